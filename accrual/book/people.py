"""What people say of themselves and of what they do, which every command of the book asks for: who, why, in words."""

from __future__ import annotations

import re
from typing import Final

from accrual.errors import UsageError

__all__ = ["NOTE_BYTES", "check_person", "check_reason", "check_text", "person"]

REASON: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
NOTE_BYTES: Final = 4096


def person(name: str) -> str:
    """Return who ``name`` means: neither case nor spaces make another person of anybody."""
    return " ".join(name.split()).casefold()


def check_person(by: str) -> str:
    """Return ``by``. Raises ``UsageError`` where it names nobody."""
    check_text("--by", by)
    if not person(by):
        raise UsageError(f"--by: {by!r} is nobody's name")
    return by


def check_reason(reason: str) -> str:
    """Return ``reason``. Raises ``UsageError`` where it is no reason code."""
    if not REASON.fullmatch(reason):
        raise UsageError(f"--reason: {reason!r} is not a code of 1 to 64 of the characters A-Z a-z 0-9 _ . -")
    return reason


def check_text(flag: str, text: str, *, shortest: int = 1, longest: int = 64) -> str:
    """Return ``text``. Raises ``UsageError`` naming ``flag`` where it is not so many bytes of UTF-8."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise UsageError(f"{flag}: {text!r} is not UTF-8") from None
    if not shortest <= size <= longest:
        raise UsageError(f"{flag}: {text[:longest]!r} is not {shortest} to {longest} bytes of UTF-8")
    return text
