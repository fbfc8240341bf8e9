"""The two data connections of a worker: one brings stream entries, one takes batches. Both are plain protocols."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, Protocol, cast

import hiredis

from accrual.errors import StreamError
from accrual.stream.replies import Reader
from accrual.stream.resp import Argument, command

__all__ = ["REPLY_TIMEOUT_S", "CommandConnection", "DataConnection", "ReadConnection", "Refused"]

CONNECTION_CLOSED: Final = "the server closed the connection"
REPLY_TIMEOUT_S: Final = 10.0


class Refused(StreamError):
    """The server answered with an error. ``code`` is its first word, such as ``OOM`` or ``NOSCRIPT``."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = message.partition(" ")[0]


class DataConnection(Protocol):
    """What a connection must offer to be opened: one command, one answer."""

    async def call(self, *arguments: Argument) -> Any:
        """Send a command and return its reply. Raises ``Refused``, or ``ConnectionError``."""

    def close(self) -> None:
        """Close the connection now."""


class _Transported:
    """Keeps the transport, and wakes the one coroutine that waits for a reply.

    A peer may disappear without a word: then nothing is ever lost, and nothing comes. So a connection is given up on
    which the server owes an answer and has been silent for ``patience_s``.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._heard = False
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._lost: str | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # The transports of uvloop are not derived from asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._lost = self._lost or str(error or CONNECTION_CLOSED)
        self._wake()

    def eof_received(self) -> bool:
        return False

    def send(self, pieces: Sequence[bytes]) -> None:
        """Write a command, given in pieces, without waiting for anything."""
        if self._transport is None or self._lost is not None:
            raise ConnectionError(self._lost or "not connected")
        self._transport.writelines(pieces)

    def close(self) -> None:
        """Close the connection now; what was not written yet is lost."""
        if self._transport is not None:
            self._transport.abort()

    def _give_up(self) -> None:
        self._lost = f"no answer for {self._patience_s:g} s"
        self.close()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait(self) -> None:
        """Wait until something has happened. Raises ``ConnectionError`` where nothing can happen any more."""
        if self._lost is not None:
            raise ConnectionError(self._lost)
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


class ReadConnection(_Transported, asyncio.BufferedProtocol):
    """Replies with stream entries, received straight into the memory of ``reader``.

    One reply is held at a time: after ``reply`` has returned, the reader has it until ``reader.clear()``, or for as
    long as it likes once ``receive_into`` has named another reader. The next command may be sent before that; its reply
    waits behind.
    """

    def __init__(self, reader: Reader, patience_s: float = REPLY_TIMEOUT_S) -> None:
        super().__init__(patience_s)
        self.reader = reader

    def get_buffer(self, sizehint: int) -> memoryview:
        """Hand out the reader's memory."""
        return self.reader.get_buffer(sizehint)

    def buffer_updated(self, nbytes: int) -> None:
        """Let the reader scan what came."""
        self._heard = True
        try:
            complete = self.reader.buffer_updated(nbytes)
        except ValueError as error:
            self._lost = str(error)
            self.close()
            complete = True
        if complete:
            self._wake()

    def receive_into(self, reader: Reader) -> None:
        """Leave the reply to its reader; ``reader`` receives what comes after it."""
        self.reader.pass_on(reader)
        self.reader = reader

    async def reply(self) -> str:
        """Wait for the next complete reply and return its kind. Raises ``ConnectionError``."""
        while True:
            kind = self.reader.kind
            if kind is not None:
                return kind
            self._heard = False
            try:
                async with asyncio.timeout(self._patience_s):
                    await self._wait()
            except TimeoutError:
                # A long reply over a slow line comes in many pieces.
                if not self._heard:
                    self._give_up()

    async def call(self, *arguments: Argument) -> bytes:
        """Send a command that has a plain answer, and return it."""
        self.send([command(*arguments)])
        kind, error, value = await self.reply(), self.reader.error, self.reader.value
        self.reader.clear()
        if kind == "error":
            raise Refused(error)
        return value


class CommandConnection(_Transported, asyncio.Protocol):
    """Small replies to large commands, in order."""

    def __init__(self, patience_s: float = REPLY_TIMEOUT_S) -> None:
        super().__init__(patience_s)
        self._parser = hiredis.Reader()
        self._replies: deque[Any] = deque()
        # How many answers are to come, and what is looked at while there are any.
        self._owed = 0
        self._unwritten_bytes = 0
        self._watch: asyncio.TimerHandle | None = None

    def send(self, pieces: Sequence[bytes]) -> None:
        """Write a command, given in pieces, without waiting for anything."""
        super().send(pieces)
        self._owed += 1
        if self._watch is None:
            self._look_later()

    def connection_lost(self, error: Exception | None) -> None:
        """Take note that the connection has ended; what it was given up for stays the reason."""
        if self._watch is not None:
            self._watch.cancel()
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        """Take in what came."""
        self._heard = True
        self._parser.feed(data)
        try:
            while (reply := self._parser.gets()) is not False:
                self._replies.append(reply)
                self._owed -= 1
        except hiredis.ProtocolError as error:
            self._lost = str(error)
            self.close()
        self._wake()

    async def reply(self) -> Any:
        """Wait for the next reply and return it. Raises ``Refused``, or ``ConnectionError``."""
        while not self._replies:
            await self._wait()
        reply = self._replies.popleft()
        if isinstance(reply, hiredis.ReplyError):
            raise Refused(str(reply))
        return reply

    async def call(self, *arguments: Argument) -> Any:
        """Send a command and return its reply; no other reply may be on its way."""
        self.send([command(*arguments)])
        return await self.reply()

    def _look_later(self) -> None:
        assert self._transport is not None
        self._heard = False
        self._unwritten_bytes = self._transport.get_write_buffer_size()
        self._watch = asyncio.get_running_loop().call_later(self._patience_s, self._look)

    def _look(self) -> None:
        """Give the connection up if an answer is owed and nothing has moved since the last look, in or out."""
        assert self._transport is not None
        self._watch = None
        if not self._owed:
            return
        if self._heard or self._transport.get_write_buffer_size() < self._unwritten_bytes:
            self._look_later()
        else:
            self._give_up()
