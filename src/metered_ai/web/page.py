"""The usage page of one customer, who the application says is looking."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, time, timedelta
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router

from ..billing import Billing
from ..core.checks import check_name
from ..errors import BillingUnavailableError, ConfigurationError
from ..records import Balance, UsageEvent, UsageSum
from .answers import STATIC, file_answer, html_answer, json_answer, refusal
from .newest import newest_events
from .view import UNAVAILABLE, UsageView, as_json, meter_view, view

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

__all__ = ["CustomerResolver", "UpgradeUrl", "UsagePage"]

_log = logging.getLogger(__name__)

CustomerResolver = Callable[[Request], "str | Awaitable[str | None] | None"]
"""Who is looking; None: nobody who may."""

UpgradeUrl = str | Callable[[str, str], "str | Awaitable[str | None] | None"]
"""Where a customer gets more credits on a meter."""

_RETRY_AFTER = {"retry-after": "5"}


class UsagePage:
    """
    An ASGI application; `usage_page` makes it.

    - Shows only what the resolver's customer may see, and asks it at every request. None is the one 404 that a wrong address is, too.
    - Only reads. Whatever else than GET is asked gets the same 404.
    - A ledger that is not available is a 503 that says nothing about it; an exception of the resolver is the application's own.
    """

    def __init__(
        self,
        billing: Billing,
        *,
        customer: CustomerResolver,
        meters: Mapping[str, str] | Sequence[str] | None,
        upgrade_url: UpgradeUrl | None,
        title: str,
        days: int,
        events: int,
        refresh: float,
    ) -> None:
        if not isinstance(billing, Billing):
            raise ConfigurationError(f"usage_page needs a Billing, such as client.billing, not {billing!r}")
        if not callable(customer):
            raise ConfigurationError(
                f"customer= must be a function of the request that says who asks, not {customer!r}"
            )
        if isinstance(meters, str):
            raise ConfigurationError(f"meters= must be a sequence or a mapping of names, not the str {meters!r}")
        for what, value, most in (("days", days, 366), ("events", events, 200)):
            if type(value) is not int or not 1 <= value <= most:
                raise ConfigurationError(f"{what}= must be an int from 1 to {most}, not {value!r}")
        if isinstance(refresh, bool) or not isinstance(refresh, int | float) or not 0 <= refresh <= 86400:
            raise ConfigurationError(f"refresh= must be seconds from 0 to 86400, not {refresh!r}")
        self._billing = billing
        self._customer = customer
        self._titles: dict[str, str] | None = None
        if meters is not None:
            self._titles = dict(meters) if isinstance(meters, Mapping) else {meter: meter for meter in meters}
            for meter in self._titles:
                try:
                    check_name(meter, "meters=")
                except ValueError as error:
                    raise ConfigurationError(str(error)) from None
        given = upgrade_url if upgrade_url is not None else billing.settings.upgrade_url
        self._upgrade_url = _checked(given) if isinstance(given, str) else given
        self._title = title
        self._days = days
        self._events = events
        self._refresh = refresh
        # Everything is answered in one place, so that a refusal looks the same wherever it comes from.
        self._router = Router([Route("/{path:path}", _Endpoint(self._answer))])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._router(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        path = request.path_params["path"]
        if request.method not in ("GET", "HEAD"):
            return refusal()
        if path in STATIC:
            return file_answer(path)
        show = {
            "": self._page,
            "fragment": self._fragment,
            "widget": self._widget,
            "usage.json": self._json,
        }.get(path)
        customer = None if show is None else await self._who(request)
        meter = request.query_params.get("meter") if path == "widget" else None
        if show is None or customer is None or not _is_name(customer) or (meter is not None and not _is_name(meter)):
            return refusal()
        try:
            shown = await self._read(customer, meter, is_whole=path != "widget")
        except BillingUnavailableError as error:
            _log.warning("a usage page cannot be shown: %s", error)
            return self._unavailable(path)
        return show(shown)

    async def _who(self, request: Request) -> str | None:
        if inspect.iscoroutinefunction(self._customer):
            found = await self._customer(request)
        else:
            found = await run_in_threadpool(self._customer, request)
            if inspect.isawaitable(found):
                found = await found
        if found is not None and not isinstance(found, str):
            raise ConfigurationError(f"customer= must give a str or None, not a {type(found).__name__}")
        return found

    # What is shown.

    def _page(self, shown: UsageView) -> Response:
        return html_answer("page.html", title=self._title, shown=shown, refresh=self._refresh, unavailable=None)

    def _fragment(self, shown: UsageView) -> Response:
        return html_answer("usage.html", shown=shown)

    def _widget(self, shown: UsageView) -> Response:
        return html_answer("widget.html", shown=shown)

    def _json(self, shown: UsageView) -> Response:
        return json_answer(as_json(shown))

    def _unavailable(self, path: str) -> Response:
        if path == "usage.json":
            body = {"error": "usage_unavailable", "message": UNAVAILABLE}
            return json_answer(body, status=503, headers=_RETRY_AFTER)
        return html_answer(
            "unavailable.html" if path in ("fragment", "widget") else "page.html",
            status=503,
            headers=_RETRY_AFTER,
            title=self._title,
            shown=None,
            refresh=self._refresh,
            unavailable=UNAVAILABLE,
        )

    # What is read.

    async def _read(self, customer: str, meter: str | None, *, is_whole: bool) -> UsageView:
        now = datetime.now(UTC)
        balances, sums, events = await asyncio.to_thread(self._look, customer, meter, now, is_whole=is_whole)
        meters = [
            meter_view(balance, self._title_of(balance.meter), await self._upgrade(balance)) for balance in balances
        ]
        return view(customer, meters, sums, events, now=now, days=self._days)

    def _look(
        self, customer: str, meter: str | None, now: datetime, *, is_whole: bool
    ) -> tuple[list[Balance], list[UsageSum], list[UsageEvent]]:
        billing = self._billing
        if meter is not None:
            return [billing.balance(customer, meter)], [], []
        balances = billing.balances(customer)
        if self._titles is not None:
            known = {balance.meter: balance for balance in balances}
            balances = [known.get(name) or billing.balance(customer, name) for name in self._titles]
        if not is_whole:
            return balances, [], []
        first = datetime.combine(now.date() - timedelta(days=self._days - 1), time(), UTC)
        sums = list(billing.usage(customer, since=first, by=("day", "meter")))
        events = [
            event for balance in balances for event in newest_events(billing, customer, balance.meter, self._events)
        ]
        events.sort(key=lambda event: event.created_at, reverse=True)
        return balances, sums, events[: self._events]

    def _title_of(self, meter: str) -> str:
        return meter if self._titles is None else self._titles.get(meter, meter)

    async def _upgrade(self, balance: Balance) -> str | None:
        where = self._upgrade_url
        if where is None or isinstance(where, str) or not (balance.show_upgrade or balance.is_exhausted):
            return where if isinstance(where, str) else None
        found = where(balance.customer, balance.meter)
        url = await found if inspect.isawaitable(found) else found
        return None if url is None else _checked(url)


class _Endpoint:
    """As a class an endpoint takes every method, so that the refusal is ours."""

    def __init__(self, answer: Callable[[Request], Awaitable[Response]]) -> None:
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._answer(Request(scope, receive))
        await response(scope, receive, send)


def _is_name(text: str) -> bool:
    try:
        check_name(text, "name")
    except ValueError:
        return False
    return True


def _checked(url: object) -> str:
    """A link for a customer to follow must lead to a page, not run something."""
    if isinstance(url, str) and url and url.isprintable():
        try:
            parts = urlsplit(url)
        except ValueError:
            parts = None
        if parts is not None and (parts.scheme in ("https", "http") or (not parts.scheme and not parts.netloc)):
            return url
    raise ConfigurationError(f"upgrade_url must be an https URL or a path of this site, not {url!r}")
