"""
Billing for Celery: who pays travels with the task, and a task that is retried is billed once.

```python
app = Celery("shop", broker=...)
carry_billing()  # where the app is made, so that the web process and the workers both do it
client = MeteredOpenAI(billing=connect(on_repeat="free"))
```
"""

from __future__ import annotations

import logging
from typing import Any

from celery import signals

from ..context import bill_to, who_pays
from ..core.payer import NOTHING

__all__ = ["carry_billing"]

_log = logging.getLogger(__name__)

HEADER = "metered_ai"


def carry_billing() -> None:
    """
    Have every task of this process carry the `bill_to` block it is sent from, and run in one like it. Again changes nothing.

    The customer, meter, amount, price slug and properties travel in a header of the message. `pricing` and `estimate` are functions and
    cannot: a task sent from a block with one is sent without a customer, which is logged, and its calls are refused unless their client
    names one. Give the worker's client the pricing instead. Tasks that a task sends carry on.

    The task's id is the transaction id of its calls: `task_…`, `.2`, `.3` and so on. When a task is retried or delivered twice, a
    `Billing` with `on_repeat="free"` answers the calls again that were billed before, and charges nothing for them; the default refuses
    them with AlreadyBilledError. Either way nothing is charged twice. What a task does should then be the same each time, in the same
    order.
    """
    signals.before_task_publish.connect(_send, dispatch_uid="metered_ai")
    signals.task_prerun.connect(_begin, dispatch_uid="metered_ai")
    signals.task_postrun.connect(_end, dispatch_uid="metered_ai")


def _send(headers: dict[str, Any] | None = None, **_: object) -> None:
    if headers is not None and HEADER not in headers:
        carried = _carried(headers.get("id"))
        if carried is not None:
            headers[HEADER] = carried


def _begin(task: Any = None, task_id: str | None = None, **_: object) -> None:
    # A task that is run eagerly has had no message: it is in the block it was called from.
    carried = task.request.get(HEADER) or (_carried(task_id) if task.request.is_eager else None)
    if carried is None:
        return
    block = bill_to(
        carried["customer"],
        meter=carried["meter"],
        amount=carried["amount"],
        price_slug=carried["price_slug"],
        properties=carried["properties"],
        transaction_id=f"task_{task_id}",
    )
    block.__enter__()
    task.request.metered_ai_block = block


def _end(task: Any = None, **_: object) -> None:
    block = getattr(task.request, "metered_ai_block", None)
    if block is not None:
        task.request.metered_ai_block = None
        block.__exit__(None, None, None)


def _carried(task_id: str | None) -> dict[str, Any] | None:
    """What a message says of the block around this moment; None where nobody pays, or where that cannot be said."""
    payer, _ = who_pays((), NOTHING)
    if payer.customer is None:
        return None
    if payer.pricing is not None or payer.estimate is not None:
        _log.error(
            "task %s is sent without its customer: the block it is sent from has a pricing or an estimate, which cannot travel",
            task_id,
        )
        return None
    return {
        "customer": payer.customer,
        "meter": payer.meter,
        "amount": payer.amount,
        "price_slug": payer.price_slug,
        "properties": None if payer.properties is None else dict(payer.properties),
    }
