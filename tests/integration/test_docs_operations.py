"""docs/OPERATIONS.md is true: each role can do its work with the rights given there, and needs every one of them."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import redis

from accrual.client import Producer
from accrual.stream import Keys
from archives import archive_of, drain_archive
from servers import Server, ServerFactory, ServerKind
from workers import NOON_MS, RULEBOOK, SECRET, WorkerProcess, command, fill, orders, wait_until

DOCUMENT = (Path(__file__).parents[2] / "docs" / "OPERATIONS.md").read_text(encoding="utf-8")
PARTITION: Final = "city-1"
KEYS: Final = Keys(PARTITION)
ROLES: Final = ("worker", "producer", "archiver", "reader", "book", "jobs", "operator")

# What the tests themselves ask for while a role is at work, in words that no role has; and what is always allowed.
OURS: Final = {"config|resetstat", "hscan"}
ALWAYS: Final = {"auth", "hello", "client|setinfo"}


def blocks(info: str) -> list[list[str]]:
    """Return the words of each line of the code blocks whose fence says ``info``, without ``redis-cli``."""
    found = re.findall(rf"^```{info}\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)
    return [shlex.split(line)[1:] for block in found for line in block.splitlines()]


def rights_of(role: str) -> list[str]:
    """Return the rules of ``ACL SETUSER`` for a role."""
    (rules,) = (words[3:] for words in blocks("sh acl") if words[2] == role)
    return rules


def fields_under(heading: str) -> set[str]:
    """Return what the first column of the table under ``heading`` names."""
    section = DOCUMENT.split(f"\n### {heading}\n")[1].split("\n## ")[0].split("\n### ")[0]
    return set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE))


def offer(client: redis.Redis, text: str) -> None:
    """Leave a rulebook for the worker."""
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    client.hset(KEYS.rulebooks, mapping={"pending": text, "pending_sha256": sha256})


def version(number: int) -> str:
    return RULEBOOK.replace("version = 1", f"version = {number}")


class Partition:
    """A private server with the users of the page, the partition's rulebook and some events."""

    def __init__(self, server: Server, directory: Path) -> None:
        self.server = server
        self.client = server.client()
        self.rulebook = directory / "rulebook.toml"
        self.rulebook.write_text(RULEBOOK, encoding="utf-8")
        self.snapshots = directory / "snapshots"
        for role in ROLES:
            self.client.execute_command("ACL", "SETUSER", role, *rights_of(role))
        fill(self.client, PARTITION, orders(1, 200))
        fill(self.client, PARTITION, [(f"{NOON_MS + 300}-0", {"e": b"\xc1"})])

    def url(self, role: str) -> str:
        return f"redis://{role}:secret@127.0.0.1:{self.server.port}"

    def as_role(self, role: str) -> redis.Redis:
        return redis.Redis.from_url(self.url(role), protocol=2)

    def worker(self, *flags: str) -> WorkerProcess:
        return WorkerProcess(self.url("worker"), PARTITION, self.rulebook, *flags)

    def drain(self, *flags: str) -> None:
        """Let a worker of the administrator decide what is there."""
        with WorkerProcess(self.server.url, PARTITION, self.rulebook, "--drain", *flags) as worker:
            assert worker.wait() == 0, worker.log

    def run(self, role: str, *words: str | Path) -> bytes:
        """Run a command of ours as ``role`` and return its output."""
        done = command(*words, "--redis", self.url(role), "--partition", PARTITION)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    def checkpoint(self) -> dict[bytes, bytes]:
        """Return the checkpoint, read in a way that no role uses."""
        fields: Any = self.client.hscan(KEYS.checkpoint, count=1000)
        return dict(fields[1])

    def used(self, work: Callable[[], object]) -> set[str]:
        """Do ``work`` and return the names of the commands that the server has carried out meanwhile."""
        self.client.config_resetstat()
        work()
        return statistics(self) - OURS - ALWAYS


@pytest.fixture
def partition(server_kind: ServerKind, server_factory: ServerFactory, tmp_path: Path) -> Partition:
    return Partition(server_factory(server_kind), tmp_path)


def granted(role: str) -> set[str]:
    return {rule.removeprefix("+") for rule in rights_of(role) if rule.startswith("+")}


