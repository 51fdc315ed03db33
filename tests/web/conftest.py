"""A ledger with an account in every state, which can go away and come back; and a browser."""

from __future__ import annotations

import pytest

from tests.web.scenes import GEN, LEVELS, Past, fill, opened, use


@pytest.fixture
def past():
    return Past()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "credits.db"


@pytest.fixture
def billing(file, past):
    """A billing on a file."""
    with opened(file, past) as billing:
        yield billing


@pytest.fixture
def levels(billing):
    """The billing, with one customer in each state."""
    for customer, (used, held) in LEVELS.items():
        fill(billing, customer, used, held)
    billing.set_unlimited("unlimited", GEN, True)
    use(billing, "unlimited", 1234, 1)
    return billing
