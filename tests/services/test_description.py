"""Every request that the library sends is held to the published description; here is what makes that check worth having."""

from __future__ import annotations

import pytest

from metered_ai.testing.flowglad import Asked
from tests.services.conftest import DESCRIPTION, violations

# The description is in the repository and not in the sdist, because it is AGPL-3.0: whoever tests from there has nothing to compare with.
pytestmark = pytest.mark.skipif(
    not DESCRIPTION.exists(),
    reason="the published description is not in this distribution: its license is not the library's",
)

GOOD = {"usageMeterSlug": "generations", "amount": 1, "subscriptionId": "sub_1", "transactionId": "gen_1"}


def asked(method, path, body=None):
    return Asked(method=method, path=path, target=path, body=body, has_key=True, status=200)


def test_good():
    """Good requests are found good."""
    requests = [
        asked("POST", "/usage-events", {"usageEvent": GOOD}),
        asked("POST", "/usage-events/bulk", {"usageEvents": [GOOD]}),
        asked("GET", "/customers/a%20b/billing"),
    ]

    assert [] == violations(requests)


@pytest.mark.parametrize(
    "request_",
    [
        asked("POST", "/usage-events", {"usageEvent": {**GOOD, "amount": 1.5}}),
        asked("POST", "/usage-events", {"usageEvent": {**GOOD, "amount": 2**31}}),
        asked("POST", "/usage-events", {"usageEvent": {**GOOD, "usageDate": "now"}}),
        asked("POST", "/usage-events", {"usageEvent": {**GOOD, "priceSlug": "x"}}),
        asked("POST", "/usage-events", {"usageEvent": {**GOOD, "transactionId": ""}}),
        asked("POST", "/usage-events/bulk", {"usageEvents": [{**GOOD, "subscriptionId": None}]}),
        asked("POST", "/customers", {"customer": {"externalId": "ada", "name": "Ada"}}),
        asked("POST", "/checkout-sessions", {"checkoutSession": {"type": "product", "customerExternalId": "ada"}}),
        asked("GET", "/customers/ada/billing", {}),
        asked("GET", "/customers/a/b/billing"),
        asked("POST", "/nowhere", {}),
    ],
    ids=lambda each: f"{each.method} {each.path}",
)
def test_bad(request_):
    """Bad ones are found."""
    assert [] != violations([request_])
