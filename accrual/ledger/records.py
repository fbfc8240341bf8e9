"""What a batch says of its place in the ledger, and the rulebooks that the ledger records."""

from __future__ import annotations

import hashlib
import importlib.metadata
from typing import Final, Literal

import msgspec

from accrual.ledger.wire import FORMAT, GENESIS, WireRulebook
from accrual.outcomes import BatchHeader, Counts
from accrual.rulebook import Rulebook

__all__ = ["START", "Header", "Link", "RulebookRecord"]

_encode = msgspec.msgpack.Encoder().encode


class Link(msgspec.Struct, frozen=True):
    """Where a ledger stands after ``batch``: all that its next batch must continue. The default is its beginning.

    ``digest`` is that of ``batch``, ``through`` the last stream entry consumed, ``next_seq`` the number of the next
    ledger entry, ``rulebook`` the version in force (0 before the first).
    """

    batch: int = 0
    digest: bytes = GENESIS
    through: tuple[int, int] = (0, 0)
    next_seq: int = 1
    rulebook: int = 0


START: Final = Link()


class Header(BatchHeader, frozen=True):
    """What a batch says of itself before its columns. A rulebook record counts nothing.

    ``rulebook`` is the version that decided the entries, or the one adopted; ``digest`` that of the batch's own bytes.
    """

    type: Literal["entries", "rulebook"]
    through: tuple[int, int]
    counts: Counts
    rulebook: int
    digest: bytes

    @property
    def link(self) -> Link:
        """Where the ledger stands after this batch."""
        return Link(self.batch, self.digest, self.through, self.first_seq + self.counts.entries, self.rulebook)


class RulebookRecord(BatchHeader, frozen=True):
    """A rulebook as the ledger records it when it is adopted: ``text`` is its TOML, byte for byte.

    Entries after it, up to the next record, were decided by it. ``zone_rules`` is the version of the ``tzdata`` package
    that gave the local dates, ``slack_days`` how much longer than the specification asks counts and ids were kept.
    """

    version: int
    name: str
    text: str
    zone_rules: str
    slack_days: int

    @classmethod
    def of(cls, header: BatchHeader, rulebook: Rulebook, slack_days: int) -> RulebookRecord:
        """Record that ``rulebook`` is adopted at the place ``header``, with this machine's zone rules."""
        return cls(
            batch=header.batch,
            previous=header.previous,
            after=header.after,
            first_seq=header.first_seq,
            version=rulebook.version,
            name=rulebook.name,
            text=rulebook.text,
            zone_rules=importlib.metadata.version("tzdata"),
            slack_days=slack_days,
        )

    @property
    def through(self) -> tuple[int, int]:
        """The same as ``after``: a record consumes nothing of the stream."""
        return self.after

    @property
    def sha256(self) -> bytes:
        """The SHA-256 of the text."""
        return hashlib.sha256(self.text.encode()).digest()

    def encode(self) -> bytes:
        """Return the ledger batch."""
        return _encode(
            WireRulebook(
                format=FORMAT,
                type="rulebook",
                batch=self.batch,
                previous=self.previous,
                after=self.after,
                through=self.through,
                first_seq=self.first_seq,
                version=self.version,
                name=self.name,
                sha256=self.sha256,
                text=self.text,
                zone_rules=self.zone_rules,
                slack_days=self.slack_days,
            )
        )
