"""The commands. Each is a module with ``add``, which declares its flags, and a function that runs it.

Data goes to stdout; progress, logs and errors go to stderr. Exit status: 0 done, 1 the work found something wrong, 2
bad usage. An error is one line that says what was being done, and what is wrong with what.

This file is light, so that a signal is answered as it should be while ``commands`` is being imported.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, NoReturn

__all__ = ["BAD_USAGE", "DONE", "FOUND_SOMETHING_WRONG", "main"]

DONE: Final = 0
FOUND_SOMETHING_WRONG: Final = 1
BAD_USAGE: Final = 2
INTERRUPTED: Final = 130

# Commands that run until they are told to stop: for them to be told so is to be done.
SERVICES: Final = ("worker", "archive", "book", "slow", "jobs")

# What such a command can do as well, and then ends: to be stopped is not to be done.
ERRANDS: Final = ("export", "verify", "replay", "expire", "rebuild")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        with _stopped_before_the_start(words):
            from accrual.cli.commands import run

            return run(words)
    except KeyboardInterrupt:
        return INTERRUPTED


@contextmanager
def _stopped_before_the_start(words: Sequence[str]) -> Iterator[None]:
    """Let a service that is told to stop before it has begun end as it does later: with status 0.

    Once it has begun it answers signals in its own way.
    """
    if words[:1] and words[0] in SERVICES and not set(words[1:]).intersection(ERRANDS):
        before = {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGINT)}
    else:
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(_number: int, _frame: object) -> NoReturn:
    # Nothing has been done, so there is nothing to tidy up; an exception might end in the middle of an import.
    os._exit(DONE)
