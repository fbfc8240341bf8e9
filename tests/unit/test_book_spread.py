"""Points that leave ``available`` use up lots as if the moves were made one by one."""

from __future__ import annotations

import time
from collections import defaultdict
from datetime import date, timedelta

from hypothesis import given
from hypothesis import strategies as st

from accrual.book.spread import Leaving, Lot, Part, spread
from book_model import Account

FIRST = date(2026, 11, 1)

numbers = st.integers(0, 4)
moves = st.lists(st.tuples(st.sampled_from("ab"), st.none() | numbers, st.integers(1, 12)), max_size=12)
lots = st.dictionaries(st.tuples(st.sampled_from("ab"), numbers), st.integers(1, 20), max_size=8)


def day(number: int) -> date:
    return FIRST + timedelta(number)


@given(moves, lots)
def test_as_one_by_one(moves: list[tuple[str, int | None, int]], lots: dict[tuple[str, int], int]) -> None:
    accounts: defaultdict[str, Account] = defaultdict(Account)
    for (member, number), points in lots.items():
        accounts[member].lots[number] = points
    expected = [
        Part(place, None if number is None else day(number), points)
        for place, (member, own, wanted) in enumerate(moves)
        for number, points in accounts[member].leaving(wanted, own)
    ]
    leaving = [
        Leaving(place, member, None if own is None else day(own), wanted)
        for place, (member, own, wanted) in enumerate(moves)
    ]
    by_expiry = [Lot(member, day(number), points) for (member, number), points in sorted(lots.items())]
    assert list(spread(leaving, by_expiry)) == expected


def test_many_moves_take_as_long_as_their_number_says() -> None:
    """A hundred thousand of one member, on each of a thousand days in turn, half of whose points were spent."""
    moves = [Leaving(place, "m", day(place % 1000), 10) for place in range(100_000)]
    started_s = time.process_time()
    parts = list(spread(moves, [Lot("m", day(number), 500) for number in range(1000)]))
    assert time.process_time() - started_s < 5
    assert sum(part.points for part in parts if part.day is None) == 500_000
