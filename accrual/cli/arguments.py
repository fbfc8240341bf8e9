"""What the commands share: how a command is declared, settings as flags, output, logs."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TextIO, TypeAlias

import msgspec

from accrual.settings import Setting, Settings, all_settings, load_settings

__all__ = [
    "Commands",
    "Run",
    "add_command",
    "add_settings",
    "log_to_stderr",
    "positive",
    "settings_of",
    "until_told_to_stop",
    "write_json",
    "write_lines",
]

# argparse hands out this type, but under no public name.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001
Run: TypeAlias = Callable[[argparse.Namespace], int]

_encode = msgspec.json.Encoder(order="sorted").encode


def add_command(commands: Commands, name: str, what: str, example: str, run: Run) -> argparse.ArgumentParser:
    """Declare a command: ``what`` it does in a few words, an ``example``, and the function that runs it."""
    parser = commands.add_parser(
        name,
        help=what,
        description=what[0].upper() + what[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_settings(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add the flags of the settings ``names``, and the one that names the file of settings."""
    table = all_settings()
    for name in names:
        _add_flag(parser, table[name])
    parser.add_argument(
        "--config", metavar="FILE", help="TOML file of settings; flags and ACCRUAL_* variables override it"
    )


def settings_of(parsed: argparse.Namespace, *required: str) -> Settings:
    """Return the settings of a command line, its environment and its file; ``required`` ones must be given."""
    table = all_settings()
    names = [name for name in (*table, "config") if hasattr(parsed, name)]
    settings = load_settings({name: getattr(parsed, name) for name in names}, os.environ)
    settings.require(*required)
    return settings


def positive(text: str) -> int:
    """Return the number of a flag that counts something: 1 or more."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return number


def write_lines(lines: Iterable[bytes]) -> int:
    """Write lines to stdout as they come; return how many."""
    written = 0
    for line in lines:
        sys.stdout.buffer.write(line + b"\n")
        written += 1
    sys.stdout.buffer.flush()
    return written


def write_json(values: Iterable[Any]) -> int:
    """Write a line of JSON with sorted keys for each of ``values``; return how many."""
    return write_lines(map(_encode, values))


def log_to_stderr(level: str) -> None:
    """Send the logs of this process to stderr, a line each, with the time in UTC."""
    handler = _Stderr()
    formatter = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    log = logging.getLogger("accrual")
    log.handlers = [handler]
    log.setLevel(level.upper())


@contextmanager
def until_told_to_stop() -> Iterator[threading.Event]:
    """Give an event that SIGTERM and SIGINT set, for a service that looks at it between two pieces of work."""
    stopping = threading.Event()
    with ExitStack() as restored:
        for number in (signal.SIGTERM, signal.SIGINT):
            before = signal.signal(number, lambda *_: stopping.set())
            restored.callback(signal.signal, number, before)
        yield stopping


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what ``sys.stderr`` is at the moment: whoever replaces it may close it again, as tests do."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        self.stream = sys.stderr
        super().emit(record)


def _add_flag(parser: argparse.ArgumentParser, setting: Setting) -> None:
    flag = f"--{setting.name.replace('_', '-')}"
    shown = flag if setting.default is True else f"--no-{flag[2:]}" if setting.default is False else setting.default
    default = "" if shown in ("", None) else f"; default: {shown}"
    # Without a default of its own, a flag that is not given leaves room for the variable and the file.
    words = f"{setting.description}{default} [{setting.variable}]".replace("%", "%%")
    if setting.is_switch:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=words)
    elif setting.choices:
        parser.add_argument(flag, choices=setting.choices, help=words)
    else:
        parser.add_argument(flag, metavar=setting.metavar or "N", help=words)
