"""Where the stream server is: one URL, understood once, for the clients and for the data connections.

==============================================  ==========================================================
``redis://[user:password@]host[:port][/db]``     TCP
``rediss://...?ssl_ca_certs=ca.pem``             TLS; the options of redis-py apply
``unix:///path/to/socket[?db=n]``                a Unix socket
``sentinel://[user:password@]host[:port],.../service[/db]``
                                                 the master that Sentinel names; ``?ssl=true`` for TLS to it,
                                                 ``sentinel_username``, ``sentinel_password`` for Sentinel itself
==============================================  ==========================================================

``valkey://`` and ``valkeys://`` mean the same as ``redis://`` and ``rediss://``.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import Callable
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

import redis
import redis.asyncio
import redis.asyncio.sentinel
import redis.sentinel
from redis.backoff import NoBackoff
from redis.retry import Retry

from accrual.errors import UsageError
from accrual.stream.connections import REPLY_TIMEOUT_S, DataConnection

__all__ = ["StreamServer", "with_fields_in_order", "without_password"]

CONNECT_TIMEOUT_S: Final = 5.0
# How long a silent connection is before the system asks the peer for a sign of life, how often, and how many times.
KEEPALIVE: Final = (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
SENTINEL_PORT: Final = 26379
ALIASES: Final = {"valkey": "redis", "valkeys": "rediss"}

ConnectionT = TypeVar("ConnectionT", bound=DataConnection)


class StreamServer:
    """The server at ``url``. Raises ``UsageError`` for a URL that is none of the forms above."""

    def __init__(self, url: str) -> None:
        scheme = urlsplit(url).scheme
        if scheme in ALIASES:
            url = ALIASES[scheme] + url[len(scheme) :]
        self.url = url
        self.name = without_password(url)
        self._sentinel = _Sentinel(url) if scheme == "sentinel" else None
        # An address that cannot be understood should be told before anything is tried.
        try:
            # Never connected: it only knows what the URL says.
            self._template: Any = self.async_client().connection_pool.make_connection()
        except (ValueError, TypeError, redis.RedisError) as error:
            raise UsageError(f"{self.name}: is not the address of a server: {error}") from None

    def client(self) -> redis.Redis:
        """Return a client whose values are bytes; the caller closes it."""
        if self._sentinel is not None:
            return self._sentinel.client()
        return redis.Redis.from_url(self.url, **_client_options())

    def async_client(self) -> redis.asyncio.Redis:
        """Return an asyncio client whose values are bytes; the caller closes it.

        It does not retry by itself. Raises ``TimeoutError`` where the server is silent for too long.
        """
        if self._sentinel is not None:
            return self._sentinel.async_client()
        return _AsyncClient.from_url(self.url, **_async_options())

    async def connect(self, factory: Callable[[], ConnectionT]) -> ConnectionT:
        """Open a data connection: connected, authenticated, on its database.

        Raises ``OSError`` where the server cannot be reached, ``Refused`` where it does not want us.
        """
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            connection = await _open(factory, self._template, await self._address())
            try:
                for handshake in _handshake(self._template):
                    await connection.call(*handshake)
            except BaseException:
                connection.close()
                raise
        return connection

    async def _address(self) -> tuple[str, int] | str:
        if self._sentinel is not None:
            return await self._sentinel.master_address()
        path = getattr(self._template, "path", None)
        return str(path) if path else (self._template.host, self._template.port)


class _AsyncClient(redis.asyncio.Redis):
    """A client with a timeout around each whole command.

    Its own timeout (``socket_timeout``) goes through ``asyncio.wait_for``, which until Python 3.12 may swallow the
    cancellation of a task, and then nothing could stop a worker.
    """

    async def execute_command(self, *arguments: Any, **options: Any) -> Any:
        """Send a command and return its reply."""
        async with asyncio.timeout(REPLY_TIMEOUT_S):
            return await super().execute_command(*arguments, **options)  # type: ignore[no-untyped-call]


class _Sentinel:
    """The parts of a ``sentinel://`` URL."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        credentials, _, hosts = parts.netloc.rpartition("@")
        path = [unquote(piece) for piece in parts.path.split("/") if piece]
        if not hosts or len(path) not in (1, 2) or (len(path) == 2 and not path[1].isdigit()):
            raise UsageError(f"{without_password(url)}: must be sentinel://host[:port],.../service[/db]")
        options = dict(parse_qsl(parts.query))
        self.service = path[0]
        self.nodes = [_host_and_port(host) for host in hosts.split(",")]
        self.own = {
            name: options.pop(f"sentinel_{name}") for name in ("username", "password") if f"sentinel_{name}" in options
        }
        with_tls = options.pop("ssl", "").lower() in ("true", "1", "yes")
        self.master = _connection_options(with_tls, credentials, options, path[1] if len(path) == 2 else "0")

    def client(self) -> redis.Redis:
        sentinel: Any = redis.sentinel.Sentinel(self.nodes, sentinel_kwargs=self.own | _client_options())
        client: redis.Redis = sentinel.master_for(self.service, **self.master, **_client_options())
        return client

    def async_client(self) -> redis.asyncio.Redis:
        client: redis.asyncio.Redis = self._async_sentinel().master_for(
            self.service, redis_class=_AsyncClient, **self.master, **_async_options()
        )
        return client

    async def master_address(self) -> tuple[str, int]:
        sentinel = self._async_sentinel()
        try:
            host, port = await sentinel.discover_master(self.service)
        except redis.RedisError as error:
            raise ConnectionError(f"Sentinel: {error}") from error
        finally:
            for node in sentinel.sentinels:
                await node.aclose()
        return host, port

    def _async_sentinel(self) -> Any:
        return redis.asyncio.sentinel.Sentinel(self.nodes, sentinel_kwargs=self.own | _async_options())


