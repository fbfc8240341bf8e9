"""Archived entries as lines of JSON, which ``accrual replay`` reads (docs/ARCHIVE.md)."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from accrual.engine.batch import items_of_entry
from accrual.errors import InvalidEvent
from accrual.events import Event, Fields, StreamEntry
from accrual.stream import stream_id_text

__all__ = ["exported_lines", "raw_fields"]

_line = msgspec.json.Encoder().encode


def exported_lines(entries: Iterable[StreamEntry]) -> Iterator[bytes]:
    """Yield a line of JSON (no newline) for each event of ``entries``, in their order.

    Each has ``at``, its arrival in ms, and where it was: ``stream_id``, ``index``. What does not decode as an event, an
    item of a batch or an entry as a whole, has its fields as they were under ``raw``; see ``raw_fields``.
    """
    for entry in entries:
        place = {"at": entry.ms, "stream_id": stream_id_text(entry[:2])}
        try:
            items = items_of_entry(entry)
        except InvalidEvent:
            yield _line({**place, "index": 0, "raw": _encoded(entry.fields)})
            continue
        for item in items:
            where = {**place, "index": item.index}
            try:
                yield _line({**where, **_present(item.event())})
            except InvalidEvent:
                yield _line({**where, "raw": _encoded(item.original)})


def raw_fields(raw: list[list[str]]) -> Fields:
    """Return the fields that are written as ``raw``: pairs of name and value, both in Base64."""
    return tuple((base64.b64decode(name), base64.b64decode(value)) for name, value in raw)


def _encoded(fields: Fields) -> list[list[str]]:
    return [[base64.b64encode(name).decode(), base64.b64encode(value).decode()] for name, value in fields]


def _present(event: Event) -> dict[str, Any]:
    """Return the fields of an event that are not absent."""
    return {name: value for name, value in msgspec.structs.asdict(event).items() if value not in (None, "", ())}
