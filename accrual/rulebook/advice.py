"""What a rulebook may say, but hardly means."""

from __future__ import annotations

from collections.abc import Iterable

from accrual.rulebook.lines import LineIndex, path_text
from accrual.rulebook.model import Campaign, Limit, Rulebook

__all__ = ["advice"]


def advice(rulebook: Rulebook, name: str = "rulebook") -> list[str]:
    """Return a line, in the form of a finding, for each kind that a campaign or limit is for, but nothing earns.

    Such an event never comes so far: it is a dead letter, or has its own way as a refund or a control event. ``name``
    stands for the file.
    """
    index = LineIndex(rulebook.text)
    tables: dict[str, Iterable[Campaign | Limit]] = {"campaign": rulebook.campaigns, "limit": rulebook.limits}
    lines: list[str] = []
    for array, rules in tables.items():
        for number, rule in enumerate(rules):
            path = (array, number, "kinds")
            where = f"{name}:{index.line_of(path)}: {path_text(path)}"
            lines.extend(
                f"{where}: no earning rule is for {kind!r}, so {rule.id!r} never applies to it"
                for kind in rule.kinds or ()
                if rulebook.earning_rule(kind) is None
            )
    return lines
