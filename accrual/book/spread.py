"""Which lots points are taken out of that leave ``available`` (SPEC section 9): computed, and free of I/O."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from datetime import date
from typing import NamedTuple

__all__ = ["Leaving", "Lot", "Part", "spread"]


class Leaving(NamedTuple):
    """A move out of ``available``; ``own_day`` is the day of the lot that it takes first, if any."""

    place: int
    member: str
    own_day: date | None
    points: int


class Lot(NamedTuple):
    """What a member's lot of a day has."""

    member: str
    day: date
    points: int


class Part(NamedTuple):
    """What the move at ``place`` takes out of the lot of a day; ``None`` for what no lot covers."""

    place: int
    day: date | None
    points: int


def spread(moves: Iterable[Leaving], lots: Iterable[Lot]) -> Iterator[Part]:
    """Yield the parts of ``moves``, made one after the other; the lots of a member come by earliest expiry.

    A lot that is used up is passed over once, however many moves there are.
    """
    members: defaultdict[str, dict[date, int]] = defaultdict(dict)
    for member, day, points in lots:
        members[member][day] = points
    for place, member, own_day, points in moves:
        left = members[member]
        wanted = points
        while wanted and left:
            day = own_day if own_day is not None and own_day in left else next(iter(left))
            part = min(wanted, left[day])
            wanted -= part
            left[day] -= part
            if not left[day]:
                del left[day]
            yield Part(place, day, part)
        if wanted:
            yield Part(place, None, wanted)
