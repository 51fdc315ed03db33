"""A ledger with an account in every state, which can go away and come back."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest

from metered_ai import Usage
from metered_ai.billing import Billing
from metered_ai.core.steps import Place, Settle
from metered_ai.ledger.sqlite import SqliteLedger

GEN = "generations"
LEVELS = {
    "ok": (40, 0),
    "high": (82, 0),
    "critical": (95, 0),
    "exhausted": (100, 0),
    "in_debt": (112, 0),
    "all_held": (70, 30),
}
"""Customers, named by the state of their account: used and held, of 100 credits."""

HOSTILE = "<script>alert(1)</script>&\"'\u202e{{7*7}}\x1b[31m"


class Past:
    """The ledger's clock, which a test may set back to write a history. It only goes on."""

    def __init__(self) -> None:
        self.back = timedelta(0)
        self.last = 0

    def __call__(self) -> int:
        now = datetime.now(UTC) - self.back
        self.last = max(self.last + 1, (now - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1))
        return self.last

    def days_ago(self, days: float) -> None:
        self.back, self.last = timedelta(days=days), 0


@pytest.fixture
def past():
    return Past()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "credits.db"


@pytest.fixture
def billing(file, past):
    """A billing on a file."""
    with opened(file, past) as billing:
        yield billing


@contextmanager
def opened(path, past, **policies):
    ledger = SqliteLedger(path, durability="relaxed", clock=past)
    with Billing(ledger, spool=path.parent / "spool", **policies) as billing:
        yield billing
    ledger.close()


def use(billing, customer, amount, number, *, meter=GEN, model="gpt-5-mini"):
    """One call of a customer, from its hold to its event."""
    hold_id = f"h{time.monotonic_ns():x}_{number}"
    billing.ledger.run(Place(hold_id, customer, meter, amount, None, model=model))
    usage = Usage(model=model, endpoint="responses", input_tokens=120, output_tokens=34)
    step = Settle(hold_id, customer, meter, amount, f"gen_resp_{customer}_{number}", "reported", usage=usage)
    return billing.ledger.run(step).event


def fill(billing, customer, used, held=0, limit=100):
    """An account of `limit` credits, `used` of them used, which may be more."""
    billing.grant(customer, GEN, limit, id="order_1")
    if used > limit:
        billing.record(customer, GEN, transaction_id="export_1", amount=used)
    elif used:
        use(billing, customer, used, 1)
    if held:
        billing.ledger.run(Place("h_open", customer, GEN, held, None))


@pytest.fixture
def levels(billing):
    """The billing, with one customer in each state."""
    for customer, (used, held) in LEVELS.items():
        fill(billing, customer, used, held)
    billing.set_unlimited("unlimited", GEN, True)
    use(billing, "unlimited", 1234, 1)
    return billing


@contextmanager
def away(path):
    """The ledger is not available in this block."""
    hidden = path.with_name("hidden")
    path.rename(hidden)
    try:
        yield
    finally:
        hidden.rename(path)


@contextmanager
def serving(app):
    """The application over real HTTP on loopback; gives its address."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off"))
    sock = server.config.bind_socket()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        sock.close()
