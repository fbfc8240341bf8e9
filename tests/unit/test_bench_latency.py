from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hdrh.histogram import HdrHistogram

# Benchmarks are no part of what gets installed. At the end, so that no build of another mode is shadowed.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench.behind import Behind, Mark, behind_of
from bench.growth import Drained, sampled
from bench.latency import (
    PERCENTILES,
    Committed,
    Latency,
    Load,
    Measured,
    Sent,
    during,
    each_of,
    histogram_of,
    latency_us,
    percentiles_of,
    summary,
)
from bench.report import Figure
from bench.rows import Integers
from bench.workload import CHUNK_EVENTS, Workload

MS = 1_000_000
START = 5_000 * MS


def numbers(*values: int) -> Integers:
    return np.array(values, np.int64)


def sent_every_ms(through: Integers, at_ms: Integers) -> Sent:
    return Sent(START, 1_000, through, START + at_ms * MS)


def test_every_event_has_the_time_of_the_piece_that_brought_it() -> None:
    assert each_of(numbers(2, 2, 5), numbers(10, 20, 30)).tolist() == [10, 10, 30, 30, 30]


def test_counts_that_go_back_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="go back"):
        each_of(numbers(2, 1), numbers(10, 20))


def test_the_clock_starts_when_an_event_was_due() -> None:
    sent = sent_every_ms(numbers(1, 2, 3), numbers(0, 1, 2))
    committed = Committed(numbers(2, 3), START + numbers(3, 4) * MS)
    assert latency_us(sent, committed).tolist() == [3000, 2000, 2000]


def test_a_stall_counts_for_all_that_were_due_in_it() -> None:
    # The server hangs for 100 ms; a producer that waits for it would send one event late and know of no other.
    sent = sent_every_ms(numbers(1, 100), numbers(0, 100))
    committed = Committed(numbers(1, 100), START + numbers(1, 101) * MS)
    waited = latency_us(sent, committed)
    assert waited[1] == 100_000
    assert (np.diff(waited[1:]) == -1000).all()
    assert np.median(waited) == pytest.approx(51_000, rel=0.02)


def test_times_are_rounded_up() -> None:
    sent = Sent(0, 1_000, numbers(1), numbers(0))
    assert latency_us(sent, Committed(numbers(1), numbers(1))).tolist() == [1]


@pytest.mark.parametrize("through", [2, 4])
def test_what_was_not_sent_cannot_be_committed_and_all_must_be(through: int) -> None:
    sent = sent_every_ms(numbers(3), numbers(2))
    with pytest.raises(RuntimeError, match=f"3 events were sent and {through} committed"):
        latency_us(sent, Committed(numbers(through), START + numbers(9) * MS))


def test_an_event_that_is_committed_before_it_is_due_is_an_error() -> None:
    sent = sent_every_ms(numbers(3), numbers(2))
    with pytest.raises(RuntimeError, match="clocks"):
        latency_us(sent, Committed(numbers(3), START + numbers(1) * MS))


def test_an_event_belongs_to_a_snapshot_if_it_waited_at_any_moment_of_it() -> None:
    # Due at 0, 1, ... 9 ms; committed at 2, 6 and 12 ms.
    sent = sent_every_ms(numbers(10), numbers(9))
    committed = Committed(numbers(2, 6, 10), START + numbers(2, 6, 12) * MS)
    window = START + 3 * MS, START + 4 * MS
    touched = during(sent, committed, [window])
    assert touched.tolist() == [False, False, True, True, True, False, False, False, False, False]
    assert not during(sent, committed, []).any()


def test_the_warm_up_counts_for_nothing() -> None:
    events = 3_000
    sent = Sent(0, 1_000, numbers(events), numbers(0))
    sent = sent._replace(at_ns=numbers(int(sent.due_ns[-1])))
    committed = Committed(numbers(events), numbers(int(sent.due_ns[-1]) + MS))
    waited, late = Measured(sent, committed).row()
    assert len(waited) == len(late) == 2_000
    assert waited[-1] == 1_000
    assert late[-1] == 0
    assert (waited - late == 1_000).all()
    chosen = np.zeros(events, np.bool_)
    chosen[[0, 2_999]] = True
    assert Measured(sent, committed).row(chosen)[0].tolist() == [1_000]


