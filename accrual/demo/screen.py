"""What the demo shows: live bars on a terminal and plain lines elsewhere (stderr), and at the end a summary (stdout).

Needs rich, which comes with the extra ``demo``; nothing else of the project does.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from accrual.demo.bookkeeping import Booked
from accrual.demo.drain import Drained
from accrual.demo.summary import Proof, Summary
from accrual.outcomes import OUTCOMES
from accrual.rulebook import Limit, Rulebook

__all__ = ["Screen", "Stage"]

SHOWN_FROZEN: Final = 5
SHOWN_LINES: Final = 12
SHOWN_CAMPAIGNS: Final = 8
RATE_SPAN_S: Final = 1.0
NARROWEST_COLUMNS: Final = 100
CHINA: Final = timezone(timedelta(hours=8))

OUTCOME_STYLES: Final = dict(zip(OUTCOMES, ("green", "yellow", "red", "cyan", "dim"), strict=True))
ACTION_STYLES: Final = {"reject": "red", "freeze": "red", "hold": "yellow", "clamp": "cyan"}
DEEDS: Final = {
    "device_farm": "12 accounts a device",
    "phone_pool": "10 accounts a phone",
    "burst_bot": "60 orders in a minute",
    "wash_orders": "large orders, refunded",
    "points_rush": "8 huge orders in 10 min",
    "review_mill": "60 reviews in 40 min",
    "proxy_crowd": "800 accounts an address",
}


class Stage:
    """One stage of the work as it goes on: how many events are through, and how many a second lately."""

    def __init__(self, progress: Progress, what: str, total: int | None, rest: str) -> None:
        self._progress = progress
        self._rest = rest
        self._task = progress.add_task(what, total=total, note="")
        self._samples = [(time.monotonic(), 0)]

    def reached(self, events: int) -> None:
        """Show that ``events`` are through."""
        now_s = time.monotonic()
        self._samples.append((now_s, events))
        while now_s - self._samples[0][0] > RATE_SPAN_S and len(self._samples) > 2:
            del self._samples[0]
        then_s, before = self._samples[0]
        total = self._progress.tasks[self._task].total or 0
        rate = (events - before) / max(1e-3, now_s - then_s)
        note = f"{events:>11,} events  {rate:>9,.0f}/s  {self._rest} {max(0, int(total) - events):>11,}"
        self._progress.update(self._task, completed=events, note=note)


class Screen:
    """Shows the stages on ``progress`` and the summary on ``output``."""

    def __init__(self, output: Console | None = None, progress: Console | None = None) -> None:
        self._output = output or _console(stderr=False)
        self._progress = progress or _console(stderr=True)

    def say(self, line: str) -> None:
        """Print one line about what goes on."""
        self._progress.print(Text(line), soft_wrap=True)

    @contextmanager
    def stage(self, what: str, total: int | None = None, rest: str = "") -> Iterator[Stage]:
        """Show ``what`` is being done, live on a terminal only; of ``total`` events where they can be counted.

        ``rest`` is the word for those that are not through yet.
        """
        columns = [SpinnerColumn(finished_text=" "), TextColumn("{task.description:<30}", markup=False)]
        columns += [BarColumn(28), TextColumn("{task.fields[note]}", markup=False)] if total else []
        live = Progress(*columns, console=self._progress, transient=True, disable=not self._progress.is_terminal)
        with live:
            yield Stage(live, what, total, rest)

    def show(self, summary: Summary, drained: Drained, rulebook: Rulebook) -> None:
        """Print the summary of a run."""
        parts = (
            _headline(summary, drained),
            *_titled("What became of the events", _outcomes(summary)),
            *_titled("Limits that tripped", _limits(summary, rulebook)),
            *_titled("Campaigns", _campaigns(summary, rulebook)),
            *_titled("Abusers planted in the crowd, and the points they got", _abusers(summary)),
            *_titled("Members who were frozen, and why", _frozen(summary, rulebook)),
            *_titled("Planted, and found", _planted(summary)),
            *_titled("Proof", _marked(summary.proofs())),
        )
        self._output.print(Group(*parts))

    def show_book(self, booked: Booked) -> None:
        """Print what the book made of the day."""
        parts = (
            *_titled("The book", _accounts(booked)),
            *_titled(f"A statement: member {booked.member}", _statement(booked)),
            *_titled("Proof of the book", _marked(booked.proofs())),
        )
        self._output.print(Group(*parts))

    def show_lines(self, lines: list[str]) -> None:
        """Print lines of the result that are to be copied: whole, however long."""
        for line in lines:
            self._output.print(Text(line), soft_wrap=True)


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        # In a file or a pipe no terminal's width has to be kept to.
        console.width = max(console.width, NARROWEST_COLUMNS)
    return console


def _headline(summary: Summary, drained: Drained) -> RenderableType:
    granted, held = (summary.of_outcome(summary.points, outcome) for outcome in ("granted", "held"))
    return Panel(
        Text.assemble(
            (f"{drained.events:,} events", "bold"),
            f" decided and committed in {drained.duration_s:.2f} s: ",
            (f"{drained.events_per_s:,} events/s", "bold green"),
            f"\n{granted:,} points granted · {held:,} held for a reviewer · {summary.clamped_points:,} clamped away",
        ),
        title="member day",
        expand=False,
        padding=(0, 2),
    )


def _titled(title: str, body: RenderableType) -> tuple[RenderableType, RenderableType]:
    return Text(f"\n{title}", "bold"), Padding(body, (0, 0, 0, 1), expand=False)


def _table(*headings: str) -> Table:
    """Return an empty table; a heading that starts with ``>`` is that of numbers."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    for heading in headings:
        table.add_column(heading.removeprefix(">"), justify="right" if heading.startswith(">") else "left")
    return table


