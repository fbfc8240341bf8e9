"""The producer's own connection to the stream server, and which of the server's refusals pass."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

from redis import exceptions
from redis.asyncio import Redis

from accrual.stream.server import StreamServer

__all__ = ["Command", "Link", "Refusal", "Server", "may_pass"]

# A URL, a client, or what makes one (a Sentinel's master, say) in the thread that will use it.
Server: TypeAlias = "str | Redis | Callable[[], Redis]"
Command: TypeAlias = tuple[str | bytes | int, ...]
Refusal: TypeAlias = exceptions.ResponseError

# What a server says while it is full, starting, a replica, unable to save, busy, or short of replicas.
_PASSING_CLASSES: Final = (
    exceptions.OutOfMemoryError,
    exceptions.ReadOnlyError,
    exceptions.ClusterDownError,
    exceptions.TryAgainError,
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    OSError,
)
_PASSING_CODES: Final = ("MISCONF", "BUSY", "NOREPLICAS", "UNBLOCKED", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN")
# In redis-py these are connection errors, but no further attempt changes them.
_LASTING_CLASSES: Final = (exceptions.AuthenticationError, exceptions.AuthorizationError)


def may_pass(error: Exception) -> bool:
    """Tell whether trying again may help: the server is away or full for now, rather than refusing us."""
    if isinstance(error, _LASTING_CLASSES) or isinstance(error.__context__, ssl.SSLCertVerificationError):
        return False
    if isinstance(error, _PASSING_CLASSES) or str(error).partition(" ")[0] in _PASSING_CODES:
        return True
    return "cannot be used with replica" in str(error)  # WAIT and WAITAOF after a failover


class Link:
    """One connection, made when it is needed and given up at the first doubt.

    ``session`` numbers the connections from 1: no reply will come any more to what was written in an earlier
    one, and ``WAIT`` and ``WAITAOF`` of this one do not speak for it.
    """

    def __init__(self, server: Server) -> None:
        self.session = 1
        self._server = server
        self._client = _client_of(server) if isinstance(server, str) else None
        self._connection: Any = None

    async def exchange(self, commands: Sequence[Command], timeout_s: float) -> list[Any]:
        """Send ``commands`` together and return one reply each: a value, or the server's ``Refusal``.

        Raises what redis-py raises, or ``TimeoutError``, where no complete answer came; that ends the
        session.
        """
        try:
            async with asyncio.timeout(timeout_s):
                connection = await self._connected()
                await connection.send_packed_command(connection.pack_commands(commands), check_health=False)
                return [await self._reply(connection, timeout_s) for _ in commands]
        except TimeoutError:
            await self.drop()
            raise TimeoutError(f"no complete answer within {timeout_s:.3f} s") from None
        except RuntimeError as error:
            # What uvloop says where a connection ends while it is written to.
            await self.drop()
            raise ConnectionError(str(error)) from error
        except BaseException:
            await self.drop()
            raise

    async def drop(self) -> None:
        """End the session."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self.session += 1
            with contextlib.suppress(exceptions.RedisError, OSError):
                await connection.disconnect(nowait=True)

    async def close(self) -> None:
        """End the session, and close the client if it was made here."""
        await self.drop()
        client, self._client = self._client, None
        if client is not None and client is not self._server:
            await client.aclose()

    async def _connected(self) -> Any:
        if self._connection is None:
            if self._client is None:
                self._client = _client_of(self._server)
            # Not one of the pool's connections: those may be shared, checked and replaced behind our back.
            self._connection = self._client.connection_pool.make_connection()
            await self._connection.connect()
        return self._connection

    async def _reply(self, connection: Any, timeout_s: float) -> Any:
        try:
            # The timeout around the whole exchange comes first; this one only replaces redis-py's default.
            return await connection.read_response(disable_decoding=True, timeout=timeout_s + 1)
        except exceptions.ResponseError as refusal:
            return refusal


def _client_of(server: Server) -> Redis:
    if isinstance(server, str):
        return StreamServer(server).async_client()
    return server if isinstance(server, Redis) else server()
