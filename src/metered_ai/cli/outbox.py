"""The commands for a ledger that serves a remote billing service: `deliver` for cron, `outbox` to see and replay what is stuck."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from ..errors import ConfigurationError
from . import show
from .commands import ROWS, Csv, ForCustomer, ForMeter, Json, Ledger, Limit, app, one_format, opened, print_list
from .sheet import OUTBOX

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..records import Deliveries, OutboxSummary, Undelivered

__all__: list[str] = []


class OutboxState(StrEnum):
    WAITING = "waiting"
    PARKED = "parked"
    DEAD = "dead"


@app.command()
def deliver(
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.0, metavar="SECONDS", help="For how long at most.")
    ] = 30.0,
    ledger: Ledger = None,
    json: Json = False,
) -> int:
    """
    Tell the remote billing service of the usage it does not have yet. For cron: a running program does it by itself.

    The ledger is one with a service, such as flowglad://?ledger=sqlite:///credits.db, with its key in the environment. Exits with 1 if
    something is left that time alone will not mend: parked or dead usage, or a service that refuses us.

    JSON: delivered, waiting, parked, dead, alarm.
    """
    with opened(ledger) as billing:
        done = billing.deliver(timeout)

    if json:
        show.print_json(done)
    else:
        out = show.console()
        for sentence in _delivery_words(done):
            out.print(sentence)
    return 1 if done.parked or done.dead or done.alarm else 0


@app.command()
def outbox(
    customer: ForCustomer = None,
    meter: ForMeter = None,
    state: Annotated[OutboxState | None, typer.Option("--state", help="Only these.", show_default=False)] = None,
    replay: Annotated[bool, typer.Option("--replay", help="Let what is parked or dead be sent again.")] = False,
    transaction: Annotated[
        str | None,
        typer.Option("--id", metavar="ID", help="With --replay: only this transaction id.", show_default=False),
    ] = None,
    limit: Limit = None,
    ledger: Ledger = None,
    json: Json = False,
    csv: Csv = False,
) -> None:
    """
    List usage that the remote billing service does not have yet, and why. Needs no key: only the ledger is read.

    Parked: the customer's meter is stuck at the service, and all of its usage waits. Dead: the service can never record this as it is.
    Once that is put right there, --replay lets it be sent again, all of it or what --customer, --meter and --id name; a parked
    meter as a whole.

    JSON and CSV: event (an object with the keys of `events`, in CSV as columns event_customer and so on), state (waiting, parked, dead),
    amount (what the service is told), attempts, reason, age (seconds), not_before. With --replay an object, only as JSON: replayed.
    """
    one_format(json=json, csv=csv, replay=csv and replay)
    if transaction is not None and not replay:
        raise ConfigurationError("--id goes with --replay")
    with opened(ledger, is_read=True) as billing:
        if replay:
            count = billing.replay(customer, meter, transaction_id=transaction)
            if json:
                show.print_json({"replayed": count})
            else:
                show.console().print(f"{show.count(count, 'usage event')} will be sent again.")
            return
        every = billing.outbox(customer, meter, state=None if state is None else state.value)
        if (json or csv) and not limit:
            print_list(OUTBOX, every, csv=csv)
            return
        rows, total = show.latest(every, ROWS if limit is None else limit or None, lambda one: one.event.created_at)
        summary = billing.outbox_summary()

    if json or csv:
        print_list(OUTBOX, rows, csv=csv)
        return
    out = show.console()
    if rows:
        out.print(_outbox_table(rows))
    if len(rows) < total:
        out.print(f"The newest {len(rows):,} of {show.count(total, 'usage event')}; --limit 0 shows all.")
    out.print(_summary_words(summary))


def _delivery_words(done: Deliveries) -> Iterable[str]:
    yield f"{show.count(done.delivered, 'usage event')} delivered."
    if done.waiting or done.parked or done.dead:
        yield _left(done)
    if done.alarm:
        yield show.shown(done.alarm[:1].upper() + done.alarm[1:] + ".")


def _summary_words(found: OutboxSummary) -> str:
    if found.oldest is None:
        return "Everything is delivered."
    return f"{_left(found)} The oldest is {_age(found.oldest)} old."


def _left(found: Deliveries | OutboxSummary) -> str:
    return f"Left: {found.waiting:,} waiting, {found.parked:,} parked, {found.dead:,} dead."


def _age(seconds: float) -> str:
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= 2 * length:
            return show.count(int(seconds // length), unit)
    return show.count(int(seconds), "second")


def _outbox_table(rows: Iterable[Undelivered]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("at (UTC)", "customer", "meter"):
        table.add_column(name, overflow="fold")
    table.add_column("credits", justify="right", no_wrap=True)
    for name in ("state", "tries", "reason", "transaction id"):
        table.add_column(name, overflow="fold")
    for row in rows:
        cells = (
            show.moment(row.event.created_at),
            show.shown(row.event.customer),
            show.shown(row.event.meter),
            f"{row.amount:,}",
            row.state,
            f"{row.attempts:,}",
            show.shown(row.reason or ""),
            show.shown(row.event.transaction_id),
        )
        table.add_row(*(Text(cell) for cell in cells))
    return table
