"""Processes that call a provider with threads and tasks are killed at random times, again and again."""

from __future__ import annotations

import random

import pytest

from metered_ai import connect
from metered_ai.ledger.sqlite import SqliteLedger
from metered_ai.testing.provider import ProviderProcess
from tests.proof.children import LONG, Child, warm_up
from tests.proof.storm import CREDITS, CUSTOMERS, account_for, kill_again_and_again, later, work

KILLS = 3_000 if LONG else 24
AT_ONCE = 3


@pytest.mark.timeout(3600)
def test_storm(tmp_path, provider, say):
    """
    Whoever is killed whenever: each answer that was acknowledged has its one event, each event an answer that was issued or a
    policy, and no credit is held or lost.
    """
    url, acks, log = f"sqlite:///{tmp_path}/credits.db", tmp_path / "acks", tmp_path / "issued"
    with connect(url) as billing:
        for customer in CUSTOMERS:
            billing.grant(customer, "generations", CREDITS, id="start")
    seed = random.randrange(1 << 30)
    dice = random.Random(seed)

    warm_up(provider.base_url, tmp_path / "warm")
    with ProviderProcess(log=log, pause=0.001) as outliving:

        def start(number: int) -> Child:
            policies = {"on_unknown": dice.choice(["release", "charge"])}
            return Child(work, url, outliving.base_url, policies, acks, seed + 100 * number)

        kill_again_and_again(start, KILLS, AT_ONCE, dice)

    ledger = SqliteLedger(tmp_path / "credits.db", clock=later)
    recovery = account_for(ledger, acks, log, say, f"storm (seed {seed}), {KILLS + AT_ONCE} killed")
    ledger.close()

    assert recovery.resolved
