"""Checks of what comes from outside: amounts and names. A ValueError names the field and the value."""

from __future__ import annotations

from ..records import MAX_AMOUNT

__all__ = ["check_amount", "check_name"]


def check_amount(value: object, what: str, minimum: int = 0) -> int:
    """
    Return `value` if it is a whole number of credits from `minimum` to 2^53−1, else raise ValueError.

    A bool, a float or a Decimal is refused even where it is whole: rounding is decided by a pricing, never here.
    """
    if type(value) is int and minimum <= value <= MAX_AMOUNT:
        return value
    raise ValueError(f"{what} must be an int from {minimum} to {MAX_AMOUNT}, not {_shown(value)}")


def check_name(value: object, what: str, limit: int = 256) -> str:
    """
    Return `value` if it can name a customer, a meter or a transaction, else raise ValueError.

    1 to `limit` characters, no NUL, no lone surrogate, no white space at either end. Names are compared as they are, never
    normalised: normalising would silently merge two accounts.
    """
    if type(value) is not str:
        raise ValueError(f"{what} must be a str of 1 to {limit} characters, not {_shown(value)}")
    if value.isascii() and value.isprintable() and 0 < len(value) <= limit and value[0] != " " and value[-1] != " ":
        return value
    if not 0 < len(value) <= limit:
        raise ValueError(f"{what} must have 1 to {limit} characters, not {len(value)}: {_shown(value)}")
    if value.strip() != value:
        raise ValueError(f"{what} must not begin or end with white space: {_shown(value)}")
    if "\0" in value:
        raise ValueError(f"{what} must not contain NUL: {_shown(value)}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{what} must not contain lone surrogates: {_shown(value)}")
    return value


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except Exception as error:  # noqa: BLE001  A foreign __repr__, or an int with more digits than Python prints.
        return f"a {type(value).__name__} without a repr ({type(error).__name__})"
    return text if len(text) <= 300 else f"{text[:300]}… ({len(text)} characters)"
