"""Outcomes: what is said of an event, and of a batch of them. Plain values that engine, ledger and stream all speak of.

::

    decision  of one event: a ledger entry, a duplicate or a dead letter; its line of JSON
    privacy   what may be kept of a device, an IP address or a phone number
    batch     of a batch: its place in the ledger, its counts, its dead letters
"""

from accrual.outcomes.batch import BatchHeader, Counts, RejectedItem
from accrual.outcomes.decision import (
    CAUSES,
    OUTCOMES,
    DeadLetter,
    DeadLetterReason,
    Decision,
    Duplicate,
    Entry,
    Outcome,
    Position,
    outcome_line,
)
from accrual.outcomes.privacy import NO_SECRET, Secret, mask

__all__ = [
    "CAUSES",
    "NO_SECRET",
    "OUTCOMES",
    "BatchHeader",
    "Counts",
    "DeadLetter",
    "DeadLetterReason",
    "Decision",
    "Duplicate",
    "Entry",
    "Outcome",
    "Position",
    "RejectedItem",
    "Secret",
    "mask",
    "outcome_line",
]
