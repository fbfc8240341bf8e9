"""What all runs with faults start from."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from workers import RULEBOOK


@pytest.fixture
def rulebook(tmp_path: Path) -> Path:
    path = tmp_path / "rulebook.toml"
    path.write_text(RULEBOOK, encoding="utf-8")
    return path


@pytest.fixture
def rng() -> random.Random:
    seed = int(os.environ.get("ACCRUAL_TEST_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
    print(f"ACCRUAL_TEST_SEED={seed}")
    return random.Random(seed)
