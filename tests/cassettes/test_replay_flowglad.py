"""Exchanges with Flowglad, replayed through `Flowglad`: what it says of them is what is in them, read without the library."""

from __future__ import annotations

import json

import pytest
import yaml

from cassettes.record import ADA, FLOWGLAD, FOLDER, NOBODY, flowglad_service, recorder
from metered_ai.services import Delivery, ServiceBalance

# Nobody listens there: whatever is not in a cassette fails.
NOWHERE = "http://127.0.0.1:9"


def path_of(name):
    return FOLDER / "flowglad" / f"{name}.yaml"


def replay(name):
    """What came of asking, with nothing but the cassette to answer; every exchange in it was played."""
    with recorder("none").use_cassette(str(path_of(name))) as cassette:
        said = FLOWGLAD[name](flowglad_service(name, NOWHERE, "sk_test_of_a_replay"))
    assert cassette.all_played
    return said


def bodies(name, end=""):
    """The answers of the exchanges whose address ends so: JSON, or text."""
    found = []
    for exchange in yaml.safe_load(path_of(name).read_text())["interactions"]:
        text = exchange["response"]["body"]["string"]
        if exchange["request"]["uri"].endswith(end):
            found.append(json.loads(text) if text.startswith("{") else text)
    return found


def recorded(event):
    details = {"event_id": event["id"], "price_id": event["priceId"], "subscription_id": event["subscriptionId"]}
    return Delivery("recorded", details=details)


def test_customer():
    """Made the first time, there the second."""
    assert [True, False] == replay("customer")


def test_balance():
    """The balance is the row's, the limit what the plan grants."""
    [row] = bodies("balance", "usage-balances")[0]["usageMeterBalances"]
    features = bodies("balance", "billing")[0]["currentSubscription"]["experimental"]["featureItems"]
    granted = sum(item["amount"] for item in features if item["usageMeterId"] == row["id"])
    has_fast = any(item["type"] == "toggle" and item["slug"] == "fast" for item in features)

    assert [ServiceBalance(row["availableBalance"], row["subscriptionId"], granted), has_fast] == replay("balance")


def test_no_customer():
    """An unknown customer is one without a plan."""
    [said] = replay("no_customer")

    assert 404 == yaml.safe_load(path_of("no_customer").read_text())["interactions"][0]["response"]["status"]["code"]
    assert NOBODY in said


def test_usage_event():
    """Recorded, recorded again as the same event, and put aside where the amount is another than the one that came back."""
    first, second, third = (body["usageEvent"] for body in bodies("usage_event", "usage-events"))
    said = replay("usage_event")

    assert first == second == third
    assert [recorded(first)] * 2 == said[:2]
    assert ("aside", "mismatch") == (said[2].outcome, said[2].details["cause"])


def test_usage_event_by_price():
    """The price that was named comes back resolved."""
    [body] = bodies("usage_event_by_price", "usage-events")

    assert [recorded(body["usageEvent"])] == replay("usage_event_by_price")


def test_usage_event_mistakes():
    """Mistakes are dead letters with the server's words."""
    said = replay("usage_event_mistakes")

    assert ["dead"] * 3 == [each.outcome for each in said]
    assert [f"HTTP 500: {body['error']}" for body in bodies("usage_event_mistakes", "usage-events")] == [
        each.reason for each in said
    ]


def test_usage_events():
    """In bulk each answer goes to its event, and what is left unsaid is to be sent alone."""
    first, second = (
        {event["transactionId"].partition("_")[0]: event for event in body["usageEvents"]}
        for body in bodies("usage_events", "bulk")
    )
    one, two = replay("usage_events")

    assert {"c"} == set(second)
    assert [recorded(first["a"]), recorded(first["b"])] == one
    assert ("alone", recorded(second["c"])) == (two[0].outcome, two[1])


def test_checkout():
    """The address is the session's; an unknown price is said in the server's words."""
    good, bad = sorted(bodies("checkout"), key=lambda body: "url" not in body)
    url, error = replay("checkout")

    assert good["url"] == url
    assert bad["error"] in error
    assert ADA in error


def test_wrong_key():
    """A wrong key, refused in plain text, stops the sending."""
    [text] = bodies("wrong_key")

    assert [Delivery("stop", f"HTTP 401: {text}")] == replay("wrong_key")


def test_all_recorded():
    """The folder holds what the script says, and nothing else; and each is replayed here."""
    names = {name.removeprefix("test_") for name in globals() if name.startswith("test_")} - {
        "all_recorded",
        "unrecorded",
    }

    assert set(FLOWGLAD) == {path.stem for path in (FOLDER / "flowglad").glob("*")} == names


def test_unrecorded():
    """What was never recorded is not sent: the replay refuses it."""
    from vcr.errors import CannotOverwriteExistingCassetteException

    service = flowglad_service("balance", NOWHERE, "sk_test_of_a_replay")
    with (
        recorder("none").use_cassette(str(path_of("balance"))),
        pytest.raises(CannotOverwriteExistingCassetteException),
    ):
        service.read_balance("somebody", "generations")
