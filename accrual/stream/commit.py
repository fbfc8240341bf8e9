"""One commit: what it says to the server, and what the server says to it."""

from __future__ import annotations

import functools
from typing import Any

import msgspec

from accrual.errors import OwnershipLost, StateMismatch, StreamError, StreamTrimmed
from accrual.outcomes import RejectedItem
from accrual.stream.checkpoint import Checkpoint, stream_id_text
from accrual.stream.deadletters import letter_fields
from accrual.stream.keys import Keys
from accrual.stream.resp import Argument, bulks, command_around
from accrual.stream.scripts import COMMIT

__all__ = ["Answer", "Commit", "lost_to"]


def lost_to(owner_name: bytes) -> OwnershipLost:
    """Return the error of a worker that finds ``owner_name`` (empty if nobody) in its place."""
    name = owner_name.decode(errors="replace")
    by = f"was taken over by {name}" if name else "is no longer this worker's"
    return OwnershipLost(f"the partition {by}: nothing more is written")


class Commit(msgspec.Struct, frozen=True, dict=True):
    """A ledger batch with its dead letters, which moves the checkpoint from ``before`` to ``after``.

    ``value`` is the encoded batch, ``after.digest`` its SHA-256; ``adopts`` the SHA-256 of the text of the rulebook
    that it records, empty where it is not a rulebook record.
    """

    before: Checkpoint
    after: Checkpoint
    value: bytes
    letters: tuple[RejectedItem, ...] = ()
    adopts: bytes = b""

    def command(self, keys: Keys, nonce: str) -> list[bytes]:
        """Return the call of the commit script, in pieces to be written one after the other."""
        before = self.before
        head: list[Argument] = [
            "EVALSHA",
            COMMIT.sha1,
            5,
            *(keys.checkpoint, keys.ledger, keys.events, keys.deadletters, keys.rulebooks),
            nonce,
            self.after.batch,
            before.digest.hex(),
            stream_id_text(before.position),
            before.stream_entries,
            before.dead_letters,
            stream_id_text(self.after.position),
            self.after.stream_entries,
        ]
        checkpoint = [text for pair in self.after.to_hash() for text in pair]
        tail: list[Argument] = [self.adopts.hex(), len(checkpoint), *checkpoint]
        return command_around(head, self.value, tail, *self.encoded_letters)

    @functools.cached_property
    def encoded_letters(self) -> tuple[int, bytes]:
        """How many arguments the dead letters are, and these as the server reads them.

        It takes a while where there are many, but only the first time.
        """
        arguments: list[Argument] = []
        for item in self.letters:
            fields = letter_fields(item)
            arguments += (len(fields), *fields)
        return len(arguments), bulks(arguments)

    @property
    def size_bytes(self) -> int:
        """The bytes of the batch and of its dead letters."""
        return len(self.value) + len(self.encoded_letters[1])


class Answer(msgspec.Struct, frozen=True):
    """What the commit script answered.

    ``committed`` tells whether this very batch has landed now; if not, the checkpoint is elsewhere. ``batch`` and
    ``digest`` are the checkpoint's as it is now, ``added`` and ``removed`` the events stream's entries so far.
    """

    committed: bool
    batch: int
    digest: bytes
    added: int
    removed: int

    @classmethod
    def of(cls, reply: Any) -> Answer:
        """Read the script's reply.

        Raises ``OwnershipLost``, ``StreamTrimmed`` or ``StateMismatch`` where nothing more may be written.
        """
        status, batch, digest, added, removed, why = reply
        if status == b"owner":
            raise lost_to(why)
        why = why.decode(errors="replace")
        if status == b"trimmed":
            raise StreamTrimmed(why)
        if status in (b"unknown", b"ledger", b"deadletters"):
            raise StateMismatch(why)
        if status not in (b"committed", b"elsewhere"):
            raise StreamError(f"the commit script answered {status!r}")
        return cls(status == b"committed", int(batch), bytes.fromhex(digest.decode()), added, removed)
