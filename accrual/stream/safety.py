"""Whether a server may be trusted with a ledger: asked before anything is written, and now and then for as long."""

from __future__ import annotations

from typing import Any, Final

import redis
import redis.asyncio

from accrual.errors import UnsafeServer

__all__ = ["check_eviction", "check_server"]

OLDEST_VERSION: Final = (7, 0)


async def check_server(client: redis.asyncio.Redis) -> list[str]:
    """Return what an operator should know of the server, as sentences.

    Raises ``UnsafeServer`` where the server could evict what was committed, is a replica, or is too old.
    """
    try:
        information: dict[str, Any] = await client.info("all")
    except (redis.exceptions.NoPermissionError, redis.ResponseError) as error:
        return [f"the server does not say how it is configured ({error}): make sure that it evicts nothing"]
    # Valkey says in this field which version of Redis it is compatible with.
    version = str(information.get("redis_version", ""))
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < OLDEST_VERSION:
        raise UnsafeServer(f"the server has version {version or 'unknown'}, and 7.0 is the oldest that will do")
    if information.get("role", "master") != "master":
        raise UnsafeServer("the server is a replica: give the address of its master, or of Sentinel")
    _check_policy(information)
    if not information.get("aof_enabled", 1):
        return ["the server keeps no append-only file: if it dies, what it had not saved is gone (appendonly yes)"]
    return []


async def check_eviction(client: redis.asyncio.Redis) -> None:
    """Check that the server still evicts nothing: an operator or a failover may have changed that.

    Raises ``UnsafeServer``.
    """
    try:
        information: dict[str, Any] = await client.info("memory")
    except redis.exceptions.NoPermissionError:
        return
    _check_policy(information)


def _check_policy(information: dict[str, Any]) -> None:
    policy = information.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        raise UnsafeServer(
            f"the server's maxmemory-policy is {policy}, so it may evict the ledger: set it to noeviction"
        )
