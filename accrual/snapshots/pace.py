"""How fast a snapshot is written: slowly enough for the events to hardly notice, and no longer than it is wanted."""

from __future__ import annotations

import threading
import time

from accrual.errors import SnapshotError

__all__ = ["Pace"]


class Pace:
    """Holds a writer to ``bytes_per_s`` by letting it sleep between two pieces; 0 lets it run.

    What is not used while the disk is slow is not made up for: each piece takes its time. Any thread may let the writer
    run, or stop it.
    """

    def __init__(self, bytes_per_s: int = 0) -> None:
        self._bytes_per_s = bytes_per_s
        self._since_s = time.monotonic()
        self._hurry = threading.Event()
        self.stopped = False

    def wrote(self, size: int) -> None:
        """Wait until so many bytes may have been written. Raises what ``check`` does."""
        if self._bytes_per_s:
            left_s = self._since_s + size / self._bytes_per_s - time.monotonic()
            if left_s > 0:
                self._hurry.wait(left_s)
            self._since_s = time.monotonic()
        self.check()

    def check(self) -> None:
        """Raise ``SnapshotError`` if the writer was stopped."""
        if self.stopped:
            raise SnapshotError("the worker ends before it is whole")

    def hurry(self) -> None:
        """Let the writer run from now on."""
        self._hurry.set()

    def stop(self) -> None:
        """Let the writer write nothing more."""
        self.stopped = True
        self._hurry.set()
