from __future__ import annotations

import math
import mmap
import sys
from pathlib import Path

import msgspec
import pytest

# Benchmarks are no part of what gets installed. At the end, so that no build of another mode is shadowed.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from accrual.rulebook import load
from bench import report
from bench.machine import Memory, describe, file_system_of, pinned
from bench.peer_lua import _fen_rates, _lua, library_of
from bench.report import Figure, save, table

ROOT = Path(__file__).resolve().parents[2]


def test_a_figure_is_the_median_with_its_noise() -> None:
    figure = Figure("worker", "events/s", (90.0, 100.0, 120.0))
    assert figure.median == 100
    assert figure.noise == pytest.approx(0.15)
    assert figure.ratio_to(Figure("peer", "events/s", (4.0,))) == 25
    assert Figure("nothing", "ms", (0.0, 0.0)).noise == 0
    assert Figure("hardly ever", "ms", (0.0, 0.0, 1.0)).noise == math.inf


def test_a_table_is_markdown() -> None:
    assert table(["", "events/s"], [["worker", "1,000"], ["peer", "7"]]).splitlines() == [
        "|        | events/s |",
        "|--------|---------:|",
        "| worker |    1,000 |",
        "| peer   |        7 |",
    ]


def test_a_file_has_every_run_and_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    path = save("core", {"cores": 2}, {"directory": tmp_path, "stages": [Figure("scan", "ns/event", (1.0, 3.0))]})
    assert path == tmp_path / "results" / "core.json"
    assert msgspec.json.decode(path.read_bytes()) == {
        "machine": {"cores": 2},
        "measured": {
            "directory": str(tmp_path),
            "stages": [{"name": "scan", "unit": "ns/event", "runs": [1.0, 3.0], "median": 2.0, "noise": 0.5}],
        },
    }


def test_the_machine_is_described() -> None:
    machine = describe()
    assert {"processor", "server", "packages", "revision"} <= machine.keys()
    assert machine["cores"]
    assert file_system_of(ROOT) != "unknown"


def test_memory_is_measured_against_an_earlier_moment() -> None:
    size = 8 << 20
    before = Memory.now()
    # Fresh pages of its own: an allocator may hand out memory that was resident before.
    with mmap.mmap(-1, size) as taken:
        taken.write(b"x" * size)
        added = Memory.now().since(before)
    assert added.resident_bytes >= size // 2
    assert before.and_then(added).minor_faults >= before.minor_faults


def test_pinning_ends() -> None:
    with pinned(0), pinned(1):
        pass
    with pinned(10_000):
        pass


def test_the_peer_has_the_whole_rulebook_in_lua() -> None:
    rulebook = load(ROOT / "bench" / "rulebook.toml")
    library = library_of(rulebook)
    assert library.startswith("#!lua name=peer\n")
    assert all(f"'{limit.id}'" in library for limit in rulebook.limits)
    assert all(f"['{rule.kind}'] =" in library for rule in rulebook.earning_rules)


def test_the_peer_prices_categories() -> None:
    (rule, *_) = load(ROOT / "bench" / "rulebook.toml").earning_rules
    assert _fen_rates(rule) == {"": 0.01, "coupon": 0.0, "fresh": 0.02, "seafood": 0.015, "tobacco": 0.0}


def test_values_are_written_as_lua() -> None:
    value = {"a": [1, 2.5, "x"], 3: {"nothing": None, "yes": True}}
    assert _lua(value) == "{ ['a'] = { 1, 2.5, 'x' }, [3] = { ['nothing'] = nil, ['yes'] = true } }"
