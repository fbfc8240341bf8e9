"""An entry of an events stream as it was read, nothing of it decoded yet (SPEC section 7)."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Fields", "StreamEntry"]

Fields = tuple[tuple[bytes, bytes], ...]


class StreamEntry(NamedTuple):
    """One entry of an events stream: its ID (``ms`` is the arrival of its events) and its fields, as read."""

    ms: int
    seq: int
    fields: Fields
