"""Audits for tests: checks of a ledger in this process, and streams that were changed behind the ledger's back."""

from __future__ import annotations

from typing import Any

from accrual.audit import Finding
from accrual.audit.decisions import Ledger, Stretch, check_ends, check_stretch
from accrual.audit.events import Events
from accrual.book import Connection
from accrual.events import decode_compact, encode_compact, validate
from accrual.stream import Keys
from books import Partition
from servers import Server
from workers import SECRET

__all__ = ["Checked", "changed"]


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
