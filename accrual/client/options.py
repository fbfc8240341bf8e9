"""What a producer may be told: every number with its unit, its default and its bounds."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final, Literal, get_args

from accrual.errors import UsageError

__all__ = ["MAXIMUM_BATCH_BYTES", "MAXIMUM_BATCH_EVENTS", "MAXIMUM_EVENT_BYTES", "Confirmation", "Options"]

Confirmation = Literal["memory", "fsync", "replicas"]

MAXIMUM_BATCH_EVENTS: Final = 1024
MAXIMUM_BATCH_BYTES: Final = 1 << 20
# The largest valid event, every text, line and tag at its limit, has 3 657 bytes.
MAXIMUM_EVENT_BYTES: Final = 4096

_BOUNDS: Final = {
    "replicas": (1, 100),
    "batch_events": (1, MAXIMUM_BATCH_EVENTS),
    "batch_bytes": (MAXIMUM_EVENT_BYTES, MAXIMUM_BATCH_BYTES),
    "linger_ms": (0, 60_000),
    "in_flight": (1, 64),
    "waiting_events": (1, 1 << 24),
    "waiting_bytes": (MAXIMUM_EVENT_BYTES, 1 << 32),
    "delivery_timeout_ms": (10, 86_400_000),
    "reply_timeout_ms": (1, 600_000),
    "confirm_timeout_ms": (1, 600_000),
    "backoff_ms": (1, 60_000),
    "backoff_limit_ms": (1, 600_000),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The settings of a producer. Raises ``UsageError`` for a value outside its bounds.

    Args:
        confirm: When an event counts as taken: once it is in the server's ``memory`` (the reply to ``XADD``;
            under ``appendfsync always`` it is on disk by then), once the server has written it to disk
            (``fsync``, by ``WAITAOF``: Valkey, or Redis from 7.2), or once replicas have it (``replicas``, by
            ``WAIT``).
        replicas: How many replicas must have it under ``confirm="replicas"``.
        batch_events: The most events in one stream entry.
        batch_bytes: The most bytes of events in one stream entry.
        linger_ms: How long the first event of a batch waits for company.
        in_flight: The most stream entries in one round trip. With 1, order is kept even where the server
            refuses an entry for a while and would have taken the next one.
        waiting_events: The most events accepted from the caller and not yet taken by the server.
        waiting_bytes: The same in bytes of encoded events.
        delivery_timeout_ms: How long an event is tried before it fails.
        reply_timeout_ms: How long the server may be silent before the connection is given up.
        confirm_timeout_ms: How long one ``WAIT`` or ``WAITAOF`` may take before it is asked again.
        backoff_ms: The pause before the first retry; each further one doubles it, less up to half by chance.
        backoff_limit_ms: The longest pause.
    """

    confirm: Confirmation = "memory"
    replicas: int = 1
    batch_events: int = 512
    batch_bytes: int = 256 * 1024
    linger_ms: int = 5
    in_flight: int = 8
    waiting_events: int = 65_536
    waiting_bytes: int = 64 << 20
    delivery_timeout_ms: int = 120_000
    reply_timeout_ms: int = 10_000
    confirm_timeout_ms: int = 5_000
    backoff_ms: int = 50
    backoff_limit_ms: int = 5_000

    def __post_init__(self) -> None:
        if self.confirm not in get_args(Confirmation):
            raise UsageError(f"confirm: {self.confirm!r} is none of {', '.join(get_args(Confirmation))}")
        for field in fields(self):
            if field.name == "confirm":
                continue
            value = getattr(self, field.name)
            low, high = _BOUNDS[field.name]
            if type(value) is not int or not low <= value <= high:
                raise UsageError(f"{field.name}: {value!r} is not an integer in {low}..{high}")
