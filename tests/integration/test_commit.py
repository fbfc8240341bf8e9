"""The scripts on real servers: what they check, and that a refusal leaves everything as it was."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest
import redis

from accrual.engine import Counts, DeadLetter, Position, RejectedItem
from accrual.errors import OwnershipLost, StateMismatch, StreamTrimmed, UsageError
from accrual.ledger import digest_of
from accrual.stream import (
    COMMIT,
    Answer,
    Checkpoint,
    CommandConnection,
    Commit,
    Held,
    Keys,
    Owned,
    Ownership,
    Refused,
    StreamServer,
    last_letter,
    offer,
    read_letters,
    redrive,
    standing,
)
from accrual.stream.server import with_fields_in_order
from servers import Server, ServerFactory, ServerKind
from workers import RULEBOOK, SECRET

pytestmark = pytest.mark.both_servers

T = TypeVar("T")

KEYS = Keys("p")
ENTRIES = 6


class Bench:
    """One owner of a partition whose stream has entries 1-0 to 6-0, and everything that a commit needs."""

    def __init__(self, server: Server) -> None:
        self.server = StreamServer(server.url)
        self.client = server.client()
        for number in range(1, ENTRIES + 1):
            self.client.xadd(KEYS.events, {"e": b"%d" % number}, id=f"{number}-0")
        self.owned, self.nonce = self.acquire()

    def acquire(self, lease_ms: int = 60_000, configured: bool = False) -> tuple[Owned | Held, str]:
        async def run() -> tuple[Owned | Held, str]:
            client = self.server.async_client()
            try:
                ownership = Ownership(client, KEYS, lease_ms)
                return await ownership.acquire(SECRET if configured else None), ownership.nonce
            finally:
                await client.aclose()

        return asyncio.run(run())

    def with_ownership(self, use: Callable[[Ownership], Coroutine[Any, Any, T]], nonce: str | None = None) -> T:
        async def run() -> T:
            client = self.server.async_client()
            try:
                ownership = Ownership(client, KEYS, 60_000)
                ownership.nonce = nonce or self.nonce
                return await use(ownership)
            finally:
                await client.aclose()

        return asyncio.run(run())

    def commit(self, *commits: Commit, nonce: str | None = None) -> list[Answer]:
        """Send commits one behind the other and return the answers."""

        async def run() -> list[Answer]:
            connection = await self.server.connect(CommandConnection)
            try:
                await connection.call("SCRIPT", "LOAD", COMMIT.text)
                for commit in commits:
                    connection.send(commit.command(KEYS, nonce or self.nonce))
                return [Answer.of(await connection.reply()) for _ in commits]
            finally:
                connection.close()

        return asyncio.run(run())

    def state(self) -> dict[str, Any]:
        """Return everything that a commit may write."""
        client = self.client
        checkpoint: Any = client.hgetall(KEYS.checkpoint)
        return {
            "checkpoint": checkpoint,
            "ledger": client.xrange(KEYS.ledger),
            "letters": client.xrange(KEYS.deadletters),
            "rulebooks": client.hgetall(KEYS.rulebooks),
        }


def batch_after(before: Checkpoint, through: int, value: bytes = b"value", letters: int = 0) -> Commit:
    """Return a commit of the entries up to ``through``-0, ``letters`` of which are dead letters."""
    entries = through - before.position[0]
    counts = Counts(stream_entries=entries, events=entries, entries=entries - letters, dead_letters=letters)
    rejected = tuple(
        RejectedItem(Position(through, 0, index), DeadLetter(None, "invalid", "why"), ((b"e", b"\xc1"),))
        for index in range(letters)
    )
    return Commit(before, before.after_entries(digest_of(value), (through, 0), counts), value, rejected)


@pytest.fixture
def bench(server: Server) -> Bench:
    return Bench(server)


def test_a_batch_its_dead_letters_and_the_checkpoint_land_together(bench: Bench) -> None:
    first = batch_after(Checkpoint(), 2, b"one")
    second = batch_after(first.after, 5, b"two", letters=2)
    answers = bench.commit(first, second)
    assert [answer.committed for answer in answers] == [True, True]
    assert (answers[-1].batch, answers[-1].digest, answers[-1].added, answers[-1].removed) == (
        2,
        digest_of(b"two"),
        ENTRIES,
        0,
    )
    state = bench.state()
    assert state["ledger"] == [(b"1-0", {b"batch": b"one"}), (b"2-0", {b"batch": b"two"})]
    assert [entry_id for entry_id, _ in state["letters"]] == [b"1-0", b"2-0"]
    assert Checkpoint.from_hash(state["checkpoint"]) == second.after


def test_a_retry_of_what_has_landed_changes_nothing(bench: Bench) -> None:
    first = batch_after(Checkpoint(), 2, b"one")
    second = batch_after(first.after, 5, b"two", letters=1)
    bench.commit(first, second)
    before = bench.state()
    answers = bench.commit(first, second)
    assert [(answer.committed, answer.batch, answer.digest) for answer in answers] == [
        (False, 2, digest_of(b"two"))
    ] * 2
    assert bench.state() == before


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch": 2},
        {"digest": bytes(range(32))},
        {"position": (1, 0)},
        {"stream_entries": 1},
        {"dead_letters": 1},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_batch_that_does_not_continue_the_checkpoint_is_refused_whole(bench: Bench, wrong: dict[str, Any]) -> None:
    bench.commit(first := batch_after(Checkpoint(), 2))
    before = bench.state()
    fields = {name: getattr(first.after, name) for name in Checkpoint.__struct_fields__} | wrong
    [answer] = bench.commit(batch_after(Checkpoint(**fields), 4, b"foreign", letters=1))
    assert (answer.committed, answer.batch, answer.digest) == (False, 1, first.after.digest)
    assert bench.state() == before


def test_a_batch_lands_only_behind_its_predecessor(bench: Bench) -> None:
    first = batch_after(Checkpoint(), 2, b"one")
    second = batch_after(first.after, 4, b"two")
    assert [answer.committed for answer in bench.commit(second, first, second)] == [False, True, True]


def test_another_owner_can_write_nothing(bench: Bench) -> None:
    before = bench.state()
    with pytest.raises(OwnershipLost):
        bench.commit(batch_after(Checkpoint(), 2), nonce="another")
    assert bench.state() == before


# What may happen to the stream after three of its six entries were consumed; IDs are 1-0 to 6-0.
LOSSES: dict[str, Callable[[redis.Redis], object]] = {
    "XTRIM MAXLEN": lambda client: client.xtrim(KEYS.events, maxlen=2, approximate=False),
    "XTRIM MINID": lambda client: client.xtrim(KEYS.events, minid="5-0", approximate=False),
    "XADD MAXLEN": lambda client: client.xadd(KEYS.events, {"e": b"7"}, id="7-0", maxlen=3, approximate=False),
    "XDEL unread": lambda client: client.xdel(KEYS.events, "4-0"),
    "XDEL read and unread": lambda client: client.xdel(KEYS.events, "1-0", "6-0"),
    "XTRIM to nothing": lambda client: client.xtrim(KEYS.events, maxlen=0, approximate=False),
    "DEL": lambda client: client.delete(KEYS.events),
    "made anew, shorter": lambda client: remake(client, 2),
    "made anew, longer": lambda client: remake(client, 9),
    "UNLINK and made anew after trimming": lambda client: remake(client, 9, trimmed=2),
}

HARMLESS: dict[str, Callable[[redis.Redis], object]] = {
    "XTRIM of what was read": lambda client: client.xtrim(KEYS.events, maxlen=3, approximate=False),
    "XTRIM of some of it": lambda client: client.xtrim(KEYS.events, minid="2-0", approximate=False),
    "XDEL of what was read": lambda client: client.xdel(KEYS.events, "2-0"),
    "XDEL of what was read last": lambda client: client.xdel(KEYS.events, "3-0"),
    "XDEL and XTRIM": lambda client: (
        client.xdel(KEYS.events, "2-0"),
        client.xtrim(KEYS.events, maxlen=3, approximate=False),
    ),
    "XADD": lambda client: client.xadd(KEYS.events, {"e": b"7"}, id="7-0"),
}


def remake(client: redis.Redis, entries: int, trimmed: int = 0) -> None:
    client.delete(KEYS.events)
    for number in range(entries):
        client.xadd(KEYS.events, {"e": b"x"}, id=f"{10 + number}-0")
    client.xtrim(KEYS.events, maxlen=entries - trimmed, approximate=False)


@pytest.mark.parametrize("loss", LOSSES)
def test_entries_that_disappeared_unread_stop_the_worker(bench: Bench, loss: str) -> None:
    bench.commit(first := batch_after(Checkpoint(), 3))
    LOSSES[loss](bench.client)
    before = bench.state()
    with pytest.raises(StreamTrimmed):
        bench.commit(batch_after(first.after, 6, b"two", letters=1))
    assert bench.state() == before
    # An idle worker commits nothing, and must notice all the same.
    with pytest.raises(StreamTrimmed):
        bench.with_ownership(lambda ownership: ownership.beat())


@pytest.mark.parametrize("change", HARMLESS)
def test_entries_that_were_read_may_go(bench: Bench, change: str) -> None:
    bench.commit(first := batch_after(Checkpoint(), 3))
    HARMLESS[change](bench.client)
    bench.with_ownership(lambda ownership: ownership.beat())
    [answer] = bench.commit(batch_after(first.after, 6, b"two"))
    assert answer.committed
    assert answer.added - answer.removed == bench.client.xlen(KEYS.events)


def test_what_was_trimmed_before_the_first_start_counts_as_unread(bench: Bench) -> None:
    bench.client.xtrim(KEYS.events, maxlen=5, approximate=False)
    with pytest.raises(StreamTrimmed, match="1 entries after 0-0"):
        bench.commit(batch_after(Checkpoint(), 6))


@pytest.mark.parametrize("through", [7, 20])
def test_a_batch_of_entries_that_the_server_does_not_have_is_refused(bench: Bench, through: int) -> None:
    """They were read before a failover, from a server that had more."""
    bench.commit(first := batch_after(Checkpoint(), 3))
    bench.client.xadd(KEYS.events, {"e": b"7"}, id="9-0")
    before = bench.state()
    with pytest.raises(StateMismatch, match=f"up to {through}-0"):
        bench.commit(batch_after(first.after, through, b"two", letters=1))
    assert bench.state() == before


def test_a_ledger_that_was_deleted_is_not_continued(bench: Bench) -> None:
    bench.commit(first := batch_after(Checkpoint(), 2))
    bench.client.delete(KEYS.ledger)
    with pytest.raises(StateMismatch, match="ledger"):
        bench.commit(batch_after(first.after, 4))
    assert not bench.client.exists(KEYS.ledger)


def test_dead_letters_that_are_ahead_are_refused_before_the_first_write(bench: Bench) -> None:
    bench.client.xadd(KEYS.deadletters, {"a": "b"}, id="1-0")
    before = bench.state()
    with pytest.raises(StateMismatch, match="dead letters"):
        bench.commit(batch_after(Checkpoint(), 2, letters=1))
    assert bench.state() == before


@pytest.mark.parametrize("key", ["events", "ledger", "deadletters", "rulebooks"])
def test_a_key_of_another_type_is_refused_before_the_first_write(bench: Bench, key: str) -> None:
    bench.client.delete(getattr(KEYS, key))
    bench.client.set(getattr(KEYS, key), "text")
    with pytest.raises(Refused, match="WRONGTYPE"):
        bench.commit(batch_after(Checkpoint(), 2, letters=1))
    checkpoint: Any = bench.client.hgetall(KEYS.checkpoint)
    assert Checkpoint.from_hash(checkpoint) == Checkpoint()
    written = [name for name in ("ledger", "deadletters") if name != key and bench.client.exists(getattr(KEYS, name))]
    assert written == []


def test_out_of_memory_refuses_the_batch_whole_and_renews_the_lease(
    server_kind: ServerKind, server_factory: ServerFactory
) -> None:
    bench = Bench(server_factory(server_kind))
    before = bench.state()
    bench.client.config_set("maxmemory", "1mb")
    with pytest.raises(Refused) as refusal:
        bench.commit(batch_after(Checkpoint(), 2, letters=1))
    assert refusal.value.code == "OOM"
    bench.with_ownership(lambda ownership: ownership.beat())
    assert bench.state() == before
    bench.client.config_set("maxmemory", "0")
    assert bench.commit(batch_after(Checkpoint(), 2, letters=1))[0].committed


def test_a_lease_keeps_others_out_until_it_runs_out_or_is_given_up(bench: Bench) -> None:
    answer, _ = bench.acquire()
    assert isinstance(answer, Held)
    assert 0 < answer.left_ms <= 60_000
    bench.with_ownership(lambda ownership: ownership.release())
    answer, nonce = bench.acquire()
    assert isinstance(answer, Owned)
    assert nonce != bench.nonce
    # The one before comes back to life.
    with pytest.raises(OwnershipLost):
        bench.with_ownership(lambda ownership: ownership.beat())
    bench.with_ownership(lambda ownership: ownership.release())
    assert bench.client.get(KEYS.lease) == nonce.encode()


def test_an_owner_whose_lease_ran_out_goes_on_if_nobody_came(bench: Bench) -> None:
    bench.client.delete(KEYS.lease)
    first = batch_after(Checkpoint(), 2)
    assert bench.commit(first)[0].committed
    bench.with_ownership(lambda ownership: ownership.beat())
    assert bench.client.get(KEYS.lease) == bench.nonce.encode()
    bench.client.delete(KEYS.lease)
    assert isinstance(bench.acquire()[0], Owned)
    with pytest.raises(OwnershipLost):
        bench.commit(batch_after(first.after, 4))


def test_the_secret_is_made_once_and_a_configured_one_is_not_stored(server: Server) -> None:
    bench = Bench(server)
    assert isinstance(bench.owned, Owned)
    bench.client.delete(KEYS.lease)
    again, _ = bench.acquire()
    assert isinstance(again, Owned)
    assert again.secret.key == bench.owned.secret.key
    bench.client.delete(KEYS.lease)
    with pytest.raises(UsageError, match="not the one"):
        bench.acquire(configured=True)
    bench.client.flushall()
    configured, _ = bench.acquire(configured=True)
    assert isinstance(configured, Owned)
    assert configured.secret.key == SECRET.key
    stored: Any = bench.client.hgetall(KEYS.checkpoint)
    assert SECRET.key.hex().encode() not in stored.values()
    bench.client.delete(KEYS.lease)
    with pytest.raises(UsageError, match="none is configured"):
        bench.acquire()
    # A refusal takes nothing.
    assert not bench.client.exists(KEYS.lease)


def test_an_adopted_rulebook_waits_no_longer(bench: Bench) -> None:
    from accrual.rulebook import parse

    rulebook = parse(RULEBOOK)
    offer(bench.client, KEYS, rulebook)
    assert bench.with_ownership(lambda ownership: ownership.beat()).pending == rulebook.digest.hex()
    after = Checkpoint().after_rulebook(digest_of(b"record"), 1, rulebook.digest)
    bench.commit(Commit(Checkpoint(), after, b"record", adopts=rulebook.digest))
    now = standing(bench.client, KEYS)
    assert (now.pending_sha256, now.checkpoint.rulebook_sha256) == ("", rulebook.digest)


ORIGINALS = {
    "bytes": ((b"e", bytes(range(256))),),
    "one name twice": ((b"e", b"1"), (b"e", b"2")),
    "names of ours": ((b"reason", b"1"), (b"stream_id", b"2"), (b"fields", b"3")),
    "an empty name": ((b"", b""),),
    "a thousand": tuple((b"%d" % number, b"x") for number in range(1000)),
    "many": tuple((b"%d" % number, b"x") for number in range(20_000)),
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_a_dead_letter_keeps_its_original_and_gives_it_back(bench: Bench, name: str) -> None:
    original = ORIGINALS[name]
    item = RejectedItem(Position(2, 0, 7), DeadLetter("事件\n1", "id_conflict", 'a "detail"'), original)
    counts = Counts(stream_entries=2, events=2, entries=1, dead_letters=1)
    before = Checkpoint()
    commit = Commit(before, before.after_entries(digest_of(b"v"), (2, 0), counts), b"v", (item,))
    assert bench.commit(commit)[0].committed
    [letter] = read_letters(bench.client, KEYS, last_letter(bench.client, KEYS))
    assert (letter.number, letter.item) == (1, item)
    if not letter.can_be_redriven:
        return
    stream_id = redrive(bench.client, KEYS, letter)
    assert stream_id is not None
    found: Any = with_fields_in_order(bench.client).xrange(KEYS.events, stream_id, stream_id)
    assert found[0][1] == [part for pair in original for part in pair]
    assert redrive(bench.client, KEYS, letter) is None
    assert bench.client.xlen(KEYS.deadletters) == 0
    assert bench.client.hget(KEYS.checkpoint, "redriven") == b"1"
