"""How far the ledger of a partition is safe: nothing is booked that the stream server could still lose.

=================== =====================================================================================
the server says      a batch is safe
=================== =====================================================================================
``appendfsync``      as soon as it can be read: the server answers nobody before what it answers is on disk
``always``
AOF, otherwise       once it has been there for ``FLUSH_S`` and the server has no write to the disk outstanding or
                     failed (``everysec`` writes each second; ``WAITAOF`` is not in Redis 7.0, and may answer early)
no AOF               never: a server that keeps nothing on disk promises nothing. Its ledger is booked as it is read,
                     with a warning; ``require_durable`` refuses instead
=================== =====================================================================================

A replica's data is not looked at: what failovers lose is in docs/DURABILITY.md. If the ledger is ever found to end
before what is booked, the book stops and says so.
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

log = logging.getLogger("accrual.book")


class Durability:
    """Tells up to which batch the ledger behind ``client`` is safe. Raises ``UnsafeServer`` where it never is."""

    def __init__(self, client: redis.Redis, *, require_durable: bool) -> None:
        self._client = client
        self._policy = self._read_policy()
        self._seen: list[tuple[float, int]] = []
        self._safe = 0
        if self._policy == "none":
            if require_durable:
                raise UnsafeServer("the server has appendonly off: what is booked from it could be lost there")
            log.warning("the server has appendonly off: should it lose its ledger, the book will contradict it")

    def safe_batch(self, last: int) -> int:
        """Return the number of the last batch that is safe, where ``last`` is there to be read now."""
        if self._policy in ("always", "none"):
            return last
        now_s = time.monotonic()
        if not self._seen or self._seen[-1][1] != last:
            self._seen.append((now_s, last))
        flushed = [batch for seen_s, batch in self._seen if seen_s + FLUSH_S <= now_s]
        if flushed and self._is_flushed():
            self._safe = flushed[-1]
            self._seen = self._seen[len(flushed) - 1 :]
        return self._safe

    def _read_policy(self) -> str:
        """Return ``always``, ``none``, or ``flushed`` for anything between them, also where we may not ask."""
        persistence: Any = self._client.info("persistence")
        if not persistence.get("aof_enabled"):
            return "none"
        try:
            policy: Any = self._client.config_get("appendfsync")
        except redis.ResponseError:
            return "flushed"
        return "always" if policy.get("appendfsync", policy.get(b"appendfsync")) in ("always", b"always") else "flushed"

    def _is_flushed(self) -> bool:
        persistence: Any = self._client.info("persistence")
        return persistence.get("aof_last_write_status", "ok") == "ok" and not persistence.get(
            "aof_pending_bio_fsync", 0
        )
