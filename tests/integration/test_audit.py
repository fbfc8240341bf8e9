"""The audit finds nothing in a book that is right, and names each kind of error that is planted in a copy of it."""

from __future__ import annotations

import ast
import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest

import accrual.audit
from accrual.audit import Audit, AuditReport, Finding, propose
from accrual.audit.correct import REMEDIES
from accrual.book import (
    Connection,
    adjust,
    approve,
    confirm,
    connect,
    expire,
    rebuild,
    release,
    send_outbox,
    settle,
    slow,
    waiting_adjustments,
)
from accrual.errors import UsageError
from accrual.events import encode_compact, validate
from accrual.rulebook import day_number
from accrual.settings import Settings
from accrual.stream import secret_check
from audits import changed, found, triggers_off
from books import BOOK_RULEBOOK, Partition, at, facts, ingest, order, redeem
from servers import Server
from workers import SECRET, command

DAY = day_number(date(2026, 11, 10))


def refund(number: int, of: int, member: str, amount: int) -> dict[str, Any]:
    event = {"id": f"r{number}", "kind": "order_refunded", "member": member, "ts": at(1, number), "amount": amount}
    return event | {"order": f"o{of}"}


def history(server: Server, connection: Connection) -> Partition:
    """Make a book in which everything has happened once."""
    partition = Partition(server.client())
    partition.send(*(order(number, "m1", device="d1", phone="p1") for number in range(1, 9)))
    partition.send(
        *(order(number, "m2", 20_000) for number in range(10, 13)), order(13, "会员\0", 700), order(15, "m6")
    )
    partition.send(
        {"id": "c1", "kind": "checkin", "member": "m2", "ts": at()},
        {"id": "x", "kind": "nonsense", "member": "m", "ts": at()},
    )
    partition.send({"id": "g1", "kind": "group_opened", "member": "m2", "ts": at()})
    partition.send(
        refund(1, 10, "m2", 5000), refund(2, 10, "m2", 15_000), refund(3, 11, "m2", 90_000), refund(4, 99, "m2", 1)
    )
    partition.send(order(20, "m3", 999, ts=at(0, 300), at=at(4)), order(21, "m3", 90_000_00, ts=at(0, 301), at=at(4)))
    ingest(connection, partition)
    slow(connection, partition.rulebook, refund_wait_hours=0)
    settle(connection, partition.rulebook, DAY)
    partition.send(refund(5, 12, "m2", 1000), order(22, "m3", 777, ts=at(0, 302), at=at(5)))
    partition.send({"id": "f1", "kind": "member_frozen", "member": "m5", "ts": at(5)}, order(23, "m5", day=5))
    ingest(connection, partition)
    slow(connection, partition.rulebook, refund_wait_hours=0)
    release(connection, "m1", reason="checked", by="alice")
    confirm(connection, "m3", reason="abuse", by="alice", claw_back=(DAY, DAY))
    confirm(connection, "m5", reason="abuse", by="alice")
    redeem(connection, "m6", 4)
    adjust(connection, "m2", -1000, reason="taken", note="", by="alice", approval_points=10_000)
    adjust(connection, "m2", 77, reason="given", note="", by="alice", approval_points=10_000)
    adjust(connection, "m4", 5, reason="given", note="", by="alice", approval_points=10_000)
    expire(connection, DAY + 365)
    send_outbox(connection, server.client())
    return partition


def audit(server: Server, url: str, archive: str = "", *, complete: bool = False) -> tuple[list[Finding], AuditReport]:
    report = AuditReport()
    settings = Settings(redis=server.url, database=url, secret=SECRET.key.hex(), archive=archive)
    return list(Audit(settings=settings, workers=1, complete=complete).run(report)), report


@pytest.fixture
def planted(valkey: Server, book: str) -> tuple[Server, str, Partition]:
    """A book that is right, and its database's URL; its triggers are off, so that errors can be planted."""
    with connect(book) as connection:
        partition = history(valkey, connection)
        triggers_off(connection)
    return valkey, book, partition


