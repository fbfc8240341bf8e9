"""Keyed fingerprints and masked forms: what a ledger may keep of a device, an IP address or a phone number."""

from __future__ import annotations

import secrets
from typing import Final

from accrual.errors import UsageError

__all__ = ["NO_SECRET", "SECRET_BYTES", "Secret", "mask"]

SECRET_BYTES: Final = 16
FINGERPRINTED: Final = ("device", "ip", "phone")
_WORD: Final = 2**64 - 1


class Secret:
    """The 16-byte key of a partition's hashes. Fingerprints with the same key can be compared; without it, not guessed.

    A fingerprint is SipHash-1-3 of the text, the first half of the key XORed with the field's number (from 1).
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != SECRET_BYTES:
            raise UsageError(f"a secret must have {SECRET_BYTES} bytes, not {len(key)}")
        self.key = key

    @classmethod
    def generate(cls) -> Secret:
        """Draw a new secret from the operating system."""
        return cls(secrets.token_bytes(SECRET_BYTES))

    def fingerprint(self, field: str, text: str) -> int:
        """Return the unsigned 64-bit fingerprint of ``text`` in ``field``; 0 for an absent text, and only for that."""
        if not text:
            return 0
        domain = FINGERPRINTED.index(field) + 1
        first = int.from_bytes(self.key[:8], "little") ^ domain
        second = int.from_bytes(self.key[8:], "little")
        return _siphash_1_3(first, second, text.encode()) or 1


NO_SECRET: Final = Secret(bytes(SECRET_BYTES))


def mask(field: str, text: str) -> str:
    """Return a form of ``text`` for people: enough to recognise it in a list, too little to use it.

    An IP address loses its last part; anything else keeps a third of its characters at each end, at most three.
    """
    if not text:
        return ""
    cut = max(text.rfind("."), text.rfind(":"))
    if field == "ip" and cut >= 0:
        return text[: cut + 1] + "*"
    kept = min(3, len(text) // 3)
    return f"{text[:kept]}****{text[len(text) - kept :]}"


def _rotated(value: int, bits: int) -> int:
    return ((value << bits) | (value >> (64 - bits))) & _WORD


def _round(v0: int, v1: int, v2: int, v3: int) -> tuple[int, int, int, int]:
    v0 = (v0 + v1) & _WORD
    v1 = _rotated(v1, 13) ^ v0
    v0 = _rotated(v0, 32)
    v2 = (v2 + v3) & _WORD
    v3 = _rotated(v3, 16) ^ v2
    v0 = (v0 + v3) & _WORD
    v3 = _rotated(v3, 21) ^ v0
    v2 = (v2 + v1) & _WORD
    v1 = _rotated(v1, 17) ^ v2
    v2 = _rotated(v2, 32)
    return v0, v1, v2, v3


def _siphash_1_3(first: int, second: int, data: bytes) -> int:
    """Return SipHash (Aumasson and Bernstein) with one compression and three finalization rounds."""
    v0, v1 = first ^ 0x736F6D6570736575, second ^ 0x646F72616E646F6D
    v2, v3 = first ^ 0x6C7967656E657261, second ^ 0x7465646279746573
    padded = data + bytes(7 - len(data) % 8) + bytes([len(data) & 0xFF])
    for start in range(0, len(padded), 8):
        word = int.from_bytes(padded[start : start + 8], "little")
        v0, v1, v2, v3 = _round(v0, v1, v2, v3 ^ word)
        v0 ^= word
    v2 ^= 0xFF
    for _ in range(3):
        v0, v1, v2, v3 = _round(v0, v1, v2, v3)
    return v0 ^ v1 ^ v2 ^ v3
