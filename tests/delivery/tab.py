"""
Tab: a billing system of a few lines, which is not Flowglad. One number for each customer and meter, and what it was told.

It stands behind `BillingService` as an object, or behind HTTP for tests of several processes. Like real ones it refuses nothing for lack of
credits, records an id once, and fails when it likes.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from metered_ai.errors import BillingUnavailableError, NoSubscriptionError
from metered_ai.records import UsageEvent
from metered_ai.services import Delivery, ServiceBalance

__all__ = ["BulkTab", "RemoteTab", "Tab", "serving"]


class Tab:
    """
    A `BillingService` in this process.

    `fault(event)` says what happens to a request: None for nothing, an outcome to answer without recording, "lost" to record and answer
    `again`. `answering` is called before each answer to a question, after the number was read.
    """

    def __init__(self, name: str = "tab (test)", credits: int | None = None) -> None:
        self.name = name
        self.credits: dict[tuple[str, str], int | None] = {}
        self.default = credits
        self.references: dict[str, str] = {}
        self.limit: int | None = None
        self.events: dict[tuple[str, str], int] = {}
        """Amounts by customer and transaction id."""
        self.told: list[tuple[str, str, int, str | None]] = []
        """Every request: customer, id, amount and reference."""
        self.requests = 0
        self.reads: Counter[str] = Counter()
        self.in_flight: Counter[tuple[str, str]] = Counter()
        self.most_in_flight: Counter[tuple[str, str]] = Counter()
        self.is_down = False
        self.fault: Callable[[UsageEvent], str | Delivery | None] = lambda event: None
        self.answering: Callable[[], object] = lambda: None
        self.writing: Callable[[UsageEvent], object] = lambda event: None
        self.is_closed = False
        self._changed = threading.Condition()

    def give(self, customer: str, amount: int | None, meter: str = "generations") -> None:
        with self._changed:
            had = self.credits.get((customer, meter), 0)
            self.credits[customer, meter] = None if amount is None else (had or 0) + amount

    # BillingService

    def check(self, customer: str, meter: str, amount: int) -> None:
        if "/" in customer:
            raise ValueError(f"customer {customer!r}: a tab has no slashes")
        if amount > 10**9:
            raise ValueError(f"amount {amount} does not fit on a tab")

    def read_balance(self, customer: str, meter: str) -> ServiceBalance:
        with self._changed:
            self.reads[customer] += 1
            self._changed.notify_all()
        if self.is_down:
            raise BillingUnavailableError(f"{self.name} does not answer")
        with self._changed:
            if (customer, meter) not in self.credits and self.default is None:
                raise NoSubscriptionError(customer=customer, meter=meter, available=0, required=0)
            credits = self.credits.get((customer, meter), self.default)
            reference = self.references.get(customer)
        self.answering()
        return ServiceBalance(credits, reference, self.limit)

    def write_usage_event(self, event: UsageEvent) -> Delivery:
        with self._entered(event):
            return self._write(event)

    def close(self) -> None:
        self.is_closed = True

    # Its own affairs

    @contextmanager
    def _entered(self, event: UsageEvent):
        key = (event.customer, event.meter)
        with self._changed:
            self.requests += 1
            self.in_flight[key] += 1
            self.most_in_flight[key] = max(self.most_in_flight[key], self.in_flight[key])
            self._changed.notify_all()
        try:
            self.writing(event)
            yield
        finally:
            with self._changed:
                self.in_flight[key] -= 1
                self._changed.notify_all()

    def _write(self, event: UsageEvent) -> Delivery:
        assert event.amount > 0
        with self._changed:
            self.told.append((event.customer, event.transaction_id, event.amount, event.reference))
        if self.is_down:
            return Delivery("again", "down")
        fault = self.fault(event)
        if isinstance(fault, Delivery):
            return fault
        if fault is not None and fault != "lost":
            return Delivery(fault, f"a scripted {fault}")
        with self._changed:
            if (event.customer, event.transaction_id) in self.events:
                return Delivery("already_there")
            self.events[event.customer, event.transaction_id] = event.amount
            key = (event.customer, event.meter)
            credits = self.credits.setdefault(key, self.default or 0)
            if credits is not None:
                self.credits[key] = credits - event.amount
        return Delivery("again", "lost") if fault else Delivery("recorded", details={"line": str(len(self.events))})

    def wait(self, is_so: Callable[[], bool], timeout: float = 20.0) -> None:
        """Wait until something is so that an answered request may have brought about."""
        with self._changed:
            assert self._changed.wait_for(is_so, timeout), (self.events, self.told[-5:])


class BulkTab(Tab):
    """One that also takes many events at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches: list[int] = []

    def write_usage_events(self, events: Sequence[UsageEvent]) -> list[Delivery]:
        with self._entered(events[0]):
            self.batches.append(len(events))
            return [self._write(event) for event in events]


class RemoteTab:
    """A `BillingService` that reaches a `Tab` over HTTP, with a connection for each request."""

    def __init__(self, address: tuple[str, int], name: str = "tab (test)", timeout: float = 5.0) -> None:
        self.name = name
        self._address = address
        self._timeout = timeout

    def check(self, customer: str, meter: str, amount: int) -> None:
        """Everything fits."""

    def read_balance(self, customer: str, meter: str) -> ServiceBalance:
        try:
            answer = self._ask({"customer": customer, "meter": meter})
        except (OSError, HTTPException, ValueError) as error:
            raise BillingUnavailableError(f"the tab does not answer: {error}") from error
        return ServiceBalance(answer["available"], answer["reference"])

    def write_usage_event(self, event: UsageEvent) -> Delivery:
        said = {name: getattr(event, name) for name in ("customer", "meter", "transaction_id", "amount", "reference")}
        try:
            answer = self._ask(said)
        except (OSError, HTTPException, ValueError) as error:
            return Delivery("again", type(error).__name__)
        return Delivery(answer["outcome"], answer["reason"])

    def close(self) -> None:
        """Nothing is open."""

    def _ask(self, said: dict[str, Any]) -> dict[str, Any]:
        connection = HTTPConnection(*self._address, timeout=self._timeout)
        try:
            connection.request("POST", "/", json.dumps(said))
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()


@contextmanager
def serving(tab: Tab):
    """A tab behind HTTP on loopback; its address. A fault "reset" breaks the connection after the event was recorded, "garbage" answers nonsense."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            said = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if "amount" not in said:
                balance = tab.read_balance(said["customer"], said["meter"])
                self._answer({"available": balance.available, "reference": balance.reference})
                return
            event = UsageEvent(created_at=None, basis="reported", **said)
            delivery = tab.write_usage_event(event)
            if delivery.reason == "lost":
                # It is recorded, and nobody hears of it.
                self.close_connection = True
                self.connection.close()
                return
            self._answer({"outcome": delivery.outcome, "reason": delivery.reason})

        def _answer(self, said: dict[str, Any]) -> None:
            body = json.dumps(said).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Quietly."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that was killed, or a connection that was broken on purpose."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.server_address
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def soon(is_so: Callable[[], bool], timeout: float = 20.0) -> None:
    """Wait until something is so that nobody tells of: it is in a database."""
    until = time.monotonic() + timeout
    while not is_so():
        assert time.monotonic() < until, "it never became so"
        time.sleep(0.005)
