"""Trouble that passes: what may be tried again, how soon, and saying it once rather than at every attempt."""

from __future__ import annotations

import logging
from typing import Final

import redis

from accrual.stream import Refused

__all__ = ["REFUSALS_THAT_PASS", "Trouble", "error_code"]

log = logging.getLogger("accrual.worker")

FIRST_PAUSE_S: Final = 0.02

# What a server says while it is full, cannot save, is starting, is short of replicas or busy with another script.
REFUSALS_THAT_PASS: Final = frozenset(
    {"OOM", "MISCONF", "LOADING", "NOREPLICAS", "BUSY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "READONLY", "NOSCRIPT"}
)

# In redis-py the first two are connection errors, but no further attempt changes them.
LASTING: Final = (
    redis.exceptions.AuthenticationError,
    redis.exceptions.AuthorizationError,
    redis.exceptions.NoPermissionError,
)

_CLASS_CODES: Final[dict[type[redis.RedisError], str]] = {
    redis.BusyLoadingError: "LOADING",
    redis.exceptions.OutOfMemoryError: "OOM",
    redis.ReadOnlyError: "READONLY",
    redis.exceptions.MasterDownError: "MASTERDOWN",
}


def error_code(error: Exception) -> str:
    """Return the first word of a server's refusal, which redis-py takes off the errors that it knows."""
    if isinstance(error, Refused):
        return error.code
    return next((code for kind, code in _CLASS_CODES.items() if isinstance(error, kind)), str(error).partition(" ")[0])


def may_pass(error: Exception) -> bool:
    """Tell whether trying again may help: the server is away, or refuses for now."""
    if isinstance(error, LASTING):
        return False
    if isinstance(error, OSError | redis.ConnectionError | redis.TimeoutError):
        return True
    return isinstance(error, Refused | redis.ResponseError) and error_code(error) in REFUSALS_THAT_PASS


class Trouble:
    """One kind of trouble: logged when it starts and when it is over, with growing pauses between attempts.

    ``doing`` says what is being attempted, for people; ``limit_ms`` is the longest pause.
    """

    def __init__(self, doing: str, limit_ms: int) -> None:
        self.doing = doing
        self.limit_s = limit_ms / 1000
        self.attempts = 0

    def pause_s(self, error: Exception) -> float:
        """Take note of a failed attempt and return how long to wait before the next one, in seconds.

        Raises ``error`` itself where no further attempt would help.
        """
        if not may_pass(error):
            raise error
        if self.attempts == 0:
            reason = " ".join(str(error).split()) or type(error).__name__
            log.warning("%s: %s; trying again", self.doing, reason)
        pause_s: float = min(self.limit_s, FIRST_PAUSE_S * 2.0 ** min(self.attempts, 16))
        self.attempts += 1
        return pause_s

    def over(self) -> None:
        """Take note that it works."""
        if self.attempts:
            log.info("%s: works again after %d attempts", self.doing, self.attempts)
        self.attempts = 0
