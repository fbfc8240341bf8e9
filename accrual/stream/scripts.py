"""The server-side scripts: one hash slot, checks before writes."""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
from typing import Final

import msgspec

__all__ = [
    "ACQUIRE",
    "ARCHIVE",
    "ARCHIVED",
    "COMMIT",
    "HEARTBEAT",
    "OUTBOX",
    "REDRIVE",
    "REFUSE",
    "RELEASE",
    "TRIM",
    "Script",
]


class Script(msgspec.Struct, frozen=True, dict=True):
    """A script in the file ``name``.lua, with the functions of ``uses``.lua before it."""

    name: str
    uses: str = ""

    @functools.cached_property
    def text(self) -> str:
        """The whole script. Its first line names the engine and must stay the first."""
        text = _read(self.name)
        if not self.uses:
            return text
        first, _, rest = text.partition("\n")
        return f"{first}\n{_read(self.uses)}\n{rest}"

    @functools.cached_property
    def sha1(self) -> str:
        """The name by which the server knows the script once it is loaded."""
        return hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()


def _read(name: str) -> str:
    return importlib.resources.files("accrual.stream").joinpath(f"{name}.lua").read_text(encoding="utf-8")


ACQUIRE: Final = Script("acquire")
HEARTBEAT: Final = Script("heartbeat", "intact")
RELEASE: Final = Script("release")
COMMIT: Final = Script("commit", "intact")
REFUSE: Final = Script("refuse")
REDRIVE: Final = Script("redrive")
OUTBOX: Final = Script("outbox")
TRIM: Final = Script("trim", "intact")
ARCHIVE: Final = Script("archive", "intact")
ARCHIVED: Final = Script("archived")
