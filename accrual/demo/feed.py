"""Streams the member day into the events stream, as fast as one connection takes it.

A producer of one's own is ``accrual.client``. Here the moments of arrival are those of the data, not of the clock, and
so is the first part of every stream ID.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from accrual.demo.memberday import MemberDay
from accrual.errors import StreamError
from accrual.stream import Keys

__all__ = ["feed"]

REPLY_TIMEOUT_S: Final = 60.0
RECEIVE_BYTES: Final = 1 << 18


def feed(day: MemberDay, keys: Keys, unix_socket_path: Path, fed: Callable[[int], None]) -> None:
    """Add every event of ``day`` to the stream ``keys.events``, and tell ``fed`` how many the server has so far.

    Raises ``StreamError`` where the server refuses one, ``OSError`` where it is gone.
    """
    count, unanswered, unanswered_events = 0, b"", 0
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(REPLY_TIMEOUT_S)
        connection.connect(str(unix_socket_path))
        for commands, answers, events in _requests(day, keys):
            connection.sendall(commands)
            # One request is always under way, so that the server works while the next is put together.
            _receive(connection, unanswered)
            count += unanswered_events
            fed(count)
            unanswered, unanswered_events = answers, events
        _receive(connection, unanswered)
    fed(count + unanswered_events)


def _requests(day: MemberDay, keys: Keys) -> Iterator[tuple[bytes, bytes, int]]:
    """Yield commands by the thousand, the bytes with which the server must answer, and how many they are."""
    stream = keys.events.encode()
    start = b"*5\r\n$4\r\nXADD\r\n$%d\r\n%b\r\n" % (len(stream), stream)
    last_ms, sequence = -1, 0
    for arrivals_ms, events in day.compact_chunks():
        commands, answers = [], []
        for arrival_ms, event in zip(arrivals_ms, events, strict=True):
            sequence = sequence + 1 if arrival_ms == last_ms else 0
            last_ms = arrival_ms
            stream_id = b"%d-%d" % (arrival_ms, sequence)
            # An entry is added under the ID that was asked for, so the answer is known beforehand.
            answer = b"$%d\r\n%b\r\n" % (len(stream_id), stream_id)
            commands.append(b"%b%b$1\r\ne\r\n$%d\r\n%b\r\n" % (start, answer, len(event), event))
            answers.append(answer)
        yield b"".join(commands), b"".join(answers), len(events)


def _receive(connection: socket.socket, expected: bytes) -> None:
    """Receive the answer ``expected``, or raise ``StreamError`` as soon as it is another."""
    rest = memoryview(expected)
    while rest:
        received = connection.recv(min(RECEIVE_BYTES, len(rest)))
        if not received:
            raise StreamError("the server closed the connection while the events were streamed")
        if rest[: len(received)] != received:
            raise StreamError(f"the server refused an event: {received[:200].decode(errors='replace')!r}")
        rest = rest[len(received) :]
