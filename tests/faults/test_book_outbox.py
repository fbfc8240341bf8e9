"""Messages of the book are on the stream once and in order, whoever dies: the sender, or the stream server."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, LiteralString, get_args

import pytest
import redis

from accrual.book import Connection, confirm, connect, release, send_outbox
from accrual.book.outbox import NOTIFICATIONS, PAGE_MESSAGES, SENDER_LOCK, write_event
from accrual.book.posting import act
from accrual.events import decode_compact
from accrual.stream import Keys, sent_position
from books import BOOK_RULEBOOK, Partition, at, ingest
from cutting import Cut, CuttingProxy, Where
from servers import Server, ServerFactory
from workers import ROOT, WorkerProcess, environment, ledger_rows, wait_until

KEYS: Final = Keys("p")
REVIEW: Final = ("--reason", "checked", "--by", "alice")

# What a sender asks of the server, in this order: where it has come to (twice), the time, the end of the stream, and to
# append. A script that the server does not know is loaded in between.
STEPS: Final = (
    Cut("HGET", 1, "before"),
    Cut("HGET", 2, "answered"),
    Cut("TIME", 1, "before"),
    Cut("XREVRANGE", 1, "answered"),
    Cut("SCRIPT LOAD", 1, "executed"),
    *(Cut("script", number, where) for number in (1, 2) for where in get_args(Where)),
    *(Cut("HGET", 3, where) for where in get_args(Where)),
)


def events_of(client: redis.Redis) -> list[tuple[str, str, str]]:
    """Return the id, kind and member of the book's events on the stream."""
    entries: Any = client.xrange(KEYS.events)
    events = [decode_compact(fields[b"e"]) for _, fields in entries]
    return [(event.id, event.kind, event.member) for event in events if event.id.startswith("book-")]


def notes_of(client: redis.Redis) -> list[int]:
    entries: Any = client.xrange(KEYS.notifications)
    return [json.loads(fields[b"n"])["number"] for _, fields in entries]


def written(connection: Connection) -> list[tuple[str, str, str]]:
    """Return the same of the events in the outbox."""
    rows = connection.execute("SELECT value FROM book.outbox WHERE stream = 'events' ORDER BY message").fetchall()
    events = [json.loads(value) for (value,) in rows]
    return [(event["id"], event["kind"], event["member"]) for event in events]


def write_notes(connection: Connection, first: int, last: int) -> None:
    """Write numbered notifications into the outbox."""
    with connection.transaction(), connection.cursor() as cursor:
        action = act(cursor, "remind", by="test")
        for number in range(first, last):
            cursor.execute(
                "INSERT INTO book.outbox (partition_id, stream, value, action) VALUES (1, %s, %s, %s)",
                (NOTIFICATIONS, json.dumps({"number": number}).encode(), action),
            )


def write_events(connection: Connection, count: int) -> None:
    """Write so many freezes of members into the outbox."""
    with connection.transaction(), connection.cursor() as cursor:
        action = act(cursor, "test", by="test")
        for number in range(count):
            write_event(cursor, 1, {"kind": "member_frozen", "member": f"m{number}"}, action)


def known(server: Server, connection: Connection, members: int = 1) -> Partition:
    """Return a partition in which members m0 and on are frozen, with held points, and the book knows it."""
    partition = Partition(server.client())
    for number in range(members):
        member = f"m{number}"
        partition.send(
            {"id": f"f{number}", "kind": "member_frozen", "member": member, "ts": at()},
            {"id": f"e{number}", "kind": "order_paid", "member": member, "ts": at(0, 1), "amount": 1000},
        )
    ingest(connection, partition)
    return partition


@contextmanager
def reviewer(book: str, url: str, member: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``accrual release``, which sends; it is killed at the end if it has not ended before."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "accrual.cli", "release", "--database", book, "--redis", url),
            *("--member", member, *REVIEW),
        ],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def sends(connection: Connection) -> bool:
    """Tell whether somebody has the outbox."""
    rows = connection.execute("SELECT FROM pg_locks WHERE locktype = 'advisory' AND classid = %s", (SENDER_LOCK,))
    return bool(rows.fetchall())


def kill_senders(server: Server, book: str, steps: list[Cut]) -> None:
    """Let a release for each step be killed there; the next sender, at the latest, sends what it wrote, once."""
    client = server.client()
    with connect(book) as connection:
        known(server, connection, len(steps))
        for number, step in enumerate(steps):
            print(step)
            # The script is to be loaded anew.
            client.script_flush()
            with CuttingProxy(server.port, step) as proxy, reviewer(book, proxy.url, f"m{number}"):
                wait_until(proxy.reached.is_set, f"{step} is reached; seen: {proxy.seen}")
            wait_until(lambda: not sends(connection), "the database lets go of what the dead sender had")
            found, wanted = events_of(client), written(connection)
            assert len(wanted) == number + 1
            assert found == wanted[: len(found)]
            # Every other one is left for the next sender to find.
            if number % 2:
                send_outbox(connection, client)
                assert events_of(client) == wanted
        send_outbox(connection, client)
        assert events_of(client) == written(connection)
        assert [member for _, _, member in written(connection)] == [f"m{number}" for number in range(len(steps))]
        assert connection.execute("SELECT count(*) FROM book.outbox WHERE sent_at IS NULL").fetchone() == (0,)
        assert send_outbox(connection, client) == 0


