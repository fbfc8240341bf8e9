"""Say what this machine lacks to build the project, and what Debian calls it; exit 1 if anything is missing.

The Makefile runs it before there is a virtual environment, so it must run on an old Python.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

COMPILERS = ("cc", "gcc", "clang")


def missing() -> list[str]:
    """Return one sentence for each thing that is missing."""
    findings = []
    if sys.version_info < (3, 11):  # noqa: UP036 - an older Python is what this line is for
        findings.append("Python 3.11 or newer is needed: name one with make PYTHON=/path/to/python3")
    if importlib.util.find_spec("ensurepip") is None:
        findings.append("Python cannot make virtual environments: apt-get install python3-venv")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        findings.append("Python's C headers are missing: apt-get install python3-dev")
    if not any(shutil.which(name) for name in (os.environ.get("CC") or "cc", *COMPILERS)):
        findings.append("there is no C compiler: apt-get install gcc libc6-dev")
    return findings


if __name__ == "__main__":
    found = missing()
    for finding in found:
        print(f"prerequisites: {finding}", file=sys.stderr)
    sys.exit(1 if found else 0)
