"""What the book knows of members beside their points: state, tier, card, immunity (SPEC section 4, steps 5 and 12).

The ledger says that a control event was applied, but not what it held; that is read from the events stream while it is
there. The late events of the slow path, and the people who look at frozen accounts, need it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np
import psycopg
import redis

from accrual.book.database import merge
from accrual.book.texts import stored
from accrual.engine.batch import Item, items_of_entry
from accrual.errors import InvalidEvent
from accrual.events import CONTROL_KINDS, StreamEntry
from accrual.ledger import EntriesBatch
from accrual.outcomes import OUTCOMES
from accrual.stream import Keys, stream_id_text

__all__ = ["ControlEvent", "MemberChange", "control_events", "member_changes", "note_members"]

APPLIED: Final = OUTCOMES.index("applied")
HELD: Final = OUTCOMES.index("held")

# What an event of each kind makes of the state; an update leaves it.
STATES: Final = {"member_frozen": "frozen", "member_released": "active", "member_blocked": "blocked"}
# Only these change attributes; whatever else an event has says nothing.
TELLING_KINDS: Final = ("member_updated", "member_released")

# So many stream entries are asked for at once, each of which may have a thousand events.
ENTRIES_AT_ONCE: Final = 64

# One change each of some members. The number stays that of the state: by it is found what froze the member.
CHANGE: Final = """
    MERGE INTO book.members m USING unnest(
        %(members)s::text[], %(states)s::text[], %(tiers)s::text[], %(cards)s::bigint[], %(immunities)s::bigint[],
        %(incomplete)s::boolean[], %(sets_immunity)s::boolean[], %(unless_immune_at)s::bigint[]
    ) AS c (member, state, tier, card_until_ms, immune_until_ms, incomplete, sets_immunity, unless_immune_at_ms)
    ON m.member = c.member
    WHEN MATCHED AND (
        c.unless_immune_at_ms IS NULL OR c.unless_immune_at_ms >= coalesce(m.immune_until_ms, 0)
    ) THEN UPDATE SET
        partition_id = %(partition_id)s,
        number = CASE WHEN c.state IS NULL THEN m.number ELSE %(number)s END,
        state = CASE WHEN c.state = 'frozen' AND m.state = 'blocked' THEN 'blocked' ELSE coalesce(c.state, m.state) END,
        tier = coalesce(c.tier, m.tier),
        card_until_ms = coalesce(c.card_until_ms, m.card_until_ms),
        immune_until_ms = CASE WHEN c.sets_immunity THEN c.immune_until_ms ELSE m.immune_until_ms END,
        incomplete = m.incomplete OR c.incomplete
    WHEN NOT MATCHED THEN INSERT
        (member, partition_id, number, state, tier, card_until_ms, immune_until_ms, incomplete)
        VALUES (c.member, %(partition_id)s, %(number)s, coalesce(c.state, 'active'), c.tier, c.card_until_ms,
            c.immune_until_ms, c.incomplete)
