"""Where a key stands in a TOML text: ``tomllib`` does not tell, and a finding should name the line."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["KeyPath", "LineIndex", "path_text"]

KeyPath = tuple[str | int, ...]

_PART: Final = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|'[^']*')"""
_NAME: Final = rf"{_PART}(?:\s*\.\s*{_PART})*"
_HEADER: Final = re.compile(rf"\s*(\[\[?)\s*({_NAME})\s*\]\]?\s*(?:#.*)?")
_KEY: Final = re.compile(rf"\s*({_NAME})\s*=")


def path_text(path: KeyPath) -> str:
    """Write a path as a person would: ``limit[2].max``, tables of an array counted from 1."""
    return "".join(f"[{part + 1}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


class LineIndex:
    """Maps paths such as ``("limit", 1, "max")`` to line numbers, as far as a plain scan can tell.

    The path of an array of tables stands for its first one.
    """

    def __init__(self, text: str) -> None:
        self._lines: dict[KeyPath, int] = {}
        self._last: dict[KeyPath, int] = {}
        table: KeyPath = ()
        for number, line in enumerate(text.split("\n"), start=1):
            if header := _HEADER.fullmatch(line.rstrip("\r")):
                table = self._table(_parts(header[2]), is_element=header[1] == "[[", line=number)
            elif key := _KEY.match(line):
                self._note((*table, *_parts(key[1])), number)

    def line_of(self, path: KeyPath) -> int | None:
        """Return the line of ``path``, or of the nearest table around it, or ``None``."""
        while path:
            if path in self._lines:
                return self._lines[path]
            path = path[:-1]
        return None

    def _table(self, names: list[str], *, is_element: bool, line: int) -> KeyPath:
        """Return the path of the table whose header has ``names``; a name of an array stands for its last element."""
        path: KeyPath = ()
        for name in names[:-1]:
            path = self._element((*path, name))
        path = (*path, names[-1])
        if is_element:
            self._last[path] = self._last.get(path, -1) + 1
            self._note(path, line)
        path = self._element(path)
        self._note(path, line)
        return path

    def _element(self, path: KeyPath) -> KeyPath:
        return (*path, self._last[path]) if path in self._last else path

    def _note(self, path: KeyPath, line: int) -> None:
        """Keep the first line of ``path`` and of the tables that it implies, as dotted names do."""
        for size in range(1, len(path) + 1):
            self._lines.setdefault(path[:size], line)


def _parts(name: str) -> list[str]:
    """Split a dotted name."""
    return [part[1:-1] if part[0] in "\"'" else part for part in re.findall(_PART, name)]
