"""A batch of ledger entries, read: numpy columns for analysis, or one ``Entry`` at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from accrual.errors import LedgerError
from accrual.events import MAXIMUM_AMOUNT_FEN, MAXIMUM_TIME_MS
from accrual.ledger.columns import INT64_MAXIMUM, checked_texts, unpack_bytes, unpack_integers, unpack_texts
from accrual.ledger.records import Header
from accrual.ledger.wire import BYTES_COLUMNS, DEFERRED, INTEGER_COLUMNS, WireEntries
from accrual.outcomes import CAUSES, OUTCOMES, Entry, Position

__all__ = ["EntriesBatch"]

ValueT = TypeVar("ValueT")

LAST_DAY: Final = MAXIMUM_TIME_MS // 86_400_000 + 1
UNSIGNED_COLUMNS: Final = frozenset({"at_seq", "tripped", "device", "ip", "phone"})

# What a column may hold at the most, both ends included; the others may hold any 64 bits.
RANGES: Final = {
    "at": (0, INT64_MAXIMUM),
    "index": (0, INT64_MAXIMUM),
    "ts": (1, MAXIMUM_TIME_MS),
    "day": (-1, LAST_DAY),
    "outcome": (0, len(OUTCOMES) - 1),
    "cause": (0, len(CAUSES) - 1),
    "frozen": (0, 1),
    "amount": (-1, MAXIMUM_AMOUNT_FEN),
}


class EntriesBatch:
    """A batch of entries. Its columns are unpacked when they are first asked for, and may raise ``LedgerError`` then.

    ``header`` says where it stands and how many of each it has, ``kinds``, ``campaigns`` and ``limits`` what the codes
    of the columns stand for; ``campaign_sets`` has the ids of each set.
    """

    def __init__(self, header: Header, wire: WireEntries) -> None:
        self.header = header
        self.kinds = wire.kinds
        self.campaigns = wire.campaigns
        self.limits = wire.limits
        self.campaign_sets = [tuple(wire.campaigns[number] for number in chosen) for chosen in wire.campaign_sets]
        self._columns = wire.columns
        self._unpacked: dict[str, NDArray[Any]] = {}

    @property
    def batch(self) -> int:
        """The batch's number, from 1."""
        return self.header.batch

    def integers(self, name: str) -> NDArray[Any]:
        """Return an integer column, read-only: uint64 for ``at_seq``, ``tripped`` and the fingerprints, else int64.

        One value per entry, but for ``observed``, which has one per limit tripped.
        """
        if name not in INTEGER_COLUMNS:
            raise KeyError(name)
        if name not in self._unpacked:
            self._unpacked[name] = self._integers(name)
        return self._unpacked[name]

    def texts(self, name: str) -> list[str]:
        """Return a text column: a value per entry, or for masked forms per entry that tripped a limit."""
        if name not in BYTES_COLUMNS or name == "payload":
            raise KeyError(name)
        return self._guarded(name, unpack_texts)

    def raw_texts(self, name: str) -> tuple[NDArray[np.int64], bytes]:
        """Return the lengths in bytes and the UTF-8, end to end, of a text column with a value per entry."""
        values: tuple[NDArray[np.int64], bytes] = self._guarded(name, checked_texts)
        return values

    def payloads(self) -> list[bytes]:
        """Return the compact events of the deferred entries, in order."""
        return self._guarded("payload", unpack_bytes)

    def rows(self) -> Iterator[tuple[int, Position, Entry]]:
        """Return an iterator over ``(seq, position, entry)``. Every column is checked before the first one comes."""
        positions = [self.integers(name).tolist() for name in ("at", "at_seq", "index")]
        entries = [
            self.texts("event"),
            [self.kinds[code] for code in self.integers("kind").tolist()],
            self.texts("member"),
            [OUTCOMES[code] for code in self.integers("outcome").tolist()],
            self.integers("ts").tolist(),
            self.integers("day").tolist(),
            [None if amount < 0 else amount for amount in self.integers("amount").tolist()],
            self.texts("order"),
            self.integers("base").tolist(),
            self.integers("uncapped").tolist(),
            self.integers("points").tolist(),
            [self.campaign_sets[code] for code in self.integers("campaign_set").tolist()],
            [CAUSES[code] for code in self.integers("cause").tolist()],
            self.integers("frozen").astype(bool).tolist(),
            self._evidence(),
            list(zip(*(self.integers(name).tolist() for name in ("device", "ip", "phone")), strict=True)),
            self._masked(),
            self._payload_of_each(),
        ]
        return zip(count(self.header.first_seq), map(Position, *positions), map(Entry, *entries), strict=False)

    def _evidence(self) -> list[tuple[tuple[str, int], ...]]:
        tripped = self.integers("tripped")
        observed = iter(self.integers("observed").tolist())
        evidence: list[tuple[tuple[str, int], ...]] = [()] * len(tripped)
        for row in np.flatnonzero(tripped).tolist():
            mask = int(tripped[row])
            limits = (limit for number, limit in enumerate(self.limits) if mask >> number & 1)
            evidence[row] = tuple((limit, next(observed)) for limit in limits)
        return evidence

    def _masked(self) -> list[tuple[str, str, str]]:
        masked = [("", "", "")] * self.header.counts.entries
        texts = (self.texts(name) for name in ("device_masked", "ip_masked", "phone_masked"))
        rows = np.flatnonzero(self.integers("tripped")).tolist()
        for row, device, ip, phone in zip(rows, *texts, strict=True):
            masked[row] = (device, ip, phone)
        return masked

    def _payload_of_each(self) -> list[bytes]:
        payloads = [b""] * self.header.counts.entries
        rows = np.flatnonzero(self.integers("outcome") == DEFERRED).tolist()
        for row, payload in zip(rows, self.payloads(), strict=True):
            payloads[row] = payload
        return payloads

    def _integers(self, name: str) -> NDArray[Any]:
        values = self._guarded(name, unpack_integers)
        if name in UNSIGNED_COLUMNS:
            values = values.view(np.uint64)
        lowest, highest = self._range(name)
        if len(values) and not (lowest <= int(values.min()) and int(values.max()) <= highest):
            found = f"values from {values.min()} to {values.max()}"
            raise LedgerError(f"batch {self.batch}: column {name}: {found}, where {lowest} to {highest} are possible")
        return values

    def _range(self, name: str) -> tuple[int, int]:
        if name == "kind":
            return 0, len(self.kinds) - 1
        if name == "campaign_set":
            return 0, len(self.campaign_sets) - 1
        if name == "tripped":
            return 0, 2 ** len(self.limits) - 1
        return RANGES.get(name, (-(2**63), 2**64 - 1))

    def _guarded(self, name: str, unpack: Callable[[Any, int], ValueT]) -> ValueT:
        try:
            return unpack(getattr(self._columns, name), self._count(name))
        except ValueError as error:
            raise LedgerError(f"batch {self.batch}: column {name}: {error}") from None

    def _count(self, name: str) -> int:
        """Return how many values a column has."""
        if name == "observed":
            return int(np.bitwise_count(self.integers("tripped")).sum(dtype=np.int64))
        if name.endswith("_masked"):
            return int(np.count_nonzero(self.integers("tripped")))
        if name == "payload":
            return int(np.count_nonzero(self.integers("outcome") == DEFERRED))
        return self.header.counts.entries
