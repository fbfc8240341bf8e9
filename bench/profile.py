"""What an event costs in instructions and cache misses, function by function: valgrind's simulation of the core.

Seconds waver with the neighbours, instructions do not: two runs of the same sources differ by less than one in a
thousand. The core decides a census and then 1 or 5 replies of fresh events; the difference is what the other four took,
without the start of the interpreter and the making of the workload. The caches are simulated too: a miss of the first
one (48 KiB) and of the second (2 MiB), which costs the way to memory unless it was asked for ahead.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from accrual.rulebook import load
from bench.core import RULEBOOK, CoreSettings, WarmCore
from bench.machine import ROOT
from bench.report import table
from bench.workload import CHUNK_EVENTS, DEFAULT_SEED

__all__ = ["Costs", "Profile", "ProfileSettings", "is_available", "measure_profile", "summary", "take_replies"]

FEW: Final = 1
MANY: Final = 5
# Of a current server processor; valgrind has two levels.
CACHES: Final = ("--D1=49152,12,64", "--LL=2097152,16,64")
EVENTS: Final = "Ir,D1mr,D1mw,DLmr,DLmw"
# A line of callgrind_annotate: as many numbers as events, then file:function [object].
LINE: Final = re.compile(r"((?:\s*[\d,.]+(?:\s+\([\d.]+%\))?){5})\s+(\S.*)")
NUMBER: Final = re.compile(r"[\d,]+|\.")
SHOWN: Final = 24
# Tables of such segments reserve less address space: valgrind has not that much.
SEGMENT_SHIFT: Final = 11


class ProfileSettings(msgspec.Struct, frozen=True):
    """What is profiled: a state that has met so many ``keys`` of each table."""

    keys: int = 100_000
    seed: int = DEFAULT_SEED


class Costs(msgspec.Struct, frozen=True):
    """Of one event: instructions, and reads and writes that miss the first cache, and the second."""

    instructions: float
    first_misses: float
    second_misses: float


class Profile(msgspec.Struct, frozen=True):
    """What an event costs, in all and by function."""

    keys: int
    total: Costs
    functions: dict[str, Costs]


def is_available() -> bool:
    """Tell whether valgrind is installed."""
    return shutil.which("valgrind") is not None and shutil.which("callgrind_annotate") is not None


def measure_profile(settings: ProfileSettings, tell: Callable[[str], None]) -> Profile:
    """Profile the core; ``tell`` hears what is going on. Raises ``RuntimeError`` where valgrind fails."""
    with tempfile.TemporaryDirectory() as directory:
        counted = []
        for replies in (FEW, MANY):
            tell(f"profile: {settings.keys:,} keys, {replies} replies")
            counted.append(_counted(settings, replies, Path(directory) / f"{replies}.out"))
    few, many = counted
    events = CHUNK_EVENTS * (MANY - FEW)
    functions = {name: _costs(values, few.get(name), events) for name, values in many.items()}
    functions = {name: costs for name, costs in functions.items() if costs.instructions >= 1}
    by_cost = sorted(functions.items(), key=lambda item: -item[1].instructions)
    total = Counter[int]()
    for sign, run in ((1, many), (-1, few)):
        for values in run.values():
            for place, value in enumerate(values):
                total[place] += sign * value
    return Profile(settings.keys, _costs([total[place] for place in range(5)], None, events), dict(by_cost))


def take_replies(keys: int, seed: int, replies: int) -> None:
    """Do what is run under valgrind: decide a census of ``keys``, and so many of the same replies."""
    core = WarmCore(CoreSettings(keys, seed=seed).workload, load(RULEBOOK), SEGMENT_SHIFT)
    for reply in core.replies(MANY)[:replies]:
        core.scan(reply)
        core.decide()
        core.encode()


def _counted(settings: ProfileSettings, replies: int, path: Path) -> dict[str, list[int]]:
    """Return the events of each function of a run."""
    program = f"from bench.profile import take_replies; take_replies({settings.keys}, {settings.seed}, {replies})"
    tool = ("valgrind", "--tool=callgrind", "--cache-sim=yes", *CACHES, f"--callgrind-out-file={path}")
    # Which name is kept where depends on the hashes of texts; and numpy's threads would wait in a loop.
    environment = os.environ | {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}
    _run(*tool, sys.executable, "-c", program, environment=environment)
    annotate = ("callgrind_annotate", "--threshold=100", "--auto=no", "--show-percs=no", f"--show={EVENTS}", str(path))
    counted: dict[str, list[int]] = {}
    for line in _run(*annotate, environment=environment).splitlines():
        match = LINE.fullmatch(line)
        if match is None or "PROGRAM TOTALS" in line:
            continue
        values = [0 if text == "." else int(text.replace(",", "")) for text in NUMBER.findall(match[1])]
        name = _name(match[2])
        known = counted.get(name, [0] * len(values))
        counted[name] = [left + right for left, right in zip(known, values, strict=True)]
    return counted


def _name(place: str) -> str:
    """Return a function without its file and object, and without what Cython puts before it."""
    name = place.partition(" [")[0].rpartition(":")[2]
    return re.sub(r"^__pyx_\w+?_8fastpath_\d+", "", name).partition(".")[0]


def _costs(values: list[int], before: list[int] | None, events: int) -> Costs:
    rest = [value - former for value, former in zip(values, before or [0] * len(values), strict=True)]
    instructions, first_reads, first_writes, second_reads, second_writes = (value / events for value in rest)
    return Costs(instructions, first_reads + first_writes, second_reads + second_writes)


def _run(*command: str, environment: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with status {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def summary(profile: Profile) -> str:
    """Return the table: the total, then the functions that cost most."""
    headings = [f"an event, {profile.keys:,} keys", "instructions", "share", "misses of 48 KiB", "misses of 2 MiB"]
    rows = []
    for name, costs in [("total", profile.total), *profile.functions.items()][: SHOWN + 1]:
        share = costs.instructions / profile.total.instructions
        misses = (f"{costs.first_misses:.2f}", f"{costs.second_misses:.2f}")
        rows.append([name, f"{costs.instructions:,.0f}", f"{share:.0%}", *misses])
    return table(headings, rows)
