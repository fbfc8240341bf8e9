"""The compiled engine and the reference say the same of everything, to the byte, however a stream is cut up."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from itertools import pairwise
from types import MappingProxyType

from hypothesis import given
from hypothesis import strategies as st

from accrual.engine import OFFLINE_SLACK_DAYS, BatchHeader, Engine, ReferenceEngine, Secret, StreamEntry
from accrual.engine.fast import FastEngine
from accrual.ledger import GENESIS, digest_of
from accrual.rulebook import Rulebook
from strategies import PLACES_MS, ZONES, rulebook_or_skip, rulebook_texts, streams

SECRET = Secret(bytes(range(16)))
SMALL_SEGMENTS = 3


def cut(entries: list[StreamEntry], cuts: list[int]) -> list[list[StreamEntry]]:
    """Split entries into non-empty runs at ``cuts``."""
    places = sorted({place % len(entries) for place in cuts} | {0, len(entries)})
    return [entries[start:end] for start, end in pairwise(places)]


def run(
    engine: Engine,
    batches: list[list[StreamEntry]],
    later: dict[int, Rulebook],
    reclaims: Mapping[int, int] = MappingProxyType({}),
) -> list[tuple[object, ...]]:
    """Decide batches in turn, adopting the rulebooks of ``later`` before the batch of that number.

    ``reclaims`` says before which batches what the business day has no need of is dropped.
    """
    results: list[tuple[object, ...]] = []
    previous, first_seq, after = GENESIS, 1, (0, 0)
    for number, entries in enumerate(batches, start=1):
        if number in later:
            engine.adopt(later[number])
        if number in reclaims:
            engine.reclaim(reclaims[number])
        batch = engine.decide_entries(entries)
        if after >= batch.through:
            # A ledger never goes back; what is compared here may.
            after = (0, 0)
        encoded = batch.encode(BatchHeader(number, previous, after, first_seq))
        outcomes = {name: count for name, count in batch.outcomes.items() if count}
        points = {name: total for name, total in batch.points.items() if total}
        decisions = list(batch.decisions())
        results.append((decisions, batch.rejected, batch.counts, batch.through, outcomes, points, encoded))
        previous, after = digest_of(encoded), batch.through
        first_seq += batch.counts.entries
    return results


@given(rulebook_texts(), streams(), st.lists(st.integers(0, 100), max_size=6))
def test_same_bytes_in_same_batches(text: str, entries: list[StreamEntry], cuts: list[int]) -> None:
    rulebook = rulebook_or_skip(text)
    batches = cut(entries, cuts)
    expected = run(ReferenceEngine(rulebook, SECRET, 1), batches, {})
    actual = run(FastEngine(rulebook, SECRET, 1, SMALL_SEGMENTS), batches, {})
    assert actual == expected


@given(rulebook_texts(), streams(), st.lists(st.integers(0, 100), max_size=6))
def test_batches_do_not_matter(text: str, entries: list[StreamEntry], cuts: list[int]) -> None:
    rulebook = rulebook_or_skip(text)
    whole = FastEngine(rulebook, SECRET, 1, SMALL_SEGMENTS).decide_entries(entries)
    decisions = list(whole.decisions())
    parts = run(FastEngine(rulebook, SECRET, 1, SMALL_SEGMENTS), cut(entries, cuts), {})
    assert [decision for part in parts for decision in part[0]] == decisions  # type: ignore[attr-defined]


@given(st.sampled_from(ZONES), streams(), st.data())
def test_same_bytes_across_rulebooks(zone: str, entries: list[StreamEntry], data: st.DataObject) -> None:
    first, second, third = (data.draw(rulebook_texts(version=version, zone=zone)) for version in (1, 2, 3))
    batches = cut(entries, data.draw(st.lists(st.integers(0, 100), min_size=2, max_size=8)))
    books = [rulebook_or_skip(text) for text in (first, second, third, first)]
    switches = sorted(data.draw(st.sets(st.integers(1, len(batches)), max_size=3)))
    later = dict(zip(switches, books[1:], strict=False))
    expected = run(ReferenceEngine(books[0], SECRET, 1), batches, later)
    actual = run(FastEngine(books[0], SECRET, 1, SMALL_SEGMENTS), batches, later)
    assert actual == expected


@given(rulebook_texts(), streams(jumps=True), st.lists(st.integers(0, 100), max_size=6), st.data())
def test_offline_arrivals_may_go_anywhere(
    text: str, entries: list[StreamEntry], cuts: list[int], data: st.DataObject
) -> None:
    rulebook = rulebook_or_skip(text)
    batches = cut(entries, cuts)
    days = st.sampled_from(PLACES_MS).map(rulebook.calendar.day)
    reclaims = data.draw(st.dictionaries(st.integers(2, len(batches) + 1), days, max_size=2), label="reclaimed")
    expected = run(ReferenceEngine(rulebook, SECRET, OFFLINE_SLACK_DAYS), batches, {}, reclaims)
    actual = run(FastEngine(rulebook, SECRET, OFFLINE_SLACK_DAYS, SMALL_SEGMENTS), batches, {}, reclaims)
    assert actual == expected


@given(rulebook_texts(), streams(), st.lists(st.integers(0, 100), min_size=2, max_size=6), st.data())
def test_an_image_taken_while_the_engine_goes_on(
    text: str, entries: list[StreamEntry], cuts: list[int], data: st.DataObject
) -> None:
    rulebook = rulebook_or_skip(text)
    batches = cut(entries, cuts)
    begun = data.draw(st.integers(0, len(batches)), label="batches before the image is begun")
    written = data.draw(st.integers(begun, len(batches)), label="batches before it is written")
    unbroken = run(FastEngine(rulebook, SECRET, 1, SMALL_SEGMENTS), batches, {})

    engine = FastEngine(rulebook, SECRET, 1, SMALL_SEGMENTS)
    for batch in batches[:begun]:
        engine.decide_entries(batch)
    image = engine.image()
    for batch in batches[begun:written]:
        engine.decide_entries(batch)
    pieces: list[bytes] = []
    assert image.write(lambda piece: pieces.append(bytes(piece)))
    image.close()
    for batch in batches[written:]:
        engine.decide_entries(batch)

    again = FastEngine(rulebook, SECRET, 1, SMALL_SEGMENTS)
    again.restore(image.description, BytesIO(b"".join(pieces)))
    if begun == len(batches):
        # A table drops what has expired when it needs room, so one may have more of that than the other.
        for each in (engine, again):
            each.reclaim(rulebook.calendar.day(entries[-1].ms))
        assert again.sizes == engine.sizes
    for number, batch in enumerate(batches[begun:], start=begun):
        assert list(again.decide_entries(batch).decisions()) == unbroken[number][0]
