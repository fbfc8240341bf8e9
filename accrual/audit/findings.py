"""What is said of something that is wrong: which check found it, where, and what should have been there."""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = ["Finding"]

_encode = msgspec.json.Encoder(order="sorted").encode


class Finding(msgspec.Struct, frozen=True, omit_defaults=True):
    """One finding. ``check`` names the check; the fields that say where are those that make sense for it."""

    check: str
    detail: str
    partition: str | None = None
    batch: int | None = None
    seq: int | None = None
    member: str | None = None
    day: str | None = None
    expected: Any = None
    found: Any = None
    owed: int | None = None
    """How many points more the member would have, were this right; where a check can say so."""
    posting: int | None = None
    """The number of the posting that should not have been; where a check can say so."""

    def line(self) -> bytes:
        """Return the finding as a line of JSON, without the newline."""
        return _encode(self)