def test_a_histogram_has_the_percentiles_of_all_values() -> None:
    random = np.random.default_rng(1)
    values = (random.exponential(3_000, 100_000)).astype(np.int64) + 1
    histogram = histogram_of(values)
    assert histogram.total_count == len(values)
    for percentile in (50.0, 99.0, 99.9):
        exact = np.percentile(values, percentile, method="inverted_cdf")
        assert histogram.get_value_at_percentile(percentile) == pytest.approx(exact, rel=2e-3)


def test_a_time_beyond_the_histogram_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="more than"):
        histogram_of(numbers(10**15))


def test_a_row_has_a_figure_for_each_percentile_and_run() -> None:
    runs = [(numbers(*range(1, 101)) * 1000, numbers(*range(100))), (numbers(7_000), numbers(0))]
    row = percentiles_of("worker", runs)
    assert row.events == 101
    assert [figure.name for figure in row.figures] == [
        f"worker {title}" for title in ("p50", "p90", "p99", "p99.9", "max")
    ]
    for figure, expected in zip(row.figures, (50, 90, 99, 100, 100), strict=True):
        assert figure.runs == pytest.approx((expected, 7), rel=2e-3)
    assert HdrHistogram.decode(row.histograms[0]).total_count == 100
    assert len(row.figures) == len(PERCENTILES)


def test_the_table_says_what_the_worker_was_told() -> None:
    row = percentiles_of("worker", [(numbers(7_000), numbers(250))])
    said = summary(Latency([row], [], [], 5, Figure("yardstick", "ms", (1.0,)))).splitlines()
    assert said[0].startswith("| ms, linger 5 ms")
    assert said[2].split("|")[2].strip() == "7.00"


def test_a_book_posts_from_one_commit_to_another() -> None:
    # 0.1 s apart: a commit is seen at 0.1, 0.3 and 0.5 s, while ten entries arrive at each look.
    booked = (0, 100, 100, 300, 300, 500, 500)
    marks = [Mark(number * 100 * MS, seq, 1_000 + 10 * number) for number, seq in enumerate(booked)]
    behind = behind_of("worker", [marks, marks[:1]])
    assert list(behind.begin.runs) == [1_000, 1_000]
    assert list(behind.end.runs) == [560, 1_000]
    assert list(behind.least.runs) == [550, 1_000]
    assert list(behind.booked.runs) == pytest.approx([1_000, 0])


def test_a_load_during_which_nobody_looked_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="nobody has looked"):
        behind_of("worker", [[]])


def test_the_table_says_where_the_book_had_caught_up() -> None:
    def beside(*least: int) -> Behind:
        return behind_of("worker", [[Mark(0, 100, 100 + entries)] for entries in least])

    row = percentiles_of("worker", [(numbers(7_000), numbers(250))])
    yardstick = Figure("yardstick", "ms", (1.0,))
    assert summary(Latency([row], [], [beside(7, 5)], 5, yardstick)).splitlines()[-1].split("|")[4].strip() == "5"
    assert "0: caught up in 1 of 2" in summary(Latency([row], [], [beside(7, 0)], 5, yardstick))


def test_the_next_load_goes_on_where_this_one_ends() -> None:
    load = Load(Workload(members=1_000), 0, 2 * CHUNK_EVENTS, 100)
    assert load.after() == Load(Workload(members=1_000), 2 * CHUNK_EVENTS, 2 * CHUNK_EVENTS, 100)


def test_tenths_are_of_events_and_divide_batches_that_span_two() -> None:
    # After a first batch of 100, ten of 150 a second each, then ten in half a second each.
    through = numbers(*range(100, 3_101, 150))
    at_ns = numbers(*(number * 1_000 * MS for number in range(11)), *(10_000 * MS + n * 500 * MS for n in range(1, 11)))
    # Both processes together work for half of the time.
    rates, spent = Drained(Committed(through, at_ns), numbers(0, 20_000 * MS), numbers(0, 10_000 * MS)).by_tenth()
    assert rates == pytest.approx([150.0] * 5 + [300.0] * 5)
    assert spent == pytest.approx([MS * 1000 / 300] * 5 + [MS * 1000 / 600] * 5)


def test_the_processor_time_of_another_process_is_read() -> None:
    asked = iter([False, False, True])
    at_ns, spent_ns = sampled([os.getpid()], lambda: next(asked))
    assert len(at_ns) == len(spent_ns) == 3
    assert (np.diff(spent_ns) > 0).all()
    assert abs(int(spent_ns[-1]) - time.process_time_ns()) < 1_000 * MS
