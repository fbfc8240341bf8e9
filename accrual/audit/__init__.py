"""The audit: the book and the ledger checked against each other, by code that had no part in making them.

It is read-only, and sees one moment of the database. It shares with the book nothing but the connection and the way
texts are kept; what it checks is written a second time here, from the specification, as queries and plain arithmetic.
Ledgers are decoded by the code that everybody reads them with, and decided again by the reference engine.

::

    findings    what is said of something that is wrong
    events      where events are read again: the stream, and the archive
    recorded    the rulebooks that ledgers recorded
    rows        entries of the ledger and rows of the book, in the same words
    standing    what a ledger stands at before a stretch of it, by what was committed
    attributes  tier, card and immunity of members, as the engine that has decided everything knows them
    decisions   stretches of each ledger: the chain of digests, every entry decided again, row by row
    sums        the whole book: balances, lots, postings, batches, identities, days, deferred events (checks/*.sql)
    members     the states of members, made again
    refunds     every reversal computed again
    late        each business day: late entries decided again on top of what was booked before them
    lots        the dates on which lots expire
    sliding     what entries come to in sliding windows
    caps        each business day: no more than a limit lets through
    run         all of it, in parallel over stretches, days and checks
    correct     findings made proposals that a person approves, or carries out
"""

from accrual.audit.correct import propose
from accrual.audit.findings import Finding
from accrual.audit.run import Audit, AuditReport

__all__ = ["Audit", "AuditReport", "Finding", "propose"]