def test_a_book_that_is_right(planted: tuple[Server, str, Partition]) -> None:
    server, url, _ = planted
    findings, report = audit(server, url)
    assert [finding.line() for finding in findings] == []
    assert report.notes == []
    assert report.checks > 15


AGAIN = (
    "INSERT INTO book.postings SELECT nextval('book.numbers'), action, kind, member, from_account, to_account, points, "
    "day, lot_days, lot_points, lot_expires_on, partition_id, seq, late, cause_seq FROM book.postings WHERE number = "
)
FIRST = "(SELECT min(number) FROM book.postings WHERE kind = '{}')"

# What is planted, and the checks that must name it: exactly these.
ERRORS = {
    "a balance": (
        "UPDATE book.balances SET available = available + 7 WHERE member = 'm1'",
        {"balances", "available"},
    ),
    "a lot": (
        "UPDATE book.lots SET points = points + 3 WHERE (member, day) = ('m2', '2026-11-10')",
        {"lots", "available"},
    ),
    "when a lot expires": (
        "UPDATE book.lots SET expires_on = expires_on + 1 WHERE (member, day) = ('m2', '2026-11-10')",
        {"lots"},
    ),
    "when a lot expires, and its postings with it": (
        (
            "WITH l AS (UPDATE book.lots SET expires_on = '2030-01-01' WHERE (member, day) = ('m2', '2026-11-10')) "
            "UPDATE book.postings SET lot_expires_on = '2030-01-01' "
            "WHERE (member, day, to_account) = ('m2', '2026-11-10', 'available')"
        ),
        {"lot_dates"},
    ),
    "points of an entry": (
        "UPDATE book.entries SET points = points + 1 WHERE event = 'e13'",
        {"rows", "balances", "settlements"},
    ),
    "the member of an entry": (
        "UPDATE book.entries SET member = 'm9' WHERE event = 'e13'",
        {"rows", "identities", "balances", "settlements"},
    ),
    "evidence of an entry": ("UPDATE book.entries SET evidence = NULL WHERE event = 'e8'", {"rows"}),
    "an entry that is gone": (
        "DELETE FROM book.entries WHERE event = 'c1'",
        {"rows", "entries", "identities", "balances", "settlements"},
    ),
    "an entry twice": (
        (
            "INSERT INTO book.entries SELECT day, partition_id, seq + 1000, late, number, rulebook, stream_id, item, "
            "ts_ms, event, kind, member, outcome, cause, frozen, amount_fen, order_id, base, uncapped, points "
            "FROM book.entries WHERE event = 'e13'"
        ),
        {"identities", "entries", "days", "balances", "settlements"},
    ),
    "an entry in the place of another": (
        "UPDATE book.entries SET seq = 1000 WHERE event = 'e13'",
        {"rows", "identities", "days"},
    ),
    "a digest": ("UPDATE book.batches SET digest = sha256('x') WHERE batch = 3", {"chain", "batches"}),
    "counts of a batch": (
        "UPDATE book.batches SET events = events + 1, duplicates = duplicates + 1 WHERE batch = 3",
        {"chain"},
    ),
    "the position": ("UPDATE book.partitions SET through = '1-1'", {"batches"}),
    "an identity": ("UPDATE book.identities SET seq = 1 WHERE event = 'e13'", {"identities"}),
    "a posting's points": (
        f"UPDATE book.postings SET points = points + 1 WHERE number = {FIRST.format('expire')}",
        {"postings", "balances"},
    ),
    "a posting's accounts": (
        "UPDATE book.postings SET from_account = 'held', lot_days = NULL, lot_points = NULL WHERE number = "
        + FIRST.format("expire"),
        {"postings", "balances", "lots", "holds"},
    ),
    "a settlement twice": (AGAIN + FIRST.format("settle"), {"settlements", "balances", "lots"}),
    "a release twice": (AGAIN + FIRST.format("release"), {"holds", "balances", "lots"}),
    "a confirmation twice": (AGAIN + FIRST.format("confirm"), {"holds", "reversals", "balances"}),
    "a confirmation of more": (
        f"UPDATE book.postings SET points = 5000 WHERE number = {FIRST.format('confirm')}",
        {"holds", "reversals", "balances"},
    ),
    "a clawback twice": (
        AGAIN + FIRST.format("clawback"),
        {"reversals", "balances", "lots", "expiry"},
    ),
    "a release of another member's points": (
        f"UPDATE book.postings SET member = 'm2' WHERE number = {FIRST.format('release')}",
        {"holds", "actions", "balances", "lots", "expiry"},
    ),
    "a posting that its action does not make": (
        "UPDATE book.actions SET kind = 'release' WHERE kind = 'settle'",
        {"postings", "actions"},
    ),
    "an expiry twice": (AGAIN + FIRST.format("expire"), {"expiry", "balances", "lots"}),
    "a redemption twice": (AGAIN + FIRST.format("redeem"), {"expiry", "balances", "lots"}),
    "a redemption of more than there is": (
        f"UPDATE book.postings SET points = 11, lot_points = ARRAY[11] WHERE number = {FIRST.format('redeem')}",
        {"expiry", "balances", "lots"},
    ),
    "an expiry before its time": (
        "UPDATE book.actions SET details = '{\"day\": \"2027-11-01\"}' WHERE kind = 'expire'",
        {"expiry"},
    ),
    "an expiry of no day": ("UPDATE book.actions SET details = '{}' WHERE kind = 'expire'", {"expiry"}),
    "a refund of more": (
        "UPDATE book.refunds SET amount_fen = 100000 WHERE seq = (SELECT min(seq) FROM book.refunds)",
        {"refunds"},
    ),
    "a refund twice": (AGAIN + FIRST.format("refund"), {"refunds", "reversals", "balances", "settlements"}),
    "a refund of nothing": (
        "UPDATE book.refunds SET reversed = 0 WHERE seq = (SELECT max(seq) FROM book.refunds)",
        {"refunds"},
    ),
    "a reversal without a refund": (
        "UPDATE book.postings SET cause_seq = 1 WHERE number = " + FIRST.format("refund"),
        {"reversals", "refunds"},
    ),
    "a clawback of more": (
        f"UPDATE book.postings SET points = 5000, lot_points = ARRAY[5000] WHERE number = {FIRST.format('clawback')}",
        {"reversals", "balances", "lots", "expiry"},
    ),
    "a deferred event that nobody dealt with": (
        "DELETE FROM book.resolutions WHERE result = 'exception'",
        {"deferred", "identities"},
    ),
    "a duplicate that is none": (
        "UPDATE book.resolutions SET result = 'duplicate' WHERE result = 'exception'",
        {"deferred", "identities"},
    ),
    "a question that nobody was asked": (
        "DELETE FROM book.exceptions WHERE kind = 'refund_exceeds_order'",
        {"deferred"},
    ),
    "points of a late entry": (
        "UPDATE book.entries SET points = 8 WHERE event = 'e20'",
        {"late", "balances", "settlements", "reversals"},
    ),
    "base of a late entry": ("UPDATE book.entries SET base = 8 WHERE event = 'e20'", {"late"}),
    "the clamp of a late entry": (
        "UPDATE book.entries SET points = uncapped, evidence = NULL WHERE event = 'e21'",
        {"late", "caps", "balances", "settlements"},
    ),
    "a late entry from nowhere": ("DELETE FROM book.deferred WHERE event = 'e20'", {"deferred", "entries", "rows"}),
    "an adjustment": ("UPDATE book.adjustments SET points = 78 WHERE points = 77", {"adjustments"}),
    "more than a day's cap": (
        "UPDATE book.entries SET points = 2000 WHERE event = 'e12'",
        {"caps", "rows", "balances", "settlements", "refunds"},
    ),
    "more often than a day allows": (
        "UPDATE book.entries SET kind = 'checkin' WHERE event IN ('e10', 'e11')",
        {"caps", "rows", "identities"},
    ),
    "more than once in a life": ("UPDATE book.entries SET kind = 'group_opened' WHERE event = 'c1'", {"once", "rows"}),
}


