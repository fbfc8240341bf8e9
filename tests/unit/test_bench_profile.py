"""The profile of the core: how the output of callgrind is read, and what the table says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Benchmarks are no part of what gets installed. At the end, so that no build of another mode is shadowed.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench.profile import Costs, Profile, ProfileSettings, measure_profile, summary
from bench.workload import CHUNK_EVENTS

OUTPUT = """\
--------------------------------------------------------------------------------
Ir               D1mr          D1mw          DLmr          DLmw           file:function
--------------------------------------------------------------------------------
{total:,} 9 8 7 6  PROGRAM TOTALS

{decide:,}  {misses:,}  .  .  {writes:,}  fastpath/decide.c:__pyx_f_8fastpath_6decide_decide_events [/x/decide.so]
{copy:,}  .  .  .  .  ./string/../sysdeps/memmove.S:__memcpy_avx_unaligned_erms [/lib/libc.so.6]
"""


def test_the_difference_of_two_runs_by_function(monkeypatch: pytest.MonkeyPatch) -> None:
    replies = 0

    def run(command: tuple[str, ...], **_: Any) -> subprocess.CompletedProcess[str]:
        nonlocal replies
        if command[0] == "valgrind":
            replies = 1 if command[-1].endswith(" 1)") else 5
            return subprocess.CompletedProcess(command, 0, "", "")
        events = CHUNK_EVENTS * replies
        numbers = {
            "total": 1,
            "decide": 1000 + 1700 * events,
            "misses": 3 * events,
            "writes": events,
            "copy": 50 * events,
        }
        return subprocess.CompletedProcess(command, 0, OUTPUT.format(**numbers), "")

    monkeypatch.setattr(subprocess, "run", run)
    result = measure_profile(ProfileSettings(keys=10), lambda _: None)
    assert result.functions == {
        "decide_decide_events": Costs(1700, 3, 1),
        "__memcpy_avx_unaligned_erms": Costs(50, 0, 0),
    }
    assert result.total == Costs(1750, 3, 1)


def test_what_valgrind_says_when_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess((), 1, "", "valgrind: no such tool")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="valgrind ended with status 1: valgrind: no such tool"):
        measure_profile(ProfileSettings(keys=10), lambda _: None)


def test_the_table() -> None:
    costs = {"decide": Costs(750, 30.25, 1.5), "decode": Costs(250, 0, 0)}
    lines = summary(Profile(1000, Costs(1000, 30.25, 1.5), costs)).splitlines()
    assert lines[0].split("|")[1].strip() == "an event, 1,000 keys"
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == ["decide", "750", "75%", "30.25", "1.50"]
