r"""Texts as the database keeps them: every character but the one numbered zero, which events may have.

So it is written as a backslash and ``0``, and a backslash as two: what an attacker sends cannot stop the book, and no
two texts become one.
"""

from __future__ import annotations

import re
from typing import Any, Final, overload

__all__ = ["shown", "stored", "stored_bytes"]

_ESCAPES: Final = {"\\\\": "\\", "\\0": "\0"}


def stored(text: str) -> str:
    """Return ``text`` as the database keeps it."""
    return text.replace("\\", "\\\\").replace("\0", "\\0")


def stored_bytes(data: bytes) -> bytes:
    """Return UTF-8 as the database keeps it."""
    return data.replace(b"\\", b"\\\\").replace(b"\0", b"\\0")


@overload
def shown(text: str) -> str: ...
@overload
def shown(text: None) -> None: ...


def shown(text: Any) -> Any:
    """Return what ``stored`` was given; ``None`` for an absent text."""
    return text and re.sub(r"\\[\\0]", lambda found: _ESCAPES[found[0]], text)
