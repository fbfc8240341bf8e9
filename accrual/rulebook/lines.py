"""Where a key stands in a TOML text: ``tomllib`` does not tell, and a finding should name the line."""

from __future__ import annotations

import re

__all__ = ["LineIndex"]

_HEADER = re.compile(r"^\s*(\[\[?)\s*([A-Za-z0-9_.\"'-]+)\s*\]\]?\s*(#.*)?$")
_KEY = re.compile(r"^\s*([A-Za-z0-9_-]+|\"[^\"]*\"|'[^']*')\s*(?:\.[^=]*)?=")


class LineIndex:
    """Maps paths such as ``("limit", 1, "max")`` to line numbers, as far as a plain scan can tell."""

    def __init__(self, text: str) -> None:
        self._lines: dict[tuple[str | int, ...], int] = {}
        table: tuple[str | int, ...] = ()
        counts: dict[str, int] = {}
        for number, line in enumerate(text.split("\n"), start=1):
            if header := _HEADER.match(line.rstrip("\r")):
                name = header[2].strip("\"'")
                table = (name,)
                if header[1] == "[[":
                    counts[name] = counts.get(name, -1) + 1
                    table = (name, counts[name])
                self._lines.setdefault(table, number)
            elif key := _KEY.match(line):
                self._lines.setdefault((*table, key[1].strip("\"'")), number)

    def line_of(self, path: tuple[str | int, ...]) -> int | None:
        """Return the line of ``path``, or of the nearest table around it, or ``None``."""
        while path:
            if path in self._lines:
                return self._lines[path]
            path = path[:-1]
        return None
