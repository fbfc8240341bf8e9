"""The commands as users meet them: what they print, where, and with which exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from accrual import cli
from servers import Server
from workers import NOON_MS, ROOT, RULEBOOK, WorkerProcess, checkpoint_of, command, environment, fill, orders

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
        ["rulebook"],
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


def test_a_worker_without_its_compiled_core_refuses_to_start(rulebook: Path, tmp_path: Path) -> None:
    """Importing the core fails; there is no silent fallback, but the plain engine may be chosen by name."""
    package = tmp_path / "fastpath"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('not built')\n")
    variables = {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    arguments = ("worker", "--rulebook", rulebook, "--redis", "redis://127.0.0.1:1", "--partition", "p")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.append({str(ROOT)!r}); from accrual.cli import main; sys.exit(main())",
        ]
        + [str(argument) for argument in arguments],
        env=environment(**variables),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert b"the compiled core cannot be loaded (not built)" in done.stderr


def test_the_drain_says_what_it_did(valkey: Server, rulebook: Path) -> None:
    fill(valkey.client(), "p", [*orders(1, 30), (f"{NOON_MS + 31}-0", {"e": b"\xc1"})])
    with WorkerProcess(valkey.url, "p", rulebook, "--drain") as worker:
        assert worker.wait() == 0
    total = worker.log.splitlines()[-1]
    assert "total events=30" in total
    assert "dead_letter=1" in total