def test_a_worker_needs_just_what_it_is_given(partition: Partition) -> None:
    snapshots = ("--snapshots", str(partition.snapshots), "--snapshot-interval-s", "0", "--snapshots-kept", "1")

    def work_and_adopt() -> None:
        with partition.worker(*snapshots, "--trim-input", "--batch-entries", "20") as worker:
            wait_until(lambda: partition.checkpoint().get(b"rulebook") == b"2", "the pending rulebook is adopted")
            wait_until(lambda: partition.checkpoint().get(b"events") == b"200", "everything is committed")
            wait_until(lambda: any(partition.snapshots.glob("*")), "a snapshot is taken")
            # The trimming comes right after the snapshot.
            wait_until(lambda: "xtrim" in statistics(partition), "the input is trimmed")
            assert worker.finish() == 0, worker.log

    def stand_by_take_over_and_refuse() -> None:
        with partition.worker(*snapshots) as owner:
            wait_until(lambda: b"owner" in partition.checkpoint(), "the first owns the partition")
            first = partition.checkpoint()[b"owner"]
            with partition.worker(*snapshots) as standby:
                wait_until(lambda: "pttl" in statistics(partition), "the second stands by")
                assert owner.finish() == 0, owner.log
                wait_until(lambda: partition.checkpoint().get(b"owner", first) != first, "the second takes over")
                assert_fields("The checkpoint", partition.checkpoint(), {"redriven", "secret", "trouble"})
                wait_until(lambda: refused(partition), "the rulebook is refused")
                assert standby.finish() == 0, standby.log

    offer(partition.client, version(2))
    used = partition.used(work_and_adopt)
    offer(partition.client, "nonsense")
    used |= partition.used(stand_by_take_over_and_refuse)
    assert used == granted("worker")
    offer(partition.client, version(3))
    assert_fields("Rulebooks", partition.client.hgetall(KEYS.rulebooks), set())


def statistics(partition: Partition) -> set[str]:
    """Return the names of the commands that the server has carried out since its counts were reset."""
    found: Any = partition.client.info("commandstats")
    return {name.removeprefix("cmdstat_") for name, value in found.items() if value["calls"]}


def refused(partition: Partition) -> bool:
    fields: Any = partition.client.hscan(KEYS.rulebooks, count=1000)
    return b"refused_reason" in fields[1]


def assert_fields(heading: str, found: Any, others: set[str]) -> None:
    """Compare what is on the server with the table; ``others`` are there at other times."""
    assert {name.decode() for name in found} | others == fields_under(heading)


def test_a_producer_needs_just_what_it_is_given(partition: Partition) -> None:
    event = {"id": "x1", "kind": "checkin", "member": "m1", "ts": NOON_MS}

    def produce() -> None:
        with Producer(partition.url("producer"), PARTITION) as producer:
            assert producer.send(event).result().stream_id

    assert partition.used(produce) == granted("producer")
    client = partition.as_role("producer")
    for refused_command in (
        ("XRANGE", KEYS.events, "-", "+"),
        ("XADD", KEYS.ledger, "*", "batch", "x"),
        ("XADD", Keys("city-2").events, "*", "e", "x"),
        ("DEL", KEYS.events),
    ):
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.execute_command(*refused_command)


def test_an_archiver_needs_just_what_it_is_given(partition: Partition, tmp_path: Path) -> None:
    place = ("--archive", tmp_path / "archive")

    def archive() -> None:
        partition.run("archiver", "archive", *place, "--drain", "--archive-retention-days", "36500")
        partition.client.xtrim(KEYS.events, maxlen=0, approximate=False)
        partition.client.delete(KEYS.archive)
        # A late one asks the stream where it begins.
        partition.run("archiver", "archive", "--archive", tmp_path / "late", "--late", "--drain")
        assert b"segments: none" in partition.run("archiver", "archive", "verify", "--archive", tmp_path / "late")

    assert partition.used(archive) - {"xtrim", "del"} == granted("archiver")
    assert_fields("The archive", partition.client.hgetall(KEYS.archive), set())
    client = partition.as_role("archiver")
    for refused_command in (("XADD", KEYS.events, "*", "e", "x"), ("HSET", KEYS.checkpoint, "batch", "1")):
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.execute_command(*refused_command)


def test_a_reader_needs_just_what_it_is_given(partition: Partition, tmp_path: Path) -> None:
    partition.drain()
    drain_archive(partition.client, archive_of(tmp_path / "archive", PARTITION), PARTITION)
    replay = ("archive", "replay", "--archive", tmp_path / "archive", "--partition", PARTITION)

    def read() -> None:
        secret = {"ACCRUAL_SECRET": SECRET.key.hex()}
        done = command(*replay, "--redis", partition.url("reader"), variables=secret)
        assert done.returncode == 0, done.stderr
        assert partition.run("reader", "ledger").count(b"\n") == 199
        assert partition.run("reader", "deadletters").count(b"\n") == 1
        assert partition.run("reader", "rulebook", "show", "--text").decode() == RULEBOOK
        client = partition.as_role("reader")
        for words in blocks("sh watch"):
            assert client.execute_command(*words)

    assert partition.used(read) == granted("reader")
    client = partition.as_role("reader")
    for refused_command in (("XADD", KEYS.events, "*", "e", "x"), ("HSET", KEYS.checkpoint, "batch", "1")):
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.execute_command(*refused_command)


