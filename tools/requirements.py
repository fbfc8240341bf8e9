"""Print the requirements of parts of this project, one a line, as pip takes them.

    python tools/requirements.py project test

A part is ``build`` (what the build itself needs), ``project`` (what it needs to run) or the name of an extra.
So the Makefile can install one group at a time, without building the project again for each.
"""

import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def requirements(part: str) -> list[str]:
    """Return the requirements of ``part``; raises ``KeyError`` for an extra that does not exist."""
    table = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))
    found: list[str]
    match part:
        case "build":
            found = table["build-system"]["requires"]
        case "project":
            found = table["project"]["dependencies"]
        case extra:
            found = table["project"]["optional-dependencies"][extra]
    return found


if __name__ == "__main__":
    for part in sys.argv[1:]:
        print("\n".join(requirements(part)))
