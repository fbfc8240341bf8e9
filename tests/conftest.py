"""Fixtures for every test: real servers on free loopback ports, and the depth of property tests.

================== ======================================================================================
valkey             the embedded Valkey, shared by the session and emptied before each test
redis7             the same with a real Redis
server             the one, then the other: the test runs twice, in tests/faults once (``make test-all``: twice)
server_kind        "valkey", then "redis7": for tests that start servers of their own on both
server_factory     ``server_factory(kind="valkey", options={...})``: a private server, ended after the test
database           the URL of a new, empty database of the embedded PostgreSQL
book               the same with the book's schema in it
new_database       ``with new_database() as url:`` as many of those as it takes
database_factory   ``database_factory(options={...})``: a private PostgreSQL, ended after the test
================== ======================================================================================

A server that is missing is an error with a reason, never a skipped test.
"""

from __future__ import annotations

import itertools
import os
import signal
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import cast

import psycopg
import pytest
from hypothesis import HealthCheck, settings

from accrual.book import open_book
from accrual.embedded import EmbeddedDatabase, Options
from accrual.errors import UsageError
from servers import SERVER_KINDS, Server, ServerFactory, ServerKind, binary_of, empty, version_of

# Whoever runs this in the background of a shell has it ignore SIGINT, and every process that it starts too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The time of one example says nothing on a busy machine. By default the same examples are tried each time;
# --hypothesis-profile=thorough looks longer, and elsewhere each time.
settings.register_profile(
    "default", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60, derandomize=True
)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=1000, derandomize=False)
# Where hypothesis takes the machine for one of continuous integration it has chosen a profile of its own by now.
settings.load_profile("default")


_database_numbers = itertools.count(1)


def _found_binary(kind: ServerKind) -> Path:
    try:
        return binary_of(kind)
    except (LookupError, UsageError) as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture(scope="session")
def _session_valkey() -> Iterator[Server]:
    with Server(binary=_found_binary("valkey")) as server:
        yield server


@pytest.fixture(scope="session")
def _session_redis7() -> Iterator[Server]:
    with Server(binary=_found_binary("redis7")) as server:
        yield server


@pytest.fixture
def valkey(_session_valkey: Server) -> Iterator[Server]:
    empty(_session_valkey)
    yield _session_valkey
    _session_valkey.close_clients()


@pytest.fixture
def redis7(_session_redis7: Server) -> Iterator[Server]:
    empty(_session_redis7)
    yield _session_redis7
    _session_redis7.close_clients()


@pytest.fixture(params=[pytest.param(kind, marks=getattr(pytest.mark, kind)) for kind in SERVER_KINDS])
def server_kind(request: pytest.FixtureRequest) -> ServerKind:
    return cast(ServerKind, request.param)


@pytest.fixture
def server(request: pytest.FixtureRequest, server_kind: ServerKind) -> Server:
    return cast(Server, request.getfixturevalue(server_kind))


def _database(options: Mapping[str, str]) -> EmbeddedDatabase:
    """Return a PostgreSQL: the embedded one, or the one whose programs are in ``ACCRUAL_POSTGRES``."""
    named = os.environ.get("ACCRUAL_POSTGRES")
    return EmbeddedDatabase({"fsync": "off"} | dict(options), programs=Path(named) if named else None)


@pytest.fixture(scope="session")
def _session_database() -> Iterator[EmbeddedDatabase]:
    # Killing its processes loses nothing without fsync either; only the machine's own end would.
    with _database({}) as database:
        with psycopg.connect(database.url, autocommit=True) as connection:
            connection.execute("CREATE DATABASE empty_book")
        with open_book(database.url_of("empty_book")):
            pass
        yield database


def _new_database(database: EmbeddedDatabase, template: str) -> Iterator[str]:
    name = f"test_{next(_database_numbers)}"
    with psycopg.connect(database.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        yield database.url_of(name)
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def database(_session_database: EmbeddedDatabase) -> Iterator[str]:
    yield from _new_database(_session_database, "template0")


@pytest.fixture
def book(_session_database: EmbeddedDatabase) -> Iterator[str]:
    yield from _new_database(_session_database, "empty_book")


@pytest.fixture
def new_database(_session_database: EmbeddedDatabase) -> Callable[[], AbstractContextManager[str]]:
    return lambda: contextmanager(_new_database)(_session_database, "empty_book")


@pytest.fixture
def database_factory() -> Iterator[Callable[..., EmbeddedDatabase]]:
    with ExitStack() as databases:
        yield lambda options=None: databases.enter_context(_database(options or {}))


@pytest.fixture
def server_factory() -> Iterator[ServerFactory]:
    with ExitStack() as servers:

        def start(
            kind: ServerKind = "valkey",
            options: Options | None = None,
            *,
            directory: Path | None = None,
        ) -> Server:
            return servers.enter_context(Server(options, binary=_found_binary(kind), directory=directory))

        yield start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by the servers that its fixtures name, so that ``-m "not redis7"`` finds them.

    Of a test that runs on both servers one run is slow, unless it says that it needs ``both_servers``.
    """
    for item in items:
        if item.get_closest_marker("both_servers") is None and _is_left_to_the_other_server(item):
            item.add_marker("slow")
        for kind in SERVER_KINDS:
            if kind in getattr(item, "fixturenames", ()):
                item.add_marker(kind)


def _is_left_to_the_other_server(item: pytest.Item) -> bool:
    """Tell whether a test runs on both servers and this is not the run that its name chooses: each has half of them."""
    callspec = getattr(item, "callspec", None)
    kind = callspec.params.get("server_kind") if callspec else None
    if kind is None:
        return False
    name = item.name.replace(kind, "")
    return bool(SERVER_KINDS[zlib.crc32(name.encode()) % len(SERVER_KINDS)] != kind)


def pytest_report_header() -> list[str]:
    """Say which servers the run is on."""
    found = []
    for kind in SERVER_KINDS:
        try:
            found.append(f"{kind}: {version_of(kind)}")
        except (LookupError, UsageError):
            found.append(f"{kind}: missing")
    return [", ".join(found)]
