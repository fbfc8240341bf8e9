"""Audits for tests: all checks in this process, within a transaction, and streams changed behind the ledger's back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accrual.audit import Finding
from accrual.audit.caps import booked_days, check_caps, check_once
from accrual.audit.decisions import Ledger, Stretch, check_ends, check_stretch
from accrual.audit.events import Events
from accrual.audit.late import check_late
from accrual.audit.lots import check_lot_dates
from accrual.audit.members import check_members
from accrual.audit.recorded import recorded_rulebooks
from accrual.audit.refunds import check_refunds
from accrual.audit.sums import check_sums, names_of_checks
from accrual.book import Connection
from accrual.events import decode_compact, encode_compact, validate
from accrual.stream import Keys
from books import Partition
from servers import Server
from workers import SECRET

__all__ = ["Checked", "changed", "found", "triggers_off"]


def changed(partition: Partition, events: dict[str, dict[str, Any]], *more: tuple[str, dict[str, Any]]) -> None:
    """Put other events in the place of some of the stream, by their ids, and ``more`` at IDs of their own."""
    client: Any = partition.client
    entries = dict(client.xrange(partition.keys.events))
    for fields in entries.values():
        event = events.get(decode_compact(fields[b"e"]).id)
        if event is not None:
            fields[b"e"] = encode_compact(validate(event))
    entries |= {stream_id.encode(): {b"e": encode_compact(validate(event))} for stream_id, event in more}
    client.delete(partition.keys.events)
    for stream_id in sorted(entries, key=lambda stream_id: tuple(map(int, stream_id.split(b"-")))):
        client.xadd(partition.keys.events, entries[stream_id], id=stream_id)


class Checked:
    """What checks of a ledger, in this process, have found and noted."""

    def __init__(self, server: Server, connection: Connection) -> None:
        self.notes: list[str] = []
        client, keys = server.client(), Keys("p")
        events = Events(client, keys), Events(client, keys)
        self.ledger = Ledger(connection, client, "p", 1, SECRET, events, self.notes.append)

    def stretch(self, first: int, last: int, *, decided: bool = True) -> list[Finding]:
        return list(check_stretch(self.ledger, Stretch(first, last, decided)))

    def ends(self) -> list[Finding]:
        return list(check_ends(self.ledger))


def found(server: Server, connection: Connection) -> Iterator[Finding]:
    """Yield what an audit finds of a book with the one partition ``p``; as ``connection`` sees it now."""
    recorded = recorded_rulebooks(connection)
    rulebooks = {record.rulebook.version: record.rulebook for record in recorded}
    checked = Checked(server, connection)
    (last,) = connection.execute("SELECT max(batch) FROM book.batches").fetchone() or (0,)
    yield from checked.stretch(1, last)
    yield from checked.ends()
    for name in names_of_checks():
        yield from check_sums(connection, name)
    yield from check_refunds(connection)
    yield from check_members(connection, recorded)
    yield from check_once(connection, recorded)
    yield from check_lot_dates(connection, rulebooks.values())
    for day in booked_days(connection, None, None):
        yield from check_caps(connection, day, recorded)
        yield from check_late(connection, day, rulebooks, checked.notes.append)
    assert checked.notes == []


def triggers_off(connection: Connection) -> None:
    """Let facts be changed, so that errors can be planted."""
    tables = connection.execute(
        "SELECT DISTINCT tgrelid::regclass::text FROM pg_trigger WHERE NOT tgisinternal AND tgparentid = 0"
    ).fetchall()
    for (table,) in tables:
        connection.execute(f"ALTER TABLE {table} DISABLE TRIGGER USER")