def test_errors_that_are_planted(planted: tuple[Server, str, Partition]) -> None:
    server, url, _ = planted
    named = {}
    with connect(url) as connection:
        for what, (statement, _) in ERRORS.items():
            with connection.transaction(force_rollback=True):
                assert connection.execute(statement).rowcount >= 1, what
                named[what] = {finding.check for finding in found(server, connection)}
    assert named == {what: checks for what, (_, checks) in ERRORS.items()}


@pytest.mark.parametrize(
    "what",
    [
        "a settlement twice",
        "a release twice",
        "a confirmation twice",
        "a clawback twice",
        "a redemption twice",
        "a refund twice",
        "an expiry twice",
        "an expiry before its time",
    ],
)
def test_a_posting_that_should_not_have_been_is_undone(planted: tuple[Server, str, Partition], what: str) -> None:
    server, url, _ = planted
    with connect(url) as connection:
        before = facts(connection)["balances"]
        connection.execute(ERRORS[what][0])
        found = (
            "max(number) FROM book.postings"
            if what.endswith("twice")
            else "number FROM book.postings WHERE kind = 'expire'"
        )
        wrong = {number for (number,) in connection.execute(f"SELECT {found}")}
        findings, _ = audit(server, url)
        proposed = [line for line in propose(connection, findings, by="audit") if "adjustment" in line]
        assert {(line["adjustment"], line["corrects"]) for line in proposed} == {
            (f"audit-undo-{number}", number) for number in wrong
        }
        # Proposed again, they are the same ones.
        assert [line for line in propose(connection, findings, by="audit") if "adjustment" in line] == proposed
        waiting = waiting_adjustments(connection)
        assert {one.corrects for one in waiting} == wrong
        for one in waiting:
            assert approve(connection, one.adjustment, by="alice").state == "posted"
        list(rebuild(connection))
        if what.endswith("twice"):
            assert facts(connection)["balances"] == before
    findings, report = audit(server, url)
    assert [finding.line() for finding in findings] == []
    assert report.put_right == 0


