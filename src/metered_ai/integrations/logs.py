"""
One log record for every hold, settle, release and refusal, with its numbers as fields for a formatter that writes them.

```python
log_steps(billing)  # to the logger "metered_ai.steps"
```
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ..core.steps import AddGrant, Enlarge, Place, Record, Release, Revoke, Settle, Settled, SetUnlimited
from ..records import Hold, UsageEvent
from .observed import observe

if TYPE_CHECKING:
    from ..billing import Billing
    from ..core.steps import Step, StepResult
    from ..ledger import Recovery

__all__ = ["log_steps"]


def log_steps(billing: Billing, logger: logging.Logger | None = None) -> None:
    """
    Log what a billing's ledger does, from now on, to `logger` (else "metered_ai.steps").

    Messages are `placed` (DEBUG), `settled`, `released`, `granted`, `revoked`, `recorded` and `recovered` (INFO), `refused` and `in doubt`
    (WARNING) and `failed` (ERROR). Each record has the fields `customer`, `meter`, `seconds` and, as they apply, `hold_id`, `amount`,
    `transaction_id`, `basis`, `outcome`, `endpoint`, `model`, `input_tokens`, `output_tokens`, `request_id`, `reason`, `available`,
    `required`, `error`. Never a prompt, an answer, a key, or the `properties` that you gave.
    """
    observe(billing, _Log(logger or logging.getLogger("metered_ai.steps")))


class _Log:
    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def stepped(self, step: Step, outcome: StepResult | Exception, seconds: float, /) -> None:
        if isinstance(outcome, Exception):
            status = getattr(outcome, "http_status", 500)
            level, message = (logging.WARNING, "refused") if status < 500 else (logging.ERROR, "failed")
            fields = {"error": type(outcome).__name__, **_numbers(outcome, "available", "required")}
        elif isinstance(step, Release) and step.sent == "unknown":
            level, message, fields = logging.WARNING, "in doubt", {}
        elif type(step) in _WORDS:
            level, message = _WORDS[type(step)]
            fields = {}
        else:
            # A renewed lease is no news.
            return
        if self._logger.isEnabledFor(level):
            fields |= {**_of_step(step), **_of_outcome(outcome), "seconds": round(seconds, 6)}
            self._logger.log(level, message, extra=fields)

    def recovered(self, found: Recovery, /) -> None:
        fields = {"released": found.released, "charged": found.charged, "in_doubt": found.in_doubt}
        self._logger.info("recovered", extra=fields)


_WORDS: dict[type, tuple[int, str]] = {
    Place: (logging.DEBUG, "placed"),
    Enlarge: (logging.DEBUG, "placed"),
    Settle: (logging.INFO, "settled"),
    Release: (logging.INFO, "released"),
    Record: (logging.INFO, "recorded"),
    AddGrant: (logging.INFO, "granted"),
    Revoke: (logging.INFO, "revoked"),
    SetUnlimited: (logging.INFO, "unlimited"),
}

# What a step may say of itself. `properties` are the user's own, and could hold anything.
_OF_STEPS = (
    "customer",
    "meter",
    "hold_id",
    "amount",
    "basis",
    "endpoint",
    "model",
    "request_id",
    "reason",
    "is_unlimited",
)


def _of_step(step: Step) -> dict[str, Any]:
    fields = _numbers(step, *_OF_STEPS)
    usage = getattr(step, "usage", None)
    if usage is not None:
        fields |= _numbers(usage, "model", "endpoint", "input_tokens", "output_tokens")
    if isinstance(step, AddGrant | Revoke):
        fields["grant_id"] = step.id
    return fields


def _of_outcome(outcome: StepResult | Exception) -> dict[str, Any]:
    if isinstance(outcome, Settled):
        return {"transaction_id": outcome.event.transaction_id, "outcome": outcome.outcome}
    if isinstance(outcome, UsageEvent | Hold):
        return _numbers(outcome, "transaction_id")
    return _numbers(outcome, "transaction_id", "outcome")


def _numbers(source: object, *names: str) -> dict[str, Any]:
    found = {name: getattr(source, name, None) for name in names}
    return {name: value for name, value in found.items() if value is not None}
