"""Unpack Debian's Redis server into a directory of its own, for the tests; nothing of the system is touched.

    python tools/fetch_redis.py [DIRECTORY]      # default: redis7/ in the running virtual environment

apt fetches the packages and checks their signatures, with lists and caches in a temporary directory: neither
root nor a filled package list is needed. ``DIRECTORY/bin`` then holds ``redis-server`` and ``redis-cli``, and
their libraries lie beside it. A second run does nothing. Exit 1, saying why, where apt cannot do it.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = ("redis-server", "redis-tools")
PROGRAMS = ("redis-server", "redis-cli")
OLDEST_VERSION = (7, 0)
WAY_OUT = "Or name a server that is already there: ACCRUAL_REDIS_SERVER=/path/to/redis-server make test"

# The hooks that a machine may have on `apt-get update` clean or fill its own caches: not ours to run.
APT_SETTINGS = """
Dir::State "{state}";
Dir::State::status "/var/lib/dpkg/status";
Dir::Cache "{cache}";
Debug::NoLocking "true";
APT::Sandbox::User "root";
APT::Get::Assume-Yes "true";
Acquire::Languages "none";
Acquire::Retries "3";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Post-Invoke;
"""

WRAPPER = """#!/bin/sh
LD_LIBRARY_PATH={libraries}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}} exec {program} "$@"
"""


class FetchError(Exception):
    """The server could not be had; the message says why."""


def run(*command: str) -> str:
    """Run ``command`` and return what it printed; raises ``FetchError`` with its complaints if it fails."""
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    if done.returncode != 0:
        raise FetchError(f"{shlex.join(command)} failed:\n{done.stdout}{done.stderr}".rstrip())
    return done.stdout


def download(workplace: Path) -> list[Path]:
    """Return the downloaded packages: Redis, and those of its libraries that this machine lacks."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise FetchError(f"there is no {tool} on this machine, so Debian's Redis cannot be fetched")
    state, cache = workplace / "state", workplace / "cache"
    (state / "lists" / "partial").mkdir(parents=True)
    (cache / "archives" / "partial").mkdir(parents=True)
    settings = workplace / "apt.conf"
    settings.write_text(APT_SETTINGS.format(state=state, cache=cache), encoding="utf-8")
    run("apt-get", "-c", str(settings), "-q", "update")
    # --reinstall downloads Redis even where it is installed; apt itself leaves out libraries that are here.
    options = ("--download-only", "--reinstall", "--no-install-recommends")
    run("apt-get", "-c", str(settings), "-q", "install", *options, *PACKAGES)
    return sorted((cache / "archives").glob("*.deb"))


def unpack(packages: list[Path], target: Path) -> None:
    """Unpack ``packages`` under ``target`` and write a wrapper for each program into ``target/bin``."""
    root = target / "root"
    for package in packages:
        run("dpkg-deb", "--extract", str(package), str(root))
    directories = sorted({str(library.parent) for library in root.rglob("*.so*")})
    (target / "bin").mkdir()
    for name in PROGRAMS:
        wrapper = target / "bin" / name
        program = shlex.quote(str(root / "usr" / "bin" / name))
        wrapper.write_text(
            WRAPPER.format(libraries=shlex.quote(":".join(directories)), program=program), encoding="utf-8"
        )
        wrapper.chmod(0o755)


def version(server: Path) -> tuple[int, int]:
    """Return the major and minor version that ``server`` says it is; ``FetchError`` if it does not run."""
    words = run(str(server), "--version").split()
    text = next((word for word in words if word.startswith("v=")), "v=0.0")
    major, minor = text.removeprefix("v=").split(".")[:2]
    return int(major), int(minor)


def fetch(target: Path) -> Path:
    """Return the server under ``target``, fetching it if it is not there yet."""
    server = target / "bin" / "redis-server"
    if server.exists():
        return server
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    try:
        with tempfile.TemporaryDirectory(prefix="fetch-redis-") as workplace:
            unpack(download(Path(workplace)), target)
        if version(server) < OLDEST_VERSION:
            raise FetchError(f"apt has only an older Redis here: {run(str(server), '--version')}")
    except BaseException:
        # A half-made directory would pass for a whole one on the next run.
        shutil.rmtree(target, ignore_errors=True)
        raise
    return server


def main() -> int:
    """Fetch the server and print what it is; the exit status is 1 if it cannot be had."""
    named = os.environ.get("ACCRUAL_REDIS_SERVER")
    try:
        if named:
            server = Path(named)
            if not server.is_file():
                raise FetchError(f"ACCRUAL_REDIS_SERVER names {server}, which is not a file")
        else:
            target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(sys.prefix) / "redis7"
            server = fetch(target.resolve())
        print(f"fetch_redis: {server}: {run(str(server), '--version').strip()}")
    except FetchError as error:
        print(f"fetch_redis: {error}\n{WAY_OUT}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