def _number(count: int, style: str = "") -> Text:
    return Text(f"{count:,}", style) if count else Text("·", "dim")


def _outcomes(summary: Summary) -> Table:
    table = _table("kind", *(f">{outcome}" for outcome in OUTCOMES), ">points granted", ">points held")
    totals: dict[str, int] = {}
    for kind, _ in summary.events:
        totals[kind] = sum(summary.events[kind, outcome] for outcome in OUTCOMES)
    for kind in sorted(totals, key=totals.__getitem__, reverse=True):
        counts = [_number(summary.events[kind, outcome], OUTCOME_STYLES[outcome]) for outcome in OUTCOMES]
        points = [_number(summary.points[kind, outcome]) for outcome in ("granted", "held")]
        table.add_row(escape(kind), *counts, *points)
    table.add_section()
    sums = [_number(summary.of_outcome(summary.events, outcome)) for outcome in OUTCOMES]
    points = [_number(summary.of_outcome(summary.points, outcome)) for outcome in ("granted", "held")]
    table.add_row("all", *sums, *points, style="bold")
    return table


def _limit_text(limit: Limit) -> str:
    duration_ms = limit.window.duration_ms
    window = "a day" if duration_ms is None else _duration_text(duration_ms)
    return f"more than {limit.max:,} {limit.measure} of a {limit.key} in {window}".replace("a ip", "an ip")


def _duration_text(duration_ms: int) -> str:
    for unit, unit_ms in (("h", 3_600_000), ("min", 60_000)):
        if duration_ms % unit_ms == 0:
            return f"{duration_ms // unit_ms} {unit}"
    return f"{duration_ms / 1000:g} s"


def _limits(summary: Summary, rulebook: Rulebook) -> Table:
    table = _table("limit", "action", "trips at", ">events", ">members")
    by_id = {limit.id: limit for limit in rulebook.limits}
    for limit_id, count in summary.limit_events.most_common():
        limit = by_id[limit_id]
        action = Text(limit.action, ACTION_STYLES[limit.action])
        members = len(summary.limit_members[limit_id])
        table.add_row(escape(limit_id), action, _limit_text(limit), _number(count), _number(members))
    return table