def test_a_sender_is_killed_between_appending_and_marking(server: Server, book: str) -> None:
    kill_senders(server, book, [Cut("script", 2, "executed"), Cut("script", 2, "answered")])


def test_senders_are_killed(server: Server, book: str, rng: random.Random) -> None:
    kill_senders(server, book, rng.sample(STEPS, 3))


@pytest.mark.slow
def test_senders_are_killed_at_every_step(server: Server, book: str, rng: random.Random) -> None:
    kill_senders(server, book, rng.sample(STEPS, len(STEPS)))


def test_a_killed_sender_s_message_is_applied_once(valkey: Server, book: str, tmp_path: Path) -> None:
    """All the way: the worker applies the release once, and the member earns again."""
    rulebook = tmp_path / "rulebook.toml"
    rulebook.write_text(BOOK_RULEBOOK, encoding="utf-8")
    client = valkey.client()
    with connect(book) as connection:
        known(valkey, connection)
        with CuttingProxy(valkey.port, Cut("script", 2, "executed")) as proxy, reviewer(book, proxy.url, "m0"):
            wait_until(proxy.reached.is_set, "the message is appended")
        with reviewer(book, valkey.url, "m0") as process:
            said, _ = process.communicate(timeout=30)
        assert json.loads(said)["changed"] is False
        # The ledger above is that of a partition without a worker; this one decides the whole stream anew.
        client.rename(KEYS.events, Keys("q").events)
        with WorkerProcess(valkey.url, "q", rulebook, "--drain") as worker:
            assert worker.wait() == 0, worker.log
        outcomes = [(entry.kind, entry.outcome) for _, _, entry in ledger_rows(client, "q")]
        assert outcomes == [("member_frozen", "applied"), ("order_paid", "held"), ("member_released", "applied")]


