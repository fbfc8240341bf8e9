"""A book that is behind its ledger and catches up, while something else is measured, and how far behind it is.

`accrual book` starts on an empty book, with all of the ledger before it, and so has work as long as that takes. Both it
and PostgreSQL run wherever there is room, as they do on a machine that they share with the fast path.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, Self

import msgspec
import redis

from accrual.book import Connection
from accrual.embedded import EmbeddedDatabase, EmbeddedServer
from accrual.stream import checkpoint_of
from bench.book import new_book
from bench.report import Figure
from bench.running import KEYS, Service

__all__ = ["PACE_SAID", "Behind", "Mark", "Watch", "behind_of", "catching_up"]

SECOND_NS: Final = 1_000_000_000
# How often is looked where book and ledger are: two small questions, which nobody notices.
LOOK_S: Final = 0.1
START_TIMEOUT_S: Final = 60.0
POSITION: Final = "SELECT coalesce(max(next_seq), 1) FROM book.partitions"
PACE_SAID: Final = r"entries behind, .*"


class Mark(NamedTuple):
    """The next seq of the book, and that of the ledger, at a moment."""

    at_ns: int
    booked: int
    ledger: int

    @property
    def behind(self) -> int:
        """How many entries the book has not got."""
        return self.ledger - self.booked


class Behind(msgspec.Struct, frozen=True):
    """How far behind a book was during some loads, in entries, by load, and how many it posted a second."""

    name: str
    begin: Figure
    end: Figure
    least: Figure
    """0 where it was not behind all the while: then that load was not what it says it is."""
    booked: Figure


class Watch:
    """Looks now and then where the book is; ``marks`` has what was seen."""

    def __init__(self, connection: Connection, client: redis.Redis) -> None:
        self._connection = connection
        self._client = client
        self._begun, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.marks: list[Mark] = []

    def wait_until_booked(self) -> None:
        """Wait until something is in the book. Raises ``RuntimeError`` where it takes too long."""
        if not self._begun.wait(START_TIMEOUT_S):
            raise RuntimeError("nothing is booked")

    def between(self, begin_ns: int, end_ns: int) -> list[Mark]:
        """Return what was seen at those times, both included."""
        return [mark for mark in self.marks if begin_ns <= mark.at_ns <= end_ns]

    def _look(self) -> None:
        while not self._ended.wait(LOOK_S):
            (booked,) = self._connection.execute(POSITION).fetchone() or (1,)
            self.marks.append(Mark(time.monotonic_ns(), booked, checkpoint_of(self._client, KEYS).next_seq))
            if booked > 1:
                self._begun.set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()


@contextlib.contextmanager
def catching_up(server: EmbeddedServer, database: EmbeddedDatabase, number: int) -> Iterator[tuple[Watch, Service]]:
    """Have the ledger on ``server`` posted to a new book, number ``number``, for as long as the block lasts.

    It has posted something when the block begins.
    """
    with new_book(database, number) as connection:
        flags = ("--database", database.url_of(connection.info.dbname))
        with (
            Service("book", server.url, *flags, anywhere=True) as ingester,
            Watch(connection, server.client(protocol=2)) as watch,
        ):
            watch.wait_until_booked()
            yield watch, ingester
            ingester.end()


def behind_of(name: str, loads: Sequence[Sequence[Mark]]) -> Behind:
    """Return what the marks of each load say of the book. Raises ``RuntimeError`` where a load has none."""
    if not all(loads):
        raise RuntimeError(f"{name}: nobody has looked where the book is")
    return Behind(
        name=name,
        begin=_entries(f"{name}: behind at the begin", [marks[0].behind for marks in loads]),
        end=_entries(f"{name}: behind at the end", [marks[-1].behind for marks in loads]),
        least=_entries(f"{name}: least behind", [min(mark.behind for mark in marks) for marks in loads]),
        booked=Figure(f"{name}: booked", "entries/s", tuple(_posted_per_s(marks) for marks in loads)),
    )


def _entries(name: str, values: Sequence[int]) -> Figure:
    return Figure(name, "entries", tuple(map(float, values)))


def _posted_per_s(marks: Sequence[Mark]) -> float:
    """Return how many entries were posted a second, from one commit that was seen to another: they are large."""
    commits = [mark for before, mark in itertools.pairwise(marks) if mark.booked > before.booked]
    first, last = (commits[0], commits[-1]) if len(commits) > 1 else (marks[0], marks[-1])
    return (last.booked - first.booked) * SECOND_NS / max(1, last.at_ns - first.at_ns)
