"""The server's protocol by hand, for the two data connections: no copy and no object more than needed."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["Argument", "bulks", "command", "command_around"]

Argument = bytes | str | int


def command(*arguments: Argument) -> bytes:
    """Return a command as the server reads it."""
    return b"".join((b"*%d\r\n" % len(arguments), *map(_bulk, arguments)))


def bulks(arguments: Iterable[Argument]) -> bytes:
    """Return arguments as the server reads them, for ``command_around``."""
    return b"".join(map(_bulk, arguments))


def command_around(
    before: Iterable[Argument], value: bytes, after: Iterable[Argument], more: int = 0, encoded: bytes = b""
) -> list[bytes]:
    """Return a command in pieces to be written one after the other; the large argument ``value`` is not copied.

    Nor are the ``more`` last arguments, which are ``encoded`` already.
    """
    head = [_bulk(argument) for argument in before]
    tail = [_bulk(argument) for argument in after]
    start = b"".join((b"*%d\r\n" % (len(head) + 1 + len(tail) + more), *head, b"$%d\r\n" % len(value)))
    return [start, value, b"".join((b"\r\n", *tail)), *([encoded] if more else [])]


def _bulk(argument: Argument) -> bytes:
    data = argument if isinstance(argument, bytes) else str(argument).encode()
    return b"$%d\r\n%b\r\n" % (len(data), data)