def with_fields_in_order(client: redis.Redis) -> redis.Redis:
    """Return a client over the same connections whose ``xrange`` gives an entry's names and values as one flat list.

    Left to itself the client makes a mapping of them, and an entry may have one name twice.
    """
    plain = redis.Redis(connection_pool=client.connection_pool)
    plain.set_response_callback("XRANGE", lambda reply, **_: reply)
    return plain


def without_password(url: str) -> str:
    """Return ``url`` as it may be shown: without passwords."""
    url = re.sub(r"(?<=//)([^/?@]*):[^/?]*(?=@)", r"\1:***", url)
    return re.sub(r"(?<=password=)[^&]*", "***", url)


def _client_options() -> dict[str, Any]:
    # RESP 2 is the same on every server and in every version of redis-py.
    return {"protocol": 2, "socket_connect_timeout": CONNECT_TIMEOUT_S, "socket_timeout": REPLY_TIMEOUT_S}


def _async_options() -> dict[str, Any]:
    # Where a command fails the worker must know at once; it decides itself what to try again.
    return _client_options() | {"socket_timeout": None, "retry": Retry(NoBackoff(), 0)}


def _host_and_port(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise UsageError(f"{text!r} is not host[:port]")
    return parts.hostname, parts.port or SENTINEL_PORT


def _connection_options(with_tls: bool, credentials: str, options: dict[str, str], database: str) -> dict[str, Any]:
    """Return what redis-py understands of the options of a ``sentinel://`` URL."""
    scheme = "rediss" if with_tls else "redis"
    separator = "@" if credentials else ""
    url = f"{scheme}://{credentials}{separator}master/{quote(database)}?{urlencode(options)}"
    understood: dict[str, Any] = redis.connection.parse_url(url)
    for name in ("host", "port", "connection_class"):
        understood.pop(name, None)
    return understood | ({"ssl": True} if with_tls else {})


async def _open(factory: Callable[[], ConnectionT], template: Any, address: tuple[str, int] | str) -> ConnectionT:
    loop = asyncio.get_running_loop()
    protocol: Any = factory
    if isinstance(address, str):
        _, connection = await loop.create_unix_connection(protocol, address)
        return connection  # type: ignore[no-any-return]
    host, port = address
    context: ssl.SSLContext | None = template.ssl_context.get() if hasattr(template, "ssl_context") else None
    transport, connection = await loop.create_connection(
        protocol, host, port, ssl=context, server_hostname=host if context else None
    )
    _keep_alive(transport.get_extra_info("socket"))
    return connection  # type: ignore[no-any-return]


def _keep_alive(own: socket.socket) -> None:
    """Let the system find out that the peer has disappeared, also where no answer is waited for."""
    own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE:
        # Not every system has them.
        if hasattr(socket, name):
            own.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _handshake(template: Any) -> list[tuple[str, ...]]:
    """Return the commands that make a new connection ours."""
    commands: list[tuple[str, ...]] = []
    if template.password:
        user = (template.username,) if template.username else ()
        commands.append(("AUTH", *user, template.password))
    if template.db:
        commands.append(("SELECT", str(template.db)))
    return commands
