"""A ledger in memory, a provider on loopback and an async client, for the frameworks under test."""

from __future__ import annotations

import pytest

from metered_ai import AsyncMeteredOpenAI
from metered_ai.testing.plugin import start


@pytest.fixture
def shop():
    """An empty ledger in memory and a scripted provider, with clients on both."""
    with start() as shop:
        yield shop


@pytest.fixture
def client(shop):
    """A sync client without a customer: who pays is said by the framework, or the call is refused."""
    with shop.client() as client:
        yield client


@pytest.fixture
def aclient(shop) -> AsyncMeteredOpenAI:
    """The async twin of `client`. Its connections belong to the loop of the test, which closes with them."""
    return shop.async_client()
