"""The operator's view of a ledger, for one person at this machine: `metered-ai serve`."""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from ..billing import Billing
from ..errors import BillingUnavailableError
from ..records import Balance, Grant, Hold, Undelivered, UsageEvent
from .answers import PRIVATE, file_answer, html_answer, refusal
from .newest import newest_events
from .tokens import LONGEST, Tokens

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

__all__ = ["OperatorView"]

_log = logging.getLogger(__name__)

ROWS = 50
"""Rows of a list on one page."""


@dataclass(slots=True)
class _Totals:
    """One meter, over all customers. Meters are never added together: their credits are different things."""

    accounts: int = 0
    limit: int = 0
    used: int = 0
    held: int = 0
    debt: int = 0
    exhausted: int = 0
    unlimited: int = 0

    def add(self, balance: Balance) -> None:
        self.accounts += 1
        self.limit += balance.limit or 0
        self.used += balance.used + balance.unlimited_used
        self.held += balance.held
        self.debt += balance.debt
        self.exhausted += balance.is_exhausted
        self.unlimited += balance.limit is None


@dataclass(slots=True)
class _Overview:
    ledger: str
    as_of: datetime
    problems: list[str]
    meters: dict[str, _Totals] = field(default_factory=dict[str, _Totals])
    accounts: list[tuple[Balance, str]] = field(default_factory=list[tuple[Balance, str]])
    first: int = 0
    total: int = 0
    open_holds: list[Hold] = field(default_factory=list[Hold])
    open_count: int = 0
    doubtful: list[Hold] = field(default_factory=list[Hold])
    doubtful_count: int = 0
    outbox: list[Undelivered] | None = None
    outbox_count: int = 0
    links: dict[str, str] = field(default_factory=dict[str, str])


