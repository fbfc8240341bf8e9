"""The keys of a partition: one hash slot, so that ledger, dead letters and position can move together."""

from __future__ import annotations

import re
from typing import Final

from accrual.errors import UsageError

__all__ = ["Keys", "partition_names"]

PARTITION_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Keys:
    """The keys of ``partition``, all under its hash tag (SPEC section 7).

    A partition's name has 1 to 64 of the characters ``A-Z a-z 0-9 _ . -``; ``UsageError`` for any other.
    """

    def __init__(self, partition: str) -> None:
        if not PARTITION_NAME.fullmatch(partition):
            raise UsageError(f"partition: {partition!r} is not 1 to 64 of the characters A-Z a-z 0-9 _ . -")
        self.partition = partition

    @property
    def events(self) -> str:
        """The stream of what producers send."""
        return self._key("events")

    @property
    def ledger(self) -> str:
        """The stream of committed batches."""
        return self._key("ledger")

    @property
    def deadletters(self) -> str:
        """The stream of what could not be decided, with the reason."""
        return self._key("deadletters")

    @property
    def checkpoint(self) -> str:
        """The hash with the position, the sequence and the digest behind which everything is committed."""
        return self._key("checkpoint")

    @property
    def lease(self) -> str:
        """Who owns the partition."""
        return self._key("lease")

    @property
    def rulebooks(self) -> str:
        """The rulebooks waiting to be adopted."""
        return self._key("rulebooks")

    @property
    def outbox(self) -> str:
        """The hash that says how far the book has sent its messages."""
        return self._key("outbox")

    @property
    def notifications(self) -> str:
        """The stream of what members should be told."""
        return self._key("notifications")

    @property
    def archive(self) -> str:
        """The hash that says how far the archive of the events has come."""
        return self._key("archive")

    def _key(self, name: str) -> str:
        return f"accrual:{{{self.partition}}}:{name}"


def partition_names(text: str) -> list[str]:
    """Return the partitions that ``text`` names, with commas between; ``UsageError`` for one that is no name."""
    return [Keys(name.strip()).partition for name in text.split(",")]
