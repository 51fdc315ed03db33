"""`metered-ai usage`: credits by day and by model, drawn once or kept up to date."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from threading import Event
from typing import Annotated, Literal, cast

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from ..billing import Billing
from ..errors import BillingUnavailableError
from ..records import UsageSum
from . import show
from .chart import usage_chart
from .commands import (
    Csv,
    ForCustomer,
    ForMeter,
    Json,
    Ledger,
    Since,
    Until,
    app,
    check_filters,
    one_format,
    opened,
    read_dates,
    unknown_words,
)
from .sheet import SUMS, print_csv

__all__ = ["usage"]

_DAYS = 30


class Part(StrEnum):
    CUSTOMER = "customer"
    DAY = "day"
    MODEL = "model"


_Parts = list[Literal["customer", "day", "meter", "model"]]


@app.command()
def usage(
    customer: ForCustomer = None,
    meter: ForMeter = None,
    since: Since = None,
    until: Until = None,
    by: Annotated[
        list[Part] | None,
        typer.Option("--by", help="For JSON and CSV: what to tell apart. Else day and model.", show_default=False),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Keep it up to date in the terminal, until Ctrl-C.")] = False,
    every: Annotated[
        float, typer.Option("--every", min=0.1, max=3600, metavar="SECONDS", help="How often --watch looks.")
    ] = 2.0,
    ledger: Ledger = None,
    json: Json = False,
    csv: Csv = False,
) -> int:
    """
    Draw credits by day and by model, each meter by itself. Days are UTC.

    Without --since it is the last 30 days. With --customer the balances stand above. More than two months are drawn by month.

    JSON and CSV, a row for each sum: customer, meter, day, model, amount, calls, input_tokens, output_tokens. customer, day and model are
    null where they are not told apart (--by).
    """
    one_format(json=json, csv=csv, watch=watch)
    check_filters(customer, meter)
    first, end = read_dates(since, until)
    wanted = [part.value for part in by] if by else ["day", "model"]
    parts = cast("_Parts", ["meter", *wanted])
    if (by or every != 2.0) and not (json or csv or watch):
        raise ValueError("--by is for --json and --csv, --every for --watch")

    def read(billing: Billing) -> list[UsageSum]:
        start = first or datetime.now(UTC) - timedelta(days=_DAYS)
        return list(billing.usage(customer, meter, since=start, until=end, by=parts))

    with opened(ledger, is_read=True) as billing:
        if json or csv:
            sums = read(billing)
            if json:
                show.print_json_list(sums)
            else:
                print_csv(SUMS, sums)
            return 0
        if watch:
            return _watch(lambda: _drawn(billing, customer, meter, read(billing)), every)
        with show.busy("Adding up…"):
            drawn = _drawn(billing, customer, meter, read(billing))
    show.console().print(drawn)
    return 0


def _drawn(billing: Billing, customer: str | None, meter: str | None, sums: Sequence[UsageSum]) -> RenderableType:
    width = show.console().width
    parts: list[RenderableType] = []
    if customer is not None:
        balances = [each for each in billing.balances(customer) if meter in (None, each.meter)]
        if balances:
            parts += [Text(show.shown(customer)), show.balance_bars(balances, is_wide=width >= 80), Text()]
    if sums:
        parts.append(usage_chart(sums, width=max(8, min(50, width - 40)), is_wide=width >= 80))
    else:
        parts.append(Text(f"No usage. {unknown_words(billing, customer, meter)}".strip()))
    return Group(*parts)


def _watch(draw: Callable[[], RenderableType], every: float) -> int:
    out = show.console()
    if not sys.stdout.isatty():
        raise ValueError("--watch needs a terminal; --json and --csv print the sums once")
    stopped = Event()
    try:
        with Live(console=out, auto_refresh=False, screen=True) as live:
            while True:
                try:
                    now = f"{datetime.now(UTC):%H:%M:%S} UTC, every {every:g} s, Ctrl-C ends"
                    live.update(Group(draw(), Text(), Text(now, style="bright_black")), refresh=True)
                except BillingUnavailableError as error:
                    # It may be locked for a moment; who watches waits.
                    live.update(Text(f"The ledger is not available now: {show.shown(str(error))}"), refresh=True)
                stopped.wait(every)
    except KeyboardInterrupt:
        return 0
