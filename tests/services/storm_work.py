"""A process that bills through Flowglad until it is killed: `python storm_work.py LEDGER CUSTOMER PREFIX`, key and address in the environment."""

from __future__ import annotations

import itertools
import sys
from contextlib import suppress

from metered_ai import BillingUnavailableError, connect
from metered_ai.services.delivery import Sender

assert Sender.__init__.__kwdefaults__ is not None
# A claim of a process that was killed outlasts it by minutes; the test has seconds. Requests here end within four.
Sender.__init__.__kwdefaults__["lease"] = 5.0


def main() -> None:
    ledger, customer, prefix = sys.argv[1:]
    billing = connect(f"flowglad://?ledger=sqlite:///{ledger}&timeout=2")
    billed = 0
    for number in itertools.count():
        with suppress(BillingUnavailableError):
            with billing.charge(customer, "generations", amount=1 + number % 3, transaction_id=f"{prefix}_{number}"):
                pass
            billed += 1
            if billed == 4:
                print("READY", flush=True)


if __name__ == "__main__":
    main()
