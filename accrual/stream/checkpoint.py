"""The checkpoint: where a partition stands. One hash, written only by the commit script and by taking ownership."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec
import redis

from accrual.errors import StateMismatch
from accrual.outcomes import Counts
from accrual.stream.keys import Keys

__all__ = [
    "NO_DIGEST",
    "START",
    "Checkpoint",
    "StreamId",
    "checkpoint_of",
    "parse_stream_id",
    "stream_id_text",
]

StreamId = tuple[int, int]

START: Final[StreamId] = (0, 0)
NO_DIGEST: Final = bytes(32)


def stream_id_text(stream_id: StreamId) -> str:
    """Return a stream ID as the server writes it: ``ms-seq``."""
    return f"{stream_id[0]}-{stream_id[1]}"


def parse_stream_id(text: bytes | str) -> StreamId:
    """Return the ``(ms, seq)`` of a stream ID as the server writes it. Raises ``ValueError``."""
    ms, seq = (text.decode() if isinstance(text, bytes) else text).split("-")
    return int(ms), int(seq)


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """What is committed: ledger batches 1 to ``batch``, the last of them with ``digest``.

    ``position`` is the last stream entry consumed; ``next_seq`` numbers the next ledger entry. The counts are totals
    since the stream began, and ``events = entries + duplicates + dead_letters``. ``rulebook`` is the version adopted
    last, ``rulebook_sha256`` the digest of its text.
    """

    batch: int = 0
    digest: bytes = NO_DIGEST
    position: StreamId = START
    next_seq: int = 1
    stream_entries: int = 0
    events: int = 0
    entries: int = 0
    duplicates: int = 0
    dead_letters: int = 0
    rulebook: int = 0
    rulebook_sha256: bytes = b""

    @classmethod
    def from_hash(cls, fields: Mapping[bytes, bytes]) -> Checkpoint:
        """Read the hash; a field that is not there has its value from before the first batch."""
        values: dict[str, object] = {}
        try:
            for field in msgspec.structs.fields(cls):
                text = fields.get(field.name.encode())
                if text is None:
                    continue
                if field.type is int:
                    values[field.name] = int(text)
                elif field.type is bytes:
                    values[field.name] = bytes.fromhex(text.decode())
                else:
                    values[field.name] = parse_stream_id(text)
        except ValueError as error:
            raise StateMismatch(f"the checkpoint cannot be read: {error}") from None
        return cls(**values)  # type: ignore[arg-type]

    def after_rulebook(self, digest: bytes, version: int, sha256: bytes) -> Checkpoint:
        """Return the checkpoint behind a batch with ``digest`` that adopts a rulebook; it consumes nothing."""
        return msgspec.structs.replace(
            self, batch=self.batch + 1, digest=digest, rulebook=version, rulebook_sha256=sha256
        )

    def after_entries(self, digest: bytes, through: StreamId, counts: Counts) -> Checkpoint:
        """Return the checkpoint behind a batch with ``digest`` that consumed the stream up to ``through``."""
        return msgspec.structs.replace(
            self,
            batch=self.batch + 1,
            digest=digest,
            position=through,
            next_seq=self.next_seq + counts.entries,
            stream_entries=self.stream_entries + counts.stream_entries,
            events=self.events + counts.events,
            entries=self.entries + counts.entries,
            duplicates=self.duplicates + counts.duplicates,
            dead_letters=self.dead_letters + counts.dead_letters,
        )

    def to_hash(self) -> list[tuple[str, str]]:
        """Return the fields and values of the hash."""
        written = []
        for field in msgspec.structs.fields(type(self)):
            value = getattr(self, field.name)
            if isinstance(value, bytes):
                value = value.hex()
            elif isinstance(value, tuple):
                value = stream_id_text(value)
            written.append((field.name, str(value)))
        return written


def checkpoint_of(client: redis.Redis, keys: Keys) -> Checkpoint:
    """Return where a partition stands. Raises ``StateMismatch`` where that cannot be read."""
    fields: Any = client.hgetall(keys.checkpoint)
    return Checkpoint.from_hash(fields)
