"""Real servers, started once for each worker; a ledger in a file; and the two shells on both."""

from __future__ import annotations

import openai
import pytest

from metered_ai import connect
from metered_ai.testing.llama import LlamaServer
from tests.client.shells import Shell


@pytest.fixture(scope="session")
def llama():
    """A real llama.cpp server that chats."""
    with LlamaServer() as server:
        yield server


@pytest.fixture(scope="session")
def endless():
    """A real llama.cpp server whose answers only a limit ends."""
    with LlamaServer(mean_length=0) as server:
        yield server


@pytest.fixture(scope="session")
def llama_embedding():
    """A real llama.cpp server for embeddings."""
    with LlamaServer(embedding=True) as server:
        yield server


@pytest.fixture
def bare(llama):
    """The SDK's own client for `llama`."""
    with openai.OpenAI(base_url=llama.base_url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def make_billing(tmp_path):
    """A `Billing` on a SQLite file with the policies that a test wants; the ledger is sound when the test is over."""
    made = []

    def make(**policies):
        billing = connect(f"sqlite:///{tmp_path / f'credits-{len(made)}.db'}", **policies)
        billing.grant("ada", "generations", 10_000_000, id="start")
        made.append(billing)
        return billing

    yield make
    for billing in made:
        assert () == billing.verify().broken
        assert [] == list(billing.holds(state="open"))
        billing.close()


@pytest.fixture
def billing(make_billing):
    """A `Billing` with the default policies: "ada" has 10,000,000 generations."""
    return make_billing()


@pytest.fixture(params=["sync", "async"])
def make_shell(request):
    """The sync clients, then the async ones, of the server and the billing that a test wants."""
    made = []

    def make(server, billing):
        shell = Shell(server, billing, is_async=request.param == "async")
        made.append(shell)
        return shell

    yield make
    for shell in made:
        shell.finish()


@pytest.fixture
def shell(make_shell, llama, billing):
    """Both shells on the server that chats."""
    return make_shell(llama, billing)
