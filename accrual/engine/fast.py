"""The compiled engine: a thin owner of ``fastpath.core``, which does the work."""

from __future__ import annotations

import copy
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Protocol, Self

import msgspec

from accrual.engine.batch import Item, explain, explain_invalid
from accrual.engine.compile import Layout, Layouts, describe
from accrual.engine.reference import STREAM_SLACK_DAYS
from accrual.errors import InvalidEvent, StateMismatch
from accrual.events import BUILT_IN_KINDS, LIMIT_KEYS, Fields, StreamEntry, items_of_json, mapping_from_json
from accrual.events.text import compact_from_mapping, compact_if_plain, is_json_array
from accrual.ledger import EntriesBatch, decode
from accrual.outcomes import (
    NO_SECRET,
    OUTCOMES,
    BatchHeader,
    Counts,
    DeadLetter,
    Decision,
    Duplicate,
    Position,
    RejectedItem,
    Secret,
)
from accrual.rulebook import Rulebook, combined_multiplier
from fastpath.core import DEFAULT_SEGMENT_SHIFT, Batch, Core
from fastpath.image import StateImage
from fastpath.resp import ReplyReader

__all__ = ["EngineImage", "FastBatch", "FastEngine", "ImageSource"]

# At a million new keys a second the tables grow by some megabytes in this time.
PREPARE_INTERVAL_S: Final = 0.01
# One may be encoded, one decided and one decoded at a time.
KEPT_BATCHES: Final = 3

_encode = msgspec.msgpack.encode

TABLES: Final = ("ids", *(f"{key}s" for key in LIMIT_KEYS), *(f"{key}_days" for key in LIMIT_KEYS))

# The size of a table's new records, and where the parts come from that they keep: ``Layout.moves_to``.
Move = tuple[int, list[tuple[int, int, int]]]


def split_json(value: bytes) -> list[tuple[bytes, bytes | None]]:
    """Return ``(original, compact)`` for every event of a JSON entry that is not one plain event.

    ``compact`` is ``None`` for a bad item. Raises ``ValueError`` where the value as a whole does not decode.
    """
    try:
        if not is_json_array(value):
            return [(value, _compact(mapping_from_json(value)))]
        items = items_of_json(value)
    except InvalidEvent as error:
        raise ValueError(str(error)) from None
    return [(item, _compact_item(item)) for item in items]


def _compact(fields: dict[str, Any]) -> bytes | None:
    try:
        return compact_from_mapping(fields)
    except InvalidEvent:
        return None


def _compact_item(item: bytes) -> bytes | None:
    compact = compact_if_plain(item)
    if compact is not None:
        return compact
    try:
        return _compact(mapping_from_json(item))
    except InvalidEvent:
        return None


def header_names(rulebook: Rulebook) -> bytes:
    """Return the part of a ledger batch's header that names the rulebook and what its codes stand for."""
    named = {
        "rulebook": rulebook.version,
        "kinds": [*(rule.kind for rule in rulebook.earning_rules), *BUILT_IN_KINDS],
        "campaigns": [campaign.id for campaign in rulebook.campaigns],
        "limits": [limit.id for limit in rulebook.limits],
    }
    return b"".join(_encode(key) + _encode(value) for key, value in named.items())


class ImageSource(Protocol):
    """A file with the bytes of an image. What ``readinto`` has filled is not changed before the next ``read``."""

    def read(self, size: int, /) -> bytes:
        """Return the next ``size`` bytes."""

    def readinto(self, place: memoryview, /) -> int:
        """Fill ``place`` with the next bytes and return how many there were."""


