"""The book: the ledger posted to PostgreSQL, and all that happens to points afterwards (SPEC section 9).

::

    database      connections, migrations, what is retried
    durability    how far the ledger is safe from being lost
    copying       columns of a ledger batch as the rows of a binary COPY
    ingest        ledger batches into entries, identities and balances, each in one transaction with its position
    posting       the one way in which points move between accounts, and what it does to lots
    settle, slow, expire, adjust, holds, reminders    the jobs
    outbox        messages to the stream server, each once
    statement     what a member sees
    rebuild       projections made anew from the facts
"""

from accrual.book.database import Connection, connect, migrate, open_book
from accrual.book.service import BookService
from accrual.book.settle import settle

__all__ = ["BookService", "Connection", "connect", "migrate", "open_book", "settle"]
