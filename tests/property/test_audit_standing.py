"""What was committed before a batch is enough to decide it again: an engine that followed stands where one decided."""

from __future__ import annotations

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from accrual.audit.standing import Following, lasting_rows, warm_from
from accrual.engine import BatchHeader, ReferenceEngine, Secret, StreamEntry
from accrual.ledger import GENESIS, EntriesBatch, decode, digest_of
from accrual.rulebook import parse
from strategies import ZONES, rulebook_or_skip, rulebook_texts, streams

SECRET = Secret(bytes(range(16)))
SLACK_DAYS = 1


def decided(engine: ReferenceEngine, entry: StreamEntry, number: int) -> bytes:
    return engine.decide_entries([entry]).encode(BatchHeader(number, GENESIS, (0, 0), 1))


@settings(max_examples=settings().max_examples // 2)
@given(st.sampled_from(ZONES), streams(longest=60), st.data())
def test_a_follower_stands_where_an_engine_does_that_decided(
    zone: str, entries: list[StreamEntry], data: st.DataObject
) -> None:
    assume(len(entries) > 1)
    books = [rulebook_or_skip(data.draw(rulebook_texts(version=version, zone=zone))) for version in (1, 2)]
    # A second version keeps the counts of limits that it has in common with the first.
    books.append(parse(books[0].text.replace("version = 1", "version = 3")))
    switches = dict(zip(sorted(data.draw(st.sets(st.integers(1, len(entries)), max_size=2))), books[1:], strict=False))
    first = data.draw(st.integers(2, len(entries)), label="the first batch that is decided again")

    engine = ReferenceEngine(books[0], SECRET, SLACK_DAYS)
    ledger: list[bytes] = []
    for number, entry in enumerate(entries, 1):
        if number in switches:
            engine.adopt(switches[number])
        ledger.append(decided(engine, entry, number))

    following = Following(SECRET)
    following.adopt(books[0].text, SLACK_DAYS)
    warm = warm_from(
        books[0].calendar, SLACK_DAYS, ((number, entries[number - 1].ms) for number in range(first - 1, 0, -1))
    )
    assert following.engine is not None
    found = {entry[:2]: entry for entry in entries}
    for number in range(1, first):
        if number in switches:
            following.adopt(switches[number].text, SLACK_DAYS)
        batch = decode(ledger[number - 1])
        assert isinstance(batch, EntriesBatch)
        if number < warm:
            following.remember(lasting_rows(batch, following.engine), found.get)
        else:
            following.take(
                [entries[number - 1]], [row[1:] for row in batch.rows()] if batch.header.counts.entries else []
            )
    for number in range(first, len(entries) + 1):
        if number in switches:
            following.adopt(switches[number].text, SLACK_DAYS)
        again = decided(following.engine, entries[number - 1], number)
        assert digest_of(again) == digest_of(ledger[number - 1]), (
            number,
            warm,
            decode(again),
            decode(ledger[number - 1]),
        )