class OperatorView:
    """
    An ASGI application: customers, meters, holds in flight, calls in doubt, debt, the outbox, `verify`.

    - Only who has a token gets in: `link()` makes one, good once and for a few minutes. It is exchanged for a cookie that lasts as long again.
    - Which customer a page shows is inside a signed token, never in a query, and good only in the session it was made for.
    - A request under a host name that is not this machine's is refused, so that no web page can reach it through a name of its own.
    - Only GET. Whatever is refused is the same 404. Nothing is stored, and no script runs.
    """

    def __init__(
        self,
        billing: Billing,
        tokens: Tokens,
        *,
        hosts: Iterable[str],
        seconds: float = LONGEST,
        customer: str | None = None,
    ) -> None:
        self._billing = billing
        self._tokens = tokens
        self._hosts = frozenset(hosts)
        self._seconds = min(seconds, LONGEST)
        self._customer = customer
        # Cookies know no ports: two servers of one machine must not take each other's.
        self._cookie = f"metered-ai-{id(self):x}"
        self._verifying = asyncio.Lock()

    def link(self) -> str:
        """The path with a new token, to be opened once."""
        return f"/enter/{self._tokens.sign('enter', self._seconds)}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        response = await self._answer(Request(scope, receive))
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        path = request.scope["path"]
        if request.method != "GET" or request.headers.get("host") not in self._hosts:
            return refusal()
        if path == "/usage.css":
            return file_answer("usage.css")
        if path.startswith("/enter/"):
            return self._enter(path.removeprefix("/enter/"))
        session = self._tokens.read(request.cookies.get(self._cookie, ""), "session")
        if session is None:
            return refusal()
        asked: dict[str, Any] = {"page": "overview", "first": 0}
        if path.startswith("/see/"):
            signed = self._tokens.read(path.removeprefix("/see/"), "see")
            if signed is None or signed["session"] != session["session"]:
                return refusal()
            asked = signed
        elif path != "/":
            return refusal()

        def sign(page: str, **content: Any) -> str:
            return "/see/" + self._tokens.sign("see", LONGEST, {"page": page, "session": session["session"], **content})

        try:
            if asked["page"] == "account":
                return await self._account(asked["customer"], asked["meter"])
            if asked["page"] == "verify":
                return await self._verify()
            return await self._overview(asked["first"], sign)
        except BillingUnavailableError as error:
            _log.warning("the ledger cannot be shown: %s", error)
            return html_answer(
                "operator_away.html", status=503, problem=str(error), title="The ledger is not available"
            )

    def _enter(self, token: str) -> Response:
        if self._tokens.spend(token, "enter") is None:
            return refusal()
        session = self._tokens.sign("session", self._seconds, {"session": token.rpartition(".")[2]})
        answer = RedirectResponse("/", status_code=303, headers=PRIVATE)
        answer.set_cookie(self._cookie, session, max_age=int(self._seconds), httponly=True, samesite="strict")
        return answer

    # Pages.

    async def _overview(self, first: int, sign: Callable[..., str]) -> Response:
        shown = await asyncio.to_thread(self._look, first)
        shown.accounts = [
            (balance, sign("account", customer=balance.customer, meter=balance.meter)) for balance, _ in shown.accounts
        ]
        shown.links = {"verify": sign("verify")}
        if first:
            shown.links["back"] = sign("overview", first=max(0, first - ROWS))
        if first + ROWS < shown.total:
            shown.links["on"] = sign("overview", first=first + ROWS)
        return html_answer("operator.html", shown=shown, rows=ROWS, title="Ledger")

    def _look(self, first: int) -> _Overview:
        billing = self._billing
        shown = _Overview(billing.ledger.name, datetime.now(UTC), billing.readiness(), first=first)

        def counted() -> Iterable[Balance]:
            accounts = billing.accounts() if self._customer is None else billing.balances(self._customer)
            for balance in accounts:
                shown.total += 1
                shown.meters.setdefault(balance.meter, _Totals()).add(balance)
                yield balance

        wanted = heapq.nsmallest(first + ROWS, counted(), key=_urgency)
        shown.accounts = [(balance, "") for balance in wanted[first:]]

        def open_holds() -> Iterable[Hold]:
            for hold in billing.holds(self._customer, state="open"):
                shown.open_count += 1
                yield hold

        def doubtful() -> Iterable[Hold]:
            for hold in billing.holds(self._customer):
                if hold.is_in_doubt:
                    shown.doubtful_count += 1
                    yield hold

        shown.open_holds = heapq.nsmallest(ROWS, open_holds(), key=lambda hold: hold.placed_at)
        shown.doubtful = heapq.nlargest(ROWS, doubtful(), key=lambda hold: hold.ended_at or hold.placed_at)
        shown.outbox, shown.outbox_count = self._outbox()
        return shown

    def _outbox(self) -> tuple[list[Undelivered] | None, int]:
        """What a remote service has not been told yet; None where there is no service."""
        if getattr(self._billing.ledger, "service", None) is None:
            return None, 0
        rows = self._billing.outbox(self._customer)
        kept = list(islice(rows, ROWS))
        return kept, len(kept) + sum(1 for _ in rows)

    async def _account(self, customer: str, meter: str) -> Response:
        def look() -> tuple[Balance, list[Grant], list[Hold], list[UsageEvent]]:
            billing = self._billing
            return (
                billing.balance(customer, meter),
                heapq.nlargest(ROWS, billing.grants(customer, meter), key=lambda grant: grant.created_at),
                heapq.nlargest(ROWS, billing.holds(customer, meter), key=lambda hold: hold.placed_at),
                newest_events(billing, customer, meter, ROWS),
            )

        balance, grants, holds, events = await asyncio.to_thread(look)
        title = f"{customer} on {meter}"
        return html_answer(
            "operator_account.html", title=title, balance=balance, grants=grants, holds=holds, events=events
        )

    async def _verify(self) -> Response:
        # One at a time: it reads the whole ledger.
        async with self._verifying:
            found = await self._billing.averify()
        return html_answer("operator_verify.html", title="Verification", found=found)


def _urgency(balance: Balance) -> tuple[int, int, str, str]:
    """What needs a look comes first: debt, then the most used."""
    return -balance.debt, -(balance.percent_used or 0), balance.customer, balance.meter
