"""Limits for tests of the audit: rulebooks that have them, and what `check_caps` finds beyond them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from accrual.audit import Finding
from accrual.audit.caps import booked_days, check_caps
from accrual.audit.recorded import recorded_rulebooks
from accrual.book import Connection

__all__ = ["capped", "limit", "name_in", "rulebook", "told"]

EARNING: Final = """\
[programme]
name = "limits-test"
version = {version}
timezone = "{zone}"

[[earn]]
kind = "order_paid"
points_per_yuan = "1"

[[earn]]
kind = "checkin"
points = 5
max_per_day = 9

[[earn]]
kind = "review"
points = 0
"""


def limit(name: str, key: str, measure: str, window: str, most: int, action: str, *kinds: str) -> str:
    lines = [f'id = "{name}"', f'key = "{key}"', f'measure = "{measure}"', f'window = "{window}"', f"max = {most}"]
    lines += [f'action = "{action}"'] + ([f"kinds = {list(kinds)}".replace("'", '"')] if kinds else [])
    return "\n[[limit]]\n" + "\n".join(lines) + "\n"


def rulebook(version: int, *limits: str, zone: str = "Asia/Shanghai") -> str:
    return EARNING.format(version=version, zone=zone) + "".join(limits)


def capped(connection: Connection) -> Iterator[Finding]:
    recorded = recorded_rulebooks(connection)
    for day in booked_days(connection, None, None):
        yield from check_caps(connection, day, recorded)


def told(connection: Connection) -> list[tuple[Any, ...]]:
    return [
        (name_in(one), one.seq, one.member, one.day, one.expected, one.found, one.owed) for one in capped(connection)
    ]


def name_in(finding: Finding) -> str:
    """Return the limit that a finding names."""
    return finding.detail.split(":")[0].removeprefix("limit ")
