"""A program that runs ``accrual`` and ends it, as a power cut would, at a step of its snapshots.

::

    python tests/dying.py fsync:2:before worker --snapshots ...

A step is a call of the operating system by a thread that writes a snapshot, copies it or reads one back: the file is
opened, a piece is written or read, the file is brought to the disk, renamed, an old one is removed, the directory is
brought to the disk. Calls are counted by name over the life of the process. Nothing of this is in the product: Python
tells a profiler of every call of a function that is written in C.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any, Final

CALLS: Final = frozenset({"open", "write", "readinto", "fsync", "close", "replace", "unlink"})


class Step:
    """The ``number``-th call (from 1) of ``name``; the process ends before it, or after it."""

    def __init__(self, text: str) -> None:
        self._name, number, where = text.split(":")
        self._number = int(number)
        self._after = where == "after"
        self._seen: Counter[str] = Counter()

    def watch(self, _frame: FrameType, event: str, function: Any) -> None:
        """Take note of a call: for ``threading.setprofile``.

        The only other thread of a worker, which brings in memory, makes none of these calls.
        """
        name = getattr(function, "__name__", "")
        if name not in CALLS:
            return
        if event == "c_call":
            self._seen[name] += 1
        # A call that has failed was made too.
        if (event != "c_call") == self._after and name == self._name and self._seen[name] == self._number:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    """Run the command that stands behind the step."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from accrual.cli import main as accrual

    threading.setprofile(Step(sys.argv.pop(1)).watch)
    return accrual()


if __name__ == "__main__":
    sys.exit(main())
