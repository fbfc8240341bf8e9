"""What a rulebook may say, but hardly means."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from accrual.rulebook.bounds import largest_sets
from accrual.rulebook.lines import KeyPath, LineIndex, path_text
from accrual.rulebook.model import Campaign, Limit, Rulebook, combined_multiplier

__all__ = ["advice"]


def advice(rulebook: Rulebook, name: str = "rulebook") -> list[str]:
    """Return a line, in the form of a finding, for each thing that is allowed and goes wrong. ``name`` is the file."""
    index = LineIndex(rulebook.text)
    found = [*_kinds_without_a_rule(rulebook), *_points_below_zero(rulebook)]
    return [f"{name}:{index.line_of(path)}: {path_text(path)}: {reason}" for path, reason in found]


def _kinds_without_a_rule(rulebook: Rulebook) -> Iterator[tuple[KeyPath, str]]:
    """Yield each kind that a campaign or limit is for, but nothing earns.

    Such an event never comes so far: it is a dead letter, or has its own way as a refund or a control event.
    """
    tables: dict[str, Iterable[Campaign | Limit]] = {"campaign": rulebook.campaigns, "limit": rulebook.limits}
    for array, rules in tables.items():
        for number, rule in enumerate(rules):
            for kind in rule.kinds or ():
                if rulebook.earning_rule(kind) is None:
                    yield (
                        (array, number, "kinds"),
                        f"no earning rule is for {kind!r}, so {rule.id!r} never applies to it",
                    )


def _points_below_zero(rulebook: Rulebook) -> Iterator[tuple[KeyPath, str]]:
    """Yield each kind whose multipliers, added up, may be below zero, and its points with them.

    Such an event takes points from its member, which is hardly what a campaign is for.
    """
    if rulebook.stacking != "add":
        return
    for rule in rulebook.earning_rules:
        for campaigns in largest_sets(rulebook, rule.kind):
            lowering = [campaign for campaign in campaigns if campaign.multiplier < 1]
            if combined_multiplier(rulebook.stacking, (campaign.multiplier for campaign in lowering)) < 0:
                ids = ", ".join(campaign.id for campaign in lowering)
                reason = f"campaigns {ids} added up make the points of {rule.kind!r} negative: members lose some"
                yield ("campaign", rulebook.campaigns.index(lowering[-1]), "multiplier"), reason
                break
