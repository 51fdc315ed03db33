"""`FakeFlowglad` answers as the real server was seen to: its exchanges are asked again, in the order in which they happened."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import httpx
import pytest

from metered_ai.testing import FakeFlowglad

OBSERVED = Path(__file__).parent / "observed"
CASES = {path.stem: json.loads(path.read_text()) for path in sorted(OBSERVED.glob("*.json"))}

FIRST = """
    customer_create usage_balances_after_grant billing_after_grant usage_event_create usage_event_duplicate_same
    usage_event_duplicate_other_amount usage_event_duplicate_by_price_slug usage_event_duplicate_other_meter price_resolution_ok
    usage_event_by_ids transaction_empty amount_int32_max amount_float_whole identifier_two_one_empty properties_set properties_null
    unknown_field livemode_in_body over_balance bulk_ok bulk_with_duplicate bulk_all_duplicates bulk_duplicate_inside bulk_one_bad
    bulk_foreign_duplicate balances_own_subscription feature_create_grant grant_immediate grant_no_immediate grant_after_overdraft
    subscription_create_do_not_charge subscription_create_no_payment_method billing_no_current_subscription customer_archive
""".split()
"""Those that depend on what was before. The others change nothing."""

ELSEWHERE = ["usage_meter_create"]
"""What was there before the rest."""

TIMES = re.compile(r"(?:At|Date|Start|End|expires)$")
ID = re.compile(r"\b(?:[a-z]+_)+[A-Za-z0-9]{21}\b")
NEW = {"request_id", "trace_id", "invoiceNumberBase", "nextCursor", "total"}
"""What no two servers share: only its kind is compared."""


class Comparison:
    """Compares answers. An id of the real server's stands for the same one of the fake's throughout."""

    def __init__(self) -> None:
        self.real_to_fake: dict[str, str] = {}

    def translate(self, text: str) -> str:
        return ID.sub(lambda found: self.real_to_fake.get(found[0], found[0]), text)

    def differences(self, real, fake, at=""):
        """What is different, as lines; nothing if it is the same."""
        name = at.rpartition(".")[2]
        if isinstance(real, dict) and isinstance(fake, dict):
            if real.keys() != fake.keys():
                return [f"{at}: fields {sorted(real.keys() ^ fake.keys())}"]
            return [line for key in real for line in self.differences(real[key], fake[key], f"{at}.{key}")]
        if isinstance(real, list) and isinstance(fake, list):
            if name == "featureItems":
                # Of no order.
                real, fake = (sorted(items, key=lambda item: item["slug"]) for items in (real, fake))
            if len(real) != len(fake):
                return [f"{at}: {len(fake)} instead of {len(real)}"]
            pairs = enumerate(zip(real, fake, strict=True))
            return [line for index, each in pairs for line in self.differences(*each, f"{at}.{index}")]
        if type(real) is not type(fake):
            return [f"{at}: {fake!r} instead of {real!r}"]
        if name in NEW or (TIMES.search(name) and isinstance(real, int)):
            return []
        if isinstance(real, str):
            return self._texts(real, fake, at)
        return [] if real == fake else [f"{at}: {fake!r} instead of {real!r}"]

    def _texts(self, real, fake, at):
        real, fake = (re.sub(r"Failed query:.*", "", text, flags=re.DOTALL) for text in (real, fake))
        real, fake = (re.sub(r"http://[a-z0-9.:]+/(checkout|billing-portal)", r"\1", text) for text in (real, fake))
        pairs = list(zip(ID.findall(real), ID.findall(fake), strict=False))
        for theirs, ours in pairs:
            if theirs.rpartition("_")[0] == ours.rpartition("_")[0]:
                self.real_to_fake.setdefault(theirs, ours)
        return [] if self.translate(real) == fake else [f"{at}: {fake!r} instead of {real!r}"]


def model_without_meter(slug):
    model = copy.deepcopy(CASES["pricing_model_default"][0]["response"]["body"]["pricingModel"])
    model["usageMeters"] = [each for each in model["usageMeters"] if each["slug"] != slug]
    return model


def load(flowglad, model):
    """Give the fake the pricing model of the real server."""
    flowglad.books.model = model
    flowglad.books.organization_id = model["organizationId"]
    features = [feature for product in model["products"] for feature in product["features"]]
    flowglad.books.features = {feature["id"]: feature for feature in features}
    # By identity, as the fake has it.
    model["defaultProduct"] = next(each for each in model["products"] if each["default"])


def ask(flowglad, client, comparison, exchange):
    """Ask the fake what the real server was asked; (status, kind, body) of both answers."""
    request, real = exchange["request"], exchange["response"]
    headers = {name: value.replace("<test key>", flowglad.key) for name, value in request["headers"].items()}
    content = request.get("body_text", "")
    if "body" in request:
        content = comparison.translate(json.dumps(request["body"]))
    path = comparison.translate(request["path"])
    fake = client.request(request["method"], flowglad.url + path, content=content, headers=headers)
    said = fake.json() if "json" in fake.headers["content-type"] else fake.text
    return (
        {
            "status": real["status"],
            "kind": real["headers"]["content-type"],
            "body": real.get("body", real.get("body_text")),
        },
        {"status": fake.status_code, "kind": fake.headers["content-type"], "body": said},
    )


def go_before(case, flowglad, client, comparison):
    """What happened before a case, and was not seen."""
    if case == "usage_event_get":
        event = {"usageMeterSlug": "generations", "amount": 1, "transactionId": "raw-4", "subscriptionId": GETTER[2]}
        headers = {"authorization": flowglad.key}
        client.post(f"{flowglad.url}/api/v1/usage-events", json={"usageEvent": event}, headers=headers)
        comparison.real_to_fake["usage_event_jfrKGDQk1Jw6DM4RMgfZY"] = flowglad.recorded("raw_1")[0]["id"]
    if case == "grant_no_immediate":
        # The same grant a second time, with grantCreditsImmediately: it shows more, and grants nothing.
        ask(flowglad, client, comparison, CASES["grant_immediate"][1])


@pytest.fixture(scope="module")
def found():
    """The differences by case, after all of them were asked in turn."""
    found = {}
    with FakeFlowglad() as flowglad, httpx.Client() as client:
        load(flowglad, model_without_meter("generations"))
        comparison = Comparison()
        for case in ELSEWHERE:
            found[case] = [comparison.differences(*ask(flowglad, client, comparison, each)) for each in CASES[case]]

    with FakeFlowglad() as flowglad, httpx.Client() as client:
        load(flowglad, model_without_meter(None))
        comparison = Comparison()
        for customer, customer_id, subscription_id in CUSTOMERS:
            flowglad.add_customer(customer, id=customer_id, subscription_id=subscription_id)
            flowglad.books.customers[customer].wire |= {"name": customer, "email": f"{customer}@example.com"}
        for case in [*FIRST, *(case for case in CASES if case not in FIRST and case not in ELSEWHERE)]:
            go_before(case, flowglad, client, comparison)
            found[case] = [comparison.differences(*ask(flowglad, client, comparison, each)) for each in CASES[case]]
    return found


GETTER = ("raw_1", "cust_7SGUAzJiZVTl6biGvbobm", "sub_GfuLBBHzo7QzlMmTRH8Lr")
CUSTOMERS = [
    GETTER,
    ("user_1", None, "sub_A54zs1vN05NiZ1WIvk792"),
    ("over_1", "cust_iqtOt3wklTjHztL57cMZS", "sub_zLqQqei7anpXyRi1kw5gw"),
    ("bulk_1", "cust_LMB3Q6MSQG6QMbGxxHycP", "sub_HaOy3Zl3IrsdJW65SqyEe"),
    ("bulk_2", None, "sub_1NGzw9dMTSKtrDZvJ44g5"),
    ("grant_1", "cust_mv1mTMidBdT6xvQGIb2s3", "sub_j5ef6cACBPjfS2wGMOAhL"),
    ("plan_1", "cust_w70TgyOEfBJu0AdNPJ31O", None),
    ("plan_2", "cust_6WldUV1RiQjoAnHVBtUYA", "sub_xEBiBbP8Xtv5OVdMvHAx9"),
    ("arch_1", "cust_k88Q8KhMeA8aCQVBnVjsQ", "sub_1da4swdEr4zK35necUYnA"),
]
"""Who was there already: the name, the customer's id and the subscription's."""


@pytest.mark.parametrize("case", CASES)
def test_as_observed(case, found):
    """The fake's status, kind of answer and body are the real server's; ids and times are new, and go together in the same way."""
    assert [] == [line for lines in found[case] for line in lines]


def test_all_asked():
    """No exchange is left out, and each order that matters is of cases that are there."""
    assert 86 == len(CASES)
    assert set() == {*FIRST, *ELSEWHERE} - CASES.keys()


@pytest.mark.parametrize(
    ("real", "fake"),
    [
        ({"amount": 3}, {"amount": 4}),
        ({"amount": 3}, {"amount": 3.0}),
        ({"amount": 3}, {"amount": 3, "used": 1}),
        ({"rows": [1]}, {"rows": []}),
        ({"error": "UsageMeter not found"}, {"error": "Price not found"}),
        ({"nextCursor": None}, {"nextCursor": "more"}),
        ({"a": f"sub_{'a' * 21}", "b": f"sub_{'a' * 21}"}, {"a": f"sub_{'b' * 21}", "b": f"sub_{'c' * 21}"}),
    ],
)
def test_comparison_sees(real, fake):
    """The comparison is not blind: other amounts, fields, texts and ids that do not go together are differences."""
    assert [] != Comparison().differences(real, fake)
