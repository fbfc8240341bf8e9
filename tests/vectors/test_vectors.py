"""The scenarios that make the specification executable, on both engines, by the command that users run."""

from __future__ import annotations

from pathlib import Path

import pytest

from accrual.cli import main

SCENARIOS = sorted((Path(__file__).parent / "scenarios").iterdir())


@pytest.mark.parametrize("engine", ["fast", "reference"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda path: path.name)
def test_replay(scenario: Path, engine: str, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    arguments = ["replay", "--rulebook", f"{scenario}/rulebook.toml", "--engine", engine, f"{scenario}/events.jsonl"]
    assert main(arguments) == 0
    assert capfdbinary.readouterr().out == (scenario / "outcomes.jsonl").read_bytes()


def test_there_are_scenarios() -> None:
    assert len(SCENARIOS) >= 14
