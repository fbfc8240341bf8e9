"""Snapshots: the state of a partition's engine in a file, so that a restart replays only what came after it.

::

    format      one file: written, read and checked
    directory   the files that are kept
    pace        how fast they are written
    copies      copies of them in a store

A snapshot is trusted for what it is, not for where it lies: its digest must be right, and its batch must be the one
that the ledger has under that number.
"""

from accrual.snapshots.copies import SnapshotCopies
from accrual.snapshots.directory import SnapshotDirectory
from accrual.snapshots.format import SnapshotHeader, SnapshotReader, write_snapshot
from accrual.snapshots.pace import Pace

__all__ = ["Pace", "SnapshotCopies", "SnapshotDirectory", "SnapshotHeader", "SnapshotReader", "write_snapshot"]
