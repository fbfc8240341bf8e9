"""Columns as a binary ``COPY`` has them, against PostgreSQL itself: what goes in comes out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import date, timedelta
from typing import Any, Final, LiteralString

import numpy as np
import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg import sql

from accrual.book import copying
from accrual.book.copying import Column
from accrual.book.texts import shown, stored
from accrual.embedded import EmbeddedDatabase

Values = list[tuple[Any, ...]]

TABLE: Final = """
    CREATE TEMP TABLE copied (place bigint, small smallint, number integer, amount bigint, happened date, late boolean,
        name text COLLATE "C", order_id text, code text, position text)
"""
EPOCH: Final = date(1970, 1, 1)
CODES: Final = [b"granted", None, b"", "\u4f1a\u5458".encode()]

texts = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("\0\\0")), max_size=12)
rows = st.lists(
    st.tuples(
        st.integers(-(2**15), 2**15 - 1),
        st.integers(-(2**31), 2**31 - 1),
        st.none() | st.integers(-(2**63), 2**63 - 1),
        st.integers(-100, 100_000),
        st.booleans(),
        texts,
        texts,
        st.integers(0, len(CODES) - 1),
        st.integers(0, 2**63 - 1),
        st.integers(0, 2**64 - 1),
    ),
    max_size=30,
)


@pytest.fixture(scope="module")
def connection(_session_database: EmbeddedDatabase) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(_session_database.url, autocommit=True) as connection:
        connection.execute(TABLE)
        yield connection


def text_column(values: Sequence[str], **options: bool) -> Column:
    data = [value.encode() for value in values]
    return copying.texts(np.array([len(value) for value in data], np.int64), b"".join(data), **options)


def columns_of(values: Values) -> list[Column]:
    """Return the columns of a batch of rows, as the ingester makes them."""
    fields = list(zip(*values, strict=True)) or [()] * 10
    small, number, amount, day, late, name, order_id, code, ms, seq = fields
    absent = np.array([value is None for value in amount], np.bool_)
    return [
        copying.integers(np.array(small, np.int64), 2),
        copying.integers(np.array(number, np.int64), 4),
        copying.integers(np.array([value or 0 for value in amount], np.int64), 8, absent),
        copying.dates(np.array(day, np.int64)),
        copying.booleans(np.array(late, np.bool_)),
        text_column(name),
        text_column(order_id, empty_is_null=True),
        copying.coded(np.array(code, np.int64), CODES),
        copying.beside(
            copying.decimals(np.array(ms, np.int64)), copying.decimals(np.array(seq, np.uint64)), between=b"-"
        ),
    ]


def expected(values: Values) -> Values:
    decoded = [None if code is None else code.decode() for code in CODES]
    return [
        (
            *(small, number, amount, EPOCH + timedelta(days=day), late, stored(name), stored(order_id) or None),
            *(decoded[code], f"{ms}-{seq}"),
        )
        for small, number, amount, day, late, name, order_id, code, ms, seq in values
    ]


def copied(
    connection: psycopg.Connection[Any],
    columns: Sequence[Column],
    order: Any = None,
    *,
    names: LiteralString = "place, small, number, amount, happened, late, name, order_id, code, position",
) -> Values:
    """Return what PostgreSQL makes of the rows, in the order in which they were written."""
    with connection.cursor() as cursor:
        cursor.execute("TRUNCATE copied")
        with cursor.copy(sql.SQL("COPY copied ({}) FROM STDIN (FORMAT BINARY)").format(sql.SQL(names))) as copy:
            copy.write(copying.HEADER)
            for piece in copying.rows_of(columns, order):
                copy.write(piece)
            copy.write(copying.TRAILER)
        cursor.execute(
            "SELECT small, number, amount, happened, late, name, order_id, code, position FROM copied ORDER BY ctid"
        )
        return cursor.fetchall()


def numbered(columns: Sequence[Column]) -> list[Column]:
    return [copying.integers(np.arange(len(columns[0])), 8), *columns]


@given(rows)
def test_rows_come_out_as_they_went_in(connection: psycopg.Connection[Any], values: Values) -> None:
    assert copied(connection, numbered(columns_of(values))) == expected(values)


@given(rows, rows, st.randoms(use_true_random=False))
def test_batches_are_joined_and_their_rows_chosen(
    connection: psycopg.Connection[Any], one: Values, other: Values, random: Any
) -> None:
    columns = [copying.joined(parts) for parts in zip(columns_of(one), columns_of(other), strict=True)]
    both = expected(one + other)
    order = random.sample(range(len(both)), random.randint(0, len(both)))
    assert copied(connection, numbered(columns), np.array(order, np.intp)) == [both[place] for place in order]


@given(rows)
def test_a_column_may_be_null_where_it_is_not_wanted(connection: psycopg.Connection[Any], values: Values) -> None:
    columns = columns_of(values)
    wanted = np.array([value[0] % 2 == 0 for value in values], np.bool_)
    columns[6] = columns[6].where(wanted)
    kept = [row[6] if kept else None for row, kept in zip(expected(values), wanted.tolist(), strict=True)]
    assert [row[6] for row in copied(connection, numbered(columns))] == kept


@given(rows, rows, st.randoms(use_true_random=False))
def test_columns_that_are_put_together_come_out_as_they_would_alone(
    connection: psycopg.Connection[Any], one: Values, other: Values, random: Any
) -> None:
    def together(values: Values) -> list[Column]:
        small, number, amount, day, late, name, order_id, code, position = columns_of(values)
        return [
            copying.together([small, number]),
            amount,
            copying.together([day, late]),
            name,
            order_id,
            code,
            position,
        ]

    columns = [copying.joined(parts) for parts in zip(together(one), together(other), strict=True)]
    both = expected(one + other)
    order = random.sample(range(len(both)), random.randint(0, len(both)))
    assert copied(connection, numbered(columns), np.array(order, np.intp)) == [both[place] for place in order]


@given(st.lists(st.tuples(*[st.integers(0, len(CODES) - 1)] * 3), max_size=30), st.sampled_from([2**63 - 1, 20]))
def test_codes_that_are_put_together_come_out_as_they_would_alone(
    connection: psycopg.Connection[Any], chosen: list[tuple[int, int, int]], largest: int
) -> None:
    parts = [(np.array(codes, np.int64), CODES) for codes in (list(zip(*chosen, strict=True)) or [()] * 3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "LARGEST_CODE", largest)
        column = copying.coded_together(parts)
    decoded = [None if code is None else code.decode() for code in CODES]
    rows = copied(connection, [column], names="name, order_id, code")
    assert [(row[5], row[6], row[7]) for row in rows] == [tuple(decoded[code] for code in codes) for codes in chosen]


@given(st.lists(st.none() | st.binary(max_size=300), max_size=20))
def test_values_of_any_length_and_nulls(values: list[bytes | None]) -> None:
    rows = b"".join(bytes(piece) for piece in copying.rows_of([copying.pieces(values)]))
    lengths = [(-1).to_bytes(4, signed=True) if value is None else len(value).to_bytes(4) for value in values]
    assert rows == b"".join(b"\0\1" + length + (value or b"") for length, value in zip(lengths, values, strict=True))


@given(st.lists(texts, max_size=20))
def test_texts_are_kept_apart_and_sort_as_in_the_database(values: list[str]) -> None:
    padded = text_column(values).padded()
    assert [shown(value.decode()) for value in padded.tolist()] == values
    assert np.sort(padded).tolist() == sorted(stored(value).encode() for value in values)


def test_many_blocks_of_rows(connection: psycopg.Connection[Any]) -> None:
    count = 3 * copying.BLOCK_ROWS + 1
    row = (1, 2, None, 20_000, True, "m", "", 0, 1, 2)
    values: Values = [(place % 7, place, *row[2:5], f"m{place}", *row[6:]) for place in range(count)]
    assert copied(connection, numbered(columns_of(values))) == expected(values)


def test_constant_columns() -> None:
    assert copying.rows_of([copying.repeated(b"\0\1", 2)]) == [b"\0\1\0\0\0\2\0\1" * 2]
    assert copying.rows_of([copying.repeated(b"\0\1", 0)]) == []