def test_every_finding_has_a_remedy(planted: tuple[Server, str, Partition]) -> None:
    server, url, _ = planted
    assert set(REMEDIES) >= set().union(*(checks for _, checks in ERRORS.values()))
    with connect(url) as connection:
        connection.execute(ERRORS["a balance"][0])
        findings, _ = audit(server, url)
        lines = list(propose(connection, findings, by="audit"))
        assert [(line["check"], line["member"], line["remedy"]) for line in lines] == [
            (finding.check, "m1", "accrual book rebuild") for finding in findings
        ]
        assert waiting_adjustments(connection) == []


def test_another_secret_than_the_partitions(planted: tuple[Server, str, Partition]) -> None:
    server, url, partition = planted
    server.client().hset(partition.keys.checkpoint, "secret_check", secret_check(SECRET))
    findings, _ = audit(server, url)
    assert findings == []
    settings = Settings(redis=server.url, database=url)
    with pytest.raises(UsageError, match="secret: partition p was started with another one"):
        list(Audit(settings=settings).run(AuditReport()))


def test_dead_letters_that_are_gone(planted: tuple[Server, str, Partition]) -> None:
    server, url, partition = planted
    assert server.client().xtrim(partition.keys.deadletters, maxlen=0, approximate=False) == 1
    findings, _ = audit(server, url)
    assert [(finding.check, finding.expected, finding.found) for finding in findings] == [("dead_letters", 1, 0)]


def taken_ledger(server: Server, partition: Partition) -> list[bytes]:
    """Take the whole ledger off the server."""
    client = server.client()
    batches: Any = client.xrange(partition.keys.ledger)
    client.delete(partition.keys.ledger)
    return [fields[b"batch"] for _, fields in batches]


def put_ledger(server: Server, partition: Partition, batches: list[bytes]) -> None:
    for number, data in enumerate(batches, 1):
        server.client().xadd(partition.keys.ledger, {"batch": data}, id=f"{number}-0")


def test_a_ledger_that_was_changed(planted: tuple[Server, str, Partition]) -> None:
    server, url, partition = planted
    batches = taken_ledger(server, partition)
    batches[3] = batches[3][:-1] + bytes([batches[3][-1] ^ 1])
    put_ledger(server, partition, batches)
    findings, _ = audit(server, url)
    assert [(finding.check, finding.batch) for finding in findings] == [("chain", 4)]


