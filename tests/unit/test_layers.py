"""House rules that no linter knows: the layers as Cython sees them, and no trace of one machine."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE_USERS = ("engine", "ledger", "stream")
GENERATED = ("build", "__pycache__")
LARGEST_FILE_BYTES = 4 << 20

# Pieced together, so that this file does not break its own rule.
FOREIGN = {
    "a path of one machine": re.compile(r"(?<![\w.])/" + r"(?:work|root|home/\w+|tmp/" + r"venv|tmp/brief)/"),
    "the host of a package registry": re.compile(
        r"(?:py" + r"pi\.org|python" + r"hosted\.org|registry\." + r"npmjs|deb\." + r"debian\.org)"
    ),
}


def cython_sources() -> list[Path]:
    return sorted(path for suffix in ("*.pyx", "*.pxd") for path in (ROOT / "fastpath").rglob(suffix))


def imports_of_cython(text: str) -> Iterator[str]:
    """Yield the modules that ``import``, ``cimport`` and ``from`` lines name."""
    for match in re.finditer(r"^[ \t]*(?:from\s+(\S+)\s+c?import|c?import\s+(.+))", text, re.MULTILINE):
        for name in (match[1] or match[2]).split(","):
            yield name.split(" as ")[0].strip()


def imports_of_python(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def without_comments_and_texts(text: str) -> str:
    """Blank out what is not code, keeping the lines, so that a rule may be named where it is explained."""
    parts = r'"""(?:.|\n)*?"""|\'\'\'(?:.|\n)*?\'\'\'|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|#[^\n]*'
    return re.sub(parts, lambda match: '""' + "\n" * match[0].count("\n"), text)


def files_of_the_repository() -> list[Path]:
    """Return what is, or would be, committed; without git, all that is neither hidden nor generated."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if shutil.which("git"):
        listing = subprocess.run(command, check=False, capture_output=True, text=True)
        if listing.returncode == 0:
            return sorted(path for name in listing.stdout.split("\0") if (path := ROOT / name).is_file())
    return sorted(path for path in ROOT.rglob("*") if path.is_file() and not is_generated(path))


def is_generated(path: Path) -> bool:
    parts = path.relative_to(ROOT).parts
    return path.suffix == ".so" or any(part.startswith(".") or part in GENERATED for part in parts)


def test_the_compiled_core_imports_nothing_of_ours() -> None:
    broken = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in cython_sources()
        for name in imports_of_cython(without_comments_and_texts(path.read_text(encoding="utf-8")))
        if name.split(".")[0] == "accrual"
    ]
    assert not broken


def test_only_engine_ledger_and_stream_import_the_compiled_core() -> None:
    allowed = [ROOT / "accrual" / name for name in CORE_USERS]
    broken = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sorted((ROOT / "accrual").rglob("*.py"))
        if not any(path.is_relative_to(folder) for folder in allowed)
        for name in imports_of_python(path)
        if name.split(".")[0] == "fastpath"
    ]
    assert not broken


@pytest.mark.parametrize(
    ("rule", "pattern"),
    [
        ("DEF constants are gone from Cython: cdef enum, or a plain constant", r"^[ \t]*DEF\s+\w+\s*="),
        ("IF is gone from Cython: decide in C, or at run time", r"^[ \t]*(?:IF|ELIF)\b.*:"),
        ("a .pyx is compiled once, not included", r"^[ \t]*include\s"),
        ("`except *` asks for the GIL after every call: return a status, `except -1`", r"\bexcept\s*\*"),
    ],
)
def test_cython_stays_on_the_paths_that_have_a_future(rule: str, pattern: str) -> None:
    broken = [
        f"{path.relative_to(ROOT)}:{number}: {rule}"
        for path in cython_sources()
        for number, line in enumerate(
            without_comments_and_texts(path.read_text(encoding="utf-8")).splitlines(), start=1
        )
        if re.search(pattern, line)
    ]
    assert not broken


def test_nothing_in_the_repository_belongs_to_one_machine() -> None:
    broken = []
    for path in files_of_the_repository():
        content = path.read_bytes()
        if b"\0" in content:
            continue
        for number, line in enumerate(content.decode(errors="replace").splitlines(), start=1):
            broken += [
                f"{path.relative_to(ROOT)}:{number}: {what}"
                for what, pattern in FOREIGN.items()
                if pattern.search(line)
            ]
    assert not broken


def test_no_file_is_larger_than_a_reader_expects() -> None:
    large = [
        f"{path.relative_to(ROOT)}: {path.stat().st_size} bytes"
        for path in files_of_the_repository()
        if path.stat().st_size > LARGEST_FILE_BYTES
    ]
    assert not large
