"""What waits for a person, and why; and a person's word that it is dealt with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from accrual.book.database import Connection
from accrual.book.people import check_person, check_reason
from accrual.book.posting import act
from accrual.book.texts import shown, stored
from accrual.errors import BookError

__all__ = ["close_exception", "exceptions"]

QUERY: Final = """
    SELECT x.exception, x.kind, x.member, p.name, x.seq, x.event, x.detail, x.data, x.opened_at, x.closed_at, a.by,
        a.reason
    FROM book.exceptions x LEFT JOIN book.partitions p USING (partition_id)
    LEFT JOIN book.actions a ON a.action = x.closed_by
    WHERE %(all)s OR x.closed_at IS NULL ORDER BY x.exception
"""
NAMES: Final = (
    *("exception", "kind", "member", "partition", "seq", "event", "detail", "data", "opened_at", "closed_at"),
    *("closed_by", "reason"),
)
TEXTS: Final = frozenset({"member", "event", "detail", "closed_by"})


def exceptions(connection: Connection, *, closed_too: bool = False) -> Iterator[dict[str, Any]]:
    """Yield what waits for a person, oldest first; with ``closed_too`` also what was dealt with."""
    with connection.transaction(), connection.cursor(name="exceptions") as cursor:
        cursor.execute(QUERY, {"all": closed_too})
        for row in cursor:
            line = {name: shown(value) if name in TEXTS else value for name, value in zip(NAMES, row, strict=True)}
            line["data"] = _shown(line["data"])
            yield {name: value for name, value in line.items() if value not in (None, {})}


def _shown(value: Any) -> Any:
    """Return a value of JSON with its texts as they were."""
    if isinstance(value, dict):
        return {name: _shown(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_shown(part) for part in value]
    return shown(value) if isinstance(value, str) else value


def close_exception(connection: Connection, number: int, *, by: str, reason: str, note: str = "") -> None:
    """Note that ``by`` has dealt with an exception. Raises ``BookError`` where there is none, or it is closed."""
    check_reason(reason)
    check_person(by)
    with connection.transaction(), connection.cursor() as cursor:
        details = {"exception": number}
        action = act(cursor, "close_exception", by=stored(by), reason=reason, note=stored(note), details=details)
        cursor.execute(
            "UPDATE book.exceptions SET closed_at = now(), closed_by = %s WHERE exception = %s AND closed_at IS NULL",
            (action, number),
        )
        if cursor.rowcount == 0:
            raise BookError(f"exception {number}: there is none open with that number")
