"""The audit: the book and the ledger checked against each other, by code that had no part in making them.

It is read-only, and sees one moment of the database. It shares with the book nothing but the connection and the way
texts are kept; what it checks is written a second time here, from the specification, as queries and plain arithmetic.

::

    findings    what is said of something that is wrong
    decisions   each partition: the chain of digests, every entry decided again by the reference engine, row by row
    sums        the whole book: balances, lots, postings, batches, identities, deferred events (checks/*.sql)
    refunds     every reversal computed again
    late        each business day: late entries decided again on top of what was booked before them
    lots        the dates on which lots expire
    caps        each business day: no more than a limit lets through
    run         all of it, in parallel over partitions, days and checks
    correct     findings made proposals that a person approves, or carries out
"""

from accrual.audit.correct import propose
from accrual.audit.findings import Finding
from accrual.audit.run import Audit, AuditReport

__all__ = ["Audit", "AuditReport", "Finding", "propose"]
