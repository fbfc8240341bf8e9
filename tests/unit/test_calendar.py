"""Local days and minutes: the calendar against zoneinfo, and the compiled core against the calendar."""

from __future__ import annotations

import importlib.resources
from bisect import bisect_right
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from random import Random
from zoneinfo import ZoneInfo

import pytest

from accrual.engine import OFFLINE_SLACK_DAYS, Entry, StreamEntry, open_engine
from accrual.events import MAXIMUM_TIME_MS, Event, encode_compact
from accrual.rulebook import Calendar, day_number, day_text, parse
from accrual.rulebook.calendar import CYCLE_MS, DAY_MS, FOLD_END_MS, FOLD_START_MS, day_of_month, day_of_week

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
QUARTERS = 96

# Half-hour daylight saving, days that never were, offsets with seconds, winter time below standard time, Ramadan.
ODD_ZONES = [
    "Africa/Casablanca",
    "Africa/Monrovia",
    "America/Nuuk",
    "America/St_Johns",
    "America/New_York",
    "Antarctica/Troll",
    "Asia/Gaza",
    "Asia/Kathmandu",
    "Asia/Pyongyang",
    "Asia/Shanghai",
    "Australia/Lord_Howe",
    "Europe/Dublin",
    "Pacific/Apia",
    "Pacific/Chatham",
    "Pacific/Kiritimati",
    "Pacific/Kwajalein",
]


def zone(name: str) -> ZoneInfo:
    with importlib.resources.files("tzdata").joinpath("zoneinfo", *name.split("/")).open("rb") as file:
        return ZoneInfo.from_file(file, key=name)


def clock(time_ms: int, local: ZoneInfo) -> tuple[date, int]:
    """Return what a wall clock shows: the date, and the minute of the day."""
    shown = (EPOCH + timedelta(milliseconds=time_ms)).astimezone(local)
    return shown.date(), shown.hour * 60 + shown.minute


def around(times_ms: list[int]) -> list[int]:
    """Return times at, just before and some way off each of ``times_ms``, ascending."""
    steps_ms = (-DAY_MS, -3_600_000, -1_800_000, -1, 0, 1, 899_999, 900_000, 3_600_000, DAY_MS)
    near = {time_ms + step_ms for time_ms in times_ms for step_ms in steps_ms}
    return sorted(time_ms for time_ms in near if 0 < time_ms <= MAXIMUM_TIME_MS)


@pytest.mark.parametrize("name", ODD_ZONES)
def test_local_agrees_with_zoneinfo(name: str) -> None:
    calendar, local, random = Calendar(name), zone(name), Random(name)
    times_ms = [random.randrange(FOLD_END_MS) for _ in range(1000)]
    times_ms += around([from_ms for from_ms, _ in calendar.transitions()[:400]])
    for time_ms in times_ms:
        day, minute = calendar.local(time_ms)
        shown, shown_minute = clock(time_ms, local)
        assert (day, minute) == (day_number(shown), shown_minute)
        assert calendar.day(time_ms) == day
        assert day_text(day) == shown.isoformat()


@pytest.mark.parametrize("name", ODD_ZONES)
def test_transitions_agree_with_zoneinfo(name: str) -> None:
    local, random = zone(name), Random(name)
    rows = Calendar(name).transitions()
    starts_ms = [from_ms for from_ms, _ in rows]
    assert starts_ms[0] == 0
    assert starts_ms == sorted(set(starts_ms))
    assert starts_ms[-1] < FOLD_END_MS
    assert all(earlier[1] != later[1] for earlier, later in pairwise(rows))

    times_ms = [random.randrange(FOLD_END_MS) for _ in range(3000)]
    times_ms += range(0, 4_102_444_800_000, 5 * DAY_MS + 7_777_777)
    times_ms += [start_ms - 1 for start_ms in starts_ms[1:]] + starts_ms
    for time_ms in times_ms:
        offset = (EPOCH + timedelta(milliseconds=time_ms)).astimezone(local).utcoffset()
        assert timedelta(milliseconds=rows[bisect_right(starts_ms, time_ms) - 1][1]) == offset


