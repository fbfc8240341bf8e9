"""A program that runs ``accrual`` with a store of files that takes what it is given and never answers.

::

    python tests/silent_store.py worker --snapshot-store /somewhere ...
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path


def main() -> int:
    """Run the command."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from accrual.blobs.directory import DirectoryStore
    from accrual.cli import main as accrual

    def put(_self: DirectoryStore, name: str, *_: object, **__: object) -> None:
        print(f"silent: {name}", file=sys.stderr, flush=True)
        threading.Event().wait()

    DirectoryStore.put = put  # type: ignore[assignment, method-assign]
    return accrual()


if __name__ == "__main__":
    sys.exit(main())
