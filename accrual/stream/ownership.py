"""Owning a partition: the lease says when another worker may try, the nonce in the checkpoint is what fences."""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
from typing import Any

import msgspec
import redis.asyncio

from accrual.errors import StreamTrimmed, UsageError
from accrual.outcomes import Secret
from accrual.stream.checkpoint import Checkpoint
from accrual.stream.commit import lost_to
from accrual.stream.keys import Keys
from accrual.stream.scripts import ACQUIRE, HEARTBEAT, RELEASE

__all__ = ["Heartbeat", "Held", "Owned", "Ownership", "secret_check"]


class Owned(msgspec.Struct, frozen=True):
    """The partition is ours: where it stands, and the key of its fingerprints."""

    checkpoint: Checkpoint
    secret: Secret


class Held(msgspec.Struct, frozen=True):
    """Another worker has the partition; its lease runs for another ``left_ms`` unless it is renewed."""

    owner_name: str
    left_ms: int


class Heartbeat(msgspec.Struct, frozen=True):
    """What the owner learns with each heartbeat; ``pending`` is the SHA-256 (hex) of a rulebook to adopt, or empty."""

    pending: str
    added: int
    removed: int


class Ownership:
    """One worker's claim to a partition, under a nonce that nobody else has."""

    def __init__(self, client: redis.asyncio.Redis, keys: Keys, lease_ms: int) -> None:
        self.nonce = secrets.token_hex(16)
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self._client = client
        self._keys = keys
        self._lease_ms = lease_ms
        self._acquire: Any = client.register_script(ACQUIRE.text)
        self._heartbeat: Any = client.register_script(HEARTBEAT.text)
        self._release: Any = client.register_script(RELEASE.text)

    async def acquire(self, configured: Secret | None) -> Owned | Held:
        """Take the partition if nobody's lease on it runs.

        ``configured`` is the secret of the settings, if there is one. Raises ``UsageError`` where it is not the one
        that the partition was started with.
        """
        new = Secret.generate()
        status, *values = await self._acquire(
            keys=[self._keys.checkpoint, self._keys.lease],
            args=[
                self.nonce,
                self.name,
                self._lease_ms,
                secret_check(configured) if configured else "",
                new.key.hex(),
                secret_check(new),
            ],
        )
        if status == b"held":
            return Held(values[0].decode(errors="replace"), values[1])
        if status == b"secret":
            raise UsageError(f"secret: {values[0].decode()}")
        fields = dict(zip(values[0][::2], values[0][1::2], strict=True))
        secret = configured or Secret(bytes.fromhex(fields[b"secret"].decode()))
        return Owned(Checkpoint.from_hash(fields), secret)

    async def look(self, configured: Secret | None) -> Owned | None:
        """Return what ``acquire`` would, without taking the partition; ``None`` where it was never started."""
        fields: Any = await self._client.hgetall(self._keys.checkpoint)
        kept = fields.get(b"secret", b"").decode()
        secret = configured or (Secret(bytes.fromhex(kept)) if kept else None)
        if secret is None or fields.get(b"secret_check", b"").decode() != secret_check(secret):
            return None
        return Owned(Checkpoint.from_hash(fields), secret)

    async def beat(self, trouble: str = "") -> Heartbeat:
        """Renew the lease, and leave word of the ``trouble`` there is, empty if there is none.

        Raises ``OwnershipLost``, or ``StreamTrimmed`` where unread entries have disappeared.
        """
        status, why, *values = await self._heartbeat(
            keys=[self._keys.checkpoint, self._keys.lease, self._keys.events, self._keys.rulebooks],
            args=[self.nonce, self._lease_ms, trouble],
        )
        if status == b"owner":
            raise lost_to(why)
        if status == b"trimmed":
            raise StreamTrimmed(why.decode(errors="replace"))
        pending, added, removed = values
        return Heartbeat(pending.decode(), added, removed)

    async def release(self) -> None:
        """Give the partition up, if it is still ours."""
        await self._release(keys=[self._keys.checkpoint, self._keys.lease], args=[self.nonce])


def secret_check(secret: Secret) -> str:
    """Return what may be kept of a secret to recognise it: it says nothing of the secret itself."""
    return hashlib.sha256(b"accrual partition secret\0" + secret.key).hexdigest()
