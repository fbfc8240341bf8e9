"""The stream server's side of a partition, in the order a worker meets it.

::

    server       where the server is, by URL: clients and data connections
    safety       whether it may be trusted
    keys         what belongs to a partition, in one hash slot
    ownership    the lease and the fence
    checkpoint   where the partition stands
    connections  stream entries in (replies), batches out (resp)
    commit       ledger, dead letters and checkpoint, together or not at all
    deadletters  what could not be decided, and the way back
    messages     what the book sends
    rulebooks    a new rulebook on its way to the worker
    archiving    how far the archive has come, and trimming behind it
    scripts      the Lua files that do it on the server
"""

from accrual.stream.archiving import (
    Archived,
    Trimmed,
    archive_standing,
    entries_after,
    note_segment,
    segments_noted,
    trim_events,
)
from accrual.stream.checkpoint import (
    NO_DIGEST,
    START,
    Checkpoint,
    StreamId,
    checkpoint_of,
    parse_stream_id,
    stream_id_text,
)
from accrual.stream.commit import Answer, Commit, lost_to
from accrual.stream.connections import CommandConnection, ReadConnection, Refused
from accrual.stream.deadletters import StoredLetter, last_letter, read_letters, redrive
from accrual.stream.keys import Keys, partition_names
from accrual.stream.messages import Message, send_messages, sent_position, stream_time_ms
from accrual.stream.ownership import Heartbeat, Held, Owned, Ownership, secret_check
from accrual.stream.replies import PlainReplyReader, Reader, open_reader
from accrual.stream.resp import command
from accrual.stream.rulebooks import Standing, offer, pending_text, refuse, standing
from accrual.stream.safety import check_eviction, check_server
from accrual.stream.scripts import COMMIT
from accrual.stream.server import StreamServer, without_password

__all__ = [
    "COMMIT",
    "NO_DIGEST",
    "START",
    "Answer",
    "Archived",
    "Checkpoint",
    "CommandConnection",
    "Commit",
    "Heartbeat",
    "Held",
    "Keys",
    "Message",
    "Owned",
    "Ownership",
    "PlainReplyReader",
    "ReadConnection",
    "Reader",
    "Refused",
    "Standing",
    "StoredLetter",
    "StreamId",
    "StreamServer",
    "Trimmed",
    "archive_standing",
    "check_eviction",
    "check_server",
    "checkpoint_of",
    "command",
    "entries_after",
    "last_letter",
    "lost_to",
    "note_segment",
    "offer",
    "open_reader",
    "parse_stream_id",
    "partition_names",
    "pending_text",
    "read_letters",
    "redrive",
    "refuse",
    "secret_check",
    "segments_noted",
    "send_messages",
    "sent_position",
    "standing",
    "stream_id_text",
    "stream_time_ms",
    "trim_events",
    "without_password",
]
