"""``accrual archive``: keep what came in, outside of the stream server; and get it back."""

from __future__ import annotations

import argparse
import asyncio
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

import redis

from accrual.blobs import open_store
from accrual.cli.arguments import (
    Commands,
    add_command,
    add_settings,
    log_to_stderr,
    settings_of,
    until_told_to_stop,
    write_lines,
)
from accrual.errors import ArchiveError, UsageError
from accrual.settings import Settings
from accrual.stream import (
    START,
    Archived,
    Keys,
    StreamId,
    StreamServer,
    archive_standing,
    parse_stream_id,
    stream_id_text,
)
from accrual.worker.trouble import Trouble

if TYPE_CHECKING:
    from accrual.archive import Archive

__all__ = ["add"]

LAST_SEQ: Final = (1 << 64) - 1


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "archive",
        "archive the input of a partition, print a stretch of it as JSON lines, verify it, or decide it again",
        "accrual archive --redis redis://localhost:6379 --partition city-1 --archive s3://bucket/archive\n"
        "  accrual archive export --partition city-1 --archive s3://bucket/archive --from 1794715200000 > some.jsonl\n"
        "  accrual archive verify --partition city-1 --archive s3://bucket/archive\n"
        "  accrual archive replay --redis redis://localhost:6379 --partition city-1 --archive s3://bucket/archive",
        _run,
    )
    parser.add_argument(
        "action",
        nargs="?",
        choices=("follow", "export", "verify", "replay", "expire"),
        default="follow",
        help="follow the stream (default), export archived events, verify all segments, decide all again and compare "
        "it with the committed ledger, or delete what is older than the retention",
    )
    add_settings(
        parser,
        *("redis", "partition", "archive", "archive_key_file", "archive_retention_days", "archive_segment_bytes"),
        *("archive_interval_s", "engine", "snapshots", "snapshot_store", "backoff_limit_ms", "log_level"),
    )
    parser.add_argument(
        "--drain", action="store_true", help="follow up to the end of the stream as it is at the start, then exit"
    )
    parser.add_argument(
        "--late", action="store_true", help="let an archive begin although some of the stream has been trimmed"
    )
    parser.add_argument("--from", dest="first", metavar="ID", help="export from this entry on; default: all")
    parser.add_argument("--to", dest="last", metavar="ID", help="export up to and with this entry; default: all")


def _run(parsed: argparse.Namespace) -> int:
    wanted = ("redis",) if parsed.action in ("follow", "replay") else ()
    settings = settings_of(parsed, *wanted, "partition", "archive")
    log_to_stderr(settings.log_level)
    _check_flags(parsed)
    archive = _open(settings)
    if parsed.action == "export":
        return _export(archive, parsed)
    if parsed.action == "verify":
        return _verify(archive, settings)
    if parsed.action == "expire":
        return _expire(archive, settings)
    if parsed.action == "replay":
        return _replay(archive, settings)
    return _follow(archive, settings, drain=parsed.drain, late=parsed.late)


def _check_flags(parsed: argparse.Namespace) -> None:
    of_follow, of_export = parsed.drain or parsed.late, parsed.first or parsed.last
    if parsed.action != "follow" and of_follow:
        raise UsageError("--drain and --late are for following the stream")
    if parsed.action != "export" and of_export:
        raise UsageError("--from and --to are for export")


def _open(settings: Settings) -> Archive:
    store = open_store(settings.archive)
    try:
        from accrual.archive import Archive, ArchiveKeys
    except ImportError as error:
        raise UsageError(f"an archive needs the extra archive: pip install 'accrual[archive]' ({error})") from error
    return Archive(store, settings.partition, ArchiveKeys.of(settings))


def _follow(archive: Archive, settings: Settings, *, drain: bool, late: bool) -> int:
    from accrual.archive import Archiver

    trouble = Trouble("archive", settings.backoff_limit_ms)
    with StreamServer(settings.redis).client() as client, until_told_to_stop() as stopping:
        archiver = Archiver(client, archive, settings, late=late)
        while not stopping.is_set():
            try:
                archiver.run(stopping, drain=drain, worked=trouble.over)
            except (OSError, redis.RedisError) as error:
                if drain:
                    raise
                stopping.wait(trouble.pause_s(error))
            else:
                break
    return 0


def _export(archive: Archive, parsed: argparse.Namespace) -> int:
    from accrual.archive import exported_lines

    first = _stream_id("--from", parsed.first)
    after = archive.beginning() if first is None else _before(first)
    write_lines(exported_lines(archive.stretch(after, _stream_id("--to", parsed.last))))
    return 0


def _verify(archive: Archive, settings: Settings) -> int:
    """Read everything; also compare the end with what the server knows of it, if the server is given."""
    noted = None
    if settings.redis:
        with StreamServer(settings.redis).client() as client:
            noted = archive_standing(client, Keys(settings.partition))
    numbers = archive.numbers()
    entries, standing = 0, Archived()
    for segment in archive.segments(numbers):
        entries += sum(1 for _ in archive.entries(segment))
        standing = segment.standing
        if noted is not None and noted.segments == standing.segments and noted != standing:
            raise ArchiveError(f"{segment.name}: is not the one that was archived")
    if noted is not None and noted.segments > standing.segments:
        raise ArchiveError(
            f"{archive.place}: ends with segment {standing.segments}, and {noted.segments} were archived"
        )
    if not numbers and not settings.redis:
        raise ArchiveError(f"{archive.place}: there is no segment of {settings.partition} to verify")
    found = f"{numbers[0]} to {numbers[-1]}" if numbers else "none"
    print(f"segments: {found}; entries: {entries}, up to {stream_id_text(standing.position)}")
    return 0


def _expire(archive: Archive, settings: Settings) -> int:
    """Delete what is older than the retention; by the server's clock too, if the server is given."""
    from accrual.archive import delete_expired

    if not settings.archive_retention_days:
        raise UsageError("archive_retention_days: missing; give the age in days at which archived input is deleted")
    with ExitStack() as stack:
        client = stack.enter_context(StreamServer(settings.redis).client()) if settings.redis else None
        print(f"segments deleted: {delete_expired(archive, settings, client)}")
    return 0


def _replay(archive: Archive, settings: Settings) -> int:
    """Decide everything again, and compare each batch with the committed one."""
    if settings.engine == "reference" and settings.snapshots:
        raise UsageError("snapshots are of the compiled engine: the reference decides from the beginning")
    from accrual.worker.archived import replay_archive

    done = asyncio.run(replay_archive(archive, settings))
    print(f"batches {done.first} to {done.last} of {done.committed}: {done.events} events, decided as committed")
    return 0


def _stream_id(flag: str, text: str | None) -> StreamId | None:
    if text is None:
        return None
    try:
        return parse_stream_id(text if "-" in text else f"{text}-{0 if flag == '--from' else LAST_SEQ}")
    except ValueError:
        raise UsageError(f"{flag}: {text!r} is not the ID of a stream entry, such as 1794715200000-0") from None


def _before(stream_id: StreamId) -> StreamId:
    """Return the ID right before ``stream_id``."""
    ms, seq = stream_id
    if seq:
        return ms, seq - 1
    return (ms - 1, LAST_SEQ) if ms else START