def test_a_ledger_that_lost_its_end(planted: tuple[Server, str, Partition]) -> None:
    server, url, partition = planted
    put_ledger(server, partition, taken_ledger(server, partition)[:-1])
    findings, _ = audit(server, url)
    assert [(finding.check, finding.detail.split(",")[0]) for finding in findings] == [
        ("chain", f"the ledger ends at batch {partition.link.batch - 1}")
    ]


def test_a_server_that_came_back_with_an_earlier_state(valkey: Server, book: str) -> None:
    client = valkey.client()
    partition = Partition(client)
    partition.send(order(1, "m1"))
    checkpoint: Any = client.hgetall(partition.keys.checkpoint)
    partition.send(order(2, "m1"))
    with connect(book) as connection:
        ingest(connection, partition)
    client.hset(partition.keys.checkpoint, mapping=checkpoint)
    put_ledger(valkey, partition, taken_ledger(valkey, partition)[:-1])
    findings, _ = audit(valkey, book)
    assert [(finding.check, finding.expected, finding.found) for finding in findings] == [("chain", 3, 2)]


def test_a_batch_that_is_missing(planted: tuple[Server, str, Partition]) -> None:
    server, url, partition = planted
    assert server.client().xdel(partition.keys.ledger, "4-0") == 1
    findings, _ = audit(server, url)
    assert [(finding.check, finding.batch) for finding in findings] == [("chain", 4)]


def test_it_shares_no_code_with_what_it_checks() -> None:
    folder = Path(accrual.audit.__file__).parent
    imported = {
        (file.stem, node.module)
        for file in folder.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module is not None
    }
    assert {name for _, name in imported if name.startswith("accrual.book")} == {
        "accrual.book.database",
        "accrual.book.texts",
    }
    # What decides late events in the book has no part in checking them; the reference engine decides ledgers alone.
    engine = {(file, name) for file, name in imported if name.startswith("accrual.engine")}
    assert {file for file, _ in engine} == {"attributes", "decisions", "standing"}
    assert "accrual.engine.late" not in {name for _, name in engine}


def test_a_ledger_that_comes_out_differently(valkey: Server, book: str) -> None:
    client = valkey.client()
    partition = Partition(client)
    partition.send(order(1, "m1"), order(2, "m1", 5000), order(3, "m2"))
    entries: Any = client.xrange(partition.keys.events)
    client.delete(partition.keys.events)
    for entry_id, fields in entries:
        changed = encode_compact(validate(order(2, "m1", 3000))) if fields == entries[1][1] else fields[b"e"]
        client.xadd(partition.keys.events, {"e": changed}, id=entry_id)
    with connect(book) as connection:
        ingest(connection, partition)
        findings, _ = audit(valkey, book)
        assert [(finding.check, finding.batch, finding.seq, finding.member) for finding in findings] == [
            ("decisions", 2, 2, "m1")
        ]
        assert (findings[0].expected["points"], findings[0].found["points"]) == (30, 50)
        for _ in range(2):
            assert [line["points"] for line in propose(connection, findings, by="audit")] == [-20]
        (waiting,) = waiting_adjustments(connection)
        assert (waiting.adjustment, waiting.member, waiting.points, waiting.state) == (
            "audit-p-2",
            "m1",
            -20,
            "waiting",
        )
        assert approve(connection, "audit-p-2", by="alice").state == "posted"
        # From then on it is no finding any more, unless something else is wrong with the entry.
        settled, report = audit(valkey, book)
        assert (settled, report.findings, report.put_right) == ([], 0, 1)


def test_events_that_have_left_the_stream_are_said_not_to_be_checked(valkey: Server, book: str) -> None:
    client = valkey.client()
    partition = Partition(client)
    partition.send(order(1, "m1"))
    partition.send(order(2, "m1"))
    client.xtrim(partition.keys.events, maxlen=1, approximate=False)
    with connect(book) as connection:
        ingest(connection, partition)
    findings, report = audit(valkey, book)
    assert findings == []
    not_audited, _ = audit(valkey, book, complete=True)
    assert [(finding.check, finding.detail) for finding in not_audited] == [("not_audited", report.notes[0])]
    assert report.notes == ["partition p: not decided again from batch 2 on: of its 1 events 0 are still there"]