class FastEngine:
    """The compiled twin of ``ReferenceEngine``. A batch it returns is valid until the next one is made.

    Three threads may decode, decide and encode batches at a time: each batch in this order, and each thread all of them
    in the order of the stream. Batches of ``decode_reply`` are valid until ``KEPT_BATCHES`` more were made.

    ``segment_shift`` is the log2 of the slots in a segment of its tables; tests make it small.
    """

    def __init__(
        self,
        rulebook: Rulebook,
        secret: Secret = NO_SECRET,
        slack_days: int = STREAM_SLACK_DAYS,
        segment_shift: int = DEFAULT_SEGMENT_SHIFT,
    ) -> None:
        self.slack_days = slack_days
        self._core = Core(secret.key, slack_days, compact_if_plain, split_json, segment_shift)
        self._layouts = Layouts()
        self._moving = threading.Lock()
        self._deciding = threading.Lock()
        self._image: StateImage | None = None
        huge = segment_shift >= DEFAULT_SEGMENT_SHIFT
        self._batches = [Batch(huge) for _ in range(KEPT_BATCHES)]
        # Memory that was used a moment ago is still in the cache.
        self._only_batch = Batch(huge)
        self.made = 0
        self._adopted = False
        self.rulebook = rulebook
        self.adopt(rulebook)

    def adopt(self, rulebook: Rulebook) -> None:
        """Decide by ``rulebook`` from now on. Raises ``RulebookError`` where it may not follow the one in force."""
        self.rulebook.check_successor(rulebook)
        before = self._layouts.tables()
        self._layouts.adopt(rulebook)
        self._take_over(rulebook, before)
        self.rulebook = rulebook

    def adoption_bytes(self, rulebook: Rulebook) -> int:
        """Return the most by which ``memory_bytes`` can grow, for a moment too, while ``rulebook`` is adopted."""
        layouts = copy.deepcopy(self._layouts)
        layouts.adopt(rulebook)
        return self._core.adoption_bytes(self._moves(self._layouts.tables(), layouts.tables()))

    def _moves(self, before: list[Layout], after: list[Layout]) -> list[Move | None]:
        """Return for each table how its records change, ``None`` where they do not."""
        return [
            None if new.parts == old.parts and self._adopted else (new.stride, old.moves_to(new))
            for old, new in zip(before, after, strict=True)
        ]

    def _take_over(self, rulebook: Rulebook, before: list[Layout]) -> None:
        """Let the core decide by ``rulebook``, and move its records from the layouts ``before`` to the present ones."""
        moves = self._moves(before, self._layouts.tables())
        if self._image is not None and any(moves):
            self._image.close()

        def multiplier(numbers: list[int]) -> tuple[int, int]:
            chosen = [rulebook.campaigns[number].multiplier for number in numbers]
            value = combined_multiplier(rulebook.stacking, chosen)
            return value.numerator, value.denominator

        with self._moving:
            self._core.adopt(describe(rulebook, self._layouts), multiplier, header_names(rulebook), moves)
        self._adopted = True

    def decide_entries(self, entries: Sequence[StreamEntry]) -> FastBatch:
        """Decide every event of ``entries``, in order. The entries must not be empty."""
        batch = self._next_batch(entries, self._only_batch, 1)
        self._core.decode_entries(entries, batch.made)
        self.decide(batch)
        return batch

    def decide_reply(self, reply: ReplyReader) -> FastBatch:
        """Decide every event of a reply, which must be kept until the batch is done with."""
        batch = self._next_batch(reply, self._only_batch, 1)
        with self._deciding:
            self._core.decide_reply(reply, batch.made)
        return batch.read()

    def decode_reply(self, reply: ReplyReader) -> FastBatch:
        """Decode every event of a reply, which must be kept until the batch is done with. It is still to be decided."""
        batch = self._next_batch(reply, self._batches[self.made % KEPT_BATCHES], KEPT_BATCHES)
        self._core.decode_reply(reply, batch.made)
        return batch

    def decide(self, batch: FastBatch) -> None:
        """Decide the events of a batch that was decoded."""
        with self._deciding:
            self._core.decide(batch.made)
        batch.read()

    def _next_batch(self, source: Sequence[StreamEntry] | ReplyReader, batch: Batch, kept: int) -> FastBatch:
        self.made += 1
        return FastBatch(self, batch, source, self.made + kept)

    def image(self) -> EngineImage:
        """Begin an image of the state as it is now, between two batches; it is to be closed before the next one.

        The engine goes on, and another thread writes the image. A rulebook that changes the records ends it.
        """
        self._image = self._core.image()
        return EngineImage(self._image, self._layouts.description(), self._deciding)

    def restore(
        self, description: dict[str, Any], source: ImageSource, check: Callable[[], object] = lambda: None
    ) -> None:
        """Take on the state of an image: ``description`` is its own, ``source`` has its bytes.

        ``check`` is called when all of them were read, and before anything is made of them; it may raise what it likes.
        The engine must be new, with the rulebook that was in force. Raises ``StateMismatch`` where the image is not one
        of such an engine; the engine is of no use then.
        """
        slack_days = description["shape"]["slack_days"]
        if slack_days != self.slack_days:
            raise StateMismatch(f"the image was taken with {slack_days} days of slack")
        before = self._layouts.tables()
        self._layouts.resume(description["layouts"], self.rulebook)
        self._take_over(self.rulebook, before)
        if self._layouts.description() != description["layouts"]:
            raise StateMismatch("the image has its records laid out in another way")
        try:
            with ThreadPoolExecutor() as threads:

                def checked(work: Callable[[int], None], tables: Iterable[int]) -> Iterator[None]:
                    check()
                    return threads.map(work, tables)

                self._core.restore(description["shape"], source, checked)
        except (ValueError, KeyError, TypeError) as error:
            raise StateMismatch(f"the image does not fit: {error}") from None

    def reclaim(self, day: int) -> None:
        """Drop what no event that arrives on the business day ``day`` or later can need; its memory is used again.

        An image that is taken ends: every record that is dropped would have to be saved for it first.
        """
        with self._deciding:
            if self._image is not None:
                self._image.close()
                self._image.discard()
            self._core.reclaim(day)

    def headroom_bytes(self, events: int, *, imaging: bool = False) -> int:
        """Return the most by which ``memory_bytes`` can grow when so many events are decided.

        With ``imaging`` also where an image of the state is begun before them.
        """
        return self._core.headroom_bytes(events, imaging)

    def prepare(self) -> None:
        """Bring in the memory that the tables will grow into: for another thread, now and then.

        The first touch of a page of two megabytes is a pause that is long for this engine.
        """
        with self._moving:
            self._core.prepare()

    def start_assistant(self) -> None:
        """Start a thread that brings in memory ahead of its use, for as long as the engine lives."""
        threading.Thread(target=_keep_prepared, args=(weakref.ref(self),), daemon=True, name="memory").start()

    @property
    def memory_bytes(self) -> int:
        """The memory of the state: what is in use, what is brought in ahead of that, and what an image has kept."""
        return self._core.memory_bytes + (self._image.kept_bytes if self._image is not None else 0)

    @property
    def sizes(self) -> dict[str, int]:
        """The number of records in each table."""
        return dict(zip(TABLES, self._core.sizes, strict=True))

    @property
    def lines_searched(self) -> dict[str, int]:
        """How many cache lines of its index are looked at, table by table, if every key is searched for once."""
        return dict(zip(TABLES, self._core.lines_searched, strict=True))


