"""Local dates and times of a programme's zone, exact for every time an event may carry (SPEC sections 1 to 3).

The zone's rules come from the ``tzdata`` package, never from the machine, so that two machines with the same lock file
decide alike. A *day number* counts local dates from 1970-01-01, which is day 0.
"""

from __future__ import annotations

import functools
import importlib.resources
from bisect import bisect_left
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from typing import Final
from zoneinfo import ZoneInfo

__all__ = ["DAY_MS", "Calendar", "day_number", "day_text", "is_zone"]

DAY_MS: Final = 86_400_000
MINUTE_MS: Final = 60_000
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_EPOCH_ORDINAL: Final = date(1970, 1, 1).toordinal()

# The calendar and every zone's standing rule repeat after 400 years, so a time beyond FOLD_END_MS has the offset of
# the time that many cycles earlier. No zone has an irregular transition after FOLD_START_MS.
CYCLE_MS: Final = 146_097 * DAY_MS
CYCLE_YEARS: Final = 400
FOLD_START_MS: Final = (date(2100, 1, 1).toordinal() - _EPOCH_ORDINAL) * DAY_MS
FOLD_END_MS: Final = FOLD_START_MS + CYCLE_MS
_DAILY_SAMPLES_END_MS: Final = (date(2040, 1, 1).toordinal() - _EPOCH_ORDINAL) * DAY_MS


@functools.cache
def _zone_names() -> frozenset[str]:
    # `Factory` is the zone of a machine that has not been given one.
    return frozenset(importlib.resources.files("tzdata").joinpath("zones").read_text().split()) - {"Factory"}


def is_zone(name: str) -> bool:
    """Tell whether ``name`` is an IANA zone."""
    return name in _zone_names()


@functools.cache
def _zone(name: str) -> ZoneInfo:
    with importlib.resources.files("tzdata").joinpath("zoneinfo", *name.split("/")).open("rb") as file:
        return ZoneInfo.from_file(file, key=name)


def fold(time_ms: int) -> int:
    """Return the time with the same local clock within the range that ``datetime`` and the tables cover."""
    if time_ms < FOLD_END_MS:
        return time_ms
    return FOLD_START_MS + (time_ms - FOLD_START_MS) % CYCLE_MS


class Calendar:
    """The local calendar of one IANA zone. Raises ``KeyError`` for an unknown zone."""

    def __init__(self, zone_name: str) -> None:
        if not is_zone(zone_name):
            raise KeyError(zone_name)
        self.zone_name = zone_name
        self._zone = _zone(zone_name)

    def offset_ms(self, time_ms: int) -> int:
        """Return the zone's offset from UTC at ``time_ms``, in ms."""
        offset = (_EPOCH + timedelta(milliseconds=fold(time_ms))).astimezone(self._zone).utcoffset()
        assert offset is not None
        return offset // timedelta(milliseconds=1)

    def local(self, time_ms: int) -> tuple[int, int]:
        """Return the local day number and the minute of that day (0..1439)."""
        day, within_ms = divmod(time_ms + self.offset_ms(time_ms), DAY_MS)
        return day, within_ms // MINUTE_MS

    def day(self, time_ms: int) -> int:
        """Return the local day number of ``time_ms``: its business day."""
        return self.local(time_ms)[0]

    def start_ms(self, day: int) -> int:
        """Return when the local day number ``day`` begins, in ms: where the clock skips midnight, at a later time."""
        around = range((day - 1) * DAY_MS, (day + 1) * DAY_MS + 1)
        return around[bisect_left(around, day, key=self.day)]

    def transitions(self) -> list[tuple[int, int]]:
        """Return ``(from_ms, offset_ms)`` rows, ascending, the first from 0, valid up to ``FOLD_END_MS``."""
        return _transitions(self.zone_name)


@functools.cache
def _transitions(zone_name: str) -> list[tuple[int, int]]:
    calendar = Calendar(zone_name)
    samples = [*range(0, _DAILY_SAMPLES_END_MS, DAY_MS), *range(_DAILY_SAMPLES_END_MS, FOLD_END_MS, 6 * DAY_MS)]
    rows = [(0, calendar.offset_ms(0))]
    for earlier, later in pairwise([*samples, FOLD_END_MS - 1]):
        offset_ms = calendar.offset_ms(later)
        if offset_ms != rows[-1][1]:
            rows.append((_first_with(calendar, offset_ms, earlier, later), offset_ms))
    return rows


def _first_with(calendar: Calendar, offset_ms: int, before: int, after: int) -> int:
    """Bisect for the first time in ``before..after`` that has ``offset_ms``."""
    while after - before > 1:
        middle = (before + after) // 2
        if calendar.offset_ms(middle) == offset_ms:
            after = middle
        else:
            before = middle
    return after


def day_number(local_date: date) -> int:
    """Return the day number of a date."""
    return local_date.toordinal() - _EPOCH_ORDINAL


def day_text(day: int) -> str:
    """Return a day number as ``YYYY-MM-DD``; years beyond 9999 have as many digits as they need."""
    cycles = max(0, day * DAY_MS - FOLD_START_MS) // CYCLE_MS
    folded = date.fromordinal(day - cycles * (CYCLE_MS // DAY_MS) + _EPOCH_ORDINAL)
    return f"{folded.year + cycles * CYCLE_YEARS:04d}-{folded.month:02d}-{folded.day:02d}"


def day_of_week(day: int) -> int:
    """Return the weekday of a day number: 0 is Monday."""
    return (day + 3) % 7


def day_of_month(day: int) -> int:
    """Return the day of the month (1..31) of a day number."""
    return int(day_text(day)[-2:])