@pytest.mark.parametrize("name", ODD_ZONES)
def test_everything_repeats_after_400_years(name: str) -> None:
    calendar, random = Calendar(name), Random(name)
    for _ in range(300):
        time_ms = FOLD_START_MS + random.randrange(CYCLE_MS)
        cycles = random.randrange(1, (MAXIMUM_TIME_MS - time_ms) // CYCLE_MS + 1)
        day, minute = calendar.local(time_ms)
        assert calendar.local(time_ms + cycles * CYCLE_MS) == (day + cycles * CYCLE_MS // DAY_MS, minute)


def quarter_rulebook(name: str) -> str:
    """Write a rulebook whose campaigns tell the quarter of an hour, by the clock of the zone, of every event."""
    parts = [f'[programme]\nname = "clock"\nversion = 1\ntimezone = "{name}"\nstacking = "max"\n']
    parts.append('[[earn]]\nkind = "tick"\npoints = 1\n')
    for quarter in range(QUARTERS):
        start, end = (f"{at // 4:02d}:{at % 4 * 15:02d}" for at in (quarter, (quarter + 1) % QUARTERS))
        parts.append(f'[[campaign]]\nid = "{start}"\nmultiplier = "1"\nkinds = ["tick"]\nhours = "{start}-{end}"\n')
    return "".join(parts)


def tick(number: int, time_ms: int) -> StreamEntry:
    event = Event(id=f"e{number}", kind="tick", member="m1", ts=time_ms)
    return StreamEntry(time_ms, number, ((b"e", encode_compact(event)),))


@pytest.mark.parametrize("name", ODD_ZONES)
def test_the_engines_read_the_same_clock(name: str) -> None:
    rulebook, calendar, random = parse(quarter_rulebook(name)), Calendar(name), Random(name)
    starts_ms = [from_ms for from_ms, _ in calendar.transitions()]
    chosen_ms = starts_ms[:20] + random.sample(starts_ms, min(40, len(starts_ms)))
    chosen_ms += [start_ms + 400 * CYCLE_MS for start_ms in starts_ms[-20:]]
    chosen_ms += [FOLD_START_MS, FOLD_END_MS, FOLD_END_MS + CYCLE_MS, MAXIMUM_TIME_MS]
    chosen_ms += [day * DAY_MS - calendar.offset_ms(day * DAY_MS) for day in random.sample(range(100_000_000), 20)]
    entries = [tick(number, time_ms) for number, time_ms in enumerate(around(chosen_ms))]
    decided = {
        engine: list(open_engine(engine, rulebook, slack_days=OFFLINE_SLACK_DAYS).decide_entries(entries).decisions())
        for engine in ("fast", "reference")
    }
    assert decided["fast"] == decided["reference"]
    for entry, (_, decision) in zip(entries, decided["fast"], strict=True):
        day, minute = calendar.local(entry.ms)
        assert isinstance(decision, Entry)
        assert (decision.outcome, decision.day) == ("granted", day)
        assert decision.campaigns == (f"{minute // 60:02d}:{minute % 60 // 15 * 15:02d}",)


def test_a_day_that_never_was() -> None:
    """Samoa moved across the date line at the end of 29 December 2011; the next day was the 31st."""
    calendar = Calendar("Pacific/Apia")
    midnight_ms = 1325239200000
    assert day_text(calendar.day(midnight_ms - 1)) == "2011-12-29"
    assert calendar.local(midnight_ms) == (day_number(date(2011, 12, 31)), 0)


def test_west_of_greenwich_the_epoch_is_the_day_before() -> None:
    assert Calendar("America/New_York").local(1) == (-1, 19 * 60)
    assert day_text(-1) == "1969-12-31"


@pytest.mark.parametrize("name", ["", "Asia/Peking", "../etc/passwd", "asia/shanghai", "Asia/Shanghai\n"])
def test_unknown_zones(name: str) -> None:
    with pytest.raises(KeyError):
        Calendar(name)


def test_day_text_up_to_the_year_9999() -> None:
    random, last = Random(1), day_number(date(9999, 12, 31))
    for day in [-1, 0, 59, last, *(random.randrange(-1, last) for _ in range(3000))]:
        expected = date(1970, 1, 1) + timedelta(days=day)
        assert day_text(day) == expected.isoformat()
        assert day_number(expected) == day
        assert day_of_week(day) == expected.weekday()
        assert day_of_month(day) == expected.day


def test_day_text_beyond_the_year_9999() -> None:
    last = day_number(date(9999, 12, 31))
    assert [day_text(last + step) for step in (0, 1, 60)] == ["9999-12-31", "10000-01-01", "10000-02-29"]
    assert day_text(100_000_000) == "275760-09-13"
    assert day_text(MAXIMUM_TIME_MS // DAY_MS) == "287396-10-12"


def test_months_stay_in_step_for_ever() -> None:
    """Across a turn of centuries far away, each day follows the one before."""
    first = 73_000_000
    for day in range(first, first + 1500):
        year, month, number = map(int, day_text(day).split("-"))
        next_year, next_month, next_number = map(int, day_text(day + 1).split("-"))
        if next_number != 1:
            assert (next_year, next_month, next_number) == (year, month, number + 1)
        else:
            assert (next_year, next_month) == ((year, month + 1) if month < 12 else (year + 1, 1))
            assert number >= 28
        assert day_of_week(day + 1) == (day_of_week(day) + 1) % 7


@pytest.mark.parametrize("name", ["Africa/Cairo", "America/Santiago", "America/Havana", "Asia/Beirut", *ODD_ZONES])
def test_a_day_begins_where_the_one_before_ends(name: str) -> None:
    calendar = Calendar(name)
    for day in range(day_number(date(2026, 1, 1)), day_number(date(2027, 1, 1))):
        start_ms = calendar.start_ms(day)
        assert (calendar.day(start_ms - 1), calendar.day(start_ms)) == (day - 1, day), day_text(day)


def test_a_day_that_the_clock_begins_at_one() -> None:
    skipped = Calendar("America/Santiago").start_ms(day_number(date(2026, 9, 6)))
    assert EPOCH + timedelta(milliseconds=skipped) == datetime(2026, 9, 6, 4, tzinfo=UTC)