def test_the_book_needs_just_what_it_is_given(partition: Partition, book: str) -> None:
    update = {"id": "u1", "kind": "member_updated", "member": "m1", "ts": NOON_MS + 400, "tier": "gold"}
    fill(partition.client, PARTITION, [(f"{NOON_MS + 400}-0", {"j": json.dumps(update).encode()})])
    partition.drain()
    partition.client.config_set("appendfsync", "always")
    partition.client.config_set("appendonly", "yes")
    place = ("--rulebook", partition.rulebook, "--database", book)

    def post_and_audit() -> None:
        partition.run("book", "book", *place, "--drain")
        secret = {"ACCRUAL_SECRET": SECRET.key.hex()}
        done = command("audit", *place, "--redis", partition.url("book"), variables=secret)
        assert done.returncode == 0, (done.stdout, done.stderr)

    assert partition.used(post_and_audit) == granted("book")
    client = partition.as_role("book")
    for refused_command in (
        ("XADD", KEYS.events, "*", "e", "x"),
        ("HSET", KEYS.checkpoint, "batch", "1"),
        ("HGETALL", KEYS.rulebooks),
        ("XRANGE", Keys("city-2").ledger, "-", "+"),
    ):
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.execute_command(*refused_command)


def test_jobs_need_just_what_they_are_given(partition: Partition, book: str) -> None:
    partition.drain()
    place = ("--rulebook", partition.rulebook, "--database", book)
    partition.run("book", "book", *place, "--drain")
    member = json.loads(partition.run("reader", "ledger").splitlines()[0])["member"]
    url = ("--redis", partition.url("jobs"))

    def work() -> None:
        for words in (
            ("confirm", "--database", book, "--member", member, "--reason", "abuse", "--by", "alice"),
            ("jobs", *place, "--once"),
            ("slow", *place, "--drain"),
        ):
            done = command(*words, *url)
            assert done.returncode == 0, done.stderr.decode()

    before = partition.client.xlen(KEYS.events)
    assert partition.used(work) == granted("jobs")
    assert partition.client.xlen(KEYS.events) == before + 1
    client = partition.as_role("jobs")
    for refused_command in (
        ("XADD", KEYS.ledger, "*", "batch", "x"),
        ("HSET", KEYS.checkpoint, "batch", "1"),
        ("XRANGE", KEYS.ledger, "-", "+"),
        ("XADD", Keys("city-2").events, "*", "e", "x"),
    ):
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.execute_command(*refused_command)


def test_an_operator_needs_just_what_it_is_given(partition: Partition, tmp_path: Path) -> None:
    partition.drain()
    letters: Any = partition.client.xrange(KEYS.deadletters)
    assert_fields("Dead letters", letters[0][1], set())
    new = tmp_path / "new.toml"
    new.write_text(version(2), encoding="utf-8")
    arguments = ("rulebook", "activate", "--redis", partition.url("operator"), "--partition", PARTITION)

    def operate() -> None:
        sent = partition.run("operator", "deadletters", "--redrive", "--execute")
        assert sent.count(b"\n") == 1
        # No worker is there to adopt it, so that only the operator is counted.
        done = command(*arguments, "--timeout", "0.2", new)
        assert b"version 2 is still pending (no worker owns the partition)" in done.stderr

    assert partition.used(operate) == granted("operator")
    assert partition.checkpoint()[b"redriven"] == b"1"
    with partition.worker() as worker:
        wait_until(lambda: partition.checkpoint().get(b"rulebook") == b"2", "the rulebook is adopted")
        assert worker.finish() == 0, worker.log
    client = partition.as_role("operator")
    for refused_command in (("SET", KEYS.lease, "x"), ("XADD", KEYS.ledger, "*", "batch", "x"), ("FLUSHALL",)):
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.execute_command(*refused_command)


def test_a_secret_of_its_own_is_in_the_checkpoint(server: Server, tmp_path: Path) -> None:
    rulebook = tmp_path / "rulebook.toml"
    rulebook.write_text(RULEBOOK, encoding="utf-8")
    for name, secret, there in (("own", None, True), ("configured", SECRET, False)):
        fill(server.client(), name, orders(1, 3))
        with WorkerProcess(server.url, name, rulebook, "--drain", secret=secret) as worker:
            assert worker.wait() == 0, worker.log
        assert server.client().hexists(Keys(name).checkpoint, "secret") is there


def test_every_key_is_named() -> None:
    named = set(re.findall(r"^\| `accrual:\{P\}:(\w+)`", DOCUMENT, re.MULTILINE))
    properties = {name for name, value in vars(Keys).items() if isinstance(value, property)}
    assert named == properties
