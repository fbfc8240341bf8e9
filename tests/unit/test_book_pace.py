"""How far behind the book says that it is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from accrual.book import follow
from accrual.book.follow import Pace


def told(
    moments: list[tuple[float, int, int, bool]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> list[str]:
    """Return what is said at ``moments``: a time in s, where the book and the ledger are, and whether it waits."""
    caplog.set_level("INFO", "accrual.book")
    pace = Pace("p")
    for now_s, next_seq, ledger_next_seq, is_waiting in moments:
        monkeypatch.setattr(follow, "time", SimpleNamespace(monotonic=lambda now_s=now_s: now_s))
        if next_seq == ledger_next_seq:
            pace.caught_up()
        else:
            pace.behind(next_seq, ledger_next_seq, is_waiting=is_waiting)
    return [message.removeprefix("partition p: ") for message in caplog.messages]


def test_catching_up_takes_what_arrives_meanwhile_into_account(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    moments = [(0.0, 0, 100_000, False), (4.0, 8_000, 102_000, False), (5.0, 10_000, 102_500, False)]
    moments += [(10.0, 11_000, 107_500, False), (15.0, 12_000, 108_500, False), (20.0, 62_000, 108_500, False)]
    assert told(moments, monkeypatch, caplog) == [
        "92500 entries behind, 2000 entries/s posted, 500 arriving, caught up in about 62 s",
        "96500 entries behind, 200 entries/s posted, 1000 arriving, falling behind",
        "96500 entries behind, 200 entries/s posted, 200 arriving, falling behind",
        "46500 entries behind, 10000 entries/s posted, 0 arriving, caught up in about 5 s",
    ]


def test_a_moment_is_not_worth_a_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    # As under everysec: always two seconds behind, waiting and posting in turn; then as under always.
    flushing = [(float(number), number * 10, number * 10 + 20, number % 3 > 0) for number in range(20)]
    keeping_up = [(30.0 + number, number * 10, number * 10 + number % 2, False) for number in range(20)]
    assert told([*flushing, *keeping_up], monkeypatch, caplog) == []


def test_waiting_for_the_disk_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    moments = [
        (0.0, 10, 20, False),
        (0.1, 10, 20, True),
        (5.0, 10, 50, True),
        (5.1, 10, 70, True),
        (10.2, 10, 70, True),
    ]
    assert told(moments, monkeypatch, caplog) == [
        "60 entries behind, 0 entries/s posted, 10 arriving, waiting for the server to write them to its disk",
        "60 entries behind, 0 entries/s posted, 0 arriving, waiting for the server to write them to its disk",
    ]
