"""The build modes of the compiled core (setup.py): each compiles, and what comes of it can be imported."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from workers import ROOT, environment

FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
LEFT_OUT = shutil.ignore_patterns("*.so", "*.c", "__pycache__")


def python(directory: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env=environment(PYTHONPATH=str(directory), **variables),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["release", "native", "debug", "coverage", "sanitize", "annotate"])
def test_each_mode_compiles(tmp_path: Path, mode: str) -> None:
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "fastpath", tmp_path / "fastpath", ignore=LEFT_OUT)
    done = python(tmp_path, "setup.py", "--quiet", "build_ext", "--inplace", BUILD=mode)
    assert done.returncode == 0, done.stderr
    # What is instrumented needs a library that is loaded before Python.
    if mode != "sanitize":
        done = python(tmp_path, "-c", "import fastpath.core; print(fastpath.core.__file__)")
        assert done.stdout.startswith(str(tmp_path)), done.stderr
    assert bool(list(tmp_path.rglob("*.html"))) == (mode == "annotate")


def test_an_unknown_mode_is_refused() -> None:
    done = python(ROOT, "setup.py", "--version", BUILD="fastest")
    assert done.returncode == 1
    assert "BUILD=fastest is not one of release, debug," in done.stderr
