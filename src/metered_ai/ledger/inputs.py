"""Checks what a step carries, before anything else happens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..core.checks import check_amount, check_name
from ..core.steps import AddGrant, Enlarge, Place, Record, Release, Renew, Revoke, Settle, SetUnlimited, Step
from ..records import MAX_AMOUNT
from .rows import microseconds

__all__ = ["ID_LIMIT", "check"]

ID_LIMIT = 255
"""Characters of a transaction's, hold's, grant's, owner's or scope's id."""

_KNOWN_AT_MOST = 10_000
_known: set[str] = set()
_accounts: set[tuple[str, str]] = set()

_ON_UNKNOWN = ("release", "charge")
_ON_REPEAT = ("refuse", "free")
_BASES = ("reported", "observed", "estimated", "held")
_KINDS = ("call", "charge")
_SENT = ("yes", "no", "unknown")


def check(step: Step) -> None:
    """Raise ValueError if a step carries anything that a ledger does not take."""
    _CHECKS[type(step)](step)


def _place(step: Place) -> None:
    lease, max_call, owner = step.lease, step.max_call, step.owner
    if not _is_usual(step):
        _account(step)
        check_name(step.hold_id, "hold_id", ID_LIMIT)
        check_amount(step.amount, "amount")
    if type(lease) is not float or not 0 < lease < 1e9:
        _seconds(lease, "lease")
    if type(max_call) is not float or not 0 < max_call < 1e9:
        _seconds(max_call, "max_call")
    if owner is not None and (type(owner) is not str or owner not in _known):
        _known_name(owner, "owner", ID_LIMIT)
    if step.operation is not None:
        check_name(step.operation, "transaction_id", ID_LIMIT)
    if step.scope is not None:
        check_name(step.scope, "scope", ID_LIMIT)
    if step.on_unknown not in _ON_UNKNOWN:
        raise _not_one_of(step.on_unknown, "on_unknown", _ON_UNKNOWN)
    if step.on_repeat not in _ON_REPEAT:
        raise _not_one_of(step.on_repeat, "on_repeat", _ON_REPEAT)
    if type(step.max_holds) is not int or step.max_holds < 1:
        raise ValueError(f"max_holds must be an int above 0, not {step.max_holds!r}")


def _is_usual(step: Place | Settle) -> bool:
    """True for an account that was checked before, an id like ours and a sound amount: what every call brings."""
    hold_id, amount = step.hold_id, step.amount
    try:
        is_known = (step.customer, step.meter) in _accounts
    except TypeError:
        return False
    return (
        is_known
        and type(hold_id) is str
        and hold_id.isalnum()
        and len(hold_id) <= ID_LIMIT
        and type(amount) is int
        and 0 <= amount <= MAX_AMOUNT
    )


def _enlarge(step: Enlarge) -> None:
    _account(step)
    check_name(step.hold_id, "hold_id", ID_LIMIT)
    check_amount(step.amount, "amount")


def _settle(step: Settle) -> None:
    if not _is_usual(step):
        _account(step)
        check_name(step.hold_id, "hold_id", ID_LIMIT)
        check_amount(step.amount, "amount")
    check_name(step.transaction_id, "transaction_id", ID_LIMIT)
    if step.basis not in _BASES:
        raise _not_one_of(step.basis, "basis", _BASES)
    if step.kind not in _KINDS:
        raise _not_one_of(step.kind, "kind", _KINDS)


def _release(step: Release) -> None:
    _account(step)
    check_name(step.hold_id, "hold_id", ID_LIMIT)
    check_name(step.reason, "reason", ID_LIMIT)
    if step.sent not in _SENT:
        raise _not_one_of(step.sent, "sent", _SENT)


def _renew(step: Renew) -> None:
    check_name(step.owner, "owner", ID_LIMIT)
    _seconds(step.lease, "lease")


def _record(step: Record) -> None:
    _account(step)
    check_name(step.transaction_id, "transaction_id", ID_LIMIT)
    check_amount(step.amount, "amount")


def _add_grant(step: AddGrant) -> None:
    _account(step)
    check_name(step.id, "grant id", ID_LIMIT)
    check_amount(step.amount, "amount", 1)
    if step.expires_at is not None:
        microseconds(step.expires_at, "expires_at")


def _revoke(step: Revoke) -> None:
    _account(step)
    check_name(step.id, "grant id", ID_LIMIT)


def _set_unlimited(step: SetUnlimited) -> None:
    _account(step)
    if type(step.is_unlimited) is not bool:
        raise ValueError(f"is_unlimited must be True or False, not {step.is_unlimited!r}")


def _account(step: Place | Enlarge | Settle | Release | Record | AddGrant | Revoke | SetUnlimited) -> None:
    if type(step.customer) is not str or step.customer not in _known:
        _known_name(step.customer, "customer")
    if type(step.meter) is not str or step.meter not in _known:
        _known_name(step.meter, "meter")
    if len(_accounts) >= _KNOWN_AT_MOST:
        _accounts.clear()
    if step.customer in _known and step.meter in _known:
        _accounts.add((step.customer, step.meter))


def _known_name(value: str, what: str, limit: int = ID_LIMIT + 1) -> None:
    """Check a name and remember it, because the same few come again and again."""
    check_name(value, what, limit)
    if len(_known) >= _KNOWN_AT_MOST:
        _known.clear()
    if len(value) <= ID_LIMIT:
        _known.add(value)


def _seconds(value: object, what: str) -> None:
    if type(value) not in (int, float) or not 0 < value < 1e9:  # type: ignore[operator]  # Checked a moment ago.
        raise ValueError(f"{what} must be a number of seconds above 0, not {value!r}")


def _not_one_of(value: object, what: str, choices: Sequence[str]) -> ValueError:
    return ValueError(f"{what} must be one of {', '.join(choices)}, not {value!r}")


_CHECKS: dict[type, Callable[[Any], None]] = {
    Place: _place,
    Enlarge: _enlarge,
    Settle: _settle,
    Release: _release,
    Renew: _renew,
    Record: _record,
    AddGrant: _add_grant,
    Revoke: _revoke,
    SetUnlimited: _set_unlimited,
}
