"""Failovers and missing replicas: what docs/DURABILITY.md says of them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from accrual.stream import Keys
from cutting import Cut, CuttingProxy
from proxy import Proxy
from runs import check, drain
from servers import Server, ServerFactory, ServerKind
from workers import (
    WorkerProcess,
    checkpoint_of,
    fill,
    ledger_output,
    orders,
    wait_for_batch,
    wait_for_events,
    wait_until,
)

KEYS = Keys("p")
SMALL_BATCHES = ("--batch-entries", "20", "--linger-ms", "1")


def pair(factory: ServerFactory, kind: ServerKind, **options: str) -> tuple[Server, Server]:
    """Start a master and a replica that has all it has."""
    master = factory(kind, {"repl-diskless-sync-delay": "0", "repl-ping-replica-period": "1"} | options)
    replica = factory(kind, {"replicaof": ("127.0.0.1", str(master.port))})
    wait_until(lambda: in_step(master, replica), "the replica has what the master has")
    return master, replica


def in_step(master: Server, replica: Server) -> bool:
    of_replica: Any = replica.client().info("replication")
    of_master: Any = master.client().info("replication")
    return (of_replica["master_link_status"], of_replica["slave_repl_offset"], of_master["connected_slaves"]) == (
        "up",
        of_master["master_repl_offset"],
        1,
    )


def promote(replica: Server) -> None:
    replica.client().execute_command("REPLICAOF", "NO", "ONE")


def test_a_worker_goes_on_after_a_failover_to_a_replica_that_has_everything(
    server_kind: ServerKind, server_factory: ServerFactory, rulebook: Path, rng: random.Random
) -> None:
    master, replica = pair(server_factory, server_kind)
    fill(master.client(), "p", orders(1, 2001))
    with CuttingProxy(master.port, Cut("commit", rng.randrange(3, 20), "executed")) as proxy:
        with WorkerProcess(proxy.url, "p", rulebook, *SMALL_BATCHES, lease_ms=10_000) as worker:
            wait_until(proxy.reached.is_set, "the commit is reached")
            wait_until(lambda: in_step(master, replica), "the replica has what the master has")
            before = checkpoint_of(master.client(), "p").batch
            master.kill()
            promote(replica)
            proxy.lead_to(replica.port)
            proxy.mend()
            wait_for_batch(replica.client(), before)
            wait_for_events(replica.client(), 2000)
            assert worker.finish() == 0, worker.log
        assert "works again" in worker.log
    check(replica)


def test_a_failover_that_loses_commits_stops_the_worker_and_the_next_goes_on_from_what_is_left(
    server_kind: ServerKind, server_factory: ServerFactory, rulebook: Path, rng: random.Random
) -> None:
    master, replica = pair(server_factory, server_kind)
    fill(master.client(), "p", orders(1, 1001))
    # A replica that has just been loaded is sent nothing before its first acknowledgement, which may take a second.
    wait_until(lambda: in_step(master, replica), "the replica has the events")
    with Proxy(master.port) as proxy, WorkerProcess(proxy.url, "p", rulebook, *SMALL_BATCHES) as worker:
        wait_for_batch(master.client(), rng.randrange(1, 20))
        promote(replica)
        # From here on the replica lacks whatever comes: events, and batches.
        lost = list(orders(1001, 1501))
        fill(master.client(), "p", lost)
        wait_for_events(master.client(), 1500)
        on_the_master = ledger_output(master, "p")
        master.kill()
        proxy.lead_to(replica.port)
        proxy.break_all()
        assert worker.wait() == 1
        assert "it has lost commits" in worker.log.splitlines()[-1]
    left = ledger_output(replica, "p")
    assert on_the_master.startswith(left)
    assert len(left) < len(on_the_master)
    # A producer that was told nothing, or that asked for replicas, sends again; here in the order of the first time.
    fill(replica.client(), "p", lost)
    replica.client().delete(KEYS.lease)
    drain(replica.url, rulebook)
    check(replica)
    assert ledger_output(replica, "p") == on_the_master


def test_a_master_without_its_replica_takes_no_batch_and_is_waited_for(
    server_kind: ServerKind, server_factory: ServerFactory, rulebook: Path
) -> None:
    limits = {"min-replicas-to-write": "1", "min-replicas-max-lag": "3"}
    master, replica = pair(server_factory, server_kind, **limits)
    client = master.client()

    def good_replicas(count: int) -> bool:
        return bool(client.info("replication")["min_slaves_good_slaves"] == count)

    wait_until(lambda: good_replicas(1), "the replica counts")
    fill(client, "p", orders(1, 1001))
    flags = (*SMALL_BATCHES, "--backoff-limit-ms", "100")
    with WorkerProcess(master.url, "p", rulebook, *flags) as worker:
        wait_for_events(client, 1000)
        fill(client, "p", orders(1001, 1501))
        wait_for_events(client, 1500)
        replica.pause()
        wait_until(lambda: good_replicas(0), "the replica is missed")
        wait_until(lambda: "NOREPLICAS" in worker.said, "the worker hears of it")
        assert worker.process.poll() is None
        replica.resume()
        wait_until(lambda: good_replicas(1), "the replica is back")
        fill(client, "p", orders(1501, 2001))
        wait_for_events(client, 2000)
        assert worker.finish() == 0, worker.log
    check(master)
    wait_until(lambda: in_step(master, replica), "the replica has what the master has")
    assert ledger_output(replica, "p") == ledger_output(master, "p")
