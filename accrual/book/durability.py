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
``require_durable`` that is refused too. A replica's data is not looked at: what failovers lose is in
docs/DURABILITY.md. If the ledger is ever found to end before what is booked, the book stops and says so.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Final

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


class Durability:
    """Tells up to which batch the ledger behind ``client`` is safe. Raises ``UnsafeServer`` where it never is."""

    def __init__(self, client: redis.Redis, *, require_durable: bool) -> None:
        self._client = client
        self._policy, self._pauses = self._read_policy()
        self._seen: list[tuple[float, int]] = []
        self._safe = 0
        doubt = DOUBTS.get(self._policy)
        if doubt is not None:
            if require_durable:
                raise UnsafeServer(f"{doubt}: what is booked from it could be lost there")
            log.warning("%s: should it lose its ledger, the book will contradict it", doubt)

    def safe_batch(self, last: int) -> int:
        """Return the number of the last batch that is safe, where ``last`` is there to be read now."""
        if self._policy in ("none", "no") or (self._policy == "always" and not self._pauses):
            return last
        now_s = time.monotonic()
        if not self._seen or self._seen[-1][1] != last:
            self._seen.append((now_s, last))
        persistence: Any = self._client.info("persistence")
        if self._pauses and _is_rewriting(persistence):
            # What was there already may not have been written either: all of it waits from the end of the rewrite on.
            self._seen = [(now_s, last)]
        flushed = [batch for seen_s, batch in self._seen if seen_s + FLUSH_S <= now_s]
        if flushed and _is_flushed(persistence):
            self._safe = flushed[-1]
            self._seen = self._seen[len(flushed) - 1 :]
        return self._safe

    def _read_policy(self) -> tuple[str, bool]:
        """Return ``appendfsync``, ``none`` without a file or ``unknown``, and whether rewrites put writing off."""
        persistence: Any = self._client.info("persistence")
        if not persistence.get("aof_enabled"):
            return "none", False
        try:
            found: Any = self._client.config_get("appendfsync", "no-appendfsync-on-rewrite")
        except redis.ResponseError:
            return "unknown", True
        said = {_text(name): _text(value) for name, value in found.items()}
        return said.get("appendfsync", "unknown"), said.get("no-appendfsync-on-rewrite") != "no"


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _is_rewriting(persistence: Any) -> bool:
    return bool(persistence.get("aof_rewrite_in_progress") or persistence.get("rdb_bgsave_in_progress"))


def _is_flushed(persistence: Any) -> bool:
    return persistence.get("aof_last_write_status", "ok") == "ok" and not persistence.get("aof_pending_bio_fsync", 0)
