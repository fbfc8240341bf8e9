"""A producer's settings: the defaults hold together, and nothing outside the bounds is taken."""

from __future__ import annotations

from typing import Any

import pytest

from accrual.client import AsyncProducer, Options, Producer
from accrual.errors import UsageError
from accrual.stream.keys import Keys


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("confirm", "disk"),
        ("replicas", 0),
        ("batch_events", 0),
        ("batch_events", 1025),
        ("batch_events", 1.5),
        ("batch_bytes", 4095),
        ("batch_bytes", (1 << 20) + 1),
        ("linger_ms", -1),
        ("in_flight", 0),
        ("waiting_events", 0),
        ("waiting_bytes", 100),
        ("delivery_timeout_ms", 9),
        ("reply_timeout_ms", True),
        ("confirm_timeout_ms", 0),
        ("backoff_ms", 0),
        ("backoff_limit_ms", None),
    ],
)
def test_a_value_outside_its_bounds_is_refused(name: str, value: object) -> None:
    options: dict[str, Any] = {name: value}
    with pytest.raises(UsageError, match=name):
        Options(**options)


@pytest.mark.parametrize("partition", ["", "a b", "{x}", "上海", "x" * 65, "a:b", "a\n"])
def test_a_partition_that_cannot_be_is_refused(partition: str) -> None:
    for producer in (AsyncProducer, Producer):
        with pytest.raises(UsageError, match="partition"):
            producer("redis://127.0.0.1:1", partition)


@pytest.mark.parametrize("url", ["127.0.0.1:6379", "http://127.0.0.1", "sentinel://127.0.0.1"])
def test_a_url_that_cannot_be_is_refused(url: str) -> None:
    for producer in (AsyncProducer, Producer):
        with pytest.raises(UsageError):
            producer(url, "shanghai")


def test_the_keys_of_a_partition_share_one_slot() -> None:
    keys = Keys("sh-1.2_x")
    names = (keys.events, keys.ledger, keys.deadletters, keys.checkpoint, keys.lease, keys.rulebooks)
    assert names[0] == "accrual:{sh-1.2_x}:events"
    assert len(set(names)) == 6
    assert all(name.startswith("accrual:{sh-1.2_x}:") for name in names)