def _keep_prepared(reference: weakref.ref[FastEngine]) -> None:
    while (engine := reference()) is not None:
        engine.prepare()
        del engine
        time.sleep(PREPARE_INTERVAL_S)


class EngineImage:
    """The state of an engine at a batch boundary. ``description`` is for ``FastEngine.restore``, beside the bytes."""

    def __init__(self, image: StateImage, layouts: dict[str, Any], deciding: threading.Lock) -> None:
        self._image = image
        self._deciding = deciding
        self.description = {"layouts": layouts, "shape": image.description}

    def write(self, sink: Callable[[memoryview], object]) -> bool:
        """Hand the image to ``sink``, piece by piece: for another thread. Returns whether it is whole.

        A piece is there only until ``sink`` returns.
        """
        return self._image.write(sink)

    def close(self) -> None:
        """End the image, written or not, between two batches."""
        with self._deciding:
            self._image.close()

    def discard(self) -> None:
        """Give back what a closed image has kept, which can be gigabytes: for another thread."""
        self._image.discard()


class FastBatch:
    """A batch of the core, read out of its columns once it is decided."""

    counts: Counts
    through: tuple[int, int]
    outcomes: dict[str, int]
    points: dict[str, int]

    def __init__(
        self, engine: FastEngine, batch: Batch, source: Sequence[StreamEntry] | ReplyReader, until: int
    ) -> None:
        self._engine = engine
        self._batch = batch
        self._source = source
        self._until = until

    @property
    def decoded(self) -> tuple[int, int]:
        """How many stream entries and events it has, decided or not."""
        return self._batch.counts[:2]

    def read(self) -> Self:
        """Take note of what the decided batch has."""
        stream_entries, events, entries, duplicates = self._batch.counts
        self.counts = Counts(stream_entries, events, entries, duplicates, events - entries - duplicates)
        self.through = self._batch.through
        self.outcomes = dict(zip(OUTCOMES, self._batch.outcomes, strict=True))
        self.points = dict(zip(OUTCOMES, self._batch.points, strict=True))
        return self

    @property
    def made(self) -> Batch:
        """The core's batch."""
        if self._engine.made >= self._until:
            raise RuntimeError("the engine has gone on: this batch is no longer there")
        return self._batch

    def encode(self, header: BatchHeader) -> bytes:
        """Return the ledger batch."""
        return self.made.encode(header.batch, header.previous, header.after, header.first_seq)

    @property
    def rejected(self) -> list[RejectedItem]:
        """The dead letters, in order."""
        return [self._rejected(*letter) for letter in self.made.dead_letters()] if self.counts.dead_letters else []

    def _rejected(
        self,
        entry: int,
        ms: int,
        seq: int,
        index: int,
        reason: str,
        event_id: str | None,
        encoding: bytes | None,
        original: bytes | None,
    ) -> RejectedItem:
        if encoding is None or original is None:
            fields = self._fields(entry)
            detail = explain_invalid(StreamEntry(ms, seq, fields))
        else:
            fields = ((encoding, original),)
            detail = explain(reason, Item(index, encoding, original), event_id, ms, self._engine.rulebook.calendar)
        letter = msgspec.convert({"event": event_id, "reason": reason, "detail": detail}, DeadLetter)
        return RejectedItem(Position(ms, seq, index), letter, fields)

    def _fields(self, entry: int) -> Fields:
        if isinstance(self._source, ReplyReader):
            return self._source.fields(entry)
        return self._source[entry].fields

    def decisions(self) -> Iterator[tuple[Position, Decision]]:
        """Yield one decision per event, in stream order."""
        decoded = decode(self.encode(BatchHeader(1, bytes(32), (0, 0), 1)))
        assert isinstance(decoded, EntriesBatch)
        rows = decoded.rows()
        rejected = iter(self.rejected)
        for _, ms, seq, index, status, event_id in self.made.statuses():
            if status == "entry":
                yield next(rows)[1:]
            elif status == "duplicate":
                assert event_id is not None
                yield Position(ms, seq, index), Duplicate(event_id)
            else:
                item = next(rejected)
                yield item.position, item.letter