"""


class ControlEvent(msgspec.Struct, frozen=True):
    """The attributes that a control event changes; ``known`` is false where it had left the stream."""

    tier: str = ""
    card_until_ms: int | None = None
    immune_until_ms: int | None = None
    known: bool = True


class MemberChange(msgspec.Struct, frozen=True):
    """What one entry changes of a member: where ``unless_immune_at_ms`` is set, only without immunity at that time."""

    member: str
    state: str | None
    control: ControlEvent
    sets_immunity: bool = False
    unless_immune_at_ms: int | None = None


def control_events(client: redis.Redis, keys: Keys, batches: Iterable[EntriesBatch]) -> dict[int, ControlEvent]:
    """Read the control events of ``batches`` that change attributes from the events stream, by seq.

    However many of them a stream entry has, it is read once.
    """
    wanted: defaultdict[str, dict[int, int]] = defaultdict(dict)
    for batch in batches:
        tells = np.array([kind in TELLING_KINDS for kind in batch.kinds])[batch.integers("kind")]
        for row in np.flatnonzero((batch.integers("outcome") == APPLIED) & tells).tolist():
            stream_id = stream_id_text((int(batch.integers("at")[row]), int(batch.integers("at_seq")[row])))
            wanted[stream_id][batch.header.first_seq + row] = int(batch.integers("index")[row])
    found: dict[int, ControlEvent] = {}
    stream_ids = list(wanted)
    for start in range(0, len(stream_ids), ENTRIES_AT_ONCE):
        chosen = stream_ids[start : start + ENTRIES_AT_ONCE]
        with client.pipeline(transaction=False) as pipeline:
            for stream_id in chosen:
                pipeline.xrange(keys.events, stream_id, stream_id)
            replies: list[Any] = pipeline.execute()
        for stream_id, reply in zip(chosen, replies, strict=True):
            items = _items(reply)
            found |= {seq: _control_event(items, index) for seq, index in wanted[stream_id].items()}
    return found


def _items(reply: list[tuple[bytes, dict[bytes, bytes]]]) -> list[Item]:
    """Return the events of the stream entry that ``reply`` has; none where it is gone."""
    if not reply:
        return []
    ms, seq = reply[0][0].split(b"-")
    try:
        return items_of_entry(StreamEntry(int(ms), int(seq), tuple(reply[0][1].items())))
    except InvalidEvent:
        return []


def _control_event(items: Sequence[Item], index: int) -> ControlEvent:
    try:
        event = items[index].event()
    except (InvalidEvent, IndexError):
        # The stream no longer has what was decided; the audit compares them.
        return ControlEvent(known=False)
    if event.kind == "member_updated":
        return ControlEvent(tier=event.tier, card_until_ms=event.card_until)
    return ControlEvent(immune_until_ms=event.immune_until)


def member_changes(
    batch: EntriesBatch, freezing: frozenset[str], controls: Mapping[int, ControlEvent], without: Collection[int]
) -> Iterator[MemberChange]:
    """Yield what the entries of ``batch`` change, in order; ``freezing`` are the limits whose action is to freeze.

    Those whose seqs are in ``without`` are not booked: they change no state, which is made anew from what is.
    """
    outcome, tripped = batch.integers("outcome"), batch.integers("tripped")
    mask = sum(1 << number for number, limit in enumerate(batch.limits) if limit in freezing)
    freezes = (tripped & np.uint64(mask)) != 0
    rows = np.flatnonzero((outcome == APPLIED) | freezes).tolist()
    for row, member in zip(rows, _members_at(batch, rows), strict=True):
        kind, seq = batch.kinds[int(batch.integers("kind")[row])], batch.header.first_seq + row
        if int(outcome[row]) == APPLIED and kind in CONTROL_KINDS:
            control = controls.get(seq, ControlEvent(known=kind not in TELLING_KINDS))
            state = None if seq in without else STATES.get(kind)
            yield MemberChange(member, state, control, sets_immunity=kind == "member_released")
        elif seq in without:
            continue
        elif int(outcome[row]) == HELD:
            # A freeze that tripped and an entry that is held: the member was not immune, or had been frozen before.
            yield MemberChange(member, "frozen", ControlEvent())
        elif OUTCOMES[int(outcome[row])] == "rejected":
            time_ms = min(int(batch.integers("ts")[row]), int(batch.integers("at")[row]))
            yield MemberChange(member, "frozen", ControlEvent(), unless_immune_at_ms=time_ms)


def _members_at(batch: EntriesBatch, rows: Sequence[int]) -> list[str]:
    """Return the members of some rows, which are few."""
    if not rows:
        return []
    lengths, data = batch.raw_texts("member")
    ends = np.cumsum(lengths)
    return [data[ends[row] - lengths[row] : ends[row]].decode() for row in rows]


def _stronger(freeze: MemberChange, other: MemberChange) -> MemberChange:
    """Return that of two freezes which freezes where either would: one that heeds no immunity, else the later one."""
    if freeze.unless_immune_at_ms is None or other.unless_immune_at_ms is None:
        return freeze if freeze.unless_immune_at_ms is None else other
    return max(freeze, other, key=lambda change: change.unless_immune_at_ms or 0)


def note_members(cursor: psycopg.Cursor[Any], partition_id: int, number: int, changes: Iterable[MemberChange]) -> None:
    """Write ``changes``, those of each member in order."""
    of_members: defaultdict[str, list[MemberChange]] = defaultdict(list)
    for change in changes:
        of_member = of_members[change.member]
        if of_member and of_member[-1].state == change.state == "frozen":
            # Whoever goes on tripping limits does so a thousand times; what freezes once more changes nothing.
            of_member[-1] = _stronger(of_member[-1], change)
        else:
            of_member.append(change)
    in_order = [of_members[member] for member in sorted(of_members)]
    for place in range(max(map(len, in_order), default=0)):
        chosen = [of_member[place] for of_member in in_order if place < len(of_member)]
        parameters = {
            "partition_id": partition_id,
            "number": number,
            "members": [stored(change.member) for change in chosen],
            "states": [change.state for change in chosen],
            "tiers": [stored(change.control.tier) or None for change in chosen],
            "cards": [change.control.card_until_ms for change in chosen],
            "immunities": [change.control.immune_until_ms for change in chosen],
            "incomplete": [not change.control.known for change in chosen],
            "sets_immunity": [change.sets_immunity for change in chosen],
            "unless_immune_at": [change.unless_immune_at_ms for change in chosen],
        }
        merge(cursor, CHANGE, parameters)
