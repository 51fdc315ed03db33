"""Amounts and names that come from outside."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metered_ai.core.checks import check_amount, check_name
from metered_ai.records import MAX_AMOUNT


class Hostile:
    """A value that cannot even be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize("value", [0, 1, MAX_AMOUNT])
def test_amount(value):
    """A whole number from 0 to 2^53−1 is an amount."""
    assert value == check_amount(value, "amount")


@pytest.mark.parametrize(
    "value",
    [-1, MAX_AMOUNT + 1, True, False, 1.0, float("nan"), float("inf"), "1", None, Decimal(1), [], Hostile()],
)
def test_amount_refused(value):
    """Nothing else is, not even a whole float, a Decimal or a bool; the error names the field."""
    with pytest.raises(ValueError, match="price must be an int"):
        check_amount(value, "price")


def test_amount_beyond_printing():
    """An int that Python itself does not print is refused with the same error."""
    with pytest.raises(ValueError, match="price must be an int"):
        check_amount(10**9999, "price")


def test_amount_minimum():
    """A grant of 0 is refused where at least 1 is asked for."""
    assert 1 == check_amount(1, "amount", 1)
    with pytest.raises(ValueError, match="from 1 to"):
        check_amount(0, "amount", 1)


@pytest.mark.parametrize(
    "value", ["a", "ada lovelace", "é", "e\u0301", "日本", "a\tb", "x" * 256, "😀" * 256, "a\u200b", "-", "'"]
)
def test_name(value):
    """A name is kept as it is, composed or decomposed."""
    assert value == check_name(value, "customer")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("", "1 to 256"),
        ("x" * 257, "1 to 256"),
        (" a", "white space"),
        ("a ", "white space"),
        ("a\n", "white space"),
        ("\u00a0a", "white space"),
        ("a\u2003", "white space"),
        ("a\0b", "NUL"),
        ("\0", "NUL"),
        ("a\ud800", "surrogate"),
        (b"a", "str"),
        (1, "str"),
        (None, "str"),
        (Hostile(), "str"),
    ],
)
def test_name_refused(value, reason):
    """What cannot be a name is refused with the reason; the error names the field."""
    with pytest.raises(ValueError, match=reason) as caught:
        check_name(value, "customer")
    assert str(caught.value).startswith("customer must")


def test_name_shown():
    """The error shows the value, but not a megabyte of it."""
    with pytest.raises(ValueError, match="'a\\\\x00b'"):
        check_name("a\0b", "meter")
    with pytest.raises(ValueError) as caught:
        check_name("x" * 1_000_000, "meter")
    assert len(str(caught.value)) < 500


@given(st.text())
def test_name_any_text(value):
    """Any text either stays as it is or is refused with a ValueError; what stays can be written as UTF-8."""
    try:
        name = check_name(value, "customer")
    except ValueError:
        return
    assert value == name
    assert name.strip() == name
    assert "\0" not in name.encode().decode()