def test_events_that_have_left_the_stream_are_read_from_the_archive(valkey: Server, book: str, tmp_path: Path) -> None:
    client = valkey.client()
    partition = Partition(client)
    partition.send(order(1, "m1"))
    partition.send(order(2, "m1"))
    archived = command(
        "archive", "--redis", valkey.url, "--partition", "p", "--archive", tmp_path / "archive", "--drain"
    )
    assert archived.returncode == 0, archived.stderr
    client.xtrim(partition.keys.events, maxlen=1, approximate=False)
    with connect(book) as connection:
        ingest(connection, partition)
    findings, report = audit(valkey, book, str(tmp_path / "archive"))
    assert (findings, report.notes) == ([], [])


def test_a_book_of_two_partitions(valkey: Server, book: str, tmp_path: Path) -> None:
    """What is wrong in one of them is named with it, and not seen where only the other one is audited."""
    partitions = [Partition(valkey.client(), name) for name in ("p", "q")]
    for number, partition in enumerate(partitions):
        own = [order(number * 10 + day, f"m{number}", day=day, device=f"d{day % 2}") for day in range(6)]
        partition.send(*own[:3])
        partition.send(*own[3:], {"id": "shared", "kind": "checkin", "member": f"m{number}", "ts": at(5, 10)})
        partition.send(refund(number, number * 10, f"m{number}", 500) | {"ts": at(6)})
    with connect(book) as connection:
        ingest(connection, *partitions)
        slow(connection, partitions[0].rulebook, refund_wait_hours=0)
        settle(connection, partitions[0].rulebook, DAY)
        # The other partition's is the one that the book does not have.
        rows = connection.execute("SELECT partition_id, seq FROM book.exceptions WHERE kind = 'id_taken'").fetchall()
        assert rows == [(2, 7)]

    def audited() -> list[tuple[str, str | None, int | None]]:
        settings = Settings(redis=valkey.url, database=book, secret=SECRET.key.hex())
        report = AuditReport()
        findings = list(Audit(settings=settings, workers=2).run(report))
        assert report.notes == []
        return sorted((finding.check, finding.partition, finding.seq) for finding in findings)

    assert audited() == []
    changed(partitions[1], {"e14": order(14, "m1", 3000, day=4)})
    with connect(book) as connection:
        triggers_off(connection)
        connection.execute("UPDATE book.entries SET base = 11 WHERE (partition_id, seq) = (2, 2)")
    assert audited() == [("decisions", "q", 5), ("rows", "q", 2)]
    rulebook = tmp_path / "rulebook.toml"
    rulebook.write_text(BOOK_RULEBOOK, encoding="utf-8")
    flags = ("--rulebook", str(rulebook), "--redis", valkey.url, "--database", book)
    done = command("audit", *flags, "--partition", "p", variables={"ACCRUAL_SECRET": SECRET.key.hex()})
    assert (done.returncode, done.stdout) == (0, b""), done.stdout + done.stderr


def test_the_command(planted: tuple[Server, str, Partition], tmp_path: Path) -> None:
    server, url, _ = planted
    rulebook = tmp_path / "rulebook.toml"
    rulebook.write_text(BOOK_RULEBOOK, encoding="utf-8")
    flags = ("audit", "--rulebook", str(rulebook), "--redis", server.url, "--database", url)
    variables = {"ACCRUAL_SECRET": SECRET.key.hex()}
    done = command(*flags, variables=variables)
    assert (done.returncode, done.stdout) == (0, b""), done.stdout + done.stderr
    with connect(url) as connection:
        connection.execute("UPDATE book.balances SET pending = pending + 1 WHERE member = 'm4'")
    done = command(*flags, variables=variables)
    assert done.returncode == 1
    (line,) = map(json.loads, done.stdout.splitlines())
    assert (line["check"], line["member"]) == ("balances", "m4")
    assert b"1 findings" in done.stderr
