"""Tier, card and immunity of members, as the engine that has decided a whole ledger again knows them.

Only the events say these, so there is nothing in the book to make them again from. Late events are decided by them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from accrual.audit.findings import Finding
from accrual.book.database import Connection
from accrual.book.texts import shown, stored
from accrual.engine import ReferenceEngine

__all__ = ["check_attributes"]

BOOKED: Final = """
    SELECT member, coalesce(tier, ''), coalesce(card_until_ms, 0), coalesce(immune_until_ms, 0)
    FROM book.members WHERE partition_id = %(partition_id)s OR member = ANY(%(members)s)
"""

# Of whom another ledger says something too, or whose event had left the stream before the book could read it.
UNCERTAIN: Final = """
    SELECT member FROM book.members WHERE incomplete AND member = ANY(%(members)s)
    UNION SELECT member FROM book.entries
    WHERE outcome = 'applied' AND partition_id <> %(partition_id)s AND member = ANY(%(members)s)
"""

# Whom a person has released, which the ledger does not say yet.
RELEASED: Final = """
    SELECT details ->> 'member' FROM book.actions a WHERE kind = 'release' AND NOT EXISTS (
        SELECT FROM book.entries e
        WHERE e.member = a.details ->> 'member' AND e.kind = 'member_released' AND e.outcome = 'applied'
            AND e.number > a.action)
"""


class Attributes(NamedTuple):
    """What an engine has of a member, as ``stored``; 0 is no time."""

    tier: str = ""
    card_until: int = 0
    immune_until: int = 0

    def told(self) -> dict[str, object]:
        """Return them as a finding tells them."""
        return {"tier": shown(self.tier), "card_until": self.card_until, "immune_until": self.immune_until}


NOTHING: Final = Attributes()


def check_attributes(
    connection: Connection, partition: str, partition_id: int, engine: ReferenceEngine
) -> Iterator[Finding]:
    """Yield the members of whom the book has something else than ``engine``, which stands where the book does."""
    known = {
        stored(name): Attributes(stored(member.tier), member.card_until, member.immune_until)
        for name, member in engine.members.items()
        if member.tier or member.card_until or member.immune_until
    }
    about: dict[str, Any] = {"partition_id": partition_id, "members": list(known)}
    booked = {name: Attributes(*attributes) for name, *attributes in connection.execute(BOOKED, about)}
    for (name,) in connection.execute(RELEASED):
        for side in (known, booked):
            side[name] = side.get(name, NOTHING)._replace(immune_until=0)
    about["members"] = sorted(
        name for name in known.keys() | booked.keys() if known.get(name, NOTHING) != booked.get(name, NOTHING)
    )
    uncertain = {name for (name,) in connection.execute(UNCERTAIN, about)}
    for name in about["members"]:
        if name not in uncertain:
            yield Finding(
                "attributes",
                "tier, card or immunity is not what the events have made of it",
                partition,
                member=shown(name),
                expected=known.get(name, NOTHING).told(),
                found=booked.get(name, NOTHING).told(),
            )
