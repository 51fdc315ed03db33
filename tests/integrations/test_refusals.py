"""What a refused request is answered, whatever the framework."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest

from metered_ai import (
    AlreadyBilledError,
    BillingUnavailableError,
    CustomerRequiredError,
    FeatureRequiredError,
    InsufficientCreditsError,
    UnmeteredCallError,
    UsageNotRecordedError,
    connect,
)
from metered_ai.integrations.refusals import (
    Refusal,
    acredits_left,
    credits_left,
    operation_of,
    refusal_behind,
    refusal_of,
)


def poor(**fields):
    return InsufficientCreditsError(customer="ada", meter="generations", available=1, required=2, **fields)


def test_insufficient_credits():
    """A 402 has the seed's body and no other; where calls in flight keep the credits, it says when to try again."""
    error = poor(upgrade_url="https://example.com/credits")

    assert Refusal(402, error.to_dict(), {}) == refusal_of(error)
    assert {
        "error": "insufficient_credits",
        "message": "Insufficient credits for generations. Available: 1, Required: 2",
        "availableBalance": 1,
        "required": 2,
        "upgradeUrl": "https://example.com/credits",
    } == refusal_of(error).body
    assert {"Retry-After": "1"} == refusal_of(poor(held=3, is_transient=True)).headers


OTHERS = [
    (AlreadyBilledError(customer="ada", meter="m", transaction_id="req_1"), 409, "already_billed", False),
    (FeatureRequiredError(customer="ada", feature="images"), 403, "feature_required", False),
    (BillingUnavailableError("sqlite:////srv/credits.db is locked"), 503, "billing_unavailable", True),
    (UnmeteredCallError("batches cannot be metered"), 501, "unmetered_call", True),
    (CustomerRequiredError("no customer for responses"), 500, "billing_error", True),
    (UsageNotRecordedError("event gen_1 of 'ada' waits", result="a prompt"), 500, "billing_error", True),
]


@pytest.mark.parametrize(("error", "status", "name", "is_logged"), OTHERS, ids=lambda value: getattr(value, "name", ""))
def test_others(error, status, name, is_logged, caplog):
    """Every other error has its `http_status` and a body of JSON that tells an end user nothing of paths, customers or answers."""
    with caplog.at_level(logging.ERROR):
        refusal = refusal_of(error)

    assert (status, name) == (refusal.status, refusal.body["error"])
    text = json.dumps(refusal.body)
    assert [] == [secret for secret in ("ada", "credits.db", "prompt", "gen_1") if secret in text]
    assert ([str(error)] if is_logged else []) == [record.args[0].args[0] for record in caplog.records]


def test_behind():
    """A refusal is found behind the errors of others, however they were raised; nothing is found behind a plain one."""

    def wrapped(raise_again):
        try:
            try:
                raise poor()
            except InsufficientCreditsError as error:
                raise_again(error)
        except BaseException as error:
            return error

    def from_it(error):
        raise KeyError from error

    def in_its_stead(error):
        raise KeyError

    def in_a_group(error):
        raise BaseExceptionGroup("several", [KeyError(), error]) from None

    found = [refusal_behind(wrapped(way)) for way in (from_it, in_its_stead, in_a_group)]
    loop = KeyError()
    loop.__context__ = OSError()
    loop.__context__.__cause__ = loop

    assert [InsufficientCreditsError] * 3 == [type(error) for error in found]
    assert [None, None] == [refusal_behind(KeyError()), refusal_behind(loop)]


@pytest.mark.parametrize("request_id", ["a", "4bf92f35-77b3", "x" * 200])
def test_operation(request_id):
    """A request's id becomes the transaction id of its calls."""
    assert f"req_{request_id}" == operation_of(request_id)


@pytest.mark.parametrize("request_id", [None, "", " a", "a\0", "x" * 201])
def test_bad_operation(request_id):
    """A request without an id, or with one that cannot name a transaction, is a 400."""
    assert 400 == operation_of(request_id).status


def test_credits_left(tmp_path):
    """The header tells the credits available; nothing for an unlimited account, and nothing while the ledger does not answer."""
    with connect(f"sqlite:///{tmp_path}/credits.db") as billing:
        billing.grant("ada", "generations", 7, id="order_1")
        billing.set_unlimited("vip", "generations", True)

        assert ["7", None, "0"] == [credits_left(billing, who, "generations") for who in ("ada", "vip", "bob")]
        assert "7" == asyncio.run(acredits_left(billing, "ada", "generations"))
    assert None is credits_left(billing, "ada", "generations")
    assert None is asyncio.run(acredits_left(billing, "ada", "generations"))
