"""Figures with their noise, the table that people read, and the JSON file that keeps everything."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from bench.machine import ROOT, describe

__all__ = ["RESULTS", "Figure", "save", "table"]

RESULTS: Final = ROOT / "bench" / "results"


class Figure(msgspec.Struct, frozen=True):
    """One measured quantity: the value of each run, in ``unit``."""

    name: str
    unit: str
    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        """The figure that is reported."""
        return statistics.median(self.runs)

    @property
    def noise(self) -> float:
        """Half the distance from the lowest to the highest run, as a share of the median."""
        return (max(self.runs) - min(self.runs)) / 2 / self.median

    def ratio_to(self, other: Figure) -> float:
        """Return how many times ``other`` this is."""
        return self.median / other.median

    def as_json(self) -> dict[str, Any]:
        """Return the figure as it goes into the file."""
        return {**msgspec.structs.asdict(self), "median": self.median, "noise": round(self.noise, 4)}


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table: the first column to the left, figures to the right."""
    columns = list(zip(headings, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"

    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([line(headings), f"|{rule}|", *map(line, rows)])


def save(name: str, content: dict[str, Any]) -> Path:
    """Write ``content`` and the description of the machine to ``bench/results/<name>.json`` and return where it is."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    text = msgspec.json.encode({"machine": describe(), **content})
    path.write_bytes(msgspec.json.format(text, indent=2) + b"\n")
    return path
