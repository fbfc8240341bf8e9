"""docs/SETTINGS.md is true: its table is the program's, its file is accepted, its messages are what is said."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from accrual.errors import UsageError
from accrual.settings import all_settings, load_settings

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "SETTINGS.md").read_text(encoding="utf-8")


def blocks(info: str) -> list[str]:
    """Return the code blocks whose fence says ``info``."""
    return re.findall(rf"^```{info}\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)


def test_the_table_is_that_of_the_program() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "make_docs.py", "--check"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_table_has_every_setting_once() -> None:
    names = re.findall(r"^\| `(\w+)` \| `ACCRUAL_\w+` \|", DOCUMENT, re.MULTILINE)
    assert names == list(all_settings())


def test_the_file_of_the_example_is_accepted(tmp_path: Path) -> None:
    (text,) = blocks("toml")
    path = tmp_path / "city-1.toml"
    path.write_text(text, encoding="utf-8")
    settings = load_settings({"config": str(path)}, {})
    assert (settings.partition, settings.lease_ms, settings.progress) == ("city-1", 5000, False)


def test_what_is_wrong_is_said_in_the_words_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variable, key = (line.removeprefix("accrual worker: ") for line in blocks("")[0].splitlines())
    monkeypatch.chdir(tmp_path)
    Path("accrual.toml").write_text("batch_size = 1\n", encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        load_settings({}, {"ACCRUAL_BLOCK_MS": "0"})
    assert str(caught.value) == variable
    with pytest.raises(UsageError) as caught:
        load_settings({"config": "accrual.toml"}, {})
    assert str(caught.value) == key
