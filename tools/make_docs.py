"""Writes the table of settings in docs/SETTINGS.md from ``accrual.settings``: ``make docs``.

With ``--check`` it writes nothing, and exits with status 1 where the page is not what it would write.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final, get_args

from msgspec import Meta

from accrual.settings import Setting, all_settings

PAGE: Final = Path(__file__).parents[1] / "docs" / "SETTINGS.md"
START: Final = "<!-- The table is made by `make docs` from accrual/settings.py: change it there. -->\n"
END: Final = "<!-- The end of the table. -->\n"
HEAD: Final = ("file key", "variable", "flag", "default", "accepts", "unit", "meaning")
UNITS: Final = ("ms", "s", "bytes", "entries", "events", "batches")
ABSENT: Final = "–"


def main() -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__, epilog="example:\n  python tools/make_docs.py --check")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where something would change")
    check = parser.parse_args().check
    before = PAGE.read_text(encoding="utf-8")
    after = page(before)
    if after == before:
        return 0
    if check:
        print(f"{PAGE.name}: the table of settings is not that of the program: run `make docs`", file=sys.stderr)
        return 1
    PAGE.write_text(after, encoding="utf-8")
    print(f"{PAGE.name}: written", file=sys.stderr)
    return 0


def page(text: str) -> str:
    """Return ``text`` with the table as it should be."""
    head, start, rest = text.partition(START)
    _, end, tail = rest.partition(END)
    if not start or not end:
        raise SystemExit(f"{PAGE.name}: the lines that enclose the table are not there")
    return f"{head}{start}{table()}{end}{tail}"


def table() -> str:
    """Return a row for each setting, in the order of their definition."""
    rows = [HEAD, ("---",) * len(HEAD), *map(row, all_settings().values())]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def row(setting: Setting) -> tuple[str, ...]:
    """Return the cells of a setting."""
    unit = setting.name.rpartition("_")[2]
    return (
        code(setting.name),
        code(setting.variable),
        flag(setting),
        default(setting.default, unit),
        accepted(setting),
        unit if unit in UNITS else ABSENT,
        setting.description,
    )


def code(text: object) -> str:
    """Return ``text`` as code."""
    return f"`{text}`"


def flag(setting: Setting) -> str:
    """Return the flag, and the one that switches off."""
    name = setting.name.replace("_", "-")
    if not setting.has_flag:
        return ABSENT
    return f"`--{name}`, `--no-{name}`" if setting.is_switch else code(f"--{name}")


def default(value: object, unit: str) -> str:
    """Return the default; large numbers of bytes also as people say them."""
    if value in ("", None):
        return ABSENT
    if isinstance(value, bool):
        return code(str(value).lower())
    words = f" ({value >> 20} MiB)" if unit == "bytes" and isinstance(value, int) and value >= 1 << 20 else ""
    return code(value) + words


def accepted(setting: Setting) -> str:
    """Return what values are accepted."""
    if setting.is_switch:
        return "`true`, `false`"
    if setting.choices:
        return ", ".join(map(code, setting.choices))
    bounds = next(part for part in get_args(setting.type) if isinstance(part, Meta))
    return "text" if bounds.ge is None else f"{bounds.ge} to {bounds.le}"


if __name__ == "__main__":
    sys.exit(main())
