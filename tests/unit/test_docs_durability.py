"""docs/DURABILITY.md names tests that are there, and settings that exist."""

from __future__ import annotations

import re
from pathlib import Path

from accrual.settings import all_settings

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "DURABILITY.md").read_text(encoding="utf-8")


def test_every_test_that_is_named_is_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", DOCUMENT))
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 15
    assert {name for name in named if f"def {name}(" not in sources} == set()


def test_every_setting_that_is_named_exists() -> None:
    named = {
        "backoff_limit_ms",
        "in_flight_bytes",
        "memory_limit_bytes",
        "require_durable",
        "snapshots_kept",
        "trim_input",
    }
    assert all(f"`{name}`" in DOCUMENT for name in named)
    assert named <= set(all_settings())


def test_every_section_that_is_linked_is_there() -> None:
    headings = re.findall(r"^#+ (.*)$", DOCUMENT, re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([\w-]+)\)", DOCUMENT)) <= anchors
    for page, anchor in re.findall(r"\]\((\w+\.md)#([\w-]+)\)", DOCUMENT):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        assert anchor in {line.lstrip("# ").lower().replace(" ", "-") for line in text.splitlines() if line[:1] == "#"}
