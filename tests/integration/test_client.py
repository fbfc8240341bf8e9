"""The producers on real servers: everything arrives, whatever happens to the server, and nothing is lost in silence."""

from __future__ import annotations

import asyncio
import os
import random
import re
import shlex
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio

from accrual.client import AsyncProducer, Delivery, Options, Producer, Receipt
from accrual.client.link import Server as Place
from accrual.errors import DeliveryError, InvalidEvent, UsageError
from accrual.events import Event, decode_compact, encode_compact, split_batch
from servers import Server, ServerFactory

pytestmark = pytest.mark.both_servers

DOCUMENT = (Path(__file__).parents[2] / "docs" / "PROTOCOL.md").read_text(encoding="utf-8")
KEY = "accrual:{p}:events"
QUICK: dict[str, Any] = {"backoff_ms": 10, "backoff_limit_ms": 50, "linger_ms": 1}
ON_DISK = {"appendonly": "yes", "appendfsync": "always"}
NOBODY = "redis://127.0.0.1:1"


def event(name: object, member: str = "m") -> Event:
    return Event(id=f"e-{name}", kind="checkin", member=member, ts=1794715201000)


def stream(server: Server, key: str = KEY) -> list[tuple[str, dict[bytes, bytes]]]:
    """Return what is on a stream: each entry's ID and fields."""
    found: Any = server.client().xrange(key)
    return [(stream_id.decode(), fields) for stream_id, fields in found]


def entries(server: Server) -> list[tuple[str, list[Event]]]:
    """Return what is on the stream: each entry's ID and events."""
    found = []
    for stream_id, fields in stream(server):
        ((name, value),) = fields.items()
        items = [value] if name == b"e" else split_batch(value)
        found.append((stream_id, [decode_compact(item) for item in items]))
    return found


def events(server: Server) -> list[Event]:
    return [each for _, items in entries(server) for each in items]


def receipts(server: Server) -> dict[str, list[Receipt]]:
    """Return where on the stream each event id is."""
    found: dict[str, list[Receipt]] = {}
    for stream_id, items in entries(server):
        for index, each in enumerate(items):
            found.setdefault(each.id, []).append(Receipt(stream_id, index))
    return found


