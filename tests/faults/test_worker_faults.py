"""What DESIGN promises of each fault. Runs are seeded; a failure prints the seed, and ACCRUAL_TEST_SEED repeats it."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from accrual.ledger import LedgerReader
from accrual.stream import COMMIT, Keys
from proxy import Proxy
from runs import check, check_like, drain, producing
from servers import Server, ServerFactory, ServerKind
from workers import (
    NOON_MS,
    WorkerProcess,
    checkpoint_of,
    command,
    fill,
    orders,
    wait_for_batch,
    wait_for_events,
    wait_until,
)

KEYS = Keys("p")


# --------------------------------------------------------------------------------------------- kill -9


def kill_repeatedly(server: Server, rulebook: Path, rng: random.Random, kills: int) -> None:
    """Kill workers at random moments while events come in, then compare with a run that nothing has disturbed."""
    client = server.client()
    landed = []
    # More than can be added in the time: the producer stops with the last kill.
    with producing(server, "p", 3000 * kills, 500, rng):
        for kill in range(kills):
            flags = (
                "--batch-entries",
                str(rng.choice([1, 7, 50, 8192])),
                "--in-flight-batches",
                str(rng.randrange(1, 9)),
            )
            with WorkerProcess(server.url, "p", rulebook, *flags, "--linger-ms", "1", lease_ms=100) as worker:
                before = checkpoint_of(client, "p").batch
                if kill % 4 == 3:
                    # Somewhere in its start, as likely as not.
                    time.sleep(rng.uniform(0.0, 1.0))
                else:
                    wait_for_batch(client, before)
                    time.sleep(rng.uniform(0.0, 0.3))
                worker.kill()
            landed.append(checkpoint_of(client, "p").batch)
    assert len(set(landed)) >= kills * 3 // 4
    drain(server.url, rulebook)
    check(server)
    # An unbroken run over the same stream, with the same secret.
    client.copy(KEYS.events, Keys("unbroken").events)
    drain(server.url, rulebook, "unbroken")
    check_like(server, "unbroken", "p")


def test_workers_killed_at_random_moments_leave_the_ledger_of_an_unbroken_run(
    server: Server, rulebook: Path, rng: random.Random
) -> None:
    kill_repeatedly(server, rulebook, rng, kills=4)


@pytest.mark.slow
def test_a_worker_killed_twenty_times(server: Server, rulebook: Path, rng: random.Random) -> None:
    kill_repeatedly(server, rulebook, rng, kills=20)


# ---------------------------------------------------------------------------------------------- zombies


def test_a_zombie_writes_nothing_and_exits(server: Server, rulebook: Path, rng: random.Random) -> None:
    client = server.client()
    flags = ("--batch-entries", "20")
    with (
        producing(server, "p", 100_000, 500, rng),
        WorkerProcess(server.url, "p", rulebook, *flags, lease_ms=200) as zombie,
    ):
        wait_for_batch(client, 5)
        zombie.signal(signal.SIGSTOP)
        with WorkerProcess(server.url, "p", rulebook, *flags, lease_ms=200) as heir:
            paused_at = checkpoint_of(client, "p").batch
            wait_for_batch(client, paused_at + 3)
            zombie.signal(signal.SIGCONT)
            assert zombie.wait() == 1
            assert "was taken over by" in zombie.log.splitlines()[-1]
            assert "Traceback" not in zombie.log
            going = checkpoint_of(client, "p").batch
            wait_for_batch(client, going)
            assert heir.process.poll() is None
            assert heir.finish() == 0
    drain(server.url, rulebook)
    check(server)


def test_a_paused_worker_whom_nobody_replaced_goes_on(valkey: Server, rulebook: Path, rng: random.Random) -> None:
    client = valkey.client()
    with (
        producing(valkey, "p", 1500, 2000, rng),
        WorkerProcess(valkey.url, "p", rulebook, "--batch-entries", "20", lease_ms=100) as worker,
    ):
        wait_for_batch(client, 3)
        worker.signal(signal.SIGSTOP)
        wait_until(lambda: not client.exists(KEYS.lease), "its lease runs out")
        worker.signal(signal.SIGCONT)
        wait_for_events(client, 1500)
        assert worker.finish() == 0
    check(valkey)


# ------------------------------------------------------------------------------------------ the network


def test_lost_replies_and_broken_connections_lose_and_double_nothing(
    server: Server, rulebook: Path, rng: random.Random
) -> None:
    client = server.client()
    with Proxy(server.port) as proxy, producing(server, "p", 4000, 2000, rng):
        flags = ("--batch-entries", "20", "--linger-ms", "0")
        with WorkerProcess(proxy.url, "p", rulebook, *flags, lease_ms=5000) as worker:
            wait_for_batch(client, 3)
            for _ in range(6):
                if rng.random() < 0.3:
                    proxy.break_all()
                else:
                    proxy.lose_replies(rng.randrange(1, 4))
                time.sleep(rng.uniform(0.05, 0.3))
            wait_for_events(client, 4000)
            assert worker.finish() == 0, worker.log
            assert "Traceback" not in worker.log
        assert proxy.lost > 0
    check(server)


def test_a_commit_connection_that_goes_silent_is_given_up(server: Server, rulebook: Path, rng: random.Random) -> None:
    """As when a firewall forgets it, or the machine of the old master is gone: no reset, no answer, no end."""
    client = server.client()
    flags = ("--batch-entries", "20", "--linger-ms", "0", "--reply-timeout-ms", "300")
    with Proxy(server.port) as proxy, producing(server, "p", 100_000, 500, rng):
        with WorkerProcess(proxy.url, "p", rulebook, *flags, lease_ms=5000) as worker:
            for _ in range(2):
                wait_for_batch(client, checkpoint_of(client, "p").batch + 3)
                proxy.silence()
            wait_for_batch(client, checkpoint_of(client, "p").batch + 3)
            assert worker.finish() == 0, worker.log
        assert "commit connection: no answer for 0.3 s; trying again" in worker.log
        assert "Traceback" not in worker.log
    drain(server.url, rulebook)
    check(server)


@pytest.mark.parametrize("disturb", ["CLIENT KILL", "SCRIPT FLUSH", "CLIENT PAUSE"])
def test_what_operators_do_is_survived(server: Server, rulebook: Path, rng: random.Random, disturb: str) -> None:
    client = server.client()
    disturbances: dict[str, Callable[[], object]] = {
        "CLIENT KILL": lambda: client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"),
        "SCRIPT FLUSH": lambda: client.script_flush("SYNC"),
        "CLIENT PAUSE": lambda: client.client_pause(150),
    }
    # Its own producer must not be disturbed, so everything is there beforehand.
    with producing(server, "p", 1500, 1_000_000, rng) as producer:
        producer.join()
        with WorkerProcess(server.url, "p", rulebook, "--batch-entries", "2", lease_ms=5000) as worker:
            for wanted in (5, 150, 400):
                wait_for_batch(client, wanted)
                disturbances[disturb]()
            wait_for_events(client, 1500)
            assert worker.finish() == 0, worker.log
    check(server)


# ------------------------------------------------------------------------------------------- the server


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_a_server_that_restarts_with_all_it_had_is_no_problem(
    server_kind: ServerKind, server_factory: ServerFactory, rulebook: Path, end: str
) -> None:
    server = server_factory(server_kind, {"appendonly": "yes", "appendfsync": "always"})
    client = server.client()
    fill(client, "p", orders(1, 3000))
    with WorkerProcess(server.url, "p", rulebook, "--batch-entries", "5", lease_ms=5000) as worker:
        wait_for_batch(client, 20)
        getattr(server, end)()
        wait_until(lambda: "trying again" in worker.said, "it notices")
        server.start()
        client = server.client()
        wait_for_events(client, 2999)
        assert worker.finish() == 0, worker.log
        assert "works again" in worker.log
    check(server)


def test_a_server_that_lost_commits_stops_the_worker_and_a_restart_goes_on_from_what_is_left(
    server_factory: ServerFactory, rulebook: Path
) -> None:
    """As a failover to a replica that was behind does, or a restart from an older file."""
    server = server_factory("valkey", {"appendonly": "no"})
    client = server.client()
    fill(client, "p", orders(1, 200))
    with WorkerProcess(server.url, "p", rulebook, lease_ms=60_000) as worker:
        wait_for_events(client, 199)
        client.save()
        fill(client, "p", orders(200, 400))
        wait_for_events(client, 399)
        server.kill()
        server.start()
        assert worker.wait() == 1
        assert "it has lost commits" in worker.log.splitlines()[-1]
    client = server.client()
    assert checkpoint_of(client, "p").events == 199
    client.delete(KEYS.lease)
    fill(client, "p", orders(200, 400))
    drain(server.url, rulebook)
    check(server)


def test_a_server_that_lost_everything_stops_the_worker(server_factory: ServerFactory, rulebook: Path) -> None:
    server = server_factory("valkey")
    fill(server.client(), "p", orders(1, 200))
    with WorkerProcess(server.url, "p", rulebook) as worker:
        wait_for_events(server.client(), 199)
        server.kill()
        server.start()
        assert worker.wait() == 1
        assert "Traceback" not in worker.log


def test_out_of_memory_refuses_batches_whole_and_passes(
    server_kind: ServerKind, server_factory: ServerFactory, rulebook: Path
) -> None:
    server = server_factory(server_kind)
    client = server.client()
    fill(client, "p", orders(1, 2000))
    with WorkerProcess(server.url, "p", rulebook, "--batch-entries", "5") as worker:
        wait_for_batch(client, 20)
        client.config_set("maxmemory", "1mb")
        wait_until(lambda: "OOM" in worker.said, "it is refused")
        stuck = checkpoint_of(client, "p").batch
        time.sleep(1.0)
        assert checkpoint_of(client, "p").batch == stuck
        assert client.xlen(KEYS.ledger) == stuck
        # It keeps its partition meanwhile.
        assert client.exists(KEYS.lease)
        client.config_set("maxmemory", "0")
        wait_for_events(client, 1999)
        assert worker.finish() == 0
    log = worker.log.splitlines()
    assert sum("OOM" in line for line in log) == 1
    assert sum("works again" in line for line in log) == 1
    check(server)


def test_a_worker_stopped_while_the_server_is_full_says_so(server_factory: ServerFactory, rulebook: Path) -> None:
    server = server_factory("valkey")
    client = server.client()
    fill(client, "p", orders(1, 500))
    with WorkerProcess(server.url, "p", rulebook, "--batch-entries", "5", "--stop-timeout-ms", "300") as worker:
        wait_for_batch(client, 3)
        client.config_set("maxmemory", "1mb")
        wait_until(lambda: "OOM" in worker.said, "it is refused")
        assert worker.finish() == 1
        assert "not landed" in worker.log.splitlines()[-1]
    client.config_set("maxmemory", "0")
    drain(server.url, rulebook)
    check(server)


def test_a_server_that_cannot_save_is_waited_for(server_factory: ServerFactory, rulebook: Path) -> None:
    server = server_factory("valkey", {"enable-protected-configs": "yes"})
    client = server.client()
    fill(client, "p", orders(1, 2000))
    with WorkerProcess(server.url, "p", rulebook, "--batch-entries", "2") as worker:
        wait_for_batch(client, 3)
        home = client.config_get("dir")["dir"]
        client.config_set("save", "1 1")
        client.config_set("dir", "/proc")
        client.bgsave()
        wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err", "saving fails")
        stuck = checkpoint_of(client, "p").batch
        time.sleep(0.3)
        assert checkpoint_of(client, "p").batch <= stuck + 1
        client.config_set("save", "")
        client.config_set("dir", str(home))
        wait_for_events(client, 1999)
        assert worker.finish() == 0
    check(server)


# ------------------------------------------------------------------------------------------- the stream


@pytest.mark.parametrize("loss", ["XTRIM", "XDEL", "DEL"])
def test_a_stream_trimmed_under_the_worker_stops_it_with_a_clear_error(
    server: Server, rulebook: Path, loss: str
) -> None:
    client = server.client()
    fill(client, "p", orders(1, 3000))
    with WorkerProcess(server.url, "p", rulebook, "--batch-entries", "2") as worker:
        wait_for_batch(client, 5)
        if loss == "XTRIM":
            client.xtrim(KEYS.events, maxlen=2, approximate=False)
        elif loss == "XDEL":
            client.xdel(KEYS.events, f"{NOON_MS + 2990}-0")
        else:
            client.delete(KEYS.events)
        assert worker.wait() == 1
        last = worker.log.splitlines()[-1]
        assert any(word in last for word in ("trimmed", "deleted"))
        assert "Traceback" not in worker.log
    batches = list(LedgerReader(client, "p").batches())
    assert len(batches) == checkpoint_of(client, "p").batch
    # And it stays so: nothing is skipped silently.
    done = command("worker", "--redis", server.url, "--partition", "p", "--rulebook", rulebook, "--drain")
    assert done.returncode != 0


def test_an_idle_worker_notices_that_its_stream_was_deleted(valkey: Server, rulebook: Path) -> None:
    client = valkey.client()
    fill(client, "p", orders(1, 20))
    with WorkerProcess(valkey.url, "p", rulebook) as worker:
        wait_for_events(client, 19)
        client.delete(KEYS.events)
        assert worker.wait() == 1
        assert "deleted" in worker.log.splitlines()[-1]


def test_a_script_that_keeps_the_server_busy_is_waited_for(server_factory: ServerFactory, rulebook: Path) -> None:
    server = server_factory("valkey", {"busy-reply-threshold": "50"})
    client = server.client()
    fill(client, "p", orders(1, 1000))
    with WorkerProcess(server.url, "p", rulebook, "--batch-entries", "2") as worker:
        wait_for_batch(client, 3)
        busy = threading.Thread(target=spin, args=(server,))
        busy.start()
        wait_until(lambda: "trying again" in worker.said, "it is refused")
        client.script_kill()
        busy.join()
        wait_for_events(client, 999)
        assert worker.finish() == 0, worker.log
    check(server)


def spin(server: Server) -> None:
    client = redis.Redis(host="127.0.0.1", port=server.port, socket_timeout=30)
    with pytest.raises(redis.ResponseError):
        client.eval("while true do end", 0)
    client.close()


def test_the_commit_script_is_what_the_worker_sends(valkey: Server) -> None:
    assert valkey.client().script_load(COMMIT.text) == COMMIT.sha1
