"""The book: the ledger posted to PostgreSQL, and all that happens to points afterwards (SPEC section 9).

::

    database      connections, migrations, what is retried
    durability    how far the ledger is safe from being lost
    rows          batches of the ledger as rows, by column (copying: as the binary COPY has them)
    ingest        rows into the database, in one transaction with the position; members: states and tiers
    follow        ledgers followed as far as they are there and safe; service: connected, and again
    posting       the one way in which points move between accounts, and what it does to lots
    people        who does it, and why: what every command asks of a person
    settle, expire, adjust, holds    jobs on the points of members; chunks: large ones in small transactions
    reminders     what members are told before points expire
    slow          the events that the ledger deferred: late, refunds, from waiting
    outbox        messages to the stream server, each once
    statement     what a member sees, in words; exceptions, held: what waits for a person, and why
    rebuild       projections made anew from the facts
    schedule      all the jobs in one process, each when it is time
"""

from accrual.book.adjust import (
    Adjustment,
    ApprovalLimit,
    adjust,
    approve,
    limit_approval,
    reject,
    undo,
    waiting_adjustments,
)
from accrual.book.chunks import Done
from accrual.book.database import Connection, connect, migrate, open_book
from accrual.book.exceptions import close_exception, exceptions
from accrual.book.expire import expire
from accrual.book.held import held
from accrual.book.holds import Verdict, confirm, release
from accrual.book.outbox import send_outbox
from accrual.book.programme import day_start_ms
from accrual.book.rebuild import rebuild
from accrual.book.reminders import remind
from accrual.book.schedule import Scheduler
from accrual.book.service import BookService
from accrual.book.settle import settle
from accrual.book.slow import SlowService, slow
from accrual.book.statement import statement

__all__ = [
    "Adjustment",
    "ApprovalLimit",
    "BookService",
    "Connection",
    "Done",
    "Scheduler",
    "SlowService",
    "Verdict",
    "adjust",
    "approve",
    "close_exception",
    "confirm",
    "connect",
    "day_start_ms",
    "exceptions",
    "expire",
    "held",
    "limit_approval",
    "migrate",
    "open_book",
    "rebuild",
    "reject",
    "release",
    "remind",
    "send_outbox",
    "settle",
    "slow",
    "statement",
    "undo",
    "waiting_adjustments",
]
