"""A new rulebook on its way to the worker: offered, pending, then adopted by a commit, or refused with a reason."""

from __future__ import annotations

from typing import Any

import msgspec
import redis
import redis.asyncio

from accrual.rulebook import Rulebook
from accrual.stream.checkpoint import Checkpoint
from accrual.stream.commit import lost_to
from accrual.stream.keys import Keys
from accrual.stream.scripts import REFUSE

__all__ = ["Standing", "offer", "pending_text", "refuse", "standing"]


class Standing(msgspec.Struct, frozen=True):
    """What a partition says of its rulebooks: the one in force, the one pending and the one refused last."""

    checkpoint: Checkpoint
    pending_sha256: str = ""
    refused_sha256: str = ""
    refused_reason: str = ""
    owner_name: str = ""


def offer(client: redis.Redis, keys: Keys, rulebook: Rulebook) -> None:
    """Leave ``rulebook`` for the worker; it takes the place of one that is still pending."""
    with client.pipeline(transaction=True) as transaction:
        transaction.hset(keys.rulebooks, mapping={"pending": rulebook.text, "pending_sha256": rulebook.digest.hex()})
        transaction.hdel(keys.rulebooks, "refused_sha256", "refused_reason")
        transaction.execute()


def standing(client: redis.Redis, keys: Keys) -> Standing:
    """Return where a partition stands, in one consistent look."""
    with client.pipeline(transaction=True) as transaction:
        transaction.hgetall(keys.checkpoint)
        transaction.hgetall(keys.rulebooks)
        checkpoint, rulebooks = transaction.execute()
    texts = {name.decode(): value.decode(errors="replace") for name, value in rulebooks.items()}
    return Standing(
        checkpoint=Checkpoint.from_hash(checkpoint),
        pending_sha256=texts.get("pending_sha256", ""),
        refused_sha256=texts.get("refused_sha256", ""),
        refused_reason=texts.get("refused_reason", ""),
        owner_name=checkpoint.get(b"owner_name", b"").decode(errors="replace"),
    )


async def pending_text(client: redis.asyncio.Redis, keys: Keys) -> tuple[str, str]:
    """Return the SHA-256 (hex) and the text of the pending rulebook, both empty where there is none."""
    found: Any = await client.hmget(keys.rulebooks, "pending_sha256", "pending")
    sha256, text = found
    return (sha256 or b"").decode(), (text or b"").decode(errors="replace")


async def refuse(client: redis.asyncio.Redis, keys: Keys, nonce: str, sha256: str, why: str) -> None:
    """Mark the pending rulebook as refused, unless another has taken its place. Raises ``OwnershipLost``."""
    script: Any = client.register_script(REFUSE.text)
    status, *values = await script(keys=[keys.checkpoint, keys.rulebooks], args=[nonce, sha256, why])
    if status == b"owner":
        raise lost_to(values[0])
