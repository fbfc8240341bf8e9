"""Rulebooks: earning rules, campaigns and limits (SPEC section 2), checked and ready to decide with.

Free of I/O but for ``load``, which reads the file. ``calendar`` has the local dates and times of the programme's zone.
"""

from accrual.rulebook.advice import advice
from accrual.rulebook.bounds import MAXIMUM_POINTS
from accrual.rulebook.calendar import Calendar, day_number, day_text
from accrual.rulebook.load import load, parse
from accrual.rulebook.model import Campaign, EarningRule, Limit, Rulebook, Window, combined_multiplier

__all__ = [
    "MAXIMUM_POINTS",
    "Calendar",
    "Campaign",
    "EarningRule",
    "Limit",
    "Rulebook",
    "Window",
    "advice",
    "combined_multiplier",
    "day_number",
    "day_text",
    "load",
    "parse",
]
