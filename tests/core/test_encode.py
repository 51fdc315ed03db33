from __future__ import annotations

import enum
import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta, timezone
from types import MappingProxyType
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metered_ai.core.encode import step_from_json, step_to_json
from metered_ai.core.steps import AddGrant, Enlarge, Place, Record, Release, Renew, Revoke, Settle, SetUnlimited, Step
from metered_ai.records import MAX_AMOUNT, Basis, Usage

SETTLE = Settle("h1", "ada", "generations", 3, "gen_resp_1", "reported")

amounts = st.integers(0, MAX_AMOUNT)
names = st.text(max_size=20)
maybe = st.one_of(st.none(), names)
flags = st.booleans()
numbers = st.one_of(st.none(), amounts)
floats = st.floats(allow_nan=False, allow_infinity=False)
usages = st.one_of(
    st.none(),
    st.builds(
        Usage,
        model=maybe,
        endpoint=maybe,
        service_tier=maybe,
        input_tokens=numbers,
        cached_input_tokens=numbers,
        cache_write_tokens=numbers,
        output_tokens=numbers,
        reasoning_tokens=numbers,
        audio_tokens=numbers,
        seconds=st.one_of(st.none(), floats),
        images=numbers,
        characters=numbers,
    ),
)
values = st.recursive(
    st.one_of(st.none(), flags, st.integers(), floats, names),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=3)),
    max_leaves=8,
)
properties = st.one_of(st.none(), st.dictionaries(names, values, max_size=4))
zones = st.integers(-23, 23).map(lambda hours: timezone(timedelta(hours=hours)))
steps: st.SearchStrategy[Step] = st.one_of(
    st.builds(
        Settle,
        names,
        names,
        names,
        amounts,
        names,
        st.sampled_from(get_args(Basis)),
        flags,
        maybe,
        usages,
        maybe,
        numbers,
        names,
        properties,
        maybe,
        maybe,
        flags,
    ),
    st.builds(Release, names, names, names, st.sampled_from(["not_sent", "unknown"]), st.sampled_from(["yes", "no"])),
    st.builds(Record, names, names, names, amounts, usages, properties, maybe),
    st.builds(
        Place,
        names,
        names,
        names,
        amounts,
        maybe,
        floats,
        floats,
        st.sampled_from(["release", "charge"]),
        maybe,
        maybe,
        st.sampled_from(["refuse", "free"]),
        maybe,
        maybe,
        maybe,
        maybe,
        properties,
        amounts,
    ),
    st.builds(Enlarge, names, names, names, amounts),
    st.builds(Renew, names, floats),
    st.builds(AddGrant, names, names, amounts, names, st.one_of(st.none(), st.datetimes(timezones=zones))),
    st.builds(Revoke, names, names, names),
    st.builds(SetUnlimited, names, names, flags),
)


@given(steps)
def test_round_trip(step: Step) -> None:
    """Whatever a step holds, it is the same step after it was written down and read."""
    text = step_to_json(step)

    assert step == step_from_json(text)
    assert text.isascii()
    assert text.splitlines() == [text]


def test_every_step_is_covered() -> None:
    """A step that is added to the union must also be one that can be written down."""
    examples: dict[type, Step] = {
        Place: Place("h1", "ada", "generations", 1, None),
        Enlarge: Enlarge("h1", "ada", "generations", 2),
        Settle: SETTLE,
        Release: Release("h1", "ada", "generations", "cancelled", "unknown"),
        Renew: Renew("o1", 120.0),
        Record: Record("ada", "exports", "export_9", 1),
        AddGrant: AddGrant("ada", "generations", 5, "order_1", datetime(2031, 2, 3, tzinfo=UTC)),
        Revoke: Revoke("ada", "generations", "order_1"),
        SetUnlimited: SetUnlimited("vip", "generations", True),
    }

    assert set(get_args(Step)) == set(examples)
    assert list(examples.values()) == [step_from_json(step_to_json(step)) for step in examples.values()]


def test_form() -> None:
    """The written form is compact and names the step and the version, so that a later release can still read it."""
    expected = (
        '{"step":"settle","version":1,"hold_id":"h1","customer":"ada","meter":"generations","amount":3,'
        '"transaction_id":"gen_resp_1","basis":"reported","is_explicit":false,"kind":"call","is_unlimited":false}'
    )

    assert expected == step_to_json(SETTLE)


