"""The ledger against the stream: nothing lost on the way, decided again in stretches as in one go, its head trimmed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from accrual.audit import Audit, AuditReport, Finding
from accrual.audit.decisions import Stretch, stretches_of
from accrual.book import Connection, connect
from accrual.settings import Settings
from audits import Checked, changed
from books import BOOK_RULEBOOK, Partition, at, ingest, order
from servers import Server
from workers import SECRET, command

DAYS = 9

RULEBOOK = (
    BOOK_RULEBOOK
    + """
[[limit]]
id = "device-orders-24h"
key = "device"
measure = "members"
window = "24h"
max = 1
action = "hold"

[[campaign]]
id = "gold"
multiplier = "3"
tiers = ["gold"]
"""
)


def checkin(member: str, day: int, minutes: int = 0, **fields: Any) -> dict[str, Any]:
    return {"id": f"c-{member}-{day}", "kind": "checkin", "member": member, "ts": at(day, minutes)} | fields


def one_day(day: int) -> Iterator[dict[str, Any]]:
    """Yield what happens on a day: streaks go on, keys are shared across midnight, and events come after it."""
    for member in ("m1", "m2"):
        yield checkin(member, day)
    yield {"id": f"g-{day}", "kind": "group_opened", "member": f"m{day % 3}", "ts": at(day, 1)}
    yield order(100 * day + 1, f"m{day % 4}", 40_000, day, device=f"d{day // 2}", ts=at(day, 10))
    if day == 2:
        yield {"id": "gold", "kind": "member_updated", "member": "m3", "ts": at(day, 11), "tier": "gold"}
    # Midnight is sixteen hours after 08:00; this one comes two minutes behind it, and is of the day before.
    yield order(100 * day + 2, "m3", 30_000, day, device=f"d{day // 2}", ts=at(day, 959), at=at(day, 961))
    # The same again: a duplicate, a day later.
    yield order(100 * day + 2, "m3", 30_000, day, device=f"d{day // 2}", ts=at(day, 959), at=at(day + 1, -100))


def written(server: Server, connection: Connection) -> Partition:
    """Write a ledger of some days, a batch for each, and book it."""
    partition = Partition(server.client(), rulebook=RULEBOOK)
    for day in range(DAYS):
        partition.send(*one_day(day))
    ingest(connection, partition)
    return partition


def told(findings: list[Finding]) -> list[tuple[Any, ...]]:
    return [(finding.check, finding.batch, finding.seq, finding.member) for finding in findings]


def test_an_event_that_the_ledger_has_lost(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(order(1))
    partition.send(order(2, "m1", 5000), order(4, "m2"))
    partition.send(order(5, "m2", 9900))
    changed(partition, {}, (f"{at(0, 3)}-0", order(3, "lost", 100_000)))
    with connect(book) as connection:
        ingest(connection, partition)
        checked = Checked(valkey, connection)
        counted, lost = checked.stretch(1, 4)
        assert (counted.check, counted.batch, counted.expected, counted.found) == ("events", 3, 3, 2)
        assert (lost.check, lost.batch, lost.seq, lost.member) == ("decisions", 3, None, "lost")
        assert (lost.expected["points"], lost.found) == (1000, None)
        assert (checked.ends(), checked.notes) == ([], [])
        # Trimmed with its neighbours it cannot be named any more; but the stream knows how many it has had.
        partition.client.xtrim(partition.keys.events, maxlen=1, approximate=False)
        (trimmed,) = checked.ends()
        assert (trimmed.check, trimmed.expected, trimmed.found) == ("events", 5, 4)
        assert checked.stretch(1, 4) == []
        assert checked.notes == ["partition p: not decided again from batch 2 on: of its 1 events 0 are still there"]


def test_a_dead_letter_that_the_ledger_has_lost(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(order(1), order(3))
    changed(partition, {}, (f"{at(0, 2)}-0", order(2) | {"kind": "nonsense"}))
    with connect(book) as connection:
        ingest(connection, partition)
        counted, decided = Checked(valkey, connection).stretch(1, 2)
    assert (counted.check, counted.expected, counted.found) == ("events", 3, 2)
    assert (decided.check, decided.expected["dead_letters"], decided.found["dead_letters"]) == ("decisions", 1, 0)


def test_an_event_that_was_taken_off_the_stream(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(order(1))
    partition.send(order(2), order(3))
    partition.client.xdel(partition.keys.events, f"{at(0, 3)}-0")
    with connect(book) as connection:
        ingest(connection, partition)
        (finding,) = Checked(valkey, connection).stretch(1, 3)
    assert (finding.check, finding.batch, finding.expected, finding.found) == ("events", 3, 1, 2)


def test_stretches_find_nothing_in_a_ledger_that_is_right(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        partition = written(valkey, connection)
        outcomes = {outcome for (outcome,) in connection.execute("SELECT DISTINCT outcome FROM book.entries")}
        assert outcomes == {"granted", "held", "rejected", "applied"}
        checked = Checked(valkey, connection)
        for batch in range(1, partition.link.batch + 1):
            assert checked.stretch(batch, batch) == []
        assert checked.notes == []
        # All at once, in two processes.
        settings = Settings(redis=valkey.url, database=book, secret=SECRET.key.hex())
        report = AuditReport()
        assert list(Audit(settings=settings, workers=2, stretch_days=1).run(report)) == []
        assert report.notes == []


@pytest.mark.parametrize("day", [3, 4])
def test_stretches_find_what_is_found_in_one_go(valkey: Server, book: str, day: int) -> None:
    with connect(book) as connection:
        partition = written(valkey, connection)
        last = partition.link.batch
        # Another member's checkin: a run of days ends, and bonuses of days to come with it. The order is of the day
        # before its arrival, counts with both days and comes twice.
        late = order(100 * day + 2, "m3", 20_000, day, device=f"d{day // 2}", ts=at(day, 959))
        changed(partition, {f"c-m1-{day}": checkin("m9", day) | {"id": f"c-m1-{day}"}, late["id"]: late})
        checked = Checked(valkey, connection)
        whole = checked.stretch(1, last)
        assert len({finding.batch for finding in whole}) > 1
        batch = day + 2
        assert whole[0].batch == batch
        # What comes before the first error stands as committed, so from there on it is the same.
        assert checked.stretch(1, batch - 1) == []
        for first in range(2, batch + 1):
            assert checked.stretch(first, last) == whole
        # What comes behind it, on what was committed: only what is wrong there itself.
        alone = [checked.stretch(number, number) for number in range(1, last + 1)]
        assert [finding for found in alone for finding in found if finding.batch == batch] == [
            finding for finding in whole if finding.batch == batch
        ]
        settings = Settings(redis=valkey.url, database=book, secret=SECRET.key.hex())
        found = list(Audit(settings=settings, workers=2, stretch_days=1).run(AuditReport()))
        assert [finding for finding in found if finding.check == "decisions"] == whole
        assert checked.notes == []


def test_days_bound_what_is_decided(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        partition = written(valkey, connection)
        changed(partition, {f"c-m1-{day}": checkin("m9", day) | {"id": f"c-m1-{day}"} for day in (1, 7)})
        stretches = stretches_of(connection, 1, "2026-11-14", "2026-11-15", 1, 1)
        # What is of the 14th came on that day or the one behind it.
        assert stretches == [Stretch(1, 4, decided=False), Stretch(5, 8), Stretch(9, 10, decided=False)]
        checked = Checked(valkey, connection)
        assert [checked.stretch(each.first, each.last, decided=each.decided) for each in stretches] == [[], [], []]
        assert stretches_of(connection, 1, "2027-01-01", None, 1, 1) == [Stretch(1, 10, decided=False)]
        for before, following in pairwise(stretches_of(connection, 1, None, None, 3, 2)):
            assert following.first == before.last + 1


def test_a_ledger_whose_head_was_trimmed(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        partition = written(valkey, connection)
        last = partition.link.batch
        client: Any = partition.client
        client.xtrim(partition.keys.ledger, minid="6-0", approximate=False)
        checked = Checked(valkey, connection)
        assert (checked.stretch(1, last), checked.ends()) == ([], [])
        assert checked.notes == ["partition p: batches 1 to 5 have left the ledger: only the book has them"]
        # What is left is decided on what the book has of what is gone.
        changed(partition, {"c-m1-7": checkin("m9", 7) | {"id": "c-m1-7"}})
        whole = checked.stretch(1, last)
        assert {finding.batch for finding in whole} == {9, 10}
        assert checked.stretch(8, last) == whole
        # The book has another batch than the one that is gone: the next one does not continue it.
        connection.execute("ALTER TABLE book.batches DISABLE TRIGGER USER")
        connection.execute("UPDATE book.batches SET digest = sha256('x') WHERE batch = 5")
        assert told(checked.stretch(1, last)) == [("chain", 6, None, None)]


def test_batches_that_nobody_has_any_more(valkey: Server, book: str) -> None:
    partition = Partition(valkey.client())
    partition.send(order(1))
    with connect(book) as connection:
        ingest(connection, partition)
        for number in (2, 3, 4):
            partition.send(order(number))
        partition.client.xtrim(partition.keys.ledger, minid="4-0", approximate=False)
        (finding,) = Checked(valkey, connection).ends()
    assert (finding.check, finding.expected, finding.found) == ("chain", 3, 4)


def test_stretches_of_the_archive(valkey: Server, book: str, tmp_path: Any) -> None:
    with connect(book) as connection:
        partition = written(valkey, connection)
        archive = tmp_path / "archive"
        done = command("archive", "--redis", valkey.url, "--partition", "p", "--archive", archive, "--drain")
        assert done.returncode == 0, done.stderr
        partition.client.xtrim(partition.keys.events, maxlen=5, approximate=False)
        settings = Settings(redis=valkey.url, database=book, secret=SECRET.key.hex(), archive=str(archive))
        report = AuditReport()
        assert list(Audit(settings=settings, workers=2, stretch_days=1).run(report)) == []
        assert report.notes == []


def test_a_stretch_that_begins_with_what_nobody_knows(valkey: Server, book: str) -> None:
    with connect(book) as connection:
        partition = written(valkey, connection)
        client: Any = partition.client
        ids = [stream_id for stream_id, _ in client.xrange(partition.keys.events)]
        # The tier that a control event has brought is nowhere else.
        client.xtrim(partition.keys.events, minid=ids[len(ids) // 2], approximate=False)
        checked = Checked(valkey, connection)
        assert checked.stretch(10, 10) == []
        (note,) = checked.notes
        assert note.startswith("partition p: not decided again from batch 10 on: the member_updated at ")
        client.xtrim(partition.keys.events, minid=ids[-1], approximate=False)
        assert checked.stretch(4, 4) == []
        gone = "of 6 events of the days before 0 are still there"
        assert checked.notes[1:] == [f"partition p: not decided again from batch 4 on: {gone}"]
