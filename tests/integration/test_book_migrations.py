"""The schema: brought up to date once, by whoever comes first, and never by a program that is older than it."""

from __future__ import annotations

import hashlib
import importlib.resources
import threading
from pathlib import Path

import psycopg
import pytest

from accrual.book import connect, migrate, open_book
from accrual.errors import BookError

FOLDER = Path(str(importlib.resources.files("accrual.book"))) / "migrations"
NAMES = sorted(file.name for file in FOLDER.glob("*.sql"))


def applied(connection: psycopg.Connection[tuple[object, ...]]) -> list[object]:
    return [name for (name,) in connection.execute("SELECT name FROM book.migrations ORDER BY applied_at, name")]


def test_a_book_of_an_earlier_program_keeps_what_it_has(book: str) -> None:
    with connect(book) as connection:
        connection.execute("DROP SCHEMA book CASCADE")
        connection.execute("CREATE SCHEMA book")
        connection.execute(
            "CREATE TABLE book.migrations (name text PRIMARY KEY, sha256 text NOT NULL, "
            "applied_at timestamptz NOT NULL DEFAULT now())"
        )
        text = (FOLDER / NAMES[0]).read_text(encoding="utf-8")
        connection.execute(text.encode())
        checksum = hashlib.sha256(text.encode()).hexdigest()
        connection.execute("INSERT INTO book.migrations (name, sha256) VALUES (%s, %s)", (NAMES[0], checksum))
        connection.execute("INSERT INTO book.actions (kind, by) VALUES ('adjust', 'alice')")
        connection.execute(
            "INSERT INTO book.postings (number, action, kind, member, from_account, to_account, points, day, lot_days, "
            "lot_points) SELECT nextval('book.numbers'), action, 'adjust', 'm1', 'issuance', 'available', 5, "
            "'2026-11-10', ARRAY['2026-11-10'::date], ARRAY[5] FROM book.actions"
        )
        assert migrate(connection) == NAMES[1:]
        assert migrate(connection) == []
        assert applied(connection) == NAMES
        assert connection.execute("SELECT member, points FROM book.standing").fetchall() == [("m1", 5)]


def test_a_book_of_a_newer_or_another_program_is_refused(book: str) -> None:
    with connect(book) as connection:
        connection.execute("INSERT INTO book.migrations (name, sha256) VALUES ('9999_future.sql', '')")
    with (
        pytest.raises(BookError, match=r"made by a newer program: this one does not know 9999_future\.sql"),
        open_book(book),
    ):
        pass
    with connect(book) as connection:
        connection.execute("DELETE FROM book.migrations WHERE name = '9999_future.sql'")
        connection.execute("UPDATE book.migrations SET sha256 = 'other' WHERE name = %s", (NAMES[0],))
    with pytest.raises(BookError, match=f"another {NAMES[0]} than this program has"), open_book(book):
        pass


def test_several_at_once_make_one_book(book: str) -> None:
    with connect(book) as connection:
        connection.execute("DROP SCHEMA book CASCADE")
    done: list[list[str]] = []

    def run() -> None:
        with connect(book) as connection:
            done.append(migrate(connection))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [[], [], [], NAMES]