def test_properties_become_plain() -> None:
    """Any mapping, a tuple and an enum of strings are written as what JSON has for them."""

    class Plan(enum.StrEnum):
        PRO = "pro"

    step = Record("ada", "exports", "export_9", 1, properties=MappingProxyType({"plan": Plan.PRO, "size": (1, 2)}))
    expected = Record("ada", "exports", "export_9", 1, properties={"plan": "pro", "size": [1, 2]})

    assert expected == step_from_json(step_to_json(step))


def _cycle() -> dict[str, Any]:
    cycle: dict[str, Any] = {}
    cycle["again"] = cycle
    return cycle


@pytest.mark.parametrize(
    ("content", "seen"),
    [
        ({"secret": object()}, "record.properties holds a object, which JSON cannot carry"),
        ({"secret": [b"secret"]}, "record.properties holds a bytes, which JSON cannot carry"),
        ({"secret": {7: "secret"}}, "a key in record.properties must be str, not int"),
        ({"secret": float("nan")}, "record.properties must be a finite number"),
        (_cycle(), "the properties of a record are nested too deeply for JSON"),
    ],
)
def test_properties_that_json_cannot_carry(content: Mapping[str, Any], seen: str) -> None:
    """What would come back as something else is refused when it is written, without showing the content."""
    step = Record("ada", "exports", "export_9", 1, properties=content)

    with pytest.raises(ValueError, match="record") as caught:
        step_to_json(step)

    assert seen == str(caught.value)


def test_wrong_types_are_not_written() -> None:
    """A step that could not be read back is refused when it is written."""
    step = Record("ada", "exports", "export_9", 1.5)  # type: ignore[arg-type]  # the mistake under test

    with pytest.raises(ValueError, match=r"^record\.amount must be int, not float$"):
        step_to_json(step)


def _change(**values: object) -> str:
    return json.dumps(json.loads(step_to_json(SETTLE)) | values)


def _without(name: str) -> str:
    return json.dumps({key: value for key, value in json.loads(step_to_json(SETTLE)).items() if key != name})


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        (lambda: '{"step":"sett', "these 13 characters are no JSON"),
        (lambda: "[" * 100_000, "these 100000 characters are no JSON"),
        (lambda: "[]", "a step in JSON must be dict, not list"),
        (lambda: _change(version=2), "this release reads steps of version 1, not 2"),
        (lambda: _change(version=True), "this release reads steps of version 1, not True"),
        (lambda: _without("version"), "this release reads steps of version 1, not None"),
        (lambda: _change(step="refund"), "there is no step 'refund'"),
        (lambda: _change(step=["settle"]), r"there is no step \['settle'\]"),
        (lambda: _without("amount"), r"settle\.amount is missing"),
        (lambda: _change(amount=None), r"settle\.amount must be int, not NoneType"),
        (lambda: _change(amount=True), r"settle\.amount must be int, not bool"),
        (lambda: _change(amount=1.0), r"settle\.amount must be int, not float"),
        (lambda: _change(is_explicit=0), r"settle\.is_explicit must be bool, not int"),
        (lambda: _change(basis="guessed"), r"settle\.basis must be one of .*, not 'guessed'"),
        (lambda: _change(tip=5), "settle has no field 'tip'"),
        (lambda: _change(usage=[]), r"settle\.usage must be Mapping, not list"),
        (lambda: _change(usage={"tokens": 5}), r"settle\.usage has no field 'tokens'"),
        (lambda: _change(usage={"seconds": "5"}), r"settle\.usage\.seconds must be float, not str"),
        (lambda: _change(usage={"seconds": float("inf")}), r"settle\.usage\.seconds must be a finite number"),
        (lambda: _change(properties="secret"), r"^settle\.properties must be Mapping, not str$"),
        (
            lambda: json.dumps(
                {
                    "step": "add_grant",
                    "version": 1,
                    "customer": "a",
                    "meter": "m",
                    "amount": 1,
                    "id": "g",
                    "expires_at": "soon",
                }
            ),
            r"add_grant\.expires_at must be a moment in ISO 8601, not 'soon'",
        ),
    ],
)
def test_malformed(text: Callable[[], str], seen: str) -> None:
    """What no `step_to_json` of this version wrote is a ValueError that tells what was seen."""
    with pytest.raises(ValueError, match=seen):
        step_from_json(text())
