"""What must add up in the whole book: a query for each check, in ``checks/``; no row, nothing wrong.

A row is ``(partition, seq, member, day, expected, found, detail)``; the first four are null where they say nothing. The
number of the posting that would put it right if it were undone may follow.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator

from accrual.audit.findings import Finding
from accrual.book.database import Connection
from accrual.book.texts import shown

__all__ = ["check_sums", "names_of_checks"]


def names_of_checks() -> list[str]:
    """Return the names of the checks."""
    folder = importlib.resources.files("accrual.audit").joinpath("checks")
    return sorted(file.name.removesuffix(".sql") for file in folder.iterdir() if file.name.endswith(".sql"))


def check_sums(connection: Connection, name: str) -> Iterator[Finding]:
    """Yield what the check ``name`` finds."""
    text = importlib.resources.files("accrual.audit").joinpath("checks", f"{name}.sql").read_text(encoding="utf-8")
    for partition, seq, member, day, expected, found, detail, *posting in connection.execute(text):
        yield Finding(
            check=name,
            detail=detail,
            partition=partition,
            seq=seq,
            member=shown(member),
            day=day,
            expected=expected,
            found=found,
            posting=posting[0] if posting else None,
        )