def test_long_outboxes_are_sent_in_pages(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        known(valkey, connection)
        write_notes(connection, 0, PAGE_MESSAGES + 7)
        write_events(connection, PAGE_MESSAGES)
        write_notes(connection, PAGE_MESSAGES + 7, 2 * PAGE_MESSAGES)
        assert send_outbox(connection, valkey.client()) == 3 * PAGE_MESSAGES
        assert notes_of(valkey.client()) == list(range(2 * PAGE_MESSAGES))
        assert events_of(valkey.client()) == written(connection)
        assert sent_position(valkey.client(), KEYS) == 3 * PAGE_MESSAGES


def test_a_sender_that_is_told_to_stop_leaves_the_rest(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        known(valkey, connection)
        write_notes(connection, 0, 3)
        stopping = threading.Event()
        stopping.set()
        assert send_outbox(connection, valkey.client(), stopping) == 0
        assert send_outbox(connection, valkey.client()) == 3


def test_racing_senders_send_each_message_once(valkey: Server, book: str) -> None:
    """While messages are being written, by transactions that end in another order than they began in."""
    writers, each = 4, 40
    with connect(book) as connection:
        known(valkey, connection)
    finished = threading.Event()

    def write(first: int) -> None:
        with connect(book) as connection:
            for number in range(first, first + each, 2):
                write_notes(connection, number, number + 2)

    def send() -> None:
        with connect(book) as connection, valkey.client() as client:
            while not finished.is_set():
                send_outbox(connection, client)

    senders = [threading.Thread(target=send) for _ in range(4)]
    writing = [threading.Thread(target=write, args=(writer * each,)) for writer in range(writers)]
    for thread in (*senders, *writing):
        thread.start()
    for thread in writing:
        thread.join()
    finished.set()
    for thread in senders:
        thread.join()
    with connect(book) as connection:
        send_outbox(connection, valkey.client())
        notes = notes_of(valkey.client())
        assert sorted(notes) == list(range(writers * each))
        # Those of one writer come in the order in which it wrote them.
        for writer in range(writers):
            mine = [number for number in notes if number // each == writer]
            assert mine == sorted(mine)
        positions = connection.execute("SELECT position FROM book.outbox ORDER BY position").fetchall()
        assert [position for (position,) in positions] == list(range(1, writers * each + 1))


def test_a_message_whose_transaction_ends_late_is_sent_too(valkey: Server, book: str) -> None:
    """Its number is the smaller one; it may not be taken for one that was sent."""
    with connect(book) as connection, connect(book) as other:
        known(valkey, connection)
        with other.transaction():
            write_notes(other, 1, 2)
            write_notes(connection, 2, 3)
            assert send_outbox(connection, valkey.client()) == 1
        assert send_outbox(connection, valkey.client()) == 1
        assert notes_of(valkey.client()) == [2, 1]


def test_whoever_finds_the_outbox_taken_need_not_wait(valkey: Server, book: str) -> None:
    """What they have written is sent by the one who has it."""
    with connect(book) as connection, connect(book) as other:
        known(valkey, connection)
        write_notes(connection, 0, 1)
        sent: list[int] = []
        first = threading.Thread(target=lambda: sent.append(send_outbox(connection, valkey.client())))
        valkey.pause()
        first.start()
        wait_until(lambda: sends(other), "the first sender has the outbox")
        write_notes(other, 1, 2)
        assert send_outbox(other, valkey.client()) == 0
        valkey.resume()
        first.join()
        assert (sent, notes_of(valkey.client())) == ([2], [0, 1])


class AboutToLeave:
    """A connection on which ``deed`` is done just before the outbox is given free for the first time."""

    def __init__(self, connection: Connection, deed: Callable[[], None]) -> None:
        self._connection = connection
        self._deeds = [deed]

    def execute(self, query: LiteralString, parameters: Any = None) -> Any:
        if "pg_advisory_unlock" in query and self._deeds:
            self._deeds.pop()()
        return self._connection.execute(query, parameters)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


def test_a_sender_looks_again_after_it_has_let_go(valkey: Server, book: str) -> None:
    """What was written after its last look, by somebody who then found the outbox taken, is sent all the same."""
    with connect(book) as connection, connect(book) as other:
        known(valkey, connection)
        write_notes(connection, 0, 1)

        def come_too_late() -> None:
            write_notes(other, 1, 2)
            assert send_outbox(other, valkey.client()) == 0

        sender: Any = AboutToLeave(connection, come_too_late)
        assert send_outbox(sender, valkey.client()) == 2
        assert notes_of(valkey.client()) == [0, 1]


def test_what_the_server_loses_is_sent_again(server_factory: ServerFactory, book: str) -> None:
    """A server that comes back without its last seconds lacks the note of them too."""
    server = server_factory("valkey", {"appendonly": "no"})
    client = server.client()
    with connect(book) as connection:
        known(server, connection, 2)
        release(connection, "m0", reason="checked", by="alice")
        write_notes(connection, 0, 2)
        assert send_outbox(connection, client) == 3
        client.save()
        release(connection, "m1", reason="checked", by="alice")
        confirm(connection, "m0", reason="checked", by="alice")
        write_notes(connection, 2, 4)
        assert send_outbox(connection, client) == 4
        server.kill()
        server.start()
        client = server.client()
        assert (len(events_of(client)), notes_of(client)) == (1, [0, 1])
        # Although nothing new is to be sent.
        assert send_outbox(connection, client) == 4
        assert (events_of(client), notes_of(client)) == (written(connection), [0, 1, 2, 3])
        assert send_outbox(connection, client) == 0


def test_a_server_that_begins_anew_is_not_told_of_the_past(server_factory: ServerFactory, book: str) -> None:
    server = server_factory("valkey")
    client = server.client()
    with connect(book) as connection:
        known(server, connection)
        write_notes(connection, 0, 3)
        assert send_outbox(connection, client) == 3
        client.flushall()
        assert send_outbox(connection, client) == 0
        write_notes(connection, 3, 4)
        assert send_outbox(connection, client) == 1
        assert notes_of(client) == [3]
        assert sent_position(client, KEYS) == 4


def test_a_book_from_a_backup_goes_on_behind_what_was_sent(valkey: Server, book: str) -> None:
    """Positions that the server has seen are not used again; otherwise the messages would count as sent."""
    with connect(book) as connection:
        known(valkey, connection)
        write_notes(connection, 0, 2)
        send_outbox(connection, valkey.client())
        valkey.client().hset(KEYS.outbox, "sent", 40)
        write_notes(connection, 2, 4)
        assert send_outbox(connection, valkey.client()) == 2
        assert notes_of(valkey.client()) == [0, 1, 2, 3]
        assert sent_position(valkey.client(), KEYS) == 42


def test_a_server_that_refuses_gets_the_messages_later(server_factory: ServerFactory, book: str) -> None:
    server = server_factory("valkey")
    client = server.client()
    with connect(book) as connection:
        known(server, connection)
        write_notes(connection, 0, 3)
        client.config_set("maxmemory", 1)
        with pytest.raises(redis.ResponseError, match="maxmemory"):
            send_outbox(connection, client)
        client.config_set("maxmemory", 0)
        client.set(KEYS.notifications, "something else")
        with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
            send_outbox(connection, client)
        assert sent_position(client, KEYS) is None
        client.delete(KEYS.notifications)
        assert send_outbox(connection, client) == 3
        assert notes_of(client) == [0, 1, 2]
