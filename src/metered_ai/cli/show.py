"""How things look: bars, tables, dates and JSON. What comes from a ledger is shown as plain text, whatever it holds."""

from __future__ import annotations

import heapq
import json
import os
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..ledger.reports import Recovery, Verification
from ..records import Balance, Grant, Hold, UsageEvent

__all__ = [
    "balance_bars",
    "busy",
    "console",
    "count",
    "event_table",
    "grant_words",
    "hold_table",
    "latest",
    "moment",
    "plain",
    "print_json",
    "print_json_list",
    "recovery_words",
    "revoke_words",
    "shown",
    "speaks_unicode",
    "verification_words",
]

_T = TypeVar("_T")

PIPED_WIDTH = 160
"""Columns where no terminal tells how many it has: room for ids, so that what is read by programs is not folded."""

_COLOURS = {"ok": "green", "high": "yellow", "critical": "red", "exhausted": "red", "unlimited": "cyan"}


def console() -> Console:
    """Where to print: colours only on a terminal and without NO_COLOR; no markup, no emoji codes, nothing guessed."""
    is_piped = not sys.stdout.isatty() and not os.environ.get("COLUMNS")
    return Console(file=sys.stdout, markup=False, emoji=False, highlight=False, width=PIPED_WIDTH if is_piped else None)


@contextmanager
def busy(words: str) -> Generator[None]:
    """Says on a terminal's stderr that something may take long, and for how long it has."""
    err = Console(file=sys.stderr, markup=False, emoji=False, highlight=False)
    if not err.is_terminal:
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        progress.add_task(words, total=None)
        yield


def shown(text: str) -> str:
    """A text with everything escaped that is not printable: no id can move a cursor, ring a bell or turn text around."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )


def count(number: int, one: str, many: str | None = None) -> str:
    """`1 hold`, `2 holds`, `12,000 holds`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def moment(at: datetime | None) -> str:
    """A time in UTC, to the second."""
    return "" if at is None else f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def latest(rows: Iterable[_T], limit: int | None, at: Callable[[_T], datetime]) -> tuple[list[_T], int]:
    """The newest `limit` rows (None: all), oldest first, and how many there were; only as many as asked for are kept."""
    total = 0

    def counted() -> Iterator[_T]:
        nonlocal total
        for row in rows:
            total += 1
            yield row

    kept = sorted(counted(), key=at) if limit is None else heapq.nlargest(limit, counted(), key=at)[::-1]
    return kept, total


# ---- balances ----


