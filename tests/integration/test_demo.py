"""The demo from end to end: its figures are those of the reference engine and of what was planted."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from accrual.demo import RULEBOOK, MemberDay, generate
from accrual.demo.baskets import load as load_baskets
from accrual.demo.bookkeeping import Booked, open_database
from accrual.demo.run import PARTITION, keep_book, new_directory, open_screen, open_server, run
from accrual.demo.screen import Screen
from accrual.demo.summary import Summary, summarise
from accrual.embedded import EmbeddedServer
from accrual.engine import Entry, ReferenceEngine
from accrual.errors import InvalidEvent, UsageError
from accrual.events import validate
from accrual.rulebook import load
from accrual.stream import Keys
from workers import ROOT, command, environment, wait_until


class Run:
    """One run on a small day: what it returned, what it printed, and what the reference engine makes of the day."""

    def __init__(self, directory: Path) -> None:
        self.day: MemberDay = generate(baskets=load_baskets().first_households(100))
        self.directory = new_directory(directory)
        output, progress = io.StringIO(), io.StringIO()
        screen = Screen(Console(file=output, width=120), Console(file=progress, width=120))
        with open_server(self.directory, with_data=False) as server, open_database() as database:
            self.summary: Summary = run(self.day, server, screen)
            self.booked: Booked = keep_book(server, database, screen)
        self.output, self.progress = output.getvalue(), progress.getvalue()
        self.engine = ReferenceEngine(load(RULEBOOK))
        self.entries = list(self._entries())

    def _entries(self) -> Iterator[Entry]:
        for event in self.day.events():
            try:
                decision = self.engine.decide(validate(event), event["at"])
            except InvalidEvent:
                continue
            if isinstance(decision, Entry):
                yield decision


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("demo") / "data")


def test_every_proof_holds(small_run: Run) -> None:
    assert [proof.claim for proof in small_run.summary.proofs() if not proof.holds] == []
    assert all(planted == found for _, planted, found in small_run.summary.planted_and_found())


def test_the_book_goes_on_from_the_ledger(small_run: Run) -> None:
    booked, summary = small_run.booked, small_run.summary
    assert [proof.claim for proof in booked.proofs() if not proof.holds] == []
    assert booked.entries == summary.entries
    assert booked.accounts["available"] == booked.settled_points > 0
    assert {line["kind"] for line in booked.lines} >= {"accrue", "settle", "refund"}
    assert "Proof of the book" in small_run.output


def test_the_figures_are_those_of_the_reference_engine(small_run: Run) -> None:
    summary = small_run.summary
    events: Counter[tuple[str, str]] = Counter()
    points: Counter[tuple[str, str]] = Counter()
    limits: Counter[str] = Counter()
    members: defaultdict[str, set[str]] = defaultdict(set)
    campaigns: Counter[str] = Counter()
    campaign_points: Counter[str] = Counter()
    clamped = 0
    for entry in small_run.entries:
        events[entry.kind, entry.outcome] += 1
        points[entry.kind, entry.outcome] += entry.points
        for limit, _ in entry.evidence:
            limits[limit] += 1
            members[limit].add(entry.member)
        if entry.outcome in {"granted", "held"}:
            clamped += entry.uncapped - entry.points
            campaigns.update(entry.campaigns)
            for campaign in entry.campaigns:
                campaign_points[campaign] += entry.points
    assert summary.entries == len(small_run.entries)
    assert summary.events == events
    assert summary.points == points
    assert summary.limit_events == limits
    assert summary.limit_members == members
    assert (summary.campaign_events, summary.campaign_points) == (campaigns, campaign_points)
    assert summary.clamped_points == clamped > 0


def test_abusers_have_the_points_that_the_reference_engine_gives_them(small_run: Run) -> None:
    group_of = {member: group for group, members in small_run.day.truth.abusers.items() for member in members}
    points: Counter[tuple[str, str]] = Counter()
    for entry in small_run.entries:
        if entry.member in group_of:
            points[group_of[entry.member], entry.outcome] += entry.points
    assert small_run.summary.group_points == points


def test_the_members_named_as_frozen_are_frozen(small_run: Run) -> None:
    frozen = {name for name, member in small_run.engine.members.items() if member.state == "frozen"}
    told = small_run.summary.frozen
    assert {one.member for one in told} == frozen
    assert len(told) == len(frozen) > 0
    evidence = {(entry.member, limit, seen) for entry in small_run.entries for limit, seen in entry.evidence}
    assert all((one.member, one.limit, one.observed) in evidence for one in told)
    assert all("****" in one.device_masked and "****" in one.phone_masked for one in told)


def test_the_output_says_it_all_without_control_characters(small_run: Run) -> None:
    output = small_run.output
    for words in ("events/s", "points granted", "clamped away", "device-burst", "member-day", "phone_pool", "✓"):
        assert words in output
    assert "✗" not in output
    assert f"{len(small_run.day):,} events in = " in output
    assert f"accrual:{{{PARTITION}}}:ledger" in output
    assert "\x1b" not in output + small_run.progress
    assert [line.partition(":")[0] for line in small_run.progress.splitlines()] == [
        *("server", "stream", "worker", "ledger", "database", "book")
    ]


def reopened(small_run: Run, directory: Path) -> EmbeddedServer:
    shutil.copytree(small_run.directory / "appendonlydir", directory / "appendonlydir")
    return open_server(directory, with_data=True)


def test_the_data_can_be_served_again_and_a_broken_ledger_is_told(small_run: Run, tmp_path: Path) -> None:
    keys = Keys(PARTITION)
    with reopened(small_run, tmp_path) as server:
        client = server.client()
        again = summarise(client, keys, load(RULEBOOK), small_run.day.truth)
        assert again == small_run.summary
        client.xdel(keys.ledger, "2-0")
        broken = summarise(client, keys, load(RULEBOOK), small_run.day.truth)
    assert "the ledger is broken: batch" in broken.ledger_fault
    claims = [proof.claim for proof in broken.proofs() if not proof.holds]
    assert broken.ledger_fault in claims


def test_a_directory_that_has_something_in_it_is_refused(small_run: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not an empty directory"):
        new_directory(small_run.directory)
    done = command("demo", "--serve", tmp_path)
    assert (done.returncode, done.stderr.decode()) == (2, f"accrual demo: {tmp_path}: has no data of a demo\n")


def test_without_rich_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "accrual.demo.screen")
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(UsageError, match=r"pip install 'accrual\[demo\]'"):
        open_screen()


def started(directory: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    """Start the command; it and all that it starts have ``directory`` in their environment."""
    return subprocess.Popen(
        [sys.executable, "-m", "accrual.cli", "demo", *map(str, arguments)],
        cwd=ROOT,
        env=environment(DEMO_TEST=str(directory), PYTHONUNBUFFERED="1"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def processes_of(directory: Path) -> int:
    """Count the processes that belong to the run in ``directory``."""
    needle = os.fsencode(f"DEMO_TEST={directory}")
    count = 0
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            count += needle in path.read_bytes()
    return count


@pytest.mark.parametrize(("stage", "number"), [("server:", signal.SIGINT), ("stream:", signal.SIGTERM)])
def test_a_signal_stops_everything(tmp_path: Path, stage: str, number: signal.Signals) -> None:
    with started(tmp_path, "--scale", "1", "--directory", tmp_path / "data") as process:
        assert process.stderr is not None
        assert any(line.startswith(stage) for line in process.stderr)
        if stage == "stream:":
            wait_until((tmp_path / "data" / "worker.log").exists, "the worker has not been started")
        assert processes_of(tmp_path) > 1
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert processes_of(tmp_path) == 0


def test_a_demo_that_is_killed_takes_everything_with_it(tmp_path: Path) -> None:
    """Nobody is left to stop the worker, which would wait for its dead server for ever."""
    with started(tmp_path, "--scale", "1", "--directory", tmp_path / "data") as process:
        log = tmp_path / "data" / "worker.log"
        wait_until(lambda: log.exists() and b"owner" in log.read_bytes(), "the worker works", 60)
        process.kill()
        process.communicate(timeout=20)
    wait_until(lambda: processes_of(tmp_path) == 0, "nothing is left running")


def test_the_server_is_kept_until_ctrl_c(small_run: Run, tmp_path: Path) -> None:
    shutil.copytree(small_run.directory / "appendonlydir", tmp_path / "appendonlydir")
    with started(tmp_path, "--serve", tmp_path) as process:
        assert process.stdout is not None
        look = next(line for line in process.stdout if " ledger --redis " in line)
        words = shlex.split(look.partition("|")[0])
        # What it prints can be typed as it is.
        done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, check=False)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert len(done.stdout.splitlines()) == len(small_run.entries)
    assert process.returncode == 0
    assert processes_of(tmp_path) == 0
