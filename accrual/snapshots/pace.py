"""How fast a snapshot is written: slowly enough for the events to hardly notice."""

from __future__ import annotations

import threading
import time

__all__ = ["Pace"]


class Pace:
    """Holds a writer to ``bytes_per_s`` by letting it sleep between two pieces; 0 lets it run.

    What is not used while the disk is slow is not made up for: each piece takes its time.
    """

    def __init__(self, bytes_per_s: int = 0) -> None:
        self._bytes_per_s = bytes_per_s
        self._since_s = time.monotonic()
        self._hurry = threading.Event()

    def wrote(self, size: int) -> None:
        """Wait until so many bytes may have been written."""
        if self._bytes_per_s:
            left_s = self._since_s + size / self._bytes_per_s - time.monotonic()
            if left_s > 0:
                self._hurry.wait(left_s)
            self._since_s = time.monotonic()

    def hurry(self) -> None:
        """Let the writer run from now on; any thread may."""
        self._hurry.set()
