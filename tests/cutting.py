"""A network that is cut at a chosen step: between two bytes of a command, or of its reply.

Commands are counted, so a step is the same one in every run: "the third commit, half of its bytes sent". At the step
everything stops, in both directions and on all connections, and the test does what it came for: it kills the worker, or
the server. What has reached the server by then was executed; nothing comes after it.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final, Literal, NamedTuple

from accrual.stream import COMMIT
from accrual.stream.scripts import ACQUIRE, HEARTBEAT, RELEASE, TRIM
from proxy import Proxy

__all__ = ["Cut", "CuttingProxy", "Where", "whole_commands"]

Where = Literal["before", "in request", "executed", "in reply", "answered"]

SCRIPTS: Final = {
    script.sha1.encode(): name
    for name, script in {
        "commit": COMMIT,
        "acquire": ACQUIRE,
        "heartbeat": HEARTBEAT,
        "release": RELEASE,
        "trim": TRIM,
    }.items()
}

# Which word of a commit has the digest of the rulebook that it adopts; it is empty in all others.
ADOPTED: Final = 17


class Cut(NamedTuple):
    """A step: the ``number``-th command (from 1) of that name, and where in it.

    Scripts have their own names; a commit that adopts a rulebook is an ``adoption``.

    ``part`` says how far into the request or the reply, from 0 to 1; at least one byte is through and one is not.
    """

    name: str
    number: int
    where: Where
    part: float = 0.5


class CuttingProxy(Proxy):
    """A proxy that stops everything at a ``Cut``; ``reached`` is set then. ``seen`` counts the commands, by name."""

    def __init__(self, port: int, cut: Cut | None = None) -> None:
        self.seen: Counter[str] = Counter()
        self.reached = threading.Event()
        self._cut = cut
        # Once the command of the cut is through, nothing may follow it while its reply is waited for.
        self._closing = False
        self._order = threading.Lock()
        super().__init__(port)

    def cut_at(self, cut: Cut) -> None:
        """Stop at ``cut``, of which the number is counted from now on."""
        with self._order:
            self.seen.clear()
            self._cut = cut

    def mend(self) -> None:
        """Break the connections that stand; new ones work, and nothing is cut any more."""
        with self._order:
            self._cut = None
        self.break_all()
        with self._order:
            self._closing = False
            self.reached.clear()

    def _join(self, near: socket.socket, far: socket.socket) -> None:
        link = _Link(self, near, far)
        for carry in (link.upwards, link.downwards):
            threading.Thread(target=carry, daemon=True).start()

    def next_request(self, name: str, size: int) -> tuple[int, bool]:
        """Count a request; return how many of its bytes go through, and whether the cut is in its reply."""
        cut = self._cut
        self.seen[name] += 1
        if cut is None or (cut.name, cut.number) != (name, self.seen[name]):
            return size, False
        if cut.where in {"before", "in request"}:
            self.reached.set()
            return 0 if cut.where == "before" else inside(size, cut.part), False
        self._closing = True
        return size, True

    def cut_reply(self, size: int) -> int:
        """Return how many bytes go through of the reply that the cut is in."""
        assert self._cut is not None
        self.reached.set()
        return {"executed": 0, "in reply": inside(size, self._cut.part), "answered": size}[self._cut.where]

    @contextlib.contextmanager
    def turn(self, *, upwards: bool) -> Iterator[None]:
        """Let one piece after the other through, and none after the cut."""
        with self._order:
            if self.reached.is_set() or (self._closing and upwards):
                raise _CutError
            yield


class _CutError(Exception):
    """Nothing goes through any more; the sockets stay open until the proxy breaks them."""


class _Link:
    """One connection. Its commands and replies are told apart, for both are counted."""

    def __init__(self, proxy: CuttingProxy, near: socket.socket, far: socket.socket) -> None:
        self._proxy = proxy
        self._near = near
        self._far = far
        self._requests = 0
        self._replies = 0
        # The number of the request whose reply is cut; none as yet.
        self._cut_request = 0

    def upwards(self) -> None:
        """Carry requests, until the end or the cut."""
        self._carry(self._near, _command_end, self._request)

    def downwards(self) -> None:
        """Carry replies likewise."""
        self._carry(self._far, _reply_end, self._reply)

    def _carry(
        self, source: socket.socket, end_of: Callable[[bytes, int], int | None], take: Callable[[bytes], None]
    ) -> None:
        held = b""
        try:
            while data := source.recv(1 << 16):
                held += data
                start = 0
                while (end := end_of(held, start)) is not None:
                    take(held[start:end])
                    start = end
                held = held[start:]
        except _CutError:
            return
        except OSError:
            pass
        for each in (self._near, self._far):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _request(self, request: bytes) -> None:
        with self._proxy.turn(upwards=True):
            self._requests += 1
            size, in_reply = self._proxy.next_request(_name_of(_words_of(request)), len(request))
            if in_reply:
                self._cut_request = self._requests
            self._far.sendall(request[:size])

    def _reply(self, reply: bytes) -> None:
        with self._proxy.turn(upwards=False):
            self._replies += 1
            size = self._proxy.cut_reply(len(reply)) if self._replies == self._cut_request else len(reply)
            self._near.sendall(reply[:size])


def inside(size: int, part: float) -> int:
    """Return a place within ``size`` bytes that is neither the start nor the end."""
    return max(1, min(size - 1, int(size * part)))


def whole_commands(data: bytes) -> Iterator[tuple[int, int, list[bytes]]]:
    """Yield ``(start, end, words)`` of every command that is in ``data`` as a whole, as on the wire or in an AOF."""
    start = 0
    while (end := _command_end(data, start)) is not None:
        yield start, end, _words_of(data[start:end])
        start = end


def _words_of(request: bytes) -> list[bytes]:
    words, at = [], request.index(b"\r\n") + 2
    while at < len(request):
        line_end = request.index(b"\r\n", at)
        size = int(request[at + 1 : line_end])
        words.append(request[line_end + 2 : line_end + 2 + size])
        at = line_end + 2 + size + 2
    return words


def _name_of(words: list[bytes]) -> str:
    """Return what a command is called here: a script's name, or the command's own."""
    first = words[0].upper().decode()
    if first == "EVALSHA":
        name = SCRIPTS.get(words[1].lower(), "script")
        return "adoption" if name == "commit" and words[ADOPTED] else name
    return f"{first} {words[1].decode().upper()}" if first in {"SCRIPT", "CLIENT", "XINFO"} else first


def _command_end(data: bytes, start: int) -> int | None:
    """Return where the command at ``start`` ends, or ``None`` if that has not come yet."""
    if data[start : start + 1] not in (b"*", b""):
        raise ValueError(f"at byte {start} there is no command: {data[start : start + 40]!r}")
    return _reply_end(data, start)


def _reply_end(data: bytes, start: int) -> int | None:
    """Return where the value at ``start`` ends, or ``None`` if that has not come yet."""
    line_end = data.find(b"\r\n", start)
    if line_end < 0:
        return None
    kind, end = data[start : start + 1], line_end + 2
    if kind == b"$":
        size = int(data[start + 1 : line_end])
        end += size + 2 if size >= 0 else 0
    elif kind == b"*":
        for _ in range(int(data[start + 1 : line_end])):
            item_end = _reply_end(data, end)
            if item_end is None:
                return None
            end = item_end
    elif kind not in (b"+", b"-", b":"):
        raise ValueError(f"there is no value that starts with {kind!r}")
    return end if end <= len(data) else None
