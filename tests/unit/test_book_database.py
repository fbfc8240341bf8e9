"""What is said of the database's URL."""

from __future__ import annotations

import pytest

from accrual.book import connect
from accrual.errors import UsageError


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:secret@[::1/db",
        "postgresql://u:%zzsecret@h/db",
        "postgresql://u:secret@h:port@/db?nothing=1",
        "host=h password='secret",
    ],
)
def test_a_url_that_cannot_be_understood_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(UsageError, match=r"^--database: ") as raised:
        connect(url)
    assert "secret" not in str(raised.value)


def test_what_is_wrong_with_a_url_is_named() -> None:
    with pytest.raises(UsageError, match=r'^--database: invalid URI query parameter: "nothing"$'):
        connect("postgresql://u:secret@h/db?nothing=1")