def balance_bars(balances: Iterable[Balance], *, is_wide: bool = True) -> Table:
    """One line for each meter: the bar, the per cent and the numbers. The words say what the colours say."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=False, overflow="fold")
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    table.add_column(overflow="fold")
    for balance in balances:
        colour = _COLOURS[balance.level]
        percent = balance.percent_used
        table.add_row(
            Text(shown(balance.meter), style="bold"),
            _bar(balance, 28 if is_wide else 12),
            Text("" if percent is None else f"{percent} %", style=colour),
            Text(_numbers(balance)),
        )
    return table


def _bar(balance: Balance, width: int) -> Text:
    if balance.limit is None:
        return Text("unlimited", style=_COLOURS["unlimited"])

    used, held, free = ("█", "▓", "░") if speaks_unicode() else ("#", "+", "-")
    if balance.limit <= 0:
        filled = taken = width
    else:
        # Rounded up, so that little is not nothing; but what is left shows, too.
        room = width - 1 if balance.available else width
        filled, taken = (
            min(room, -(-part * width // balance.limit)) for part in (balance.used, balance.used + balance.held)
        )
    colour = _COLOURS[balance.level]
    return Text.assemble(
        (used * filled, colour), (held * (taken - filled), colour), (free * (width - taken), "bright_black")
    )


def speaks_unicode() -> bool:
    return (sys.stdout.encoding or "ascii").lower().replace("-", "").startswith("utf")


def _numbers(balance: Balance) -> str:
    if balance.limit is None:
        words = f"{balance.unlimited_used:,} used without a limit"
        return f"{words}, {balance.used:,} before that" if balance.used else words

    words = f"{balance.used:,} of {balance.limit:,} used, {balance.available:,} available"
    if balance.held:
        words += f", {balance.held:,} held"
    if balance.debt:
        words += f", {balance.debt:,} in debt"
    if balance.unlimited_used:
        words += f"; {balance.unlimited_used:,} while unlimited"
    if balance.level != "ok":
        words += f" ({balance.level})"
    return words


# ---- tables ----


def event_table(events: Iterable[UsageEvent], *, customer: str | None = None, meter: str | None = None) -> Table:
    """Usage events as a table; what was filtered for is not repeated in every line."""
    table = _table("time (UTC)")
    if customer is None:
        table.add_column("customer", overflow="fold")
    if meter is None:
        table.add_column("meter", overflow="fold")
    table.add_column("credits", justify="right", no_wrap=True)
    table.add_column("basis", no_wrap=True)
    table.add_column("model", overflow="fold")
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("transaction id", overflow="fold")
    for event in events:
        usage = event.usage
        who = [shown(name) for name, given in ((event.customer, customer), (event.meter, meter)) if given is None]
        read, wrote = (None, None) if usage is None else (usage.input_tokens, usage.output_tokens)
        _add(
            table,
            moment(event.created_at),
            *who,
            f"{event.amount:,}",
            (event.basis if event.kind == "call" else event.kind) + (", late" if event.is_late else ""),
            shown(usage.model or "") if usage is not None else "",
            "" if read is None and wrote is None else f"{read or 0:,} + {wrote or 0:,}",
            shown(event.transaction_id),
        )
    return table


def hold_table(holds: Iterable[Hold], *, customer: str | None = None, meter: str | None = None) -> Table:
    """Holds as a table: open ones and those that ended without being settled."""
    table = _table("placed (UTC)")
    if customer is None:
        table.add_column("customer", overflow="fold")
    if meter is None:
        table.add_column("meter", overflow="fold")
    table.add_column("credits", justify="right", no_wrap=True)
    table.add_column("state", overflow="fold")
    table.add_column("until (UTC)", no_wrap=True)
    table.add_column("model", overflow="fold")
    table.add_column("hold", overflow="fold")
    for hold in holds:
        who = [shown(name) for name, given in ((hold.customer, customer), (hold.meter, meter)) if given is None]
        _add(
            table,
            moment(hold.placed_at),
            *who,
            f"{hold.amount:,}",
            hold_state(hold),
            moment(hold.expires_at if hold.state == "open" else hold.ended_at),
            shown(hold.model or ""),
            shown(hold.id),
        )
    return table


def hold_state(hold: Hold) -> str:
    """The state of a hold with its reason, and whether we may have paid for an answer nobody got."""
    reason = f": {shown(hold.reason)}" if hold.reason and hold.state != "open" else ""
    return f"{hold.state}{reason}{', in doubt' if hold.is_in_doubt else ''}"


def _table(first: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(first, no_wrap=True)
    return table


def _add(table: Table, *cells: str) -> None:
    table.add_row(*(Text(cell) for cell in cells))


# ---- words ----


def grant_words(grant: Grant, *, is_repeat: bool) -> str:
    """What a grant did."""
    until = "" if grant.expires_at is None else f", until {moment(grant.expires_at)} UTC"
    what = f"{count(grant.amount, 'credit')} on {shown(grant.meter)} to {shown(grant.customer)} (id {shown(grant.id)}{until})"
    if is_repeat:
        return f"Granted before, at {moment(grant.created_at)} UTC, and nothing changed: {what}."
    return f"Granted {what}."


def revoke_words(grant: Grant, *, is_repeat: bool) -> str:
    """What taking a grant back did."""
    what = f"grant {shown(grant.id)} of {shown(grant.customer)} on {shown(grant.meter)}"
    if is_repeat:
        return f"Taken back before, and nothing changed: {what}."
    return f"Took back {what}: {count(grant.revoked, 'credit')} of {grant.amount:,}."


def recovery_words(found: Recovery, still_open: int) -> list[str]:
    """What `recover` did, in sentences."""
    words: list[str] = []
    if found.released:
        words.append(
            f"Released {count(found.released, 'hold')} of calls whose process died; they cost the customer nothing."
        )
    if found.in_doubt:
        words.append(
            f"In doubt: {count(found.in_doubt, 'call')} whose answer nobody got; the provider may have billed you."
        )
    if found.charged:
        words.append(
            f"Charged {count(found.charged, 'hold')} of calls whose process died: {count(found.charged_amount, 'credit')}."
        )
    if found.replayed:
        words.append(f"Brought in {count(found.replayed, 'record')} that a process had kept beside the ledger.")
    if found.parked:
        words.append(f"Put aside {count(found.parked, 'record')} that the ledger can never take; they need a person.")
    if not words:
        words.append("Nothing to recover.")
    if still_open:
        words.append(f"{count(still_open, 'call')} in flight, left alone: their leases run.")
    return words


def verification_words(found: Verification) -> list[str]:
    """What `verify` found, in sentences; the first one is the verdict."""
    counts = ", ".join(
        (
            count(found.accounts, "account"),
            count(found.events, "usage event"),
            count(found.grants, "grant"),
            count(found.open_holds, "open hold"),
        )
    )
    words = [f"Sound: {counts}; every sum adds up."] if found.is_sound else []
    if not found.is_sound:
        words.append(f"Broken: {count(len(found.broken), 'invariant')} in {counts}.")
        words += [f"  {shown(sentence)}" for sentence in found.broken]
    if found.in_doubt:
        words.append(
            f"In doubt: {count(found.in_doubt, 'call')} of {count(found.in_doubt_amount, 'credit')}, released, that may have cost you."
        )
    if found.debt:
        words.append(f"Debt: {count(found.debt, 'credit')} over all meters.")
    return words


# ---- JSON ----


def plain(value: object) -> Any:
    """A record as JSON knows it: dataclasses become objects, times ISO 8601 in UTC."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def print_json(value: object) -> None:
    print(json.dumps(plain(value), indent=2))


def print_json_list(rows: Iterable[object]) -> None:
    """A JSON array, a row a line, written as the rows are read."""
    separator = "["
    for row in rows:
        print(f"{separator}\n{json.dumps(plain(row))}", end="")
        separator = ","
    print("[]" if separator == "[" else "\n]")
