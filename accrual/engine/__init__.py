"""Engines: from stream entries to decisions. ``fast`` is the compiled one, ``reference`` its plain twin.

Free of I/O, clocks and randomness. There is no silent fallback: the plain engine is chosen by name.
"""

from __future__ import annotations

from accrual.engine.batch import Batch, Engine, explain_invalid
from accrual.engine.reference import OFFLINE_SLACK_DAYS, STREAM_SLACK_DAYS, ReferenceEngine
from accrual.errors import CoreMissing, UsageError
from accrual.events import StreamEntry
from accrual.outcomes import (
    NO_SECRET,
    BatchHeader,
    Counts,
    DeadLetter,
    Decision,
    Duplicate,
    Entry,
    Position,
    RejectedItem,
    Secret,
    outcome_line,
)
from accrual.rulebook import Rulebook

__all__ = [
    "NO_SECRET",
    "OFFLINE_SLACK_DAYS",
    "STREAM_SLACK_DAYS",
    "Batch",
    "BatchHeader",
    "Counts",
    "DeadLetter",
    "Decision",
    "Duplicate",
    "Engine",
    "Entry",
    "Position",
    "ReferenceEngine",
    "RejectedItem",
    "Secret",
    "StreamEntry",
    "explain_invalid",
    "open_engine",
    "outcome_line",
]


def open_engine(
    name: str,
    rulebook: Rulebook,
    secret: Secret = NO_SECRET,
    slack_days: int = STREAM_SLACK_DAYS,
    *,
    assisted: bool = False,
) -> Engine:
    """Return a new engine: ``name`` is ``fast`` or ``reference``.

    With ``assisted`` a thread brings in memory for the compiled one, ahead of its use. For a worker.

    Raises ``UsageError`` for any other name, ``CoreMissing`` where the compiled core is not there.
    """
    if name == "reference":
        return ReferenceEngine(rulebook, secret, slack_days)
    if name != "fast":
        raise UsageError(f"engine: {name!r} is neither fast nor reference")
    try:
        from accrual.engine.fast import FastEngine
    except ImportError as error:
        raise CoreMissing(error) from error
    engine = FastEngine(rulebook, secret, slack_days)
    if assisted:
        engine.start_assistant()
    return engine
