"""What people say of themselves on the command line: whoever does something is named, in text that can be kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from accrual.book import connect
from books import BOOK_RULEBOOK
from workers import command


@pytest.mark.parametrize("by", ["", " ", "x" * 65, "\udcff"])
@pytest.mark.parametrize("job", ["settle", "expire", "remind", "slow", "rebuild"])
def test_a_job_is_done_by_somebody(book: str, tmp_path: Path, job: str, by: str) -> None:
    rulebook = tmp_path / "rulebook.toml"
    rulebook.write_text(BOOK_RULEBOOK, encoding="utf-8")
    places = ["--database", book, "--by", by]
    rules = ["--rulebook", str(rulebook)]
    words = {"slow": [*rules, "--redis", "redis://127.0.0.1:1", "--drain"], "rebuild": []}
    name = ["book", "rebuild"] if job == "rebuild" else [job]
    done = command(*name, *places, *words.get(job, [*rules, "--day", "2026-11-10"]))
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (2, b"", 1), done.stderr
    assert b"--by: " in done.stderr
    with connect(book) as connection:
        assert connection.execute("SELECT count(*) FROM book.actions").fetchone() == (0,)


@pytest.mark.parametrize("name", ["balance", "statement", "held"])
def test_a_member_whose_name_is_no_text_is_wrong_usage(book: str, name: str) -> None:
    done = command(name, "--database", book, "--member", "m\udcff")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode() == f"accrual {name}: 'm\\udcff' is not UTF-8\n"
