"""A program that runs ``accrual`` on a machine whose clock cannot be trusted: every look at it jumps by up to a year.

::

    python tests/jumping.py worker --redis ...
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path
from typing import Final

DAY_NS: Final = 86_400 * 1_000_000_000
JUMPS_DAYS: Final = (0, 0, 1, -1, 40, -40, 365, -365)


def main() -> int:
    """Let the clock jump from now on, and run the command."""
    right, rng = time.time_ns, random.Random(7)

    def wrong() -> int:
        return right() + rng.choice(JUMPS_DAYS) * DAY_NS

    time.time_ns = wrong
    time.time = lambda: wrong() / 1e9
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from accrual.cli import main as accrual

    return accrual()


if __name__ == "__main__":
    sys.exit(main())
