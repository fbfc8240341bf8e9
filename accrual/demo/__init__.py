"""The demo's data: grocery baskets, the member day that is made of them, and the rulebook that decides it.

``baskets`` reads the compact file in ``data/``, ``memberday`` folds it onto one day and adds what it lacks,
and ``member-day.toml`` (``RULEBOOK``) says what the events of the day earn.
"""

from pathlib import Path
from typing import Final

from accrual.demo.baskets import Baskets
from accrual.demo.memberday import MemberDay, Truth, generate

__all__ = ["RULEBOOK", "Baskets", "MemberDay", "Truth", "generate"]

RULEBOOK: Final = Path(__file__).with_name("member-day.toml")
