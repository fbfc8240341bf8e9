"""Memory that the machine has really got.

A hypervisor may take back what its guest has left free. Then the first touch of a page is a fault in the guest and one
in the host, which can take twenty times as long as the same touch on a machine of one's own: it would be this that is
measured. ``find_memory`` touches as much as a run is going to need, in a process that ends at once, so that the run
finds it there; and says what it took the first time, and the second.

As a module it is that process: ``python -m bench.memory BYTES``.
"""

from __future__ import annotations

import mmap
import sys
import threading
import time
from typing import Final

import msgspec
import numpy as np

from bench.machine import run_module

__all__ = ["FirstTouch", "find_memory", "find_memory_for", "random_line_ns"]

HUGE_PAGE_BYTES: Final = 2 << 20
PAGE_BYTES: Final = 4096
# A worker, its state, and what the server gets meanwhile.
RUN_BYTES: Final = 2 << 30
MEMBER_BYTES: Final = 800
THREADS: Final = 2
WORD_BYTES: Final = 8
LINE_WORDS: Final = 8
READS: Final = 1 << 21
ATTEMPTS: Final = 5


class FirstTouch(msgspec.Struct, frozen=True):
    """How long two threads together took for 2 MiB, ms: as the memory was found, and right after that."""

    found_ms: float
    again_ms: float


def find_memory(size_bytes: int) -> FirstTouch:
    """Make sure that the machine has ``size_bytes`` of memory to give."""
    said = run_module("bench.memory", str(size_bytes), anywhere=True).stdout
    return msgspec.json.decode(said, type=FirstTouch)


def find_memory_for(members: int) -> None:
    """Make sure that there is memory for a run on a state of so many members."""
    find_memory(RUN_BYTES + members * MEMBER_BYTES)


def _touch(size_bytes: int) -> None:
    with mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        # The view must be gone before the mapping can be.
        np.frombuffer(memory, np.uint8)[::PAGE_BYTES].fill(1)


def _touch_all(size_bytes: int) -> float:
    """Touch so much memory in all and return the ms for each 2 MiB."""
    started = time.perf_counter()
    threads = [threading.Thread(target=_touch, args=(size_bytes // THREADS,)) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return (time.perf_counter() - started) * 1000 * HUGE_PAGE_BYTES / size_bytes


def random_line_ns(size_bytes: int) -> float:
    """Return what it takes to read one line of 64 bytes at random out of so much memory, many on their way at a time.

    Processor time, the median of some attempts.
    """
    memory = np.ones(size_bytes // WORD_BYTES, np.uint64)
    lines = len(memory) // LINE_WORDS
    random = np.random.default_rng(lines)
    found = np.empty(READS, np.uint64)
    spent = []
    for _ in range(ATTEMPTS):
        places = random.integers(0, lines, READS) * LINE_WORDS
        started = time.thread_time_ns()
        memory.take(places, out=found, mode="clip")
        spent.append((time.thread_time_ns() - started) / READS)
    return float(np.median(spent))


if __name__ == "__main__":
    wanted = int(sys.argv[1])
    print(msgspec.json.encode(FirstTouch(_touch_all(wanted), _touch_all(wanted))).decode())
