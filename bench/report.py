"""Figures with their noise, the table that people read, and the JSON file that keeps everything."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from bench.machine import ROOT

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
        half = (max(self.runs) - min(self.runs)) / 2
        if not self.median:
            return math.inf if half else 0.0
        return half / self.median

    def ratio_to(self, other: Figure) -> float:
        """Return how many times ``other`` this is."""
        return self.median / other.median


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table: the first column to the left, figures to the right."""
    columns = list(zip(headings, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"

    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([line(headings), f"|{rule}|", *map(line, rows)])


def save(name: str, machine: dict[str, Any], content: object) -> Path:
    """Write what was measured on ``machine`` to ``bench/results/<name>.json`` and return where that is.

    ``content`` is anything that msgspec can encode; each figure in it goes with its median and its noise.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    plain = msgspec.to_builtins({"machine": machine, "measured": content}, enc_hook=str)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(_with_medians(plain)), indent=2) + b"\n")
    return path


def _with_medians(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_medians(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == set(Figure.__struct_fields__):
        figure = msgspec.convert(value, Figure)
        return {**value, "median": figure.median, "noise": round(figure.noise, 4)}
    return {name: _with_medians(item) for name, item in value.items()}
