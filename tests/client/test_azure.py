"""Azure: paths with deployments, keys and tokens of Entra ID, and copies that lose none of it."""

from __future__ import annotations

import openai
import pytest

from metered_ai import InsufficientCreditsError, bill_to, per_token
from tests.client.shells import HELLO, VERSION

CHAT = {"model": "m", "messages": HELLO}


def wire(shell):
    return [request.url.partition("?")[0] for request in shell.provider.requests]


def test_bills(shell, ledger):
    """A call to a deployment is held and settled like any other, under the result's id."""
    answer = shell.run(shell.azure().chat.completions.create(**CHAT))
    (event,) = shell.billing.usage_events("ada")

    assert ["place", "settle"] == ledger.kinds
    assert (f"gen_{answer.id}", 1, "m") == (event.transaction_id, event.amount, event.usage.model)
    assert ["/openai/deployments/gpt/chat/completions"] == wire(shell)


def test_model_as_deployment(shell, ledger):
    """Without a deployment of its own a client takes the model's name for it, and bills."""
    shell.run(shell.azure(azure_deployment=None).chat.completions.create(**CHAT))

    assert ["/openai/deployments/m/chat/completions"] == wire(shell)
    assert ["place", "settle"] == ledger.kinds


def test_stream(shell, ledger):
    """Streams too; at a token price the usage is asked for and not shown."""
    client = shell.azure(pricing=per_token(input=1, output=10))
    chunks = shell.read(shell.run(client.chat.completions.create(**CHAT, stream=True)))
    (event,) = shell.billing.usage_events("ada")

    assert (10 + 90, "reported") == (event.amount, event.basis)
    assert all(chunk.choices for chunk in chunks)


def test_refusal(shell, ledger):
    """Without credits nothing is sent."""
    with bill_to("bob"), pytest.raises(InsufficientCreditsError):
        shell.run(shell.azure(customer=None).chat.completions.create(**CHAT))

    assert [] == shell.provider.requests


@pytest.mark.parametrize(
    "derive",
    [
        lambda client: client.with_billing(amount=2),
        lambda client: client.copy(),
        lambda client: client.with_options(timeout=3).with_billing(amount=2),
    ],
    ids=["with_billing", "copy", "chain"],
)
def test_derived(shell, ledger, derive):
    """Derived clients ask at the same addresses, deployment or not, with the same version of the API."""
    client = shell.azure()
    for one in (client, derive(client)):
        shell.run(one.chat.completions.create(**CHAT))
        shell.run(one.responses.create(model="m", input="Hi"))
        shell.read(shell.run(one.models.list()) if not shell.is_async else one.models.list())
    urls = [request.url for request in shell.provider.requests]

    assert urls[:3] == urls[3:]
    assert all("api-version=2026-01-01" in url for url in urls)
    assert ["place", "settle"] * 4 == ledger.kinds


def test_another_version(shell):
    """What belongs to Azure can be changed in a copy."""
    shell.run(shell.azure().with_options(api_version="2030-01-01").chat.completions.create(**CHAT))

    assert "api-version=2030-01-01" in shell.provider.requests[0].url


def test_token_provider(shell, ledger):
    """A token provider is asked for each call, and by derived clients too."""
    asked = []

    def token():
        asked.append(1)
        return "t"

    async def atoken():
        return token()

    client = shell.azure(api_key=None, azure_ad_token_provider=atoken if shell.is_async else token)
    shell.run(client.chat.completions.create(**CHAT))
    shell.run(client.with_billing(amount=2).chat.completions.create(**CHAT))

    assert 2 == len(asked)
    assert ["***", "***"] == [request.headers["authorization"] for request in shell.provider.requests]
    assert ["place", "settle"] * 2 == ledger.kinds


def test_token_provider_fails(shell, ledger):
    """A token provider that fails sends nothing, and the hold is released as not sent."""

    def fail():
        raise openai.OpenAIError("no token")

    async def afail():
        fail()

    client = shell.azure(api_key=None, azure_ad_token_provider=afail if shell.is_async else fail)
    with pytest.raises(openai.OpenAIError, match="no token"):
        shell.run(client.chat.completions.create(**CHAT))

    assert ["place", "release"] == ledger.kinds
    assert ("not_sent", "no") == (ledger.steps[1].reason, ledger.steps[1].sent)
    assert [] == shell.provider.requests


def test_images(shell, ledger):
    """Images, embeddings and audio of a deployment are the doors they are elsewhere."""
    client = shell.azure()
    shell.run(client.images.generate(model="m", prompt="A fox"))
    shell.run(client.embeddings.create(model="m", input="Hi"))
    shell.run(client.audio.transcriptions.create(model="m", file=("a.mp3", b"x")))

    endpoints = [step.endpoint for step in ledger.steps if hasattr(step, "endpoint")]
    assert ["images.generations", "embeddings", "audio.transcriptions"] == endpoints


def test_retries(shell, ledger):
    """The SDK changes the path at each attempt; it is one call all the same."""
    shell.provider.answer(status=500, headers={"retry-after-ms": "1"}, times=2)
    shell.run(shell.azure(max_retries=2, azure_deployment=None).chat.completions.create(**CHAT))
    (event,) = shell.billing.usage_events("ada")

    assert 3 == event.attempts == len(shell.provider.requests)
    assert ["place", "settle"] == ledger.kinds


def test_version():
    """The SDKs this runs on are the ones that are promised."""
    assert (2, 54) <= VERSION < (4,)