def within(seconds: float, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------- what arrives


def test_every_event_arrives_once_and_in_order(server: Server) -> None:
    sent = [event(number) for number in range(3000)]

    async def main() -> list[Receipt]:
        async with AsyncProducer(server.url, "p", Options(batch_events=64)) as producer:
            deliveries = [await producer.send(each) for each in sent]
            return [await delivery for delivery in deliveries]

    told = asyncio.run(main())
    assert events(server) == sent
    found = receipts(server)
    assert [[receipt] for receipt in told] == [found[each.id] for each in sent]


def test_threads_share_a_producer(server: Server) -> None:
    with Producer(server.url, "p", Options(batch_events=100)) as producer:

        def work(thread: int) -> list[tuple[str, Delivery]]:
            return [(f"e-{thread}-{n}", producer.send(event(f"{thread}-{n}", f"m{thread}"))) for n in range(500)]

        with ThreadPoolExecutor(8) as threads:
            sent = [pair for pairs in threads.map(work, range(8)) for pair in pairs]
        told = {event_id: [delivery.result(10)] for event_id, delivery in sent}
    assert told == receipts(server)
    for thread in range(8):
        ids = [each.id for each in events(server) if each.member == f"m{thread}"]
        assert ids == [f"e-{thread}-{n}" for n in range(500)]


def test_a_lone_event_is_not_a_batch(server: Server) -> None:
    with Producer(server.url, "p") as producer:
        receipt = producer.deliver({"id": "x", "kind": "checkin", "member": "m", "ts": 5, "city": "上海"})
    ((stream_id, fields),) = stream(server)
    assert fields == {b"e": encode_compact(Event(id="x", kind="checkin", member="m", ts=5, city="上海"))}
    assert receipt == Receipt(stream_id, 0)


def test_an_invalid_mapping_does_not_get_past_send(server: Server) -> None:
    with Producer(server.url, "p") as producer:
        with pytest.raises(InvalidEvent, match="ts: missing"):
            producer.send({"id": "x", "kind": "checkin", "member": "m"})
        producer.deliver(event("good"))
    assert [each.id for each in events(server)] == ["e-good"]


def test_flush_sends_what_lingers(server: Server) -> None:
    options = Options(linger_ms=60_000)

    async def main() -> None:
        async with AsyncProducer(server.url, "p", options) as producer:
            delivery = await producer.send(event("async"))
            await producer.flush(10)
            assert delivery.done()
            assert producer.waiting_events == 0

    asyncio.run(main())
    with Producer(server.url, "p", options) as producer:
        sent = producer.send(event("sync"))
        with pytest.raises(TimeoutError):
            sent.result(0.01)
        producer.flush(10)
        assert sent.done()
        assert producer.waiting_events == 0


def test_a_delivery_can_be_a_real_future(server: Server) -> None:
    with Producer(server.url, "p") as producer:
        futures = [producer.send(event(number)).future() for number in range(5)]
        done, _ = wait(futures, timeout=10)
        assert len(done) == 5

        async def main() -> list[Receipt]:
            return list(await asyncio.gather(*map(asyncio.wrap_future, futures)))

        assert {receipt.index for receipt in asyncio.run(main())} <= set(range(5))


# ----------------------------------------------------------------------------------------- how it connects


def test_it_connects_by_unix_socket_by_client_and_by_function(server: Server) -> None:
    def client() -> redis.asyncio.Redis:
        return redis.asyncio.Redis(host="127.0.0.1", port=server.port, decode_responses=True, db=0)

    async def main() -> None:
        own = client()
        places: list[Place] = [server.unix_url, own, client]
        for number, place in enumerate(places):
            async with AsyncProducer(place, "p") as producer:
                await producer.deliver(event(number))
        assert await own.ping()
        await own.aclose()

    asyncio.run(main())
    with Producer(client, "p") as producer:
        producer.deliver(event(3))
    assert [each.id for each in events(server)] == ["e-0", "e-1", "e-2", "e-3"]


def test_a_user_needs_only_what_the_document_says(server_factory: ServerFactory) -> None:
    server = server_factory("valkey", ON_DISK)
    (command,) = re.findall(r"^```sh acl\nredis-cli (.*?)\n```", DOCUMENT, re.MULTILINE | re.DOTALL)
    server.client().execute_command(*shlex.split(command.replace("{shanghai}", "{p}")))
    url = f"redis://pipeline:secret@127.0.0.1:{server.port}"
    with Producer(url, "p", Options(confirm="fsync")) as producer:
        producer.deliver(event("allowed"))
    with Producer(url, "elsewhere") as producer, pytest.raises(DeliveryError, match="NoPermission"):
        producer.deliver(event("refused"))
    assert [each.id for each in events(server)] == ["e-allowed"]


@pytest.mark.parametrize("user", ["", ":wrong@", "nobody:wrong@"])
def test_a_wrong_password_fails_fast(server_factory: ServerFactory, user: str) -> None:
    server = server_factory("valkey", {"requirepass": "right"})
    started = time.monotonic()
    with (
        Producer(f"redis://{user}127.0.0.1:{server.port}", "p") as producer,
        pytest.raises(DeliveryError, match="refused: Authentication"),
    ):
        producer.deliver(event(1))
    assert time.monotonic() - started < 5
    with Producer(f"redis://:right@127.0.0.1:{server.port}", "p") as producer:
        producer.deliver(event(1))


def test_a_key_that_is_no_stream_fails_fast_and_can_be_mended(server: Server) -> None:
    server.client().set(KEY, "no stream")
    with Producer(server.url, "p") as producer:
        with pytest.raises(DeliveryError, match="WRONGTYPE"):
            producer.deliver(event(1))
        server.client().delete(KEY)
        producer.deliver(event(1))


# ----------------------------------------------------------------------------------- what happens to servers


@pytest.mark.parametrize("confirm", ["memory", "fsync"])
def test_a_killed_server_loses_nothing(
    server_factory: ServerFactory, confirm: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server = server_factory("valkey", ON_DISK)
    options = Options(batch_events=20, confirm=confirm, waiting_events=500, **QUICK)
    sent = [event(number) for number in range(6000)]
    pauses = random.Random(7)

    def interrupt() -> None:
        for _ in range(3):
            time.sleep(pauses.uniform(0.05, 0.15))
            server.kill()
            time.sleep(pauses.uniform(0.0, 0.1))
            server.start()

    async def main() -> list[Receipt]:
        async with AsyncProducer(server.url, "p", options) as producer:
            interruptions = asyncio.create_task(asyncio.to_thread(interrupt))
            deliveries = []
            for number, each in enumerate(sent):
                deliveries.append(await producer.send(each))
                if number % 100 == 0:
                    await asyncio.sleep(0.005)
            await interruptions
            return [await delivery for delivery in deliveries]

    told = asyncio.run(main())
    assert "trying again" in caplog.text
    found = receipts(server)
    assert all(receipt in found[each.id] for each, receipt in zip(sent, told, strict=True))
    # Copies are allowed, other content is not, and the first sight of every event is in order.
    copies = events(server)
    assert list(dict.fromkeys(copies)) == sent


def test_a_full_server_is_waited_for(server: Server) -> None:
    client = server.client()
    client.config_set("maxmemory", "1")
    try:
        with Producer(server.url, "p", Options(batch_events=10, **QUICK)) as producer:
            deliveries = [producer.send(event(number)) for number in range(500)]
            time.sleep(0.2)
            assert not any(delivery.done() for delivery in deliveries)
            client.config_set("maxmemory", "0")
            for delivery in deliveries:
                delivery.result(10)
    finally:
        client.config_set("maxmemory", "0")
    assert sorted(each.id for each in events(server)) == sorted(f"e-{number}" for number in range(500))


def test_a_replica_is_waited_for_until_it_is_a_master(server_factory: ServerFactory) -> None:
    server = server_factory()
    server.client().replicaof("127.0.0.1", "1")
    with Producer(server.url, "p", Options(**QUICK)) as producer:
        delivery = producer.send(event(1))
        time.sleep(0.1)
        assert not delivery.done()
        server.client().replicaof("no", "one")
        delivery.result(10)


def test_replicas_confirm(server_factory: ServerFactory) -> None:
    master, replica = server_factory("valkey", {"repl-diskless-sync-delay": 0}), server_factory()
    options = Options(confirm="replicas", confirm_timeout_ms=50, delivery_timeout_ms=500, **QUICK)
    with Producer(master.url, "p", options) as producer:
        with pytest.raises(DeliveryError, match="no confirmation by replicas"):
            producer.deliver(event("alone"))
        assert master.client().xlen(KEY) == 1  # asked again and again, but written once
        replica.client().replicaof("127.0.0.1", str(master.port))
        within(10, lambda: master.client().info("replication")["connected_slaves"] == 1)
        within(10, lambda: replica.client().info("replication")["master_link_status"] == "up")
        receipt = producer.deliver(event("together"))
    assert receipts(replica)["e-together"] == [receipt]


def test_a_confirmation_that_the_server_cannot_give_is_said_plainly(server: Server) -> None:
    with (
        Producer(server.url, "p", Options(confirm="fsync")) as producer,
        pytest.raises(DeliveryError, match=r"took it but cannot confirm it by fsync: .*WAITAOF"),
    ):
        producer.deliver(event(1))
    assert len(events(server)) == 1


# ------------------------------------------------------------------------------------------- backpressure


def test_threads_wait_for_room(server_factory: ServerFactory) -> None:
    server = server_factory()
    most = 0
    with Producer(server.url, "p", Options(waiting_events=100, batch_events=10, **QUICK)) as producer:
        server.pause()
        for number in range(100):
            producer.send(event(number))
        with pytest.raises(DeliveryError, match=r"no room within 0.05 s: 100 events are waiting"):
            producer.send(event("refused"), timeout_s=0.05)
        with ThreadPoolExecutor(4) as threads:
            later = [threads.submit(producer.send, event(number)) for number in range(100, 400)]
            time.sleep(0.1)
            assert not any(each.done() for each in later)
            assert producer.waiting_events == 100
            server.resume()
            while not all(each.done() for each in later):
                most = max(most, producer.waiting_events)
                time.sleep(0)
    assert most <= 100
    assert {each.id for each in events(server)} == {f"e-{number}" for number in range(400)}


def test_coroutines_wait_for_room_in_their_order(server_factory: ServerFactory) -> None:
    server = server_factory()
    most = 0

    async def main() -> None:
        nonlocal most
        async with AsyncProducer(server.url, "p", Options(waiting_events=50, **QUICK)) as producer:
            server.pause()
            for number in range(50):
                _ = await producer.send(event(number))
            with pytest.raises(DeliveryError, match=r"no room within 0.05 s: 50 events are waiting"):
                _ = await producer.send(event("refused"), timeout_s=0.05)
            later = [asyncio.create_task(producer.send(event(number))) for number in range(50, 300)]
            later[30].cancel()
            server.resume()
            while not all(task.done() for task in later):
                most = max(most, producer.waiting_events)
                await asyncio.sleep(0)

    asyncio.run(main())
    assert most <= 50
    assert [each.id for each in events(server)] == [f"e-{number}" for number in range(300) if number != 80]


def test_bytes_that_wait_are_bounded_too(server_factory: ServerFactory) -> None:
    server = server_factory()
    with Producer(server.url, "p", Options(waiting_bytes=10_000, **QUICK)) as producer:
        server.pause()
        size_bytes = len(encode_compact(event(10, "m" * 60)))
        accepted = 10_000 // size_bytes
        for number in range(10, 10 + accepted):
            producer.send(event(number, "m" * 60))
        with pytest.raises(DeliveryError, match="no room"):
            producer.send(event(99, "m" * 60), timeout_s=0.05)
        server.resume()
    assert len(events(server)) == accepted


# --------------------------------------------------------------------------------------------- how it ends


def test_closing_says_how_much_an_unreachable_server_did_not_get() -> None:
    with pytest.raises(DeliveryError, match="30 events were not delivered: the producer stopped"):
        close_without_server()

    async def main() -> None:
        producer = AsyncProducer(NOBODY, "p", Options(**QUICK))
        deliveries = [await producer.send(event(number)) for number in range(10)]
        with pytest.raises(DeliveryError, match="10 events were not delivered"):
            await producer.close(0.1)
        with pytest.raises(DeliveryError, match="stopped"):
            await deliveries[3]
        with pytest.raises(DeliveryError, match="the producer is closed"):
            _ = await producer.send(event(0))
        await producer.close()

    asyncio.run(main())


def close_without_server() -> None:
    producer = Producer(NOBODY, "p", Options(**QUICK))
    deliveries = [producer.send(event(number)) for number in range(30)]
    started = time.monotonic()
    try:
        producer.close(0.1)
    finally:
        assert time.monotonic() - started < 5
        assert all(delivery.done() for delivery in deliveries)
        with pytest.raises(DeliveryError, match="the producer is closed"):
            producer.send(event(0))
        producer.close()


def test_an_unreachable_server_costs_the_delivery_timeout() -> None:
    with Producer(NOBODY, "p", Options(delivery_timeout_ms=100, **QUICK)) as producer:
        with pytest.raises(DeliveryError, match=r"did not take it within 100 ms: ConnectionError"):
            producer.deliver(event(1))
        producer.send(event(2))
        with pytest.raises(DeliveryError, match=r"1 events are still waiting after 0.01 s"):
            producer.flush(0.01)
        with pytest.raises(DeliveryError, match="1 events were not delivered"):
            producer.flush(10)


def test_closing_while_threads_send_leaves_no_event_between(server: Server) -> None:
    producer = Producer(server.url, "p", Options(waiting_events=200, batch_events=50))
    accepted: list[Delivery] = []
    started = threading.Barrier(5)

    def work(thread: int) -> None:
        started.wait()
        for number in range(100_000):
            try:
                accepted.append(producer.send(event(f"{thread}-{number}")))
            except DeliveryError as error:
                assert "closed" in str(error)  # noqa: PT017 - the loop ends here, and that is all
                return

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    started.wait()
    time.sleep(0.05)
    producer.close()
    for thread in threads:
        thread.join()
    assert len(events(server)) == len(accepted) > 0
    assert all(delivery.result(0) for delivery in accepted)


def test_a_program_that_ends_without_closing_has_sent_everything(server: Server) -> None:
    program = f"""
from accrual.client import Options, Producer
producer = Producer({server.url!r}, "p", Options(linger_ms=1000))
for number in range(1000):
    producer.send({{"id": str(number), "kind": "checkin", "member": "m", "ts": 1}})
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)
    assert [each.id for each in events(server)] == [str(number) for number in range(1000)]


def test_a_forked_child_must_make_its_own(server: Server) -> None:
    with Producer(server.url, "p", Options(linger_ms=200)) as producer:
        delivery = producer.send(event("parent"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            os._exit(_in_the_child(producer))
        assert os.waitpid(child, 0)[1] == 0
        delivery.result(10)
    assert [each.id for each in events(server)] == ["e-parent"]


def _in_the_child(producer: Producer) -> int:
    try:
        producer.send(event("child"))
    except UsageError:
        producer.close()
        return 0
    return 1


# ------------------------------------------------------------------------------------------- the document


def test_the_commands_of_the_document_can_be_run(server: Server) -> None:
    (block,) = re.findall(r"^```sh run\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)
    for line in block.splitlines():
        *sources, command = line.split(" | ")
        words: list[str | bytes] = [*shlex.split(command)]
        assert words.pop(0) == "redis-cli"
        if sources:
            # redis-cli -x takes its last argument from what the pipe brings it.
            assert words.pop(0) == "-x"
            assert sources[1] == "xxd -r -p"
            words.append(bytes.fromhex(sources[0].removeprefix("echo ")))
        server.client().execute_command(*words)
    found = stream(server, "accrual:{shanghai}:events")
    assert [list(fields) for _, fields in found] == [[b"j"], [b"e"], [b"j"]]


@pytest.mark.parametrize("kind", ["async", "sync"])
def test_the_programs_of_the_document_can_be_run(server: Server, kind: str) -> None:
    (source,) = re.findall(rf"^```python {kind}\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(source, names)  # noqa: S102 - it is our own document
    sent = [{"id": str(number), "kind": "checkin", "member": "m", "ts": 1} for number in range(10)]
    told = names["send"](server.url, sent)
    if kind == "async":
        told = asyncio.run(told)
    ((stream_id, _),) = stream(server, "accrual:{shanghai}:events")
    assert told == f"{stream_id} 9"
