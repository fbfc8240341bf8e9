"""``python -m accrual.cli`` is ``accrual``."""

import sys

from accrual.cli import main

if __name__ == "__main__":
    sys.exit(main())
