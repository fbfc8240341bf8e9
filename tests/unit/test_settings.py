"""Settings: where they come from, which comes first, and how a wrong one is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from accrual.errors import UsageError
from accrual.settings import Settings, all_settings, load_settings


def file_with(tmp_path: Path, text: str) -> str:
    path = tmp_path / "accrual.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_defaults_are_in_the_table() -> None:
    settings = load_settings({}, {})
    assert settings == Settings()
    assert {name: setting.default for name, setting in all_settings().items()} == {
        name: getattr(settings, name) for name in Settings.__struct_fields__
    }


def test_every_setting_says_what_it_is() -> None:
    for setting in all_settings().values():
        assert setting.description
        assert setting.variable == "ACCRUAL_" + setting.name.upper()


def test_a_flag_comes_before_a_variable_and_a_variable_before_the_file(tmp_path: Path) -> None:
    path = file_with(tmp_path, "batch_entries = 1\nblock_ms = 1\nlinger_ms = 1\n")
    settings = load_settings(
        {"config": path, "batch_entries": "3"}, {"ACCRUAL_BATCH_ENTRIES": "2", "ACCRUAL_BLOCK_MS": "2"}
    )
    assert (settings.batch_entries, settings.block_ms, settings.linger_ms) == (3, 2, 1)


def test_the_file_may_be_named_by_a_variable_and_by_a_flag_before_it(tmp_path: Path) -> None:
    path = file_with(tmp_path, 'partition = "from-file"\n')
    assert load_settings({}, {"ACCRUAL_CONFIG": path}).partition == "from-file"
    assert load_settings({"config": path}, {"ACCRUAL_CONFIG": "missing.toml"}).partition == "from-file"


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ("1", True), ("0", False)])
def test_a_switch_in_a_variable(text: str, value: bool) -> None:
    assert load_settings({}, {"ACCRUAL_WAIT": text}).wait is value
    assert load_settings({}, {"ACCRUAL_PROGRESS": text}).progress is value


def test_a_flag_that_was_not_given_leaves_the_others_alone() -> None:
    assert load_settings({"wait": None, "block_ms": None}, {"ACCRUAL_WAIT": "false"}).wait is False


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch_entrees = 1\n", ["accrual.toml", "batch_entrees", "no such setting"]),
        ("[worker]\nblock_ms = 1\n", ["accrual.toml", "worker", "no such setting"]),
        ('block_ms = "1s"\n', ["accrual.toml", "block_ms", "1s"]),
        ("block_ms = 0\n", ["accrual.toml", "block_ms", "0"]),
        ("block_ms = 1.5\n", ["accrual.toml", "block_ms", "1.5"]),
        ("block_ms = \n", ["accrual.toml", "line 1"]),
    ],
)
def test_what_is_wrong_in_the_file_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        load_settings({"config": file_with(tmp_path, text)}, {})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "environment", "words"),
    [
        ({"block_ms": "x"}, {}, ["--block-ms", "'x'"]),
        ({"block_ms": "-1"}, {}, ["--block-ms", "'-1'", ">= 1"]),
        ({"engine": "slow"}, {}, ["--engine", "slow"]),
        ({}, {"ACCRUAL_LEASE_MS": "1"}, ["ACCRUAL_LEASE_MS", ">= 100"]),
        ({}, {"ACCRUAL_WAIT": "maybe"}, ["ACCRUAL_WAIT", "maybe"]),
        ({"config": "missing.toml"}, {}, ["missing.toml", "No such file"]),
    ],
)
def test_what_is_wrong_elsewhere_is_named(flags: dict[str, Any], environment: dict[str, str], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        load_settings(flags, environment)
    for word in words:
        assert word in str(caught.value)


def test_a_secret_is_never_repeated() -> None:
    with pytest.raises(UsageError) as caught:
        load_settings({}, {"ACCRUAL_SECRET": "not-quite-a-secret"})
    assert "not-quite" not in str(caught.value)
    assert "ACCRUAL_SECRET" in str(caught.value)


def test_a_missing_setting_says_how_to_give_it() -> None:
    with pytest.raises(UsageError, match="--redis, ACCRUAL_REDIS, or redis in the file"):
        Settings().require("redis")
    Settings(redis="redis://localhost").require("redis")