def _campaigns(summary: Summary, rulebook: Rulebook) -> Table:
    table = _table("campaign", ">multiplier", ">events it applied to", ">their points")
    by_id = {campaign.id: campaign for campaign in rulebook.campaigns}
    for campaign_id, count in summary.campaign_events.most_common(SHOWN_CAMPAIGNS):
        multiplier = f"× {float(by_id[campaign_id].multiplier):g}"
        points = _number(summary.campaign_points[campaign_id])
        table.add_row(escape(campaign_id), multiplier, _number(count), points)
    return table


def _abusers(summary: Summary) -> Table:
    table = _table("members", "what they do", ">tripped a limit", "mostly", ">granted", ">held")
    for group, members in summary.truth.abusers.items():
        points = [_number(summary.group_points[group, outcome]) for outcome in ("granted", "held")]
        caught = members & summary.noticed
        counts = f"{len(caught):,} of {len(members):,}"
        table.add_row(escape(group), DEEDS.get(group, ""), counts, _mostly_by(summary, caught), *points)
    table.add_section()
    touched = summary.lookalikes & summary.noticed
    counts = f"{len(touched):,} of {len(summary.lookalikes):,}"
    table.add_row("neighbours", "honest: a leader orders", counts, _mostly_by(summary, touched))
    touched = summary.noticed_ordinary
    counts = f"{len(touched):,} of {summary.truth.members:,}"
    table.add_row("shoppers", "honest: they shop", counts, _mostly_by(summary, touched))
    return table


def _mostly_by(summary: Summary, members: frozenset[str]) -> str:
    """Return the limit that most of ``members`` tripped."""
    tripped = {limit: len(members & found) for limit, found in summary.limit_members.items()}
    return escape(max(tripped, key=tripped.__getitem__)) if any(tripped.values()) else ""


def _frozen(summary: Summary, rulebook: Rulebook) -> RenderableType:
    table = _table("member", "at", "limit", ">observed", "device", "phone")
    notes: list[Any] = [table]
    for limit in (limit for limit in rulebook.limits if limit.action == "freeze"):
        found = [member for member in summary.frozen if member.limit == limit.id]
        for one in found[:SHOWN_FROZEN]:
            at = datetime.fromtimestamp(one.ts_ms / 1000, CHINA).strftime("%H:%M:%S")
            texts = map(escape, (one.member, at, one.limit))
            table.add_row(*texts, f"{one.observed:,}", escape(one.device_masked), escape(one.phone_masked))
        if found:
            notes.append(Text(f"{limit.id} froze {len(found):,}: {_limit_text(limit)}", "dim"))
    return Group(*notes) if summary.frozen else Text("nobody", "dim")


def _planted(summary: Summary) -> Table:
    table = _table("", ">planted", ">found", "")
    for what, planted, found in summary.planted_and_found():
        table.add_row(escape(what), _number(planted), _number(found), _mark(planted == found))
    return table


def _accounts(booked: Booked) -> Table:
    table = _table("account", "points")
    for account, points in sorted(booked.accounts.items()):
        table.add_row(account, _number(points))
    for kind, count in sorted(booked.exceptions.items()):
        table.add_row(f"waits for a person: {kind}", _number(count))
    return table


def _statement(booked: Booked) -> Table:
    table = _table("", "points", "")
    for line in booked.lines[:SHOWN_LINES]:
        table.add_row(f"{line['from']} → {line['to']}", _number(line["points"]), Text(line["words"]))
    return table


def _marked(proofs: list[Proof]) -> Group:
    return Group(*(Text.assemble(_mark(proof.holds), f" {proof.claim}") for proof in proofs))


def _mark(holds: bool) -> Text:
    return Text("✓", "green") if holds else Text("✗ WRONG", "bold red")
