"""Who pays and how: the rule of precedence, as a table and as properties."""

from __future__ import annotations

import subprocess
import sys
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metered_ai import ConfigurationError, operation_id, per_call, per_token
from metered_ai.core.payer import Terms, resolve, terms

TOKENS = per_token(input=1, output=2)
FIVE = per_call(5)


def guess(request):
    return 7


def guess_more(request):
    return 9


def told(payer):
    """What was found, without what nobody gave."""
    return {name: value for name, value in payer._asdict().items() if value is not None}


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        pytest.param([], {}, id="nothing"),
        pytest.param([{}, {}], {}, id="nothing from several"),
        pytest.param([{"customer": "ada"}], {"customer": "ada"}, id="one"),
        pytest.param([{"customer": "ada"}, {"customer": "bob"}], {"customer": "ada"}, id="the nearest customer"),
        pytest.param([{}, {"customer": "bob"}], {"customer": "bob"}, id="a source that says nothing is passed over"),
        pytest.param([{"meter": "m"}, {"customer": "bob"}], {"customer": "bob", "meter": "m"}, id="field by field"),
        pytest.param([{"meter": "m"}, {"meter": "n"}], {"meter": "m"}, id="the nearest meter"),
        # A customer hides what belongs to the customers below.
        pytest.param(
            [{"customer": "ada"}, {"customer": "bob", "transaction_id": "t", "scope": "s"}],
            {"customer": "ada"},
            id="customer hides the transaction id",
        ),
        pytest.param([{"customer": "ada"}, {"amount": 5}], {"customer": "ada"}, id="customer hides the amount"),
        pytest.param(
            [{"customer": "ada"}, {"price_slug": "p"}], {"customer": "ada"}, id="customer hides the price slug"
        ),
        pytest.param(
            [{"customer": "ada"}, {"properties": {"a": 1}}], {"customer": "ada"}, id="customer hides the properties"
        ),
        pytest.param(
            [{"customer": "ada"}, {"pricing": TOKENS, "estimate": guess}],
            {"customer": "ada", "pricing": TOKENS, "estimate": guess},
            id="customer hides no pricing",
        ),
        pytest.param(
            [{"customer": "ada"}, {"amount": 5}, {"pricing": TOKENS}],
            {"customer": "ada", "pricing": TOKENS},
            id="a hidden amount hides nothing itself",
        ),
        pytest.param(
            [{"customer": "ada"}, {"meter": "m"}], {"customer": "ada", "meter": "m"}, id="customer hides no meter"
        ),
        pytest.param(
            [
                {
                    "customer": "ada",
                    "amount": 5,
                    "transaction_id": "t",
                    "scope": "s",
                    "price_slug": "p",
                    "properties": {"a": 1},
                }
            ],
            {
                "customer": "ada",
                "amount": 5,
                "transaction_id": "t",
                "scope": "s",
                "price_slug": "p",
                "properties": {"a": 1},
            },
            id="what the source with the customer says itself counts",
        ),
        pytest.param(
            [
                {"amount": 5, "transaction_id": "t", "scope": "s"},
                {"customer": "bob", "amount": 6, "transaction_id": "u"},
            ],
            {"customer": "bob", "amount": 5, "transaction_id": "t", "scope": "s"},
            id="nearer than the customer counts",
        ),
        # A meter hides prices in the units of another meter.
        pytest.param([{"meter": "m"}, {"amount": 5}], {"meter": "m"}, id="meter hides the amount"),
        pytest.param([{"meter": "m"}, {"price_slug": "p"}], {"meter": "m"}, id="meter hides the price slug"),
        pytest.param(
            [{"meter": "m"}, {"transaction_id": "t", "scope": "s", "properties": {"a": 1}}],
            {"meter": "m", "transaction_id": "t", "scope": "s", "properties": {"a": 1}},
            id="meter hides neither id nor properties",
        ),
        pytest.param([{"meter": "m"}, {"pricing": FIVE}], {"meter": "m", "pricing": FIVE}, id="meter hides no pricing"),
        pytest.param([{"meter": "m", "amount": 3}], {"meter": "m", "amount": 3}, id="the meter's own amount counts"),
        # amount, pricing and estimate are one field.
        pytest.param([{"amount": 0}, {"amount": 5}], {"amount": 0}, id="an amount of 0 counts"),
        pytest.param([{"amount": 5}, {"pricing": TOKENS}], {"amount": 5}, id="amount over pricing below"),
        pytest.param([{"pricing": TOKENS}, {"amount": 5}], {"pricing": TOKENS}, id="pricing over amount below"),
        pytest.param([{"pricing": TOKENS}, {"pricing": FIVE}], {"pricing": TOKENS}, id="the nearest pricing"),
        pytest.param([{"amount": 5}, {"estimate": guess}], {"amount": 5}, id="amount hides the estimate below"),
        pytest.param(
            [{"pricing": TOKENS}, {"estimate": guess}], {"pricing": TOKENS}, id="pricing hides the estimate below"
        ),
        pytest.param(
            [{"estimate": guess}, {"pricing": TOKENS, "estimate": guess_more}],
            {"pricing": TOKENS, "estimate": guess},
            id="an estimate alone serves the pricing below",
        ),
        pytest.param(
            [{"pricing": TOKENS, "estimate": guess}, {"estimate": guess_more}],
            {"pricing": TOKENS, "estimate": guess},
            id="a pricing with its own estimate",
        ),
        # The id and its scope go together.
        pytest.param(
            [{"transaction_id": "t", "scope": "s"}, {"transaction_id": "u", "scope": "r"}],
            {"transaction_id": "t", "scope": "s"},
            id="the nearest id, with its scope",
        ),
        # Properties merge, the nearer wins.
        pytest.param(
            [
                {"properties": {"a": 1, "b": 1}},
                {},
                {"properties": {"b": 2, "c": 2}},
                {"customer": "ada", "properties": {"d": 3}},
            ],
            {"customer": "ada", "properties": {"a": 1, "b": 1, "c": 2, "d": 3}},
            id="properties merge",
        ),
        pytest.param([{"price_slug": "p"}, {"price_slug": "q"}], {"price_slug": "p"}, id="the nearest price slug"),
    ],
)
def test_precedence(sources, expected):
    """The nearest source wins, field by field; a customer or a meter hides below it what belongs to another one."""
    found = resolve(Terms(**source) for source in sources)

    assert expected == told(found)


