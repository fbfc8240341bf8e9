"""What a worker tells of itself: one line a second on a terminal, or every ten seconds in a log."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections import Counter
from typing import Final, NoReturn, TextIO

from accrual.engine import Batch
from accrual.errors import MemoryLimitReached
from accrual.stream import Checkpoint, Commit

__all__ = ["Progress", "live_stream"]

log = logging.getLogger("accrual.worker")

LIVE_INTERVAL_S: Final = 1.0
LOG_INTERVAL_S: Final = 10.0


class Progress:
    """Counts of one worker's run, and the lines that show them.

    ``live`` is where a line per second goes, on a terminal over the one before it; without it the log has a line for
    every ten seconds in which something was committed. ``trouble`` is what keeps the worker from working, if something
    does.
    """

    def __init__(self, live: TextIO | None) -> None:
        self._live = live
        self._on_terminal = live is not None and live.isatty()
        self._started_s = time.monotonic()
        self._shown_s = self._started_s
        self._latencies_s: list[float] = []
        self._interval_events = 0
        self._interval_batches = 0
        self._warned_of_removal = False
        self.trouble = ""
        self.doing = "recovering"
        self.events = 0
        self.batches = 0
        self.outcomes: Counter[str] = Counter()
        self.points: Counter[str] = Counter()
        self.consumed = 0
        self.added = 0

    def start_from(self, checkpoint: Checkpoint) -> None:
        """Start counting at ``checkpoint``."""
        self.consumed = checkpoint.stream_entries
        self.doing = "waiting for events"
        self._started_s = self._shown_s = time.monotonic()

    def decided(self, batch: Batch) -> None:
        """Take note of a decided batch."""
        self.outcomes.update(batch.outcomes)
        self.points.update(batch.points)
        self.outcomes["duplicate"] += batch.counts.duplicates
        self.outcomes["dead_letter"] += batch.counts.dead_letters

    def landed(self, commit: Commit, latency_s: float) -> None:
        """Take note of a commit that has landed, ``latency_s`` after it was decided."""
        events = commit.after.events - commit.before.events
        self.events += events
        self.batches += 1
        self._interval_events += events
        self._interval_batches += 1
        self._latencies_s.append(latency_s)
        self.consumed = commit.after.stream_entries

    def stream_size(self, added: int, removed: int) -> None:
        """Take note of how many entries the events stream has ever had, and how many of them were removed."""
        self.added = added
        if removed and not self._warned_of_removal:
            self._warned_of_removal = True
            log.warning(
                "%d entries were removed from the events stream behind the checkpoint: a restart without a snapshot "
                "from behind them will not be able to replay it",
                removed,
            )

    async def stand_still(self, error: MemoryLimitReached) -> NoReturn:
        """Say that nothing goes on, and why. Only a restart, or the end, ends it; heartbeats and commits go on."""
        log.error("%s", error)
        self.trouble = "MEMORY LIMIT REACHED, no input is taken"
        await asyncio.Event().wait()
        raise error

    @property
    def lag(self) -> int:
        """How many stream entries are there that were not consumed by a commit that has landed."""
        return max(0, self.added - self.consumed)

    async def show(self) -> NoReturn:
        """Show the figures at every interval."""
        interval_s = LIVE_INTERVAL_S if self._live is not None else LOG_INTERVAL_S
        while True:
            await asyncio.sleep(interval_s)
            if self._live is not None:
                end, start = ("", "\r\x1b[K") if self._on_terminal else ("\n", "")
                self._live.write(f"{start}{self._line_for_people()}{end}")
                self._live.flush()
            elif self._interval_batches or self.trouble:
                log.info("%s", self._line_for_logs())
            self._shown_s = time.monotonic()
            self._latencies_s.clear()
            self._interval_events = self._interval_batches = 0

    def finish(self) -> None:
        """Say in the log what the whole run did."""
        if self._live is not None and self._on_terminal:
            self._live.write("\n")
        duration_s = max(1e-9, time.monotonic() - self._started_s)
        outcomes = "".join(f" {name}={count}" for name, count in self.outcomes.items() if count)
        log.info(
            "total events=%d batches=%d seconds=%.1f events_per_s=%.0f lag=%d points_granted=%d%s",
            self.events,
            self.batches,
            duration_s,
            self.events / duration_s,
            self.lag,
            self.points["granted"],
            outcomes,
        )

    def _line_for_people(self) -> str:
        rate = self._interval_events / (time.monotonic() - self._shown_s)
        median_ms, worst_ms = self._latency_ms()
        outcomes = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in self.outcomes.items() if count)
        return " · ".join(
            (
                f"{self.events:,} events",
                f"{rate:,.0f}/s",
                f"lag {self.lag:,}",
                f"commit {median_ms:.1f} ms (at most {worst_ms:.1f})",
                self.trouble or outcomes or self.doing,
                f"{self.points['granted']:,} points granted",
            )
        )

    def _line_for_logs(self) -> str:
        rate = self._interval_events / (time.monotonic() - self._shown_s)
        median_ms, worst_ms = self._latency_ms()
        return (
            f"events={self.events} events_per_s={rate:.0f} lag={self.lag} batches={self.batches} "
            f"commit_median_ms={median_ms:.1f} commit_max_ms={worst_ms:.1f}"
            f"{' trouble=' + repr(self.trouble) if self.trouble else ''}"
        )

    def _latency_ms(self) -> tuple[float, float]:
        """Return the median and the longest time of this interval from a decision to its landing, in ms."""
        ordered = sorted(self._latencies_s) or [0.0]
        return 1000 * ordered[len(ordered) // 2], 1000 * ordered[-1]


def live_stream(wanted: bool | None) -> TextIO | None:
    """Return where live progress goes: stderr if it is ``wanted``, or if nothing was said and it is a terminal."""
    if wanted is None:
        wanted = sys.stderr.isatty()
    return sys.stderr if wanted else None
