"""Findings as proposals: every wrong entry, what people made of each, and that nothing else silences a finding."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from accrual.audit import Audit, AuditReport, Finding, propose
from accrual.audit.correct import approved_points, is_put_right
from accrual.book import Connection, adjust, approve, connect, reject, undo, waiting_adjustments
from accrual.settings import Settings
from audits import Checked, changed
from books import Partition, ingest, order
from servers import Server
from workers import SECRET


def audited(server: Server, url: str, **options: Any) -> tuple[list[Finding], AuditReport]:
    report = AuditReport()
    settings = Settings(redis=server.url, database=url, secret=SECRET.key.hex())
    return list(Audit(settings=settings, workers=1, **options).run(report)), report


def test_every_wrong_entry_is_named_until_all_are_put_right(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(*(order(number, f"m{number}") for number in range(50)))
    changed(partition, {f"e{number}": order(number, f"m{number}", 500) for number in range(50)})
    with connect(book) as connection:
        ingest(connection, partition)
        findings, _ = audited(valkey, book)
        assert [finding.seq for finding in findings] == list(range(1, 51))
        # At most so many are told; the others come the next time.
        findings, report = audited(valkey, book, most_findings=30)
        assert [finding.seq for finding in findings[:30]] == list(range(1, 31))
        assert findings[30].detail == "20 more findings are not told: put these right, and the next audit tells them"
        assert report.findings == 31
        assert "adjustment" not in list(propose(connection, findings, by="audit"))[30]
        for waiting in waiting_adjustments(connection):
            approve(connection, waiting.adjustment, by="alice")
        findings, report = audited(valkey, book, most_findings=30)
        assert ([finding.seq for finding in findings], report.put_right) == (list(range(31, 51)), 30)


@pytest.fixture
def wrong(valkey: Server, book: str) -> tuple[Partition, str, Finding]:
    """A book in which m1 has 20 points too many, its URL, and the finding that says so."""
    partition = Partition(valkey.client())
    partition.send(order(1, "m1", 5000))
    changed(partition, {"e1": order(1, "m1", 3000)})
    with connect(book) as connection:
        ingest(connection, partition)
        (finding,) = Checked(valkey, connection).stretch(1, 2)
    return partition, book, finding


def proposed(connection: Connection, finding: Finding) -> dict[str, Any]:
    (line,) = propose(connection, [finding], by="audit")
    return {name: line[name] for name in ("adjustment", "points", "state", "rejected_by", "remedy") if name in line}


def test_what_became_of_a_proposal(wrong: tuple[Partition, str, Finding]) -> None:
    _, url, finding = wrong
    more = Finding(finding.check, finding.detail, "p", seq=1, member="m1", owed=-25)
    with connect(url) as connection:
        first = {"adjustment": "audit-p-1", "points": -20}
        assert proposed(connection, finding) == proposed(connection, finding) == first | {"state": "waiting"}
        # Another amount is owed by now; until the one that waits is turned down there is no second one.
        remedy = "another amount is owed by now, -25: reject this one and propose again"
        assert proposed(connection, more) == first | {"state": "waiting", "remedy": remedy}
        reject(connection, "audit-p-1", by="bob")
        assert proposed(connection, finding) == first | {"state": "rejected", "rejected_by": "bob"}
        assert waiting_adjustments(connection) == []
        second = {"adjustment": "audit-p-1#2", "points": -25, "state": "waiting"}
        assert proposed(connection, more) == second
        approve(connection, "audit-p-1#2", by="bob")
        assert proposed(connection, more) == second | {"state": "posted"}
        approved = approved_points(connection)
        assert is_put_right(more, approved)
        assert not is_put_right(finding, approved)
        # Too much was taken by now; what is left to give back has a key of its own.
        assert proposed(connection, finding) == {"adjustment": "audit-p-1#3", "points": 5, "state": "waiting"}
        approve(connection, "audit-p-1#3", by="bob")
        assert is_put_right(finding, approved_points(connection))
        # An adjustment that was undone has put nothing right.
        (number,) = connection.execute("SELECT max(number) FROM book.postings").fetchone() or (0,)
        approve(connection, undo(connection, number, reason="no", note="", by="alice").adjustment, by="bob")
        assert not is_put_right(finding, approved_points(connection))


def test_an_undoing_that_was_turned_down(wrong: tuple[Partition, str, Finding]) -> None:
    _, url, _ = wrong
    with connect(url) as connection:
        adjust(connection, "m1", 7, reason="given", note="", by="alice")
        (number,) = connection.execute("SELECT max(number) FROM book.postings").fetchone() or (0,)
        finding = Finding("expiry", "twice", member="m1", posting=number)
        (line,) = propose(connection, [finding], by="audit")
        assert (line["adjustment"], line["corrects"], line["state"]) == (f"audit-undo-{number}", number, "waiting")
        reject(connection, line["adjustment"], by="bob")
        (line,) = propose(connection, [finding], by="audit")
        assert (line["state"], line["rejected_by"]) == ("rejected", "bob")


@pytest.mark.parametrize(
    "planted",
    [
        "UPDATE book.adjustments SET member = 'm2'; UPDATE book.postings SET member = 'm2'",
        "UPDATE book.adjustments SET points = -19; UPDATE book.postings SET points = 19",
        "UPDATE book.adjustments SET approved_by = NULL",
        "UPDATE book.adjustments SET approved_by = ' AUDIT'",
    ],
)
def test_only_what_corrects_it_silences_a_finding(wrong: tuple[Partition, str, Finding], planted: str) -> None:
    _, url, finding = wrong
    with connect(url) as connection:
        proposed(connection, finding)
        approve(connection, "audit-p-1", by="bob")
        assert is_put_right(finding, approved_points(connection))
        for table in ("adjustments", "postings"):
            connection.execute(
                psycopg.sql.SQL("ALTER TABLE book.{} DISABLE TRIGGER USER").format(psycopg.sql.Identifier(table))
            )
        connection.execute("ALTER TABLE book.adjustments DROP CONSTRAINT adjustments_check")
        for statement in planted.split(";"):
            connection.execute(statement)
        assert not is_put_right(finding, approved_points(connection))


def test_an_adjustment_under_the_key_of_a_proposal_silences_nothing(wrong: tuple[Partition, str, Finding]) -> None:
    _, url, finding = wrong
    with connect(url) as connection:
        connection.execute(
            "INSERT INTO book.adjustments (adjustment, member, points, reason, note, asked_by) "
            "VALUES ('audit-p-1', 'mallory', -20, 'audit', '', 'mallory')"
        )
        approve(connection, "audit-p-1", by="bob")
        assert not is_put_right(finding, approved_points(connection))
        assert proposed(connection, finding) == {"adjustment": "audit-p-1#2", "points": -20, "state": "waiting"}
