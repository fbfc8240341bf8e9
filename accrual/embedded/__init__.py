"""Servers of our own, for the demo, the benchmarks and the tests: never for production.

::

    process   how a server process starts, ends, is killed and paused
    server    Valkey or Redis
    database  PostgreSQL

    with EmbeddedServer({"appendonly": "yes"}) as server:
        print(server.url, server.client().ping())

A server is a child process on a free loopback port and on a Unix socket. It ends with ``stop``, with the ``with``
block, and also when this process dies without a word, so that nothing is left running.
"""

from accrual.embedded.database import EmbeddedDatabase, postgresql_programs
from accrual.embedded.process import EmbeddedProcess, Lifeline, has_ended
from accrual.embedded.server import EmbeddedServer, Options, valkey_binary

__all__ = [
    "EmbeddedDatabase",
    "EmbeddedProcess",
    "EmbeddedServer",
    "Lifeline",
    "Options",
    "has_ended",
    "postgresql_programs",
    "valkey_binary",
]
