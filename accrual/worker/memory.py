"""The memory limit: the state grows only where the most that it can need fits (docs/SNAPSHOTS.md)."""

from __future__ import annotations

import asyncio
from typing import Any

from accrual.engine import Engine
from accrual.errors import MemoryLimitReached
from accrual.events import MAXIMUM_TIME_MS
from accrual.rulebook import Rulebook
from accrual.stream import Reader

__all__ = ["MemoryLimit"]


class MemoryLimit:
    """What the state may take, in bytes; 0 is no limit.

    A replay asks it at the same places as the run that it repeats, about the same entries, and what the engine answers
    depends on nothing but what it has decided. So a state that was reached under a limit is reached again under it.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes

    def most_events(self, reader: Reader) -> int:
        """Return the most events that the reply in ``reader`` can hold; 0 where nobody need know."""
        return reader.most_events if self.limit_bytes else 0

    def leaves_room_beside(self, engine: Engine, reader: Reader, events: int) -> bool:
        """Tell whether there is room for the reply in ``reader`` and so many events besides.

        Then there is for the reply alone, so that a replay, which may have other batches beside it, need not ask.
        """
        return not self.limit_bytes or self.allows(engine, engine.headroom_bytes(reader.most_events + events))

    async def make_room(self, engine: Engine, reader: Reader) -> None:
        """Let ``engine`` have room for what the reply in ``reader`` can need, if need be by dropping what has expired.

        Nothing that a limit still counts is ever given up for it. Raises ``MemoryLimitReached`` where that is not
        enough; then nothing has been decided, and nothing is lost.
        """
        if self.leaves_room_beside(engine, reader, 0):
            return
        day = engine.rulebook.calendar.day(min(reader.first[0], MAXIMUM_TIME_MS))
        # There may be millions to drop, and the lease is to be renewed meanwhile.
        await asyncio.to_thread(engine.reclaim, day)
        if not self.leaves_room_beside(engine, reader, 0):
            raise self._reached(engine.memory_bytes, "no more input is taken")

    def check_adoption(self, engine: Engine, rulebook: Rulebook) -> None:
        """Raise ``MemoryLimitReached`` where ``engine`` cannot adopt ``rulebook``: it may have to move all records."""
        if self.limit_bytes and not self.allows(engine, engine.adoption_bytes(rulebook)):
            raise self._reached(engine.memory_bytes, f"rulebook {rulebook.version} cannot be adopted")

    def check_image(self, description: dict[str, Any]) -> None:
        """Raise ``MemoryLimitReached`` where the records of an image have no room, even without their index."""
        shape = description["shape"]
        least_bytes = shape["names_size"] + sum(stride * count for stride, count in shape["tables"])
        if self.limit_bytes and least_bytes > self.limit_bytes:
            raise self._reached(least_bytes, "the snapshot is not read")

    def allows(self, engine: Engine, more_bytes: int) -> bool:
        """Tell whether the state may grow by ``more_bytes``."""
        return not self.limit_bytes or engine.memory_bytes + more_bytes <= self.limit_bytes

    def _reached(self, memory_bytes: int, consequence: str) -> MemoryLimitReached:
        return MemoryLimitReached(
            f"memory limit reached: memory_bytes={memory_bytes} limit_bytes={self.limit_bytes}: {consequence}; "
            "give it more (memory_limit_bytes) and start again"
        )
