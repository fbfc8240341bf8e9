"""Settings, from flags, then ``ACCRUAL_*`` variables, then one TOML file: one table, documented where it is defined.

A setting ``batch_entries`` is the flag ``--batch-entries``, the variable ``ACCRUAL_BATCH_ENTRIES`` and the key
``batch_entries`` of the file. The file is named by ``--config`` or ``ACCRUAL_CONFIG``; a key that it should not have is
an error. Every value is checked wherever it comes from, and a fault names its origin.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from accrual.errors import UsageError

__all__ = ["PREFIX", "Setting", "Settings", "all_settings", "load_settings"]

PREFIX: Final = "ACCRUAL_"
CONFIG: Final = "ACCRUAL_CONFIG"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """All settings. The last word of a name is its unit; ``1 MiB`` is ``1048576``."""

    redis: Annotated[
        str,
        Meta(
            description="URL of the stream server: redis://, rediss:// (TLS), unix:// or sentinel://",
            extra={"metavar": "URL"},
        ),
    ] = ""
    partition: Annotated[
        str,
        Meta(
            description="name of the partition, the P in accrual:{P}:events; for the book and its audit several, a,b,c",
            extra={"metavar": "P"},
        ),
    ] = ""
    rulebook: Annotated[str, Meta(description="file with the rulebook", extra={"metavar": "FILE"})] = ""
    engine: Annotated[
        Literal["fast", "reference"],
        Meta(description="the compiled engine, or the plain one that it is checked against"),
    ] = "fast"
    secret: Annotated[
        str,
        Meta(
            pattern="^([0-9a-fA-F]{32})?$",
            description="32 hex digits: the key of the fingerprints; without it a partition makes its own at its start",
            extra={"flag": False},
        ),
    ] = ""
    batch_entries: Annotated[int, Meta(ge=1, le=1 << 17, description="most stream entries in one ledger batch")] = 8192
    batch_events: Annotated[
        int,
        Meta(
            ge=1, le=1 << 22, description="events in one ledger batch at which the worker reads fewer entries at once"
        ),
    ] = 16384
    in_flight_batches: Annotated[
        int, Meta(ge=1, le=64, description="most batches sent to the server and not yet answered")
    ] = 4
    in_flight_bytes: Annotated[
        int, Meta(ge=1 << 16, le=1 << 32, description="bytes in flight above which no further batch is decided")
    ] = 64 << 20
    block_ms: Annotated[
        int, Meta(ge=1, le=60_000, description="how long the server holds a read that finds nothing")
    ] = 1000
    linger_ms: Annotated[
        int, Meta(ge=0, le=10_000, description="pause after a batch that was not full, so that the next has company")
    ] = 5
    lease_ms: Annotated[int, Meta(ge=100, le=600_000, description="how long a silent worker keeps its partition")] = (
        2000
    )
    wait: Annotated[
        bool, Meta(description="stand by while another worker has the partition, rather than exit with status 1")
    ] = True
    reply_timeout_ms: Annotated[
        int,
        Meta(
            ge=100,
            le=600_000,
            description="how long the server may be silent where it owes an answer, before another connection is tried",
        ),
    ] = 10_000
    stop_timeout_ms: Annotated[
        int, Meta(ge=0, le=600_000, description="how long a stopping worker waits for its last batches to land")
    ] = 10_000
    backoff_limit_ms: Annotated[
        int, Meta(ge=10, le=600_000, description="longest pause between attempts while the server refuses or is away")
    ] = 2000
    snapshots: Annotated[
        str,
        Meta(
            description="directory for snapshots of the state, from which a restart goes on; without it there are none",
            extra={"metavar": "DIRECTORY"},
        ),
    ] = ""
    snapshot_interval_s: Annotated[int, Meta(ge=0, le=86_400, description="time between two snapshots")] = 300
    snapshot_rate_bytes: Annotated[
        int,
        Meta(
            ge=0,
            le=1 << 40,
            description="how much of a snapshot is written a second, so that events hardly notice; 0: no limit",
        ),
    ] = 128 << 20
    snapshots_kept: Annotated[int, Meta(ge=1, le=1000, description="how many snapshots are kept")] = 3
    trim_input: Annotated[
        bool, Meta(description="remove events that come before the oldest of the kept snapshots from the stream")
    ] = False
    snapshot_store: Annotated[
        str,
        Meta(
            description="where each snapshot is copied to, and fetched from by a worker that has none: "
            "a directory, file:// or s3://",
            extra={"metavar": "URL"},
        ),
    ] = ""
    archive: Annotated[
        str,
        Meta(
            description="where the input is archived, and without which it is not trimmed: a directory, file:// or "
            "s3://",
            extra={"metavar": "URL"},
        ),
    ] = ""
    archive_key: Annotated[
        str,
        Meta(
            pattern="^([0-9a-fA-F]{64})?$",
            description="64 hex digits: the key that the archive is encrypted with; without one it is not",
            extra={"flag": False},
        ),
    ] = ""
    archive_key_file: Annotated[
        str,
        Meta(
            description="file with keys of the archive, 64 hex digits a line; the first encrypts, all decrypt",
            extra={"metavar": "FILE"},
        ),
    ] = ""
    archive_retention_days: Annotated[
        int, Meta(ge=0, le=36_525, description="age at which archived input is deleted; 0: never")
    ] = 0
    archive_segment_bytes: Annotated[
        int, Meta(ge=1 << 10, le=1 << 28, description="size of the entries, uncompressed, at which a segment is full")
    ] = 16 << 20
    archive_interval_s: Annotated[
        int, Meta(ge=0, le=86_400, description="longest time that a segment waits to become full")
    ] = 60
    memory_limit_bytes: Annotated[
        int,
        Meta(ge=0, le=1 << 50, description="memory of the state at which the worker takes no more input; 0: no limit"),
    ] = 0
    database: Annotated[
        str,
        Meta(description="URL of the book's PostgreSQL database, 15 or newer", extra={"metavar": "URL"}),
    ] = ""
    require_durable: Annotated[
        bool, Meta(description="book nothing from a stream server that could lose what it has, rather than warn")
    ] = False
    refund_wait_hours: Annotated[
        int, Meta(ge=0, le=87_600, description="how long a refund waits for its order before a person is asked")
    ] = 168
    adjust_approval_points: Annotated[
        int,
        Meta(
            ge=0,
            le=1 << 62,
            description="adjustments of more points than this wait for a second person even below the book's own limit",
        ),
    ] = 1 << 62
    slow_interval_s: Annotated[
        int, Meta(ge=1, le=86_400, description="how often `accrual jobs` looks for refunds and late events")
    ] = 1
    settle_interval_s: Annotated[
        int, Meta(ge=1, le=86_400, description="how often it looks for days to be settled, or settled again")
    ] = 60
    remind_interval_s: Annotated[
        int, Meta(ge=1, le=86_400, description="how often it looks for lots to be reminded of")
    ] = 3600
    expire_interval_s: Annotated[
        int, Meta(ge=1, le=86_400, description="how often it looks for lots that have expired")
    ] = 600
    outbox_interval_s: Annotated[
        int, Meta(ge=1, le=86_400, description="how often it looks for messages to be sent")
    ] = 1
    progress: Annotated[
        bool | None, Meta(description="a line of progress per second on stderr; by default only on a terminal")
    ] = None
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="what is worth a line on stderr")
    ] = "info"

    def require(self, *names: str) -> None:
        """Check that the settings ``names`` are given. Raises ``UsageError`` naming the first that is not."""
        for name in names:
            if getattr(self, name) in ("", None):
                flag = name.replace("_", "-")
                raise UsageError(f"{name}: missing; give --{flag}, {PREFIX}{name.upper()}, or {name} in the file")


class Setting(msgspec.Struct, frozen=True):
    """One row of the table: the name, the type that values are checked against, the default, and words for people."""

    name: str
    type: Any
    default: Any
    description: str
    metavar: str | None
    choices: tuple[str, ...]
    has_flag: bool
    is_switch: bool

    @property
    def variable(self) -> str:
        """The environment variable of this setting."""
        return PREFIX + self.name.upper()

    def check(self, value: object, origin: str) -> Any:
        """Return ``value`` as its type. Raises ``UsageError`` naming ``origin``; text may stand for a number."""
        try:
            return msgspec.convert(value, self.type, strict=not isinstance(value, str))
        except msgspec.ValidationError as error:
            if not self.has_flag:
                # What must not be on a command line, where everybody can read it, must not be in a message either.
                raise UsageError(f"{origin}: is not {self.description}") from None
            wanted = str(error).replace("`", "").partition(" - at")[0]
            raise UsageError(f"{origin}: {value!r} will not do: {wanted[0].lower()}{wanted[1:]}") from None


def all_settings() -> dict[str, Setting]:
    """Return the table, by name."""
    hints = get_type_hints(Settings, include_extras=True)
    return {field.name: _setting(field, hints[field.name]) for field in msgspec.structs.fields(Settings)}


def load_settings(flags: Mapping[str, Any], environment: Mapping[str, str]) -> Settings:
    """Return the settings from ``flags`` (``None`` where a flag was not given), the environment and the file.

    ``flags`` may have ``config``, the path of the file. Raises ``UsageError`` naming the origin of what is wrong.
    """
    table = all_settings()
    path = flags.get("config") or environment.get(CONFIG)
    values = _from_file(path, table) if path else {}
    for name, setting in table.items():
        if setting.variable in environment:
            values[name] = setting.check(environment[setting.variable], setting.variable)
        if flags.get(name) is not None:
            values[name] = setting.check(flags[name], f"--{name.replace('_', '-')}")
    return Settings(**values)


def _from_file(path: str, table: Mapping[str, Setting]) -> dict[str, Any]:
    try:
        document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{path}: {reason}") from None
    _refuse_unknown(path, document, table)
    return {name: table[name].check(value, f"{path}: {name}") for name, value in document.items()}


def _refuse_unknown(path: str, names: Iterable[str], table: Mapping[str, Setting]) -> None:
    unknown = [name for name in names if name not in table]
    if unknown:
        raise UsageError(f"{path}: {unknown[0]}: there is no such setting")


def _setting(field: msgspec.structs.FieldInfo, annotated: Any) -> Setting:
    plain, meta = get_args(annotated)
    extra = meta.extra or {}
    return Setting(
        name=field.name,
        type=annotated,
        default=field.default,
        description=meta.description,
        metavar=extra.get("metavar"),
        choices=get_args(plain) if get_origin(plain) is Literal else (),
        has_flag=extra.get("flag", True),
        is_switch=bool in (plain, *get_args(plain)),
    )
