"""What nobody may write to the book unseen: each column and row that was changed past the program is named."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date

import pytest

from accrual.audit import Finding
from accrual.audit.caps import check_caps, check_once
from accrual.audit.recorded import recorded_rulebooks
from accrual.audit.sums import check_sums
from accrual.book import Connection, adjust, approve, confirm, connect, release, settle, slow, undo
from accrual.rulebook import day_number
from audits import found, triggers_off
from books import BOOK_RULEBOOK, TAKING_RULEBOOK, Partition, at, ingest, order, taking
from servers import Server

DAY = day_number(date(2026, 11, 10))


@pytest.fixture
def booked(valkey: Server, book: str) -> Iterator[tuple[Server, Connection]]:
    """A book in which everything that these tests change has happened, and is right; its triggers are off."""
    with connect(book) as connection:
        partition = Partition(valkey.client())
        partition.send(*(order(number, "m1", device="d1", phone="p1") for number in range(1, 9)))
        partition.send(order(10, "m2", 20_000), order(11, "m2", 5000), order(13, "m4", 700), order(14, "m3"))
        partition.send(
            {"id": "f1", "kind": "member_frozen", "member": "m6", "ts": at()},
            {"id": "u1", "kind": "member_updated", "member": "m4", "ts": at(), "tier": "gold", "card_until": at(9)},
            {"id": "v1", "kind": "member_released", "member": "m2", "ts": at(), "immune_until": at(9)},
            {"id": "v2", "kind": "member_released", "member": "m1", "ts": at(), "immune_until": at(8)},
        )
        refund = {"kind": "order_refunded", "ts": at(1)}
        partition.send(
            refund | {"id": "r1", "member": "m2", "order": "o10", "amount": 5000},
            refund | {"id": "r2", "member": "m2", "order": "o11", "amount": 9000},
        )
        ingest(connection, partition)
        slow(connection, partition.rulebook, refund_wait_hours=0)
        settle(connection, partition.rulebook, DAY)
        release(connection, "m1", reason="checked", by="alice", immune_until_ms=at(30))
        confirm(connection, "m3", reason="abuse", by="alice", claw_back=(DAY, DAY))
        adjust(connection, "m4", 5, reason="given", note="", by="alice")
        adjust(connection, "m5", 20_000, reason="given", note="", by="alice", key="large")
        approve(connection, "large", by="bob")
        adjust(connection, "m7", 9, reason="given", note="", by="alice")
        (number,) = connection.execute("SELECT max(number) FROM book.postings").fetchone() or (0,)
        approve(connection, undo(connection, number, reason="no", note="", by="alice").adjustment, by="bob")
        triggers_off(connection)
        yield valkey, connection


# What is planted, the check that names it, and the words in which it does.
PLANTS = {
    "UPDATE book.entries SET rulebook = 9 WHERE event = 'e13'": ("rows", "another entry"),
    """UPDATE book.entries SET masked = '{"device": "x"}' WHERE event = 'e8'""": ("rows", "another entry"),
    "UPDATE book.entries SET number = number + 1000 WHERE event = 'e13'": ("rows", "another entry"),
    "INSERT INTO book.entries SELECT day, partition_id, seq, late, number, rulebook, stream_id, item, ts_ms, event, "
    "kind, 'm9', outcome, cause, frozen, amount_fen, order_id, base, uncapped, points FROM book.entries "
    "WHERE event = 'e13'": (*("rows", "another entry beside"),),
    "UPDATE book.deferred SET number = number + 1000 WHERE event = 'r1'": ("rows", "another entry"),
    "UPDATE book.partitions SET rulebook = 7": ("batches", "not where the book says"),
    "UPDATE book.deferred SET rulebook = 9 WHERE event = 'r1'": ("rows", "another entry"),
    "UPDATE book.batches SET rulebook = 7 WHERE batch = 2": ("chain", "another batch"),
    "UPDATE book.rulebooks SET text = replace(text, 'max = 1000', 'max = 9999')": ("rulebooks", "another rulebook"),
    "UPDATE book.rulebooks SET zone_rules = '1'": ("rulebooks", "another rulebook"),
    "UPDATE book.identities SET paid_order = NULL WHERE event = 'e13'": ("identities", "another day or order"),
    "UPDATE book.identities SET payer = 'm9' WHERE event = 'e13'": ("identities", "that another member paid"),
    "UPDATE book.identities SET payer = NULL WHERE event = 'e13'": ("identities", "that another member paid"),
    "UPDATE book.identities SET payer = 'm6' WHERE event = 'f1'": ("identities", "that another member paid"),
    "UPDATE book.identities SET payer = 'm2' WHERE event = 'r2'": ("identities", "that no event has"),
    "UPDATE book.identities SET paid_order = 'o' WHERE event = 'r2'": ("identities", "that no event has"),
    "INSERT INTO book.identities VALUES ('ghost', NULL, '2026-11-10', 1, 999, false)": (
        "identities",
        "that no event has",
    ),
    "UPDATE book.identities SET seq = 1 WHERE event = 'r1'": ("identities", "its event id is booked for another"),
    "INSERT INTO book.exceptions (kind, partition_id, seq, event, detail) VALUES ('id_taken', 1, 999, 'nobody', '')": (
        "identities",
        "nobody else has it",
    ),
    "UPDATE book.members SET state = 'blocked' WHERE member = 'm1'": ("members", "the state is not"),
    "UPDATE book.members SET state = 'active' WHERE member = 'm6'": ("members", "the state is not"),
    "DELETE FROM book.members WHERE member = 'm3'": ("members", "the state is not"),
    "UPDATE book.members SET tier = 'plain' WHERE member = 'm4'": ("attributes", "tier, card or immunity"),
    "UPDATE book.members SET card_until_ms = card_until_ms + 1 WHERE member = 'm4'": ("attributes", "tier, card"),
    "UPDATE book.members SET immune_until_ms = NULL WHERE member = 'm2'": ("attributes", "tier, card or immunity"),
    "DELETE FROM book.members WHERE member = 'm4'": ("attributes", "tier, card or immunity"),
    "UPDATE book.members SET tier = 'gold' WHERE member = 'm6'": ("attributes", "tier, card or immunity"),
    "UPDATE book.days SET last_seq = last_seq - 1": ("days", "another one than the book knows of"),
    "UPDATE book.days SET day = day + 1": ("days", "another one than the book knows of"),
    "DELETE FROM book.days": ("days", "another one than the book knows of"),
    "INSERT INTO book.days VALUES ('2026-11-10', 2, 1)": ("days", "another one than the book knows of"),
    "UPDATE book.actions SET by = ' ' WHERE kind = 'settle'": ("actions", "by nobody"),
    "UPDATE book.actions SET reason = NULL WHERE kind = 'release'": ("actions", "without a reason"),
    "UPDATE book.actions SET by = 'bob' WHERE kind = 'adjust'": ("actions", "not as adjustment"),
    """UPDATE book.actions SET details = '{"day": "2026-11-09"}' WHERE kind = 'settle'""": (
        "actions",
        "another member or day",
    ),
    "UPDATE book.actions SET details = '{}' WHERE kind = 'settle'": ("actions", "another member or day"),
    "UPDATE book.actions SET details = '{}' WHERE kind = 'confirm'": ("actions", "another member or day"),
    "WITH gone AS (DELETE FROM book.entries WHERE event = 'e13' RETURNING partition_id, seq) "
    "INSERT INTO book.exceptions (kind, partition_id, seq, event, detail) "
    "SELECT 'id_taken', partition_id, seq, 'e1', '' FROM gone": (*("rows", "does not have the entry"),),
    "DELETE FROM book.settled_days": ("settlements", "the day is not among those that were"),
    "DELETE FROM book.postings WHERE kind = 'settle' AND member = 'm4'": ("settlements", "points of it are pending"),
    "INSERT INTO book.waiting SELECT partition_id, seq, cause, number FROM book.deferred WHERE event = 'r1'": (
        "deferred",
        "was dealt with and still waits",
    ),
    "DELETE FROM book.resolutions": ("deferred", "neither waits nor was dealt with"),
    "UPDATE book.deferred SET member = 'm9' WHERE event = 'r1'": ("refunds", "belongs to another member"),
    "UPDATE book.refunds SET order_seq = 999": ("refunds", "there is no order"),
    "DELETE FROM book.adjustments WHERE member = 'm4'": ("adjustments", "without a record"),
    "UPDATE book.adjustments SET approved_by = NULL WHERE corrects IS NOT NULL": (
        "adjustments",
        "nobody else approved",
    ),
    "UPDATE book.adjustments SET approved_by = NULL WHERE adjustment = 'large'": (
        "adjustments",
        "nobody else approved",
    ),
    "UPDATE book.adjustments SET approved_by = 'Alice ' WHERE adjustment = 'large'": ("adjustments", "nobody else"),
    "UPDATE book.adjustments SET approved_by = NULL, approval_points = 20000 WHERE adjustment = 'large'": (
        "adjustments",
        "than the book said",
    ),
    "UPDATE book.postings SET points = 8, lot_points = '{8}' WHERE kind = 'correct'": ("postings", "to the letter"),
}


def test_what_is_planted_is_named(booked: tuple[Server, Connection]) -> None:
    server, connection = booked
    assert [finding.line() for finding in found(server, connection)] == []
    for statement, (check, words) in PLANTS.items():
        with connection.transaction(force_rollback=True):
            assert connection.execute(statement).rowcount >= 1, statement
            findings = list(found(server, connection))
            named = [finding for finding in findings if finding.check == check and words in finding.detail]
            assert named, (statement, [finding.line() for finding in findings])


def test_no_kind_of_posting_moves_points_between_other_accounts(booked: tuple[Server, Connection]) -> None:
    _, connection = booked
    kinds = {kind for (kind,) in connection.execute("SELECT DISTINCT kind FROM book.postings")}
    assert kinds == {"settle", "refund", "release", "clawback", "adjust", "correct"}
    connection.execute("ALTER TABLE book.postings DROP CONSTRAINT postings_corrects_check")
    (number,) = connection.execute("SELECT min(number) FROM book.postings").fetchone() or (0,)
    # The accounts of each kind: of a posting, by the table of SPEC section 9.
    right = {
        ("settle", "pending", "available"),
        *(("release", "held", account) for account in ("pending", "available")),
        ("confirm", "held", "issuance"),
        # Of negative points.
        ("settle", "available", "pending"),
        *(("release", account, "held") for account in ("pending", "available")),
        ("confirm", "issuance", "held"),
        *(("refund", account, "issuance") for account in ("held", "pending", "available")),
        *(("clawback", account, "issuance") for account in ("pending", "available")),
        ("expire", "available", "expired"),
        ("adjust", "issuance", "available"),
        ("adjust", "available", "issuance"),
        ("redeem", "available", "redeemed"),
    }
    accounts = ("issuance", "pending", "available", "held", "redeemed", "expired")
    moves = {
        (kind, source, target) for kind, _, _ in right for source in accounts for target in accounts if source != target
    }
    refused = set()
    for kind, source, target in moves:
        with connection.transaction(force_rollback=True):
            lots = "'{2026-11-10}'::date[], ARRAY[points]" if "available" in (source, target) else "NULL, NULL"
            connection.execute(
                "UPDATE book.postings SET kind = %s, from_account = %s, to_account = %s, "
                f"(lot_days, lot_points) = ({lots}) WHERE number = %s",
                (kind, source, target, number),
            )
            detail = f"posting {number}: moves points from {source} to {target}"
            if detail in {finding.detail for finding in check_sums(connection, "postings")}:
                refused.add((kind, source, target))
    assert moves - refused == right


COLUMNS = "action, kind, member, from_account, to_account, points, day, lot_days, lot_points, partition_id, seq, late"
AGAIN = f"INSERT INTO book.postings (number, {COLUMNS}) SELECT nextval('book.numbers'), {COLUMNS} FROM book.postings"
# m1 and m4 have minus 5 of the second day settled, m2 has as much released and m3 confirmed. m4 has minus 5 pending of
# the third day. What is planted, the check that names it, in which words, and whether it would have a posting undone.
NEGATIVE_PLANTS = {
    "DELETE FROM book.postings WHERE kind = 'settle' AND member = 'm1' AND from_account = 'available'": (
        *("settlements", "points of it are pending", False),
    ),
    "UPDATE book.postings SET points = 7, lot_points = '{7}' WHERE member = 'm1' AND from_account = 'available'": (
        *("settlements", "settled something else", True),
    ),
    f"{AGAIN} WHERE kind = 'settle' AND member = 'm4' AND from_account = 'available'": (
        *("settlements", "settled something else", True),
    ),
    # The other way round, of a day that has nothing negative.
    "UPDATE book.postings SET from_account = 'available', to_account = 'pending' WHERE member = 'm4' "
    "AND from_account = 'pending'": ("settlements", "settled something else", True),
    "UPDATE book.postings SET points = 9, lot_points = '{9}' WHERE kind = 'release'": ("holds", "more was", False),
    "UPDATE book.postings SET from_account = 'held', to_account = 'available' WHERE kind = 'release'": (
        *("holds", "more was released", True),
    ),
    f"{AGAIN} WHERE kind = 'confirm'": ("reversals", "more went back", True),
    "UPDATE book.postings SET from_account = 'held', to_account = 'issuance' WHERE kind = 'confirm'": (
        *("reversals", "more went back", True),
    ),
    "UPDATE book.refunds SET reversed = 2": ("refunds", "other points than it should have", False),
    "UPDATE book.balances SET pending = 0 WHERE member = 'm4'": ("balances", "not the sum", False),
    "UPDATE book.entries SET points = -4 WHERE event = 'e3'": ("rows", "another entry", False),
    "UPDATE book.entries SET points = -6 WHERE event = 'e3'": ("settlements", "settled something else", True),
}


def test_what_is_planted_among_negative_points_is_named(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client(), rulebook=TAKING_RULEBOOK)
    frozen = [
        {"id": f"f{member}", "kind": "member_frozen", "member": member, "ts": at(0, 2)} for member in ("m2", "m3")
    ]
    partition.send(order(1), *frozen, taking(3, day=1), taking(4, "m2", day=1), taking(5, "m3", day=1))
    partition.send(order(6, "m4"), taking(7, "m4", day=1), taking(8, "m4", day=2))
    partition.send({"id": "r", "kind": "order_refunded", "member": "m1", "ts": at(2, 9), "order": "o3", "amount": 500})
    with connect(book) as connection:
        ingest(connection, partition)
        for day in (DAY, DAY + 1):
            settle(connection, partition.rulebook, day)
        slow(connection, partition.rulebook, refund_wait_hours=1)
        release(connection, "m2", reason="checked", by="alice")
        confirm(connection, "m3", reason="abuse", by="alice")
        triggers_off(connection)
        assert [finding.line() for finding in found(valkey, connection)] == []
        for statement, (check, words, is_undone) in NEGATIVE_PLANTS.items():
            with connection.transaction(force_rollback=True):
                assert connection.execute(statement).rowcount == 1, statement
                findings = list(found(valkey, connection))
                named = [finding for finding in findings if finding.check == check and words in finding.detail]
                assert named, (statement, [finding.line() for finding in findings])
                assert (named[0].posting is not None) is is_undone, statement


def told(findings: Iterator[Finding]) -> list[tuple[int | None, str | None, int | None]]:
    return [(finding.seq, finding.member, finding.owed) for finding in findings]


def test_caps_are_counted_through_rulebook_versions(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    checkin = {"kind": "checkin", "member": "m1"}
    opened = {"kind": "group_opened", "member": "m1"}
    partition.send(order(1, "m1", 90_000), checkin | {"id": "c1", "ts": at()}, opened | {"id": "g1", "ts": at()})
    # The second version keeps all counts; the third has another limit in the place of the first one.
    partition.adopt(BOOK_RULEBOOK.replace("version = 1", "version = 2"))
    partition.send(
        order(2, "m1", 90_000), checkin | {"id": "c2", "ts": at(0, 3)}, opened | {"id": "g2", "ts": at(0, 3)}
    )
    partition.adopt(BOOK_RULEBOOK.replace("version = 1", "version = 3").replace("member-cap", "another-cap"))
    partition.send(order(4, "m1", 90_000), order(5, "m2", 1000))
    # A lower maximum lets nothing more through, and what was let through before is right.
    partition.adopt(
        BOOK_RULEBOOK.replace("version = 1", "version = 4").replace("member-cap", "another-cap").replace("1000", "500")
    )
    partition.send(order(6, "m1", 90_000), order(7, "m2", 1000))
    with connect(book) as connection:
        ingest(connection, partition)
        triggers_off(connection)
        rows = connection.execute("SELECT event, points FROM book.entries WHERE points > 0 ORDER BY seq").fetchall()
        assert rows == [("e1", 900), ("c1", 5), ("g1", 50), ("e2", 45), ("e4", 900), ("e5", 10), ("e7", 10)]
        recorded = recorded_rulebooks(connection)
        assert told(check_caps(connection, "2026-11-10", recorded)) == []
        assert told(check_once(connection, recorded)) == []
        connection.execute("UPDATE book.entries SET points = 900 WHERE event = 'e2'")
        connection.execute("UPDATE book.entries SET outcome = 'granted', points = 5 WHERE event = 'c2'")
        connection.execute("UPDATE book.entries SET outcome = 'granted', points = 50 WHERE event = 'g2'")
        # 955 and 900 are 855 too many, and all that comes behind is too much.
        expected = [(4, "m1", -855), (5, "m1", -5), (6, "m1", -50), (5, "m1", -5)]
        assert told(check_caps(connection, "2026-11-10", recorded)) == expected
        assert told(check_once(connection, recorded)) == [(6, "m1", -50)]
