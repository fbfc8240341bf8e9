"""How far the ledger of a partition is safe: nothing is booked that the stream server could still lose.

=================== =====================================================================================
the server says      a batch is safe
=================== =====================================================================================
``appendfsync``      as soon as it can be read: the server answers nobody before what it answers is on disk
``always``
``everysec``         once it has been there for ``FLUSH_S`` and the server has no write to the disk outstanding or
                     failed (it writes each second; ``WAITAOF`` is not in Redis 7.0, and may answer early). With
                     ``no-appendfsync-on-rewrite yes`` also since the last rewrite ended, and so it is under
                     ``always`` then: while a child writes, the server writes nothing to the disk
``no``, or no AOF    never: a server that leaves it to the kernel when to write, or keeps nothing on disk, promises
                     nothing. Its ledger is booked as it is read, with a warning; ``require_durable`` refuses instead
=================== =====================================================================================

Where the server does not let us ask for its configuration it is taken for ``everysec``, with a warning; with
``require_durable`` that is refused too. It is asked again and again, since another server may have taken its place, or
somebody may have configured it anew; then all that was seen counts as new. A replica's data is not looked at: what
failovers lose is in docs/DURABILITY.md. If the ledger is ever found to end before what is booked, the book stops and
says so.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Final, NamedTuple

import redis

from accrual.errors import UnsafeServer

__all__ = ["Durability"]

# The server writes every second, puts it off for another while the disk is busy, and then stops answering.
FLUSH_S: Final = 2.1

# What a policy cannot promise; of the last two, what is meant is only known to whoever configured the server.
DOUBTS: Final = {
    "none": "the server has appendonly off",
    "no": "the server has appendfsync no, and may lose half a minute and more to a power cut",
    "unknown": "the server does not say what its appendfsync is (CONFIG GET)",
}

log = logging.getLogger("accrual.book")


class Standing(NamedTuple):
    """What a server says. ``server`` names the process and its data, both as long as they are the same.

    ``policy`` is ``appendfsync``, ``none`` without a file, or ``unknown``; ``pauses``: rewrites put writing off.
    """

    server: tuple[str, str]
    policy: str
    pauses: bool


class Durability:
    """Tells up to which batch the ledger behind ``client`` is safe. Raises ``UnsafeServer`` where it never is."""

    def __init__(self, client: redis.Redis, *, require_durable: bool) -> None:
        self._client = client
        self._require_durable = require_durable
        self._standing, _ = self._ask()
        self._begins_file = False
        self._seen: list[tuple[float, int]] = []
        self._safe = 0
        self._judge()

    def safe_batch(self, last: int) -> int:
        """Return the number of the last batch that is safe, where ``last`` is there to be read now."""
        standing, persistence = self._ask()
        if standing != self._standing:
            # A server that begins to keep a file has nothing in it before it has written all that it has.
            self._begins_file = standing.policy != "none" and self._standing.policy == "none"
            self._standing = standing
            self._judge()
            self._seen, self._safe = [], 0
            # `last` may be of the ledger that another server has.
            return 0
        if standing.policy in ("none", "no"):
            return last
        if self._begins_file:
            self._begins_file = _is_rewriting(persistence)
        waits = standing.pauses or self._begins_file
        if standing.policy == "always" and not waits:
            return last
        now_s = time.monotonic()
        if self._seen and last < self._seen[-1][1]:
            self._seen, self._safe = [], 0
        if not self._seen or self._seen[-1][1] != last:
            self._seen.append((now_s, last))
        if waits and _is_rewriting(persistence):
            # What was there already may not have been written either: all of it waits from the end of the rewrite on.
            self._seen = [(now_s, last)]
        flushed = [batch for seen_s, batch in self._seen if seen_s + FLUSH_S <= now_s]
        if flushed and _is_flushed(persistence):
            self._safe = flushed[-1]
            self._seen = self._seen[len(flushed) - 1 :]
        return self._safe

    def has_changed(self) -> bool:
        """Tell whether the server is another one than was asked last, so that what was read since may be its ledger."""
        return _server_of(self._client.info("server", "replication")) != self._standing.server

    def _judge(self) -> None:
        doubt = DOUBTS.get(self._standing.policy)
        if doubt is not None:
            if self._require_durable:
                raise UnsafeServer(f"{doubt}: what is booked from it could be lost there")
            log.warning("%s: should it lose its ledger, the book will contradict it", doubt)

    def _ask(self) -> tuple[Standing, Any]:
        """Return what the server says of itself, and of what is on its disk."""
        said: Any = self._client.info("server", "replication", "persistence")
        server = _server_of(said)
        if not said.get("aof_enabled"):
            return Standing(server, "none", False), said
        try:
            found: Any = self._client.config_get("appendfsync", "no-appendfsync-on-rewrite")
        except redis.ResponseError:
            return Standing(server, "unknown", True), said
        options = {_text(name): _text(value) for name, value in found.items()}
        pauses = options.get("no-appendfsync-on-rewrite") != "no"
        return Standing(server, options.get("appendfsync", "unknown"), pauses), said


def _server_of(said: Any) -> tuple[str, str]:
    return said["run_id"], said["master_replid"]


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _is_rewriting(persistence: Any) -> bool:
    names = ("aof_rewrite_in_progress", "aof_rewrite_scheduled", "rdb_bgsave_in_progress")
    return any(persistence.get(name) for name in names)


def _is_flushed(persistence: Any) -> bool:
    return persistence.get("aof_last_write_status", "ok") == "ok" and not persistence.get("aof_pending_bio_fsync", 0)
