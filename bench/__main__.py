"""``python -m bench``: measures, prints a table and writes a JSON file that has everything about the run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from accrual.cli.arguments import positive
from bench import audit, book, core, drain, growth, jobs, latency, profile, restart
from bench.machine import describe
from bench.memory import find_memory
from bench.report import save
from bench.workload import CHUNK_EVENTS, DEFAULT_SEED

__all__ = ["main"]

MANY_KEYS: Final = 10_000_000
KEYS: Final = (100_000, 1_000_000, MANY_KEYS)
QUICK_KEYS: Final = (10_000, 100_000)
QUICK_MEMBERS: Final = 100_000
FIRST_TOUCH_BYTES: Final = 1 << 30

EXAMPLES: Final = """\
examples:
  python -m bench                           everything, an hour or more, in 16 GB of memory
  python -m bench --quick                   the same on little data: whether it works, not how fast it is
  python -m bench core --keys 1000000       the core on so many keys a table (10 million of them take 12 GB of memory)
  python -m bench drain --events 4000000 --variants single durable
  python -m bench latency --rate 100000 --seconds 10 --linger-ms 1
  python -m bench restart --state-members 1000000
  python -m bench book --events 1000000
  python -m bench jobs --runs 1
  python -m bench audit
  python -m bench profile                   instructions and cache misses of the core, by valgrind
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks that the command line names."""
    parsed = _parser().parse_args(arguments)
    touch = find_memory(FIRST_TOUCH_BYTES)
    before = describe() | {"first_touch": touch}
    _tell(f"{before['processor']}, {before['cores']} cores, {before['server']}")
    _tell(f"first touch of 2 MiB of memory: {touch.found_ms:.2f} ms as it was found, {touch.again_ms:.2f} ms again")
    for name, run in BENCHMARKS.items():
        if parsed.what in (name, "all"):
            run(parsed, before)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure the compiled core, and the worker end to end, each figure beside its ceiling or its peer.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="?", choices=(*BENCHMARKS, "all"), default="all", help="default: all")
    parser.add_argument("--quick", action="store_true", help="a tenth of everything, two runs: to see that it works")
    parser.add_argument(
        "--runs", type=positive, metavar="N", help="runs, of which the median counts (drain 5, others 3)"
    )
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="of the workload; default %(default)s")
    parser.add_argument(
        "--name",
        metavar="NAME",
        help="bench/results/NAME.json; default: core and so on, core-quick with --quick",
    )
    parser.add_argument(
        "--directory", type=Path, metavar="DIR", help="for the server's files; default: a temporary one"
    )
    group = parser.add_argument_group("core")
    group.add_argument(
        "--keys", type=positive, nargs="+", metavar="N", help="keys a table; default 100000 1000000 10000000"
    )
    group.add_argument("--replies", type=positive, metavar="N", help="replies of 8192 fresh events; default 24")
    group = parser.add_argument_group("drain")
    group.add_argument("--events", type=positive, metavar="N", help="events on the stream; default 2000000")
    group.add_argument("--members", type=positive, metavar="N", help="members in them; default 1000000")
    group.add_argument("--peer-events", type=positive, metavar="N", help="events for the peer; default 50000")
    group.add_argument("--transport", choices=("tcp", "unix"), default="tcp", help="to the server; default tcp")
    names = [variant.name for variant in drain.VARIANTS]
    group.add_argument("--variants", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    _add_lasting(parser)
    return parser


def _add_lasting(parser: argparse.ArgumentParser) -> None:
    """Add what belongs to latency, restart and growth."""
    group = parser.add_argument_group("latency, restart, growth")
    group.add_argument("--rate", type=positive, metavar="N", help="events per second that are sent; default 100000")
    group.add_argument("--seconds", type=positive, metavar="N", help="for which they are sent, each run; default 10")
    group.add_argument(
        "--linger-ms", type=int, default=1, metavar="N", help="the worker's setting; default %(default)s"
    )
    group.add_argument(
        "--loads",
        nargs="+",
        choices=latency.VARIANTS,
        default=latency.VARIANTS,
        metavar="NAME",
        help="of latency: " + ", ".join(latency.VARIANTS),
    )
    group.add_argument(
        "--state-members",
        type=positive,
        metavar="N",
        help="members of the large state, of which a snapshot is taken; default 10000000 (16 GB of memory)",
    )
    group.add_argument(
        "--replay-events", type=positive, metavar="N", help="events behind the snapshot; default 2000000"
    )


def _run_core(parsed: argparse.Namespace, machine: dict[str, Any]) -> None:
    keys = parsed.keys or (QUICK_KEYS if parsed.quick else KEYS)
    results = []
    for number in keys:
        settings = core.CoreSettings(
            keys=number,
            replies=parsed.replies or (8 if parsed.quick else 24),
            runs=parsed.runs or (2 if parsed.quick else 3),
            reference_events=CHUNK_EVENTS // 8 if parsed.quick else CHUNK_EVENTS,
            seed=parsed.seed,
        )
        _tell(f"core: {number:,} keys")
        results.append((settings, core.measure_core(settings)))
    path = save(
        _name(parsed, "core"),
        machine,
        [{"settings": settings, "result": result} for settings, result in results],
    )
    print(core.summary([result for _, result in results]))
    _tell(f"everything is in {path}")


def _run_drain(parsed: argparse.Namespace, machine: dict[str, Any]) -> None:
    settings = drain.DrainSettings(
        events=parsed.events or (200_000 if parsed.quick else 2_000_000),
        peer_events=parsed.peer_events or (CHUNK_EVENTS if parsed.quick else 50_000),
        runs=parsed.runs or (2 if parsed.quick else 5),
        members=parsed.members or (QUICK_MEMBERS if parsed.quick else 1_000_000),
        seed=parsed.seed,
        transport=parsed.transport,
        directory=parsed.directory,
        variants=tuple(parsed.variants),
    )
    result = drain.measure_drain(settings, _tell)
    path = save(_name(parsed, "drain"), machine, {"settings": settings, "result": result})
    print(drain.summary(result))
    _tell(f"everything is in {path}")


def _run_latency(parsed: argparse.Namespace, machine: dict[str, Any]) -> None:
    quick = parsed.quick
    settings = latency.LatencySettings(
        rate_per_s=parsed.rate or (20_000 if quick else 100_000),
        seconds=parsed.seconds or (1 if quick else 10),
        runs=parsed.runs or (2 if quick else 3),
        members=QUICK_MEMBERS if quick else 1_000_000,
        snapshot_members=parsed.state_members or (QUICK_MEMBERS if quick else MANY_KEYS),
        snapshot_seconds=6 if quick else 90,
        snapshot_interval_s=2 if quick else 60,
        linger_ms=parsed.linger_ms,
        seed=parsed.seed,
        directory=parsed.directory,
        variants=tuple(parsed.loads),
    )
    result = latency.measure_latency(settings, _tell)
    print(latency.summary(result))
    path = save(_name(parsed, "latency"), machine, {"settings": settings, "result": result})
    _tell(f"everything is in {path}")


def _run_restart(parsed: argparse.Namespace, machine: dict[str, Any]) -> None:
    settings = restart.RestartSettings(
        members=parsed.state_members or (QUICK_MEMBERS if parsed.quick else MANY_KEYS),
        replay_events=parsed.replay_events or (100_000 if parsed.quick else 2_000_000),
        runs=parsed.runs or (2 if parsed.quick else 3),
        seed=parsed.seed,
        directory=parsed.directory,
    )
    result = restart.measure_restart(settings, _tell)
    print(restart.summary(result))
    path = save(_name(parsed, "restart"), machine, {"settings": settings, "result": result})
    _tell(f"everything is in {path}")


def _run_growth(parsed: argparse.Namespace, machine: dict[str, Any]) -> None:
    quick = parsed.quick
    settings = growth.GrowthSettings(
        core_events=1_000_000 if quick else 10_000_000,
        core_members=QUICK_MEMBERS // 10 if quick else QUICK_MEMBERS,
        worker_events=parsed.events or (200_000 if quick else 4_000_000),
        worker_members=parsed.members or (QUICK_MEMBERS if quick else 1_000_000),
        runs=parsed.runs or (2 if quick else 3),
        seed=parsed.seed,
        directory=parsed.directory,
    )
    result = growth.measure_growth(settings, _tell)
    print(growth.summary(result))
    path = save(_name(parsed, "growth"), machine, {"settings": settings, "result": result})
    _tell(f"everything is in {path}")


def _run_book(parsed: argparse.Namespace, machine: dict[str, Any]) -> None:
    settings = book.BookSettings(
        events=parsed.events or (200_000 if parsed.quick else 1_000_000),
        runs=parsed.runs or (2 if parsed.quick else 3),
        members=parsed.members or (QUICK_MEMBERS if parsed.quick else 1_000_000),
        seed=parsed.seed,
        directory=parsed.directory,
    )
    result = book.measure_book(settings, _tell)
    print(book.summary(result))
    path = save(_name(parsed, "book"), machine, {"settings": settings, "result": result})
    _tell(f"everything is in {path}")


def _run_jobs(parsed: argparse.Namespace, machine: dict[str, Any]) -> None:
    quick = parsed.quick
    settings = jobs.JobsSettings(
        members=parsed.members or (QUICK_MEMBERS if quick else 1_000_000),
        runs=parsed.runs or (2 if quick else 3),
        alone_s=2.0 if quick else 10.0,
        beside_events=parsed.events or (10 if quick else 40) * CHUNK_EVENTS,
        seed=parsed.seed,
        directory=parsed.directory,
    )
    result = jobs.measure_jobs(settings, _tell)
    print(jobs.summary(result))
    path = save(_name(parsed, "jobs"), machine, {"settings": settings, "result": result})
    _tell(f"everything is in {path}")


def _run_audit(parsed: argparse.Namespace, machine: dict[str, Any]) -> None:
    settings = audit.AuditSettings(
        events=parsed.events or (1 if parsed.quick else 4) * CHUNK_EVENTS,
        runs=parsed.runs or (2 if parsed.quick else 3),
        members=parsed.members or min(QUICK_KEYS if parsed.quick else KEYS),
        seed=parsed.seed,
    )
    result = audit.measure_audit(settings, _tell)
    print(audit.summary(result))
    path = save(_name(parsed, "audit"), machine, {"settings": settings, "result": result})
    _tell(f"everything is in {path}")


def _run_profile(parsed: argparse.Namespace, machine: dict[str, Any]) -> None:
    if not profile.is_available():
        if parsed.what == "profile":
            raise SystemExit("python -m bench profile: valgrind is not installed")
        _tell("profile: left out, since valgrind is not installed")
        return
    keys = parsed.keys[0] if parsed.keys else min(QUICK_KEYS if parsed.quick else KEYS)
    settings = profile.ProfileSettings(keys=keys, seed=parsed.seed)
    result = profile.measure_profile(settings, _tell)
    print(profile.summary(result))
    path = save(_name(parsed, "profile"), machine, {"settings": settings, "result": result})
    _tell(f"everything is in {path}")


def _name(parsed: argparse.Namespace, benchmark: str) -> str:
    """Return what the file is called. What was tried quickly must not take the place of what was measured."""
    return parsed.name or (f"{benchmark}-quick" if parsed.quick else benchmark)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


BENCHMARKS: Final[dict[str, Callable[[argparse.Namespace, dict[str, Any]], None]]] = {
    "core": _run_core,
    "drain": _run_drain,
    "latency": _run_latency,
    "restart": _run_restart,
    "growth": _run_growth,
    "book": _run_book,
    "jobs": _run_jobs,
    "audit": _run_audit,
    "profile": _run_profile,
}

if __name__ == "__main__":
    raise SystemExit(main())
