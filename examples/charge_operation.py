"""
Credits around anything that is not an OpenAI call: held while it runs, charged when it is done, given back when it fails.

Needs neither a key nor a server.
"""

from dataclasses import dataclass

from metered_ai import Billing, InsufficientCreditsError, connect


@dataclass
class Report:
    id: int
    pages: int


def build(pages: int) -> Report:
    if pages > 100:
        raise RuntimeError("the printer is out of paper")
    return Report(id=7, pages=pages)


def sell(billing: Billing, pages: int) -> str:
    try:
        with billing.charge("ada", "reports", amount=5) as charge:
            report = build(pages)
            if report.pages > 10:
                charge.raise_to(8)  # the difference is held first, or refused
            # Known only now. If this report was billed before, nothing is charged and charge.event is the earlier event.
            charge.transaction_id = f"report_{report.id}"
    except InsufficientCreditsError as error:
        return f"refused: {error.required} required, {error.available} available"
    except RuntimeError as error:
        return f"failed, nothing charged: {error}"
    return f"{charge.event.transaction_id}: {charge.event.amount} credits"


with connect() as billing:
    billing.grant("ada", "reports", 20, id="order_42")
    print(sell(billing, pages=20))
    print(sell(billing, pages=3), "(the same report: charged once)")
    print(sell(billing, pages=1000))
    print(f"left: {billing.balance('ada', 'reports').available}")
