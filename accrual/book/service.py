"""``accrual book`` as it runs: connected to both sides, and again when one of them went away."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Final

import psycopg
import redis

from accrual.book.database import open_book
from accrual.book.follow import GROUP_ENTRIES, Follower, follow
from accrual.errors import BookError
from accrual.settings import Settings
from accrual.stream import StreamServer, partition_names

__all__ = ["BookService", "run_again"]

FIRST_PAUSE_S: Final = 0.1

# What a server says while it is away, full, a replica, unable to save, short of replicas, or busy.
PASSING: Final = (redis.ConnectionError, redis.TimeoutError, redis.OutOfMemoryError, redis.ReadOnlyError)
PASSING_CODES: Final = frozenset({"MISCONF", "NOREPLICAS", "BUSY"})
# In redis-py these are connection errors, but no further attempt changes them.
LASTING: Final = (redis.AuthenticationError, redis.exceptions.AuthorizationError)

log = logging.getLogger("accrual.book")


class BookService:
    """Posts the ledgers of the partitions in ``settings.partition`` (one name, or several with commas between).

    A server or database that is away is waited for, unless it is only to ``drain``; then, as with everything that
    waiting cannot mend, the error is raised.
    """

    def __init__(self, settings: Settings, *, drain: bool) -> None:
        self._settings = settings
        self._drain = drain
        self._partitions = partition_names(settings.partition)

    def run(self, stopping: threading.Event) -> None:
        """Run until ``stopping`` is set, or until all is drained."""
        work = functools.partial(self._follow, self._partitions, stopping)
        if self._drain:
            work()
        else:
            run_again(work, stopping, longest_pause_s=self._settings.backoff_limit_ms / 1000)

    def _follow(self, partitions: Sequence[str], stopping: threading.Event) -> None:
        with ExitStack() as opened:
            client = opened.enter_context(StreamServer(self._settings.redis).client())
            followers = []
            for name in partitions:
                connection = opened.enter_context(open_book(self._settings.database))
                follower = Follower(
                    connection,
                    client,
                    name,
                    require_durable=self._settings.require_durable,
                    group_entries=GROUP_ENTRIES // len(partitions),
                )
                followers.append(opened.enter_context(follower))
            follow(followers, stopping, drain=self._drain)


def run_again(work: Callable[[], None], stopping: threading.Event, *, longest_pause_s: float) -> None:
    """Do ``work`` until it ends, again whenever a server refuses for now or went away, or until ``stopping`` is set.

    Raises what waiting cannot mend.
    """
    pause_s = FIRST_PAUSE_S
    while not stopping.is_set():
        try:
            work()
        except (redis.RedisError, BookError) as error:
            if not _may_pass(error):
                raise
            log.warning("%s; trying again", " ".join(str(error).split()))
            stopping.wait(pause_s)
            pause_s = min(2 * pause_s, longest_pause_s)
        else:
            return


def _may_pass(error: Exception) -> bool:
    if isinstance(error, BookError):
        return isinstance(error.__cause__, psycopg.OperationalError)
    if isinstance(error, LASTING):
        return False
    return isinstance(error, PASSING) or str(error).partition(" ")[0] in PASSING_CODES
