"""A Flowglad on loopback, the library's view of it, and the published description that every request is held to."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote

import pytest

from metered_ai.records import UsageEvent
from metered_ai.services.flowglad import Flowglad
from metered_ai.testing import FakeFlowglad

DESCRIPTION = Path(__file__).parent / "openapi.json"
"""Flowglad's published description of the requests that we send, without its words. It is not ours, so no distribution has it."""

NOW = datetime(2026, 11, 23, 12, 0, 0, 123000, tzinfo=UTC)


def usage_event(transaction_id="gen_1", amount=1, *, customer="ada", meter="generations", reference=None, **fields):
    return UsageEvent(customer, meter, transaction_id, amount, NOW, "reported", reference=reference, **fields)


def violations(requests):
    """What in requests is against the published description, and against what the server wants beyond it."""
    from jsonschema import Draft202012Validator

    described = json.loads(DESCRIPTION.read_text())
    found = []
    for asked in requests:
        place = next((name for name in described if matches(name, asked)), None)
        if place is None:
            found.append(f"{asked.method} {asked.path} is not described")
            continue
        wanted = described[place]["body"]
        errors = [] if wanted is None else list(Draft202012Validator(wanted).iter_errors(asked.body))
        found += [f"{place}: {error.message}" for error in errors]
        if wanted is None and asked.body is not None:
            found.append(f"{place}: a body, where none belongs")
        events = (asked.body or {}).get("usageEvents") or [asked.body["usageEvent"]] if "usage-events" in place else []
        for event in events:
            named = [event.get(name) for name in ("usageMeterSlug", "usageMeterId", "priceSlug", "priceId")]
            if sum(map(bool, named)) != 1 or not event["transactionId"] or not 0 < event["amount"] < 2**31:
                found.append(f"{place}: {event}")
    return found


def matches(name, asked):
    method, _, template = name.partition(" ")
    pattern = re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(template))
    return method == asked.method and re.fullmatch(pattern, f"/api/v1{asked.path}") and unquote(asked.path)


@pytest.fixture
def fake():
    """A Flowglad with a meter, a free plan of 100 credits, and ada on it. Whatever it was asked is as the published description says."""
    with FakeFlowglad() as fake:
        fake.add_meter("generations")
        fake.add_plan("free", credits={"generations": 100}, is_default=True)
        fake.add_customer("ada")
        yield fake

        # As in test_description.py: it is not in the sdist.
        if not DESCRIPTION.exists():
            pytest.skip("the published description is not in this distribution: its license is not the library's")
        assert [] == violations(fake.requests)


@pytest.fixture
def service(fake):
    service = Flowglad(fake.key, fake.url)
    yield service
    service.close()