NAMES = st.sampled_from(["ada", "bob"])
SOURCES = st.lists(
    st.builds(
        Terms,
        customer=st.none() | NAMES,
        meter=st.none() | st.sampled_from(["m", "n"]),
        amount=st.none() | st.integers(0, 3),
        pricing=st.none() | st.sampled_from([FIVE, TOKENS]),
        estimate=st.none() | st.sampled_from([guess, guess_more]),
        price_slug=st.none() | st.sampled_from(["p", "q"]),
        transaction_id=st.none() | st.sampled_from(["t", "u"]),
        properties=st.none() | st.dictionaries(st.sampled_from("ab"), st.integers(0, 2)),
    ).map(lambda terms: terms._replace(pricing=None) if terms.amount is not None else terms),
    max_size=5,
)

BELONGS_TO_CUSTOMER = ("transaction_id", "scope", "amount", "price_slug", "properties")


@given(SOURCES, SOURCES)
def test_no_strangers_terms(near, below):
    """Whatever stands below the source that names the customer, only meter, pricing and estimate come from there."""
    near = [*near, Terms(customer="ada")]
    found, without = resolve([*near, *below]), resolve(near)

    assert [getattr(without, name) for name in BELONGS_TO_CUSTOMER] == [
        getattr(found, name) for name in BELONGS_TO_CUSTOMER
    ]
    assert without.customer == found.customer


@given(SOURCES)
def test_one_price(sources):
    """There is an amount or a pricing, never both, and never an estimate from below the price."""
    found = resolve(sources)

    assert found.amount is None or found.pricing is None
    if found.amount is not None or found.pricing is not None:
        assert found.estimate is None or found.estimate in [source.estimate for source in sources]


@given(SOURCES, st.integers(0, 5))
def test_silence_changes_nothing(sources, at):
    """A source that says nothing changes nothing, wherever it stands."""
    assert resolve(sources) == resolve([*sources[:at], Terms(), *sources[at:]])


@given(SOURCES)
def test_customer_and_meter(sources):
    """Customer and meter are the nearest ones named."""
    found = resolve(sources)

    assert next((source.customer for source in sources if source.customer), None) == found.customer
    assert next((source.meter for source in sources if source.meter), None) == found.meter


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"amount": 1, "pricing": FIVE}, ConfigurationError, "amount or pricing"),
        ({"customer": ""}, ValueError, "customer"),
        ({"customer": " ada"}, ValueError, "' ada'"),
        ({"customer": 7}, ValueError, "customer.*7"),
        ({"meter": "x" * 257}, ValueError, "meter"),
        ({"amount": -1}, ValueError, "amount.*-1"),
        ({"amount": True}, ValueError, "True"),
        ({"amount": 1.0}, ValueError, "1.0"),
        ({"amount": Decimal(1)}, ValueError, "Decimal"),
        ({"price_slug": "\0"}, ValueError, "price_slug"),
        ({"transaction_id": "x" * 256}, ValueError, "transaction_id"),
        ({"pricing": 5}, ValueError, "pricing.*5"),
        ({"estimate": 5}, ConfigurationError, "estimate.*5"),
        ({"properties": {"a": object()}}, ValueError, "properties"),
        ({"properties": {"a": float("nan")}}, ValueError, "properties"),
        ({"properties": "abc"}, ValueError, "properties"),
    ],
)
def test_bad_terms(given, error, match):
    """What cannot be is refused where it is given, by name and value."""
    with pytest.raises(error, match=match):
        terms(**given)


def test_terms_are_copied():
    """Properties are taken as they are now: changing the mapping later changes no call's record."""
    properties = {"a": [1]}
    made = terms(properties=properties)
    properties["a"].append(2)

    assert {"a": [1]} == made.properties


def test_scope_needs_an_id():
    """A scope means nothing without a transaction id."""
    assert (None, "s") == (terms(scope="s").scope, terms(scope="s", transaction_id="t").scope)


def test_operation_id():
    """The same customer and parameters give the same id, in any order and in every process; others give others."""
    code = "from metered_ai import operation_id; print(operation_id('ada', day='2026-11-23', pages=[1, 2]))"
    other = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(filter(None, sys.path)), "PYTHONHASHSEED": "7"},
    )
    mine = operation_id("ada", pages=[1, 2], day="2026-11-23")

    assert other.stdout.strip() == mine
    assert mine.startswith("op_")
    assert len({mine, operation_id("bob", day="2026-11-23", pages=[1, 2]), operation_id("ada", pages=[2, 1])}) == 3
    assert len(mine) <= 255 - len(".1000")


@pytest.mark.parametrize("bad", [object(), float("inf"), {1, 2}, b"x"])
def test_operation_id_is_plain(bad):
    """A parameter that is no plain JSON value is a ValueError: its text would differ from process to process."""
    with pytest.raises(ValueError, match="plain JSON"):
        operation_id("ada", what=bad)
