"""Following the ledgers of partitions: what is there and safe is posted, and where that falls behind it is said."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import takewhile
from typing import Final, Self

import redis

from accrual.book.database import Connection
from accrual.book.durability import Durability
from accrual.book.ingest import Book
from accrual.book.members import control_events
from accrual.book.rows import Group, group_of
from accrual.errors import StreamError
from accrual.ledger import Chain, EntriesBatch, LedgerReader, Link, RulebookRecord
from accrual.stream import Keys, checkpoint_of

__all__ = ["GROUP_ENTRIES", "Follower", "Pace", "follow"]

# What all partitions together make ready at once, which takes half a GiB of memory. The more entries share a
# transaction, the more of them meet in one page of an index, and in one balance.
GROUP_ENTRIES: Final = 262_144
GROUP_BATCHES: Final = 256
POLL_S: Final = 0.1
REPORT_S: Final = 5.0

log = logging.getLogger("accrual.book")


class Follower:
    """Posts the ledger of one partition as far as it is there and safe. ``book`` says how far it has come.

    With ``require_durable`` nothing is safe that is not on the server's disk. A transaction ends with the batch that
    brings it to ``group_entries``.
    """

    def __init__(
        self,
        connection: Connection,
        client: redis.Redis,
        partition: str,
        *,
        require_durable: bool = False,
        group_entries: int = GROUP_ENTRIES,
    ) -> None:
        self._client = client
        self._keys = Keys(partition)
        self._reader = LedgerReader(client, partition)
        self._durability = Durability(client, require_durable=require_durable)
        self._group_entries = group_entries
        self._pace = Pace(partition)
        self._thread = ThreadPoolExecutor(1, f"book {partition}")
        self._ahead: Future[Group | None] | None = None
        self.book = Book(connection, partition)

    def end(self) -> int:
        """Return the number of the ledger's last batch, of which the checkpoint knows: batches are large."""
        return checkpoint_of(self._client, self._keys).batch

    def step(self) -> bool:
        """Post one group of batches. Return whether there was one."""
        group = self._ahead.result() if self._ahead else self._group_after(self.book.link)
        self._ahead = None
        if group is None:
            self.book.flush()
            self._tell_pace(is_waiting=True)
            return False
        # The next group is made ready while the database is busy with this one.
        self._ahead = self._thread.submit(self._group_after, group.links[-1])
        self.book.post(group)
        self._tell_pace(is_waiting=False)
        return True

    def close(self) -> None:
        """Let the thread end that makes groups ready."""
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        """Return the follower; it is closed at the end of the block."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close it."""
        self.close()

    def _tell_pace(self, *, is_waiting: bool) -> None:
        next_seq, ledger_next_seq = self.book.link.next_seq, checkpoint_of(self._client, self._keys).next_seq
        if next_seq < ledger_next_seq:
            self._pace.behind(next_seq, ledger_next_seq, is_waiting=is_waiting)
        else:
            self._pace.caught_up()

    def _group_after(self, link: Link) -> Group | None:
        """Read what is there and safe behind ``link``, as much as one transaction should post."""
        checkpoint = checkpoint_of(self._client, self._keys)
        safe = self._durability.safe_batch(checkpoint.batch)
        if safe <= link.batch and (checkpoint.batch > link.batch or checkpoint.digest == link.digest):
            # Nothing is new and safe, and what is booked is not contradicted; nothing of the ledger need be read.
            return None
        batches: list[EntriesBatch | RulebookRecord] = []
        links: list[Link] = []
        chain = Chain(link)
        for batch in takewhile(lambda batch: batch.batch <= safe, self._reader.batches(chain=chain)):
            batches.append(batch)
            links.append(chain.link)
            if chain.link.next_seq - link.next_seq >= self._group_entries or len(batches) >= GROUP_BATCHES:
                break
        # What another server has in its place meanwhile is not what was found to be safe.
        if not batches or self._durability.has_changed():
            return None
        entries = [batch for batch in batches if isinstance(batch, EntriesBatch)]
        controls = control_events(self._client, self._keys, entries)
        return group_of(batches, links, controls, self.book.partition_id)


def follow(followers: Sequence[Follower], stopping: threading.Event, *, drain: bool) -> None:
    """Post until ``stopping`` is set; with ``drain``, until every ledger's end as found at the start is posted.

    At the end, and whenever there is nothing to do, all that was posted is on the database's disk.

    Raises what the server and the database raise: whoever calls decides what to try again.
    """
    ends = {follower: follower.end() for follower in followers}
    _refuse_shorter(followers, ends)
    while not stopping.is_set():
        waiting = [follower for follower in followers if not drain or follower.book.link.batch < ends[follower]]
        if not waiting:
            break
        # One group of each in turn, so that no partition waits for another to catch up.
        steps = [follower.step() for follower in waiting]
        if not any(steps):
            _refuse_shorter(waiting, ends if drain else {})
            stopping.wait(POLL_S)
    for follower in followers:
        follower.book.flush()


def _refuse_shorter(followers: Sequence[Follower], ends: dict[Follower, int]) -> None:
    for follower in followers:
        if follower.end() < max(follower.book.link.batch, ends.get(follower, 0)):
            raise StreamError(
                f"partition {follower.book.partition}: its ledger ends at batch {follower.end()}, but batch "
                f"{follower.book.link.batch} is booked: the server has lost what it had"
            )


class Pace:
    """Says how far behind the book is and when it will have caught up, while it takes longer than a moment."""

    def __init__(self, partition: str) -> None:
        self._partition = partition
        self._is_waiting = False
        self._since: tuple[float, int, int] | None = None

    def behind(self, next_seq: int, ledger_next_seq: int, *, is_waiting: bool) -> None:
        """Take note of where book and ledger are; ``is_waiting`` where the rest is not safe on the server's disk."""
        now_s = time.monotonic()
        if self._since is None or is_waiting != self._is_waiting:
            # What is always some moments behind, since it waits for the disk between two posts, need not be said.
            self._is_waiting, self._since = is_waiting, (now_s, next_seq, ledger_next_seq)
        began_s, posted_from, arrived_from = self._since
        elapsed_s = now_s - began_s
        if elapsed_s < REPORT_S:
            return
        self._since = now_s, next_seq, ledger_next_seq
        entries = ledger_next_seq - next_seq
        posted, arrived = (next_seq - posted_from) / elapsed_s, (ledger_next_seq - arrived_from) / elapsed_s
        if is_waiting:
            expected = "waiting for the server to write them to its disk"
        elif posted > arrived:
            expected = f"caught up in about {entries / (posted - arrived):.0f} s"
        else:
            expected = "falling behind"
        words = "partition %s: %d entries behind, %.0f entries/s posted, %.0f arriving, %s"
        log.info(words, self._partition, entries, posted, arrived, expected)

    def caught_up(self) -> None:
        """Take note that everything is posted."""
        self._since = None
