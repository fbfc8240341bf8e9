"""Retries, order and confirmation against a scripted server: what no real one can be made to say on demand."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Callable, Coroutine
from typing import Any, Self

import hiredis
import pytest
import uvloop
from redis import exceptions
from redis.asyncio import Connection

from accrual.client import AsyncDelivery, AsyncProducer, Options
from accrual.client.link import may_pass
from accrual.client.outbox import encode
from accrual.errors import DeliveryError
from accrual.events import decode_compact, split_batch

QUICK: dict[str, Any] = {"backoff_ms": 1, "backoff_limit_ms": 5, "linger_ms": 0, "batch_events": 1}
CUT = b""  # the connection ends instead of an answer
SILENT = b"silent"  # no answer, and the connection stays
TAKEN = b"taken"  # the answer is a new ID

Answer = Callable[["ScriptedServer", list[bytes]], bytes]


class ScriptedServer:
    """Answers ``XADD``, ``WAIT`` and ``WAITAOF`` as ``answer`` says, everything else with OK.

    ``added`` has the ids of the events of every ``XADD`` received, in order, refused ones too; ``commands`` the number
    of the connection and the name of every such command.
    """

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.added: list[list[str]] = []
        self.taken: list[list[str]] = []
        self.commands: list[tuple[int, str]] = []
        self.connections = 0
        self.stillborn = 0  # how many connections end at their first command
        self._writers: list[asyncio.StreamWriter] = []
        self._handlers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in self._writers:
            writer.close()
        await asyncio.gather(*self._handlers, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._handlers.append(asyncio.create_task(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        connection = self.connections
        self._writers.append(writer)
        if connection <= self.stillborn:
            await reader.read(1)
            writer.transport.abort()
            return
        parser = hiredis.Reader()
        while data := await reader.read(1 << 16):
            parser.feed(data)
            while (command := parser.gets()) is not False:
                reply = self._reply(connection, command)
                if reply == CUT:
                    writer.close()
                    return
                writer.write(b"" if reply == SILENT else reply)

    def _reply(self, connection: int, command: list[bytes]) -> bytes:
        name = command[0].decode()
        if name not in ("XADD", "WAIT", "WAITAOF"):
            return b"+OK\r\n"
        self.commands.append((connection, name))
        ids: list[str] = []
        if name == "XADD":
            items = [command[4]] if command[3] == b"e" else split_batch(command[4])
            ids = [decode_compact(item).id for item in items]
            self.added.append(ids)
        reply = self.answer(self, command)
        if reply != TAKEN:
            return reply
        self.taken.append(ids)
        text = f"{len(self.taken)}-0"
        return f"${len(text)}\r\n{text}\r\n".encode()


def always(reply: bytes) -> Answer:
    return lambda _, __: reply


def after(*replies: bytes) -> Answer:
    """Give each of ``replies`` once, and then take everything."""
    waiting = list(replies)
    return lambda _, __: waiting.pop(0) if waiting else TAKEN


def event(number: int) -> dict[str, Any]:
    return {"id": f"e{number}", "kind": "checkin", "member": "m", "ts": 1}


def run(
    answer: Answer, scenario: Callable[[ScriptedServer, AsyncProducer], Coroutine[Any, Any, None]], **options: Any
) -> ScriptedServer:
    """Run ``scenario`` with a producer on a server that answers by ``answer``; return the server."""

    async def main() -> ScriptedServer:
        async with ScriptedServer(answer) as server:
            async with AsyncProducer(server.url, "p", Options(**(QUICK | options))) as producer:
                await scenario(server, producer)
            return server

    return asyncio.run(main())


async def send(producer: AsyncProducer, count: int) -> list[AsyncDelivery]:
    """Send ``count`` events in one turn of the event loop, so that they share a round trip."""
    placed = [producer._outbox.offer(encode(event(number))) for number in range(count)]
    return [AsyncDelivery(*place) for place in placed if place]


async def send_and_await(_: ScriptedServer, producer: AsyncProducer) -> None:
    for delivery in await send(producer, 4):
        await delivery


def first_sights(batches: list[list[str]]) -> list[str]:
    return list(dict.fromkeys(event_id for batch in batches for event_id in batch))


def test_a_lost_reply_is_answered_with_the_same_events() -> None:
    server = run(after(CUT), send_and_await)
    assert server.connections == 2
    assert first_sights(server.taken) == ["e0", "e1", "e2", "e3"]
    assert server.added[0] == server.added[1] == ["e0"]


def test_entries_after_a_lost_reply_keep_their_order() -> None:
    server = run(after(TAKEN, TAKEN, CUT), send_and_await)
    assert server.added == [["e0"], ["e1"], ["e2"], ["e0"], ["e1"], ["e2"], ["e3"]]
    assert first_sights(server.taken) == ["e0", "e1", "e2", "e3"]


@pytest.mark.parametrize(
    "refusal",
    [
        b"-OOM command not allowed when used memory > 'maxmemory'.\r\n",
        b"-MISCONF Errors writing to the AOF file: No space left on device\r\n",
        b"-NOREPLICAS Not enough good replicas to write.\r\n",
        b"-BUSY Valkey is busy running a script.\r\n",
        b"-TRYAGAIN not now\r\n",
    ],
)
def test_a_passing_refusal_is_tried_again_on_the_same_connection(refusal: bytes) -> None:
    server = run(after(refusal), send_and_await)
    assert server.connections == 1
    assert sorted(first_sights(server.taken)) == ["e0", "e1", "e2", "e3"]
    assert len(server.taken) == 4


@pytest.mark.parametrize(
    "refusal",
    [
        b"-LOADING Valkey is loading the dataset in memory\r\n",
        b"-READONLY You can't write against a read only replica.\r\n",
        b"-ERR max number of clients reached\r\n",
    ],
)
def test_some_passing_refusals_need_a_new_connection(refusal: bytes) -> None:
    server = run(after(refusal), send_and_await)
    assert server.connections == 2
    assert sorted(first_sights(server.taken)) == ["e0", "e1", "e2", "e3"]


def refusing_the_second(server: ScriptedServer, command: list[bytes]) -> bytes:
    return b"-OOM not now\r\n" if server.added.count(["e1"]) == 1 and server.added[-1] == ["e1"] else TAKEN


def test_a_refused_entry_follows_the_round_trip_that_overtook_it() -> None:
    server = run(refusing_the_second, send_and_await, in_flight=8)
    assert server.taken == [["e0"], ["e2"], ["e3"], ["e1"]]


def test_nothing_overtakes_with_one_in_flight() -> None:
    server = run(refusing_the_second, send_and_await, in_flight=1)
    assert server.taken == [["e0"], ["e1"], ["e2"], ["e3"]]


def test_a_lasting_refusal_fails_at_once_and_does_not_stop_the_rest() -> None:
    async def scenario(server: ScriptedServer, producer: AsyncProducer) -> None:
        with pytest.raises(DeliveryError, match=r"refused: .*WRONGTYPE"):
            await producer.deliver(event(0))
        await producer.deliver(event(1))

    server = run(after(b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"), scenario)
    assert server.added == [["e0"], ["e1"]]


def test_a_failure_that_nobody_awaits_is_raised_by_flush() -> None:
    async def scenario(server: ScriptedServer, producer: AsyncProducer) -> None:
        _ = await producer.send(event(0))
        with pytest.raises(DeliveryError, match="1 events were not delivered"):
            await producer.flush()
        await producer.flush()

    run(after(b"-NOPERM no\r\n"), scenario)


def test_a_failure_that_nobody_awaits_is_raised_by_leaving() -> None:
    async def scenario(server: ScriptedServer, producer: AsyncProducer) -> None:
        await send(producer, 3)

    with pytest.raises(DeliveryError, match="3 events were not delivered"):
        run(always(b"-NOPERM no\r\n"), scenario)


def test_an_error_of_the_caller_is_not_hidden_by_a_failure() -> None:
    async def scenario(server: ScriptedServer, producer: AsyncProducer) -> None:
        await send(producer, 3)
        raise KeyError("the caller's")

    with pytest.raises(KeyError, match="the caller's") as caught:
        run(always(b"-NOPERM no\r\n"), scenario)
    assert ["3 events were not delivered" in note for note in caught.value.__notes__] == [True]


def test_a_silent_server_is_given_up_and_asked_again() -> None:
    server = run(after(SILENT, SILENT, SILENT, SILENT), send_and_await, reply_timeout_ms=50)
    assert server.connections == 2
    assert first_sights(server.taken) == ["e0", "e1", "e2", "e3"]


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
def test_connections_that_die_in_their_cradle_are_tried_again(runner: Callable[[Any], None]) -> None:
    async def main() -> None:
        async with ScriptedServer(always(TAKEN)) as server:
            server.stillborn = 10
            async with AsyncProducer(server.url, "p", Options(**QUICK)) as producer:
                await producer.deliver(event(0))
            assert server.connections == 11

    runner(main())


def test_a_transport_that_closes_under_the_handshake_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    connect: Any = Connection.connect
    failures = [RuntimeError("unable to perform operation on <TCPTransport>; the handler is closed")]

    async def connect_late(connection: Connection) -> None:
        if failures:
            raise failures.pop()
        await connect(connection)

    monkeypatch.setattr(Connection, "connect", connect_late)
    server = run(always(TAKEN), one_event)
    assert (server.taken, failures) == ([["e0"]], [])


def test_the_delivery_timeout_ends_it() -> None:
    async def scenario(server: ScriptedServer, producer: AsyncProducer) -> None:
        started = time.monotonic()
        with pytest.raises(DeliveryError, match=r"within 100 ms: OutOfMemory"):
            await producer.deliver(event(0))
        assert 0.09 < time.monotonic() - started < 2

    run(always(b"-OOM not now\r\n"), scenario, delivery_timeout_ms=100)


def test_the_delivery_timeout_ends_waiting_for_a_silent_server_too() -> None:
    async def scenario(server: ScriptedServer, producer: AsyncProducer) -> None:
        started = time.monotonic()
        with pytest.raises(DeliveryError, match="no complete answer"):
            await producer.deliver(event(0))
        assert 0.09 < time.monotonic() - started < 2

    run(always(SILENT), scenario, delivery_timeout_ms=100)


def confirming(*answers: bytes) -> Answer:
    """Take every ``XADD``, and answer the confirmations by ``answers``, the last of them for ever."""
    waiting = list(answers)

    def answer(_: ScriptedServer, command: list[bytes]) -> bytes:
        if command[0] == b"XADD":
            return TAKEN
        return waiting.pop(0) if len(waiting) > 1 else waiting[0]

    return answer


def test_too_few_replicas_are_asked_again_without_writing_again() -> None:
    server = run(confirming(b":0\r\n", b":1\r\n", b":2\r\n"), one_event, confirm="replicas", replicas=2)
    assert [name for _, name in server.commands] == ["XADD", "WAIT", "WAIT", "WAIT"]
    assert server.connections == 1


def test_one_confirmation_speaks_for_a_whole_round_trip() -> None:
    server = run(confirming(b"*2\r\n:1\r\n:0\r\n"), send_and_await, confirm="fsync")
    assert [name for _, name in server.commands] == ["XADD"] * 4 + ["WAITAOF"]


def test_a_confirmation_on_a_new_connection_counts_only_with_a_new_copy() -> None:
    server = run(confirming(CUT, b":1\r\n"), one_event, confirm="replicas")
    assert server.commands == [(1, "XADD"), (1, "WAIT"), (2, "XADD"), (2, "WAIT")]


@pytest.mark.parametrize(
    "refusal",
    [
        b"-UNBLOCKED force unblock from blocking operation, instance state changed (master -> replica?)\r\n",
        b"-ERR WAIT cannot be used with replica instances.\r\n",
    ],
)
def test_a_server_that_became_a_replica_confirms_nothing_that_it_had(refusal: bytes) -> None:
    server = run(confirming(refusal, b":1\r\n"), one_event, confirm="replicas")
    assert server.commands == [(1, "XADD"), (1, "WAIT"), (2, "XADD"), (2, "WAIT")]


def test_a_confirmation_that_is_not_to_be_had_fails_and_says_what_happened() -> None:
    async def scenario(server: ScriptedServer, producer: AsyncProducer) -> None:
        with pytest.raises(DeliveryError, match=r"took it but cannot confirm it by fsync: .*unknown command"):
            await producer.deliver(event(0))

    run(confirming(b"-ERR unknown command 'WAITAOF'\r\n"), scenario, confirm="fsync")


async def one_event(_: ScriptedServer, producer: AsyncProducer) -> None:
    await producer.deliver(event(0))


def test_a_sender_that_breaks_leaves_nobody_waiting(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(server: ScriptedServer, producer: AsyncProducer) -> None:
        deliveries = await send(producer, 3)
        for delivery in deliveries:
            with pytest.raises(DeliveryError, match="stopped"):
                await delivery
        with pytest.raises(DeliveryError, match="has stopped"):
            _ = await producer.send(event(9))

    # An answer that is no ID: not a reply that any server gives, so nobody has thought of it.
    run(always(b":5\r\n"), scenario)
    assert "the producer stopped" in caplog.text


def test_a_producer_left_open_fails_what_it_had_with_its_event_loop(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> AsyncDelivery:
        producer = AsyncProducer("redis://127.0.0.1:1", "p")
        delivery = await producer.send(event(0))
        await asyncio.sleep(0)
        return delivery

    assert asyncio.run(main()).done()
    assert "1 events failed" in caplog.text


def test_a_cancelled_close_still_fails_what_waits() -> None:
    async def scenario(server: ScriptedServer, producer: AsyncProducer) -> None:
        (delivery,) = await send(producer, 1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await producer.close()
        with pytest.raises(DeliveryError, match="stopped"):
            await delivery

    run(always(SILENT), scenario)


def test_cancelling_one_who_waits_does_not_disturb_the_others() -> None:
    async def scenario(server: ScriptedServer, producer: AsyncProducer) -> None:
        first, second = await send(producer, 2)

        async def wait(delivery: Any) -> Any:
            return await delivery

        waiting = [asyncio.create_task(wait(first)) for _ in range(2)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        assert (await waiting[1]).index == 0
        assert (await second).index == 1
        assert waiting[0].cancelled()

    run(always(TAKEN), scenario, batch_events=2)


def test_trouble_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    refusal = b"-OOM not now\r\n"
    run(after(refusal, refusal, refusal), one_event)
    (record,) = caplog.records
    assert "trying again" in record.message


def _untrusted() -> Exception:
    try:
        try:
            raise ssl.SSLCertVerificationError("self-signed certificate")
        except OSError as error:
            raise exceptions.ConnectionError(str(error))  # noqa: B904 - as redis-py does it
    except exceptions.ConnectionError as error:
        return error


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (exceptions.ConnectionError("Connection closed by server."), True),
        (exceptions.TimeoutError("Timeout connecting to server"), True),
        (exceptions.BusyLoadingError("loading"), True),
        (exceptions.OutOfMemoryError("full"), True),
        (exceptions.MasterDownError("down"), True),
        (ConnectionRefusedError("refused"), True),
        (TimeoutError("no answer"), True),
        (exceptions.ResponseError("MISCONF snapshots cannot be saved"), True),
        (exceptions.ResponseError("MISCONFIGURED"), False),
        (exceptions.AuthenticationError("wrong password"), False),
        (exceptions.NoPermissionError("no"), False),
        (exceptions.ResponseError("WRONGTYPE Operation"), False),
        (exceptions.ResponseError("unknown command 'XADD'"), False),
        (_untrusted(), False),
    ],
)
def test_which_errors_may_pass(error: Exception, passes: bool) -> None:
    assert may_pass(error) is passes
