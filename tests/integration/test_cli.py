"""The commands as users meet them: what they print, where, and with which exit status."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from accrual import cli
from accrual.cli.arguments import log_to_stderr
from servers import Server
from workers import (
    NOON_MS,
    ROOT,
    RULEBOOK,
    WorkerProcess,
    checkpoint_of,
    command,
    environment,
    expected,
    fill,
    orders,
    stream_entries,
    wait_until,
)

COMMANDS = ["check", "replay", "worker", "ledger", "deadletters", "rulebook", "rulebook activate", "rulebook show"]


@pytest.fixture
def rulebook(tmp_path: Path) -> Path:
    path = tmp_path / "rulebook.toml"
    path.write_text(RULEBOOK, encoding="utf-8")
    return path


def run(*arguments: str | Path) -> int:
    """Run a command in this process and return its status, as the shell would see it."""
    try:
        return cli.main([*map(str, arguments)])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else -1


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(*name.split(), "--help") == 0
    out = capfd.readouterr().out
    assert f"example:\n  accrual {name}" in out


def test_help_lists_the_commands_and_there_is_a_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    out = capfd.readouterr().out
    assert all(name.split()[0] in out for name in COMMANDS)
    assert run("--version") == 0
    assert capfd.readouterr().out.startswith("accrual ")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["check"],
        ["worker"],
        ["worker", "--redis", "redis://localhost", "--partition", "p"],
        ["worker", "--redis", "redis://localhost", "--partition", "p", "--rulebook", "r", "--block-ms", "x"],
        ["worker", "--engine", "slow"],
        ["ledger", "--partition", "p"],
        ["ledger", "--redis", "localhost:6379", "--partition", "p"],
        ["ledger", "--redis", "sentinel://localhost", "--partition", "p"],
        ["ledger", "--redis", "redis://localhost", "--partition", "a b"],
        ["ledger", "--redis", "redis://localhost", "--partition", "p", "--config", "missing.toml"],
        ["deadletters", "--redis", "redis://localhost", "--partition", "p", "--reason", "bored"],
        ["deadletters", "--redis", "redis://localhost", "--partition", "p", "--limit", "0"],
        ["deadletters", "--redis", "redis://localhost", "--partition", "p", "--execute"],
        ["statement", "--database", "dbname=book", "--member", "m1", "--limit", "-1"],
        ["liability", "--from", "2026-11-01", "--to", "2026-11-30", "--breakage", "nan"],
        ["audit", "--workers", "0"],
        ["audit", "--propose", "findings.jsonl", "--database", "dbname=book", "--by", " "],
        ["demo", "--scale", "0"],
        ["rulebook"],
        ["rulebook", "activate", "rulebook.toml", "--timeout", "nan"],
        ["replay"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_status_2_and_says_why_on_stderr(
    arguments: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ACCRUAL_REDIS", "ACCRUAL_PARTITION", "ACCRUAL_RULEBOOK", "ACCRUAL_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    assert run(*arguments) == 2
    output = capfd.readouterr()
    assert output.out == ""
    assert "accrual" in output.err
    assert "Traceback" not in output.err


def test_a_good_rulebook_is_summed_up(rulebook: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("check", rulebook) == 0
    output = capfd.readouterr()
    assert output.out == f"{rulebook}: test version 1 (Asia/Shanghai): 2 earning rules, 1 campaign, 2 limits\n"
    assert output.err == ""


def test_what_a_rulebook_hardly_means_is_a_warning(rulebook: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rulebook.write_text(f'{RULEBOOK}kinds = ["chekin"]\n', encoding="utf-8")
    assert run("check", rulebook) == 0
    output = capfd.readouterr()
    assert output.out.endswith(": 2 earning rules, 1 campaign, 2 limits\n")
    start = f"accrual check: warning: {rulebook}:{RULEBOOK.count(chr(10)) + 1}: limit[2].kinds: "
    assert output.err.startswith(start)
    assert output.err.count("\n") == 1
    assert "'chekin'" in output.err


def test_the_findings_of_a_check_are_its_output(rulebook: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rulebook.write_text(RULEBOOK.replace("max = 5\n", "max = -5\nsurprise = 1\n"), encoding="utf-8")
    assert run("check", rulebook) == 1
    output = capfd.readouterr()
    line = RULEBOOK.splitlines().index('id = "device-burst"') + 1
    assert [finding.split(": ")[:2] for finding in output.out.splitlines()] == [
        [f"{rulebook}:{line + 4}", "limit[1].max"],
        [f"{rulebook}:{line + 5}", "limit[1].surprise"],
    ]
    assert output.err == ""


@pytest.mark.parametrize("arguments", [["check", "missing.toml"], ["worker", "--rulebook", "missing.toml"]])
def test_a_missing_file_is_named_in_one_line(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    more = ["--redis", "redis://localhost:1", "--partition", "p"] if arguments[0] == "worker" else []
    assert run(*arguments, *more) == 1
    assert capfd.readouterr().err == f"accrual {arguments[0]}: missing.toml: No such file or directory\n"


def test_a_broken_rulebook_keeps_a_worker_from_starting(rulebook: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rulebook.write_text("version = 1\n", encoding="utf-8")
    assert run("worker", "--rulebook", rulebook, "--redis", "redis://localhost:1", "--partition", "p") == 1
    output = capfd.readouterr()
    assert output.out == ""
    assert str(rulebook) in output.err


def test_replay_prints_the_outcomes_of_a_vector(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    scenario = ROOT / "tests" / "vectors" / "scenarios" / "points-caps"
    for engine in ("fast", "reference"):
        assert (
            run("replay", "--rulebook", scenario / "rulebook.toml", "--engine", engine, scenario / "events.jsonl") == 0
        )
        assert capfdbinary.readouterr().out == (scenario / "outcomes.jsonl").read_bytes()


def test_a_server_that_is_not_there_is_told_in_one_line() -> None:
    for name in ("ledger", "deadletters"):
        done = command(name, "--redis", "redis://127.0.0.1:1", "--partition", "p")
        assert done.returncode == 1
        assert done.stdout == b""
        assert done.stderr.count(b"\n") == 1
        assert b"127.0.0.1:1" in done.stderr


def test_a_wrong_password_is_told_in_one_line_without_it(server: Server) -> None:
    server.client().execute_command("ACL", "SETUSER", "worker", "on", ">right", "~*", "+@all")
    url = f"redis://worker:wrong@127.0.0.1:{server.port}"
    try:
        done = command("ledger", "--redis", url, "--partition", "p")
    finally:
        server.client().execute_command("ACL", "DELUSER", "worker")
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1
    assert b"wrong" not in done.stderr.replace(b"WRONGPASS", b"")


def test_settings_come_from_variables_and_a_file(server: Server, rulebook: Path, tmp_path: Path) -> None:
    fill(server.client(), "p", orders(1, 30))
    config = tmp_path / "accrual.toml"
    config.write_text(f'redis = "{server.url}"\nrulebook = "{rulebook}"\nbatch_entries = 10\n', encoding="utf-8")
    variables = {"ACCRUAL_CONFIG": str(config), "ACCRUAL_PARTITION": "p"}
    done = command("worker", "--drain", variables=variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout == b""
    assert checkpoint_of(server.client(), "p").batch == 4
    printed = command("ledger", variables=variables)
    assert [json.loads(line)["seq"] for line in printed.stdout.splitlines()] == list(range(1, 30))


def test_an_empty_partition_prints_nothing(server: Server) -> None:
    for name in ("ledger", "deadletters"):
        done = command(name, "--redis", server.url, "--partition", "nobody")
        assert (done.returncode, done.stdout) == (0, b"")
    done = command("rulebook", "show", "--redis", server.url, "--partition", "nobody")
    assert done.returncode == 1


def test_whoever_reads_the_output_may_go_early(valkey: Server, rulebook: Path) -> None:
    fill(valkey.client(), "p", orders(1, 3000))
    with WorkerProcess(valkey.url, "p", rulebook, "--drain") as worker:
        assert worker.wait() == 0, worker.log
    with subprocess.Popen(
        [sys.executable, "-m", "accrual.cli", "ledger", "--redis", valkey.url, "--partition", "p"],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["seq"] == 1
        process.stdout.close()
        assert process.wait(20) == 0
        assert process.stderr.read() == b""


def test_a_damaged_ledger_is_printed_up_to_the_damage(valkey: Server, rulebook: Path) -> None:
    fill(valkey.client(), "p", orders(1, 30))
    with WorkerProcess(valkey.url, "p", rulebook, "--drain", "--batch-entries", "10") as worker:
        assert worker.wait() == 0, worker.log
    valkey.client().xdel("accrual:{p}:ledger", "3-0")
    done = command("ledger", "--redis", valkey.url, "--partition", "p")
    assert done.returncode == 1
    assert done.stdout.count(b"\n") == 10
    assert b"batch" in done.stderr


def without_core(directory: Path, *arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
    """Run a command that finds no compiled core."""
    package = directory / "fastpath"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('not built')\n")
    program = f"import sys; sys.path.append({str(ROOT)!r}); from accrual.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=environment(PYTHONPATH=str(directory), PYTHONSAFEPATH="1"),
        capture_output=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    "arguments", [("worker", "--redis", "redis://127.0.0.1:1", "--partition", "p"), ("replay", "events.jsonl")]
)
def test_without_its_compiled_core_a_command_refuses_to_start(
    arguments: tuple[str, ...], rulebook: Path, tmp_path: Path
) -> None:
    done = without_core(tmp_path, *arguments, "--rulebook", rulebook)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode() == (
        f"accrual {arguments[0]}: the compiled core cannot be loaded (not built): build it with `make build`, "
        "or choose the plain engine by name, --engine reference\n"
    )


def test_the_plain_engine_needs_no_compiled_core(tmp_path: Path) -> None:
    scenario = ROOT / "tests" / "vectors" / "scenarios" / "points-caps"
    rules, events = scenario / "rulebook.toml", scenario / "events.jsonl"
    done = without_core(tmp_path, "replay", "--engine", "reference", "--rulebook", rules, events)
    assert (done.returncode, done.stdout) == (0, (scenario / "outcomes.jsonl").read_bytes()), done.stderr


def test_the_drain_says_what_it_did(valkey: Server, rulebook: Path) -> None:
    fill(valkey.client(), "p", [*orders(1, 30), (f"{NOON_MS + 31}-0", {"e": b"\xc1"})])
    with WorkerProcess(valkey.url, "p", rulebook, "--drain") as worker:
        assert worker.wait() == 0
    total = worker.log.splitlines()[-1]
    assert "total events=30" in total
    assert "dead_letter=1" in total


def stopped_while_importing(directory: Path, number: signal.Signals, *arguments: str | Path) -> tuple[int, bytes]:
    """Send ``number`` to a command that is still importing, and return its exit status and what it said."""
    reached = directory / "reached"
    (directory / "redis.py").write_text(f"open({str(reached)!r}, 'x').close()\nimport time\ntime.sleep(60)\n")
    with subprocess.Popen(
        [sys.executable, "-m", "accrual.cli", *map(str, arguments)],
        cwd=ROOT,
        env=environment(PYTHONPATH=os.pathsep.join([str(directory), str(ROOT)]), PYTHONSAFEPATH="1"),
        stderr=subprocess.PIPE,
    ) as process:
        try:
            wait_until(reached.exists, "the command imports redis")
            process.send_signal(number)
            _, errors = process.communicate(timeout=20)
        finally:
            process.kill()
    return process.returncode, errors


@pytest.mark.parametrize("words", [("book", "rebuild"), ("archive", "replay"), ("archive", "expire")])
def test_an_errand_of_a_service_that_is_stopped_has_not_done_its_work(words: tuple[str, ...], tmp_path: Path) -> None:
    assert stopped_while_importing(tmp_path, signal.SIGTERM, *words) == (-signal.SIGTERM, b"")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_that_is_stopped_before_it_has_begun_is_done(number: signal.Signals, tmp_path: Path) -> None:
    assert stopped_while_importing(tmp_path, number, "worker") == (0, b"")


def test_another_command_that_is_stopped_has_not_done_its_work(tmp_path: Path) -> None:
    (tmp_path / "terminated").mkdir()
    assert stopped_while_importing(tmp_path / "terminated", signal.SIGTERM, "ledger") == (-signal.SIGTERM, b"")
    (tmp_path / "interrupted").mkdir()
    assert stopped_while_importing(tmp_path / "interrupted", signal.SIGINT, "ledger") == (130, b"")


def catches(process_id: int, number: signal.Signals) -> bool:
    """Tell whether a process has a handler of its own for a signal."""
    status = Path(f"/proc/{process_id}/status").read_text()
    return bool(int(status.split("SigCgt:")[1].split()[0], 16) >> (number - 1) & 1)


def test_a_worker_may_be_stopped_at_any_moment_of_its_start(valkey: Server, rulebook: Path) -> None:
    fill(valkey.client(), "p", orders(1, 100))
    for delay_s in (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4):
        with WorkerProcess(valkey.url, "p", rulebook) as worker:
            wait_until(lambda: catches(worker.process.pid, signal.SIGTERM), "the program has begun")
            time.sleep(delay_s)
            assert worker.finish() == 0, (delay_s, worker.log)
        # A second signal may cut it short, and must do no harm.
        with WorkerProcess(valkey.url, "p", rulebook) as worker:
            wait_until(lambda: catches(worker.process.pid, signal.SIGTERM), "the program has begun")
            time.sleep(delay_s)
            worker.signal(signal.SIGTERM)
            assert worker.finish() in {0, 1, -signal.SIGTERM}, (delay_s, worker.log)
    with WorkerProcess(valkey.url, "p", rulebook, "--drain") as worker:
        assert worker.wait() == 0, worker.log
    printed = command("ledger", "--redis", valkey.url, "--partition", "p")
    assert printed.stdout == expected(stream_entries(valkey.client(), "p")).ledger


def test_logs_go_to_what_stderr_is_at_the_moment(capsys: pytest.CaptureFixture[str]) -> None:
    log_to_stderr("info")
    with contextlib.redirect_stderr(io.StringIO()) as closed:
        logging.getLogger("accrual.test").info("first")
        assert closed.getvalue().endswith("INFO first\n")
    closed.close()
    logging.getLogger("accrual.test").info("second")
    assert capsys.readouterr().err.endswith("INFO second\n")
