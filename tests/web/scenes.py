"""What is on the pages in tests and in screenshots: accounts in every state, a month of use, an application, a browser."""

from __future__ import annotations

import shutil
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

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


def fill(billing, customer, used, held=0, limit=100, meter=GEN):
    """An account of `limit` credits, `used` of them used, which may be more."""
    billing.grant(customer, meter, limit, id="order_1")
    if used > limit:
        billing.record(customer, meter, transaction_id="export_1", amount=used)
    elif used:
        use(billing, customer, used, 1, meter=meter)
    if held:
        billing.ledger.run(Place(f"h_open_{meter}", customer, meter, held, None))


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


def write_history(billing, past, days=30):
    """A customer with a month of use on three meters: one runs low, one is used up, one is unlimited."""
    past.days_ago(days)
    billing.grant("ada", GEN, 1200, id="order_41")
    billing.grant("ada", "images", 40, id="order_42")
    billing.set_unlimited("ada", "reports", True)
    for day in range(days - 1, -1, -1):
        past.days_ago(day + 0.01)
        use(billing, "ada", 12 + (day * 7) % 31, f"a{day}")
        use(billing, "ada", 4 + (day * 5) % 9, f"b{day}", model="gpt-5")
        if day % 3 == 0:
            use(billing, "ada", 4, f"c{day}", meter="images", model="gpt-image-1")
        billing.record("ada", "reports", transaction_id=f"report_{day}", amount=1 + day % 4)
    past.days_ago(0)


def fill_every_level(billing, customer="every"):
    """One customer with a meter in each state."""
    for level, (used, held) in LEVELS.items():
        fill(billing, customer, used, held, meter=level)
    billing.set_unlimited(customer, "unlimited", True)
    use(billing, customer, 1234, 1, meter="unlimited")


# ---- a browser ----

QUIET = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --disable-dev-shm-usage --hide-scrollbars"
).split()
"""Chromium in a container, which asks nobody on the Internet anything."""


def find_chromium():
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def chromium():
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=QUIET)
        try:
            yield browser
        finally:
            browser.close()
