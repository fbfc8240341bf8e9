"""A network between worker and server that can fail: replies get lost, connections break."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Self

__all__ = ["Proxy"]


class Proxy:
    """Forwards TCP connections to ``port`` on this machine.

    ``lose_replies`` says how many more times a connection that carries scripts breaks after the server has taken a
    command and before its reply is through. ``break_all`` cuts every connection that stands. ``silence`` lets nothing
    more through on the connection that carries commits, whose ends do not hear of it; new ones are not affected.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._lose = 0
        self._silent: set[threading.Event] = set()
        self._commits: set[threading.Event] = set()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self.lost = 0
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        """The URL of the server as seen through the proxy."""
        return f"redis://127.0.0.1:{self._listener.getsockname()[1]}"

    def lose_replies(self, count: int) -> None:
        """Lose the replies to ``count`` commits, one at a time."""
        with self._lock:
            self._lose += count

    def silence(self) -> None:
        """Swallow all that comes on the connection that carries commits, from now on."""
        with self._lock:
            self._silent |= self._commits

    def lead_to(self, port: int) -> None:
        """Forward new connections to another port, as the address of a service does after a failover."""
        self._target = port

    def break_all(self) -> None:
        """Cut the connections that stand; new ones may come."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            _close(*pair)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        # Closing a listener does not wake whoever waits in accept; shutting it down does.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.break_all()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                near.close()
                continue
            with self._lock:
                self._pairs.append((near, far))
            self._join(near, far)

    def _join(self, near: socket.socket, far: socket.socket) -> None:
        """Carry what comes from ``near``, the worker's side, to ``far``, and the other way round."""
        commits = threading.Event()
        for source, sink, upwards in ((near, far, True), (far, near, False)):
            threading.Thread(target=self._pump, args=(source, sink, commits, upwards), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, commits: threading.Event, upwards: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if upwards and b"EVALSHA" in data and b":ledger" in data:
                    commits.set()
                    with self._lock:
                        self._commits.add(commits)
                if commits in self._silent:
                    continue
                if not upwards and commits.is_set() and self._loses():
                    break
                sink.sendall(data)
        _close(source, sink)

    def _loses(self) -> bool:
        with self._lock:
            if not self._lose:
                return False
            self._lose -= 1
            self.lost += 1
            return True


def _close(*sockets: socket.socket) -> None:
    for each in sockets:
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
        each.close()
