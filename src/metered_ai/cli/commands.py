"""The commands. Each opens the ledger, asks `Billing` one thing, and shows it."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..billing import Billing, connect
from ..core.checks import check_amount, check_name
from ..errors import BillingUnavailableError, ConfigurationError
from ..records import Balance, Hold
from ..urls import billing_url, ledger_url
from . import show
from .dates import read_date
from .sheet import BALANCES, EVENTS, HOLDS, print_csv

__all__ = ["NotFoundError", "app", "check_filters", "one_format", "opened", "read_dates", "unknown_words"]

PATIENCE = 5.0
"""Seconds to wait for a ledger that somebody else has locked."""

ROWS = 50
"""Rows of a table, unless --limit says otherwise."""

BROKEN_PIPE = 141
"""The exit code of a program whose reader has gone away (128 + SIGPIPE), as shells know it."""


class NotFoundError(Exception):
    """What a command was to work on is not in the ledger: exit 1."""


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            code = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # Whoever reads us has seen enough. Python must not find the broken pipe again when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return BROKEN_PIPE
        return code


app = typer.Typer(
    name="metered-ai",
    cls=_Commands,
    help="Credits of your customers: give them, look at them, and prove that they add up.\n\n"
    "Exit codes: 0 done; 1 refused, not found, or a broken invariant was found; 2 used wrongly, or the ledger is not available. "
    "Every mistake is one line on stderr. Times are UTC.",
    epilog='Dates: "2026-12-31", "2026-12-31 18:00", ISO 8601, "now", or from now "+30d", "-12h" (s, m, h, d, w).',
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Ledger = Annotated[
    str | None,
    typer.Option(
        "--ledger",
        metavar="URL",
        help="The ledger, such as sqlite:///credits.db. Else METERED_AI_BILLING, else sqlite:///metered_ai.db.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, with the keys named above.")]
Csv = Annotated[bool, typer.Option("--csv", help="Print CSV: the keys of the JSON are its columns.")]
ForCustomer = Annotated[str | None, typer.Option("--customer", metavar="NAME", help="Only this customer's.")]
ForMeter = Annotated[str | None, typer.Option("--meter", metavar="NAME", help="Only this meter's.")]
Since = Annotated[str | None, typer.Option("--since", metavar="DATE", help="From this moment on.")]
Until = Annotated[str | None, typer.Option("--until", metavar="DATE", help="Before this moment.")]
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit",
        min=0,
        metavar="N",
        help=f"The newest N, 0 for all. A table shows {ROWS}, JSON all.",
        show_default=False,
    ),
]


class HoldState(StrEnum):
    OPEN = "open"
    RELEASED = "released"
    EXPIRED = "expired"
    CHARGED = "charged"


@contextmanager
def opened(url: str | None, *, creates: bool = False, is_read: bool = False) -> Generator[Billing]:
    """The billing that a command works on; with `is_read` the ledger alone, without the service beside it."""
    url = billing_url(url)
    url, kept_in = (ledger_url(url), ledger_url(url)) if is_read else (url, ledger_url(url))
    if kept_in == "memory://":
        raise ConfigurationError(
            "memory:// lives inside one program; the command line needs a file: --ledger sqlite:///credits.db"
        )
    path = kept_in.removeprefix("sqlite:///")
    if not creates and path != kept_in and not has_content(path):
        raise _nothing_at(repr(path))
    with connect(url, hold_patience=PATIENCE, settle_patience=PATIENCE) as billing:
        if not creates and path == kept_in and not _has_schema(billing):
            raise _nothing_at(billing.ledger.name)
        yield billing


def _nothing_at(place: str) -> BillingUnavailableError:
    return BillingUnavailableError(
        f"there is no ledger at {place}; --ledger or METERED_AI_BILLING names another, `metered-ai grant` makes one"
    )


def _has_schema(billing: Billing) -> bool:
    from ..ledger.postgres import PostgresLedger

    return not isinstance(billing.ledger, PostgresLedger) or billing.ledger.is_made()


def has_content(path: str) -> bool:
    # A reading command must not turn an empty file into a ledger either.
    try:
        return os.stat(path).st_size > 0
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise BillingUnavailableError(f"the ledger {path!r} cannot be reached: {error.strerror}") from error


def _date(text: str | None, what: str) -> datetime | None:
    return None if text is None else read_date(text, what, datetime.now(UTC))


def _name(text: str | None, what: str) -> str | None:
    return None if text is None else check_name(text, what)


def _amount(text: str) -> int:
    # Of int's own spellings only the plain one: "1_000" or "٣" in an order is a mistake more often than it is meant.
    if text.isascii() and text.isdigit() and len(text) < 20:
        return check_amount(int(text), "AMOUNT", minimum=1)
    raise ValueError(f"AMOUNT must be a whole number of credits, at least 1, not {text!r}")


def check_filters(customer: str | None, meter: str | None) -> None:
    """Refuse what can name no customer or no meter."""
    _name(customer, "--customer")
    _name(meter, "--meter")


def read_dates(since: str | None, until: str | None) -> tuple[datetime | None, datetime | None]:
    """The moments that --since and --until name."""
    return _date(since, "--since"), _date(until, "--until")


def one_format(**asked: bool) -> None:
    """Refuse two formats at once."""
    formats = [f"--{name}" for name, is_asked in asked.items() if is_asked]
    if len(formats) > 1:
        raise ValueError(f"{' and '.join(formats)} cannot be had together")


def unknown_words(billing: Billing, customer: str | None, meter: str | None) -> str:
    """A sentence, where a list is empty because nobody has heard of the customer or the meter."""
    if customer is not None:
        known = {balance.meter for balance in billing.balances(customer)}
        if not known:
            return f"{show.shown(customer)} has no account."
        if meter is not None and meter not in known:
            return f"{show.shown(customer)} has no account on {show.shown(meter)}."
    elif meter is not None and next(iter(billing.accounts(meter)), None) is None:
        return f"No customer has an account on {show.shown(meter)}."
    return ""


def _rows(limit: int | None) -> int | None:
    return ROWS if limit is None else limit or None


@app.command()
def demo(json: Json = False) -> int:
    """
    Show everything once, for real, on this machine.

    Starts an inference server on loopback (or uses OpenAI, with gpt-5-mini, if OPENAI_API_KEY is set), and a ledger in a temporary
    folder. Needs the extra `demo`. Exits with 1 if a step did not do what it promises.

    JSON: is_sound, server, and for each step its figures.
    """
    from .demo import run_demo

    return run_demo(as_json=json)


@app.command()
def grant(
    customer: Annotated[str, typer.Argument(help="Who gets the credits.")],
    meter: Annotated[str, typer.Argument(help="On which meter.")],
    amount: Annotated[str, typer.Argument(help="Whole credits, at least 1.")],
    grant_id: Annotated[str, typer.Option("--id", help="What this grant is called, such as an order's number.")],
    expires: Annotated[
        str | None, typer.Option("--expires", metavar="DATE", help="From when on what is unspent is gone.")
    ] = None,
    ledger: Ledger = None,
    json: Json = False,
) -> None:
    """
    Give a customer credits. Makes the ledger if there is none.

    The same --id again gives nothing more, so a repeated command is harmless; with another amount it is refused (exit 1).

    JSON: customer, meter, id, amount, created_at, expires_at, spent, expired, revoked, is_repeat.
    """
    check_name(customer, "CUSTOMER")
    check_name(meter, "METER")
    check_name(grant_id, "--id", 255)
    credits, until = _amount(amount), _date(expires, "--expires")
    with opened(ledger, creates=True) as billing:
        is_repeat = any(given.id == grant_id for given in billing.grants(customer, meter))
        given = billing.grant(customer, meter, credits, id=grant_id, expires_at=until)
        balance = billing.balance(customer, meter)

    if json:
        show.print_json({**show.plain(given), "is_repeat": is_repeat})
        return
    out = show.console()
    out.print(show.grant_words(given, is_repeat=is_repeat))
    out.print(show.balance_bars([balance], is_wide=out.width >= 80))


@app.command()
def revoke(
    customer: Annotated[str, typer.Argument(help="Who got the credits.")],
    meter: Annotated[str, typer.Argument(help="On which meter.")],
    grant_id: Annotated[str, typer.Option("--id", help="What the grant is called.")],
    ledger: Ledger = None,
    json: Json = False,
) -> None:
    """
    Take a grant back: what is unspent is gone, what was spent becomes debt.

    A second time nothing more is taken. A grant that was never made is refused (exit 1). To refund a charge, grant its credits.

    JSON: customer, meter, id, amount, created_at, expires_at, spent, expired, revoked, is_repeat.
    """
    check_name(customer, "CUSTOMER")
    check_name(meter, "METER")
    check_name(grant_id, "--id", 255)
    with opened(ledger) as billing:
        before = next((given for given in billing.grants(customer, meter) if given.id == grant_id), None)
        if before is None:
            unknown = unknown_words(billing, customer, meter)
            raise NotFoundError(f"no grant of {customer!r} on {meter!r} has the id {grant_id!r}. {unknown}".strip())
        given = billing.revoke(customer, meter, grant_id)
        balance = billing.balance(customer, meter)

    is_repeat = before.revoked == given.revoked and given.revoked > 0
    if json:
        show.print_json({**show.plain(given), "is_repeat": is_repeat})
        return
    out = show.console()
    out.print(show.revoke_words(given, is_repeat=is_repeat))
    out.print(show.balance_bars([balance], is_wide=out.width >= 80))


@app.command()
def balance(
    customer: Annotated[str, typer.Argument(help="Whose credits.")],
    meter: Annotated[
        str | None, typer.Argument(help="One meter; else all of the customer's.", show_default=False)
    ] = None,
    ledger: Ledger = None,
    json: Json = False,
    csv: Csv = False,
) -> None:
    """
    Show a customer's credits as bars: yellow over 75 % used, red over 90 %.

    A customer nobody has heard of has no account, and 0 credits.

    JSON and CSV, by meter: customer, meter, limit, used, held, available, debt, unlimited_used, is_estimate, percent_used, level
    (ok, high, critical, exhausted, unlimited), show_upgrade, is_exhausted, has_account. limit, available and percent_used are null when
    unlimited.
    """
    one_format(json=json, csv=csv)
    check_name(customer, "CUSTOMER")
    _name(meter, "METER")
    with opened(ledger) as billing:
        known = billing.balances(customer)
        wanted = [found for found in known if meter in (None, found.meter)]
        found = wanted if wanted or meter is None else [billing.balance(customer, meter)]

    if json or csv:
        keys = (_balance_keys(each, has_account=bool(wanted)) for each in found)
        if json:
            show.print_json_list(keys)
        else:
            print_csv(BALANCES, keys)
        return
    out = show.console()
    if not wanted:
        where = "" if meter is None else f" on {show.shown(meter)}"
        out.print(f"{show.shown(customer)} has no account{where}: 0 credits.")
        return
    out.print(show.shown(customer))
    out.print(show.balance_bars(found, is_wide=out.width >= 80))


def _balance_keys(balance: Balance, *, has_account: bool) -> dict[str, object]:
    return {
        **show.plain(balance),
        "percent_used": balance.percent_used,
        "level": balance.level,
        "show_upgrade": balance.show_upgrade,
        "is_exhausted": balance.is_exhausted,
        "has_account": has_account,
    }


@app.command()
def events(
    customer: ForCustomer = None,
    meter: ForMeter = None,
    since: Since = None,
    until: Until = None,
    limit: Limit = None,
    ledger: Ledger = None,
    json: Json = False,
    csv: Csv = False,
) -> None:
    """
    List usage events: what was charged, for what. The newest come last.

    JSON and CSV: customer, meter, transaction_id, amount, created_at, basis (reported, observed, estimated, held), kind (call, charge,
    record, expired, correction), hold_id, usage, request_id, attempts, properties, price_slug, parent, is_unlimited, is_late, reference,
    delivered. usage is null or an object: model, endpoint, service_tier, input_tokens, cached_input_tokens, cache_write_tokens,
    output_tokens, reasoning_tokens, audio_tokens, seconds, images, characters, in CSV as columns usage_model and so on. Without --limit
    they go by customer and meter.
    """
    one_format(json=json, csv=csv)
    check_filters(customer, meter)
    first, end = read_dates(since, until)
    with opened(ledger, is_read=True) as billing:
        found = billing.usage_events(customer, meter, since=first, until=end)
        if (json or csv) and not limit:
            print_list(EVENTS, found, csv=csv)
            return
        with show.busy("Looking for the newest…"):
            rows, total = show.latest(found, _rows(limit), lambda event: event.created_at)
        unknown = "" if rows else unknown_words(billing, customer, meter)

    if json or csv:
        print_list(EVENTS, rows, csv=csv)
        return
    out = show.console()
    if not rows:
        out.print(f"No usage events. {unknown}".strip())
        return
    out.print(show.event_table(rows, customer=customer, meter=meter))
    if len(rows) < total:
        out.print(f"The newest {len(rows):,} of {show.count(total, 'usage event')}; --limit 0 shows all.")


def print_list(columns: list[str], rows: Iterable[object], *, csv: bool) -> None:
    """A list as a program reads it: CSV with these columns, or JSON."""
    if csv:
        print_csv(columns, rows)
    else:
        show.print_json_list(rows)


@app.command()
def holds(
    customer: ForCustomer = None,
    meter: ForMeter = None,
    since: Since = None,
    until: Until = None,
    state: Annotated[HoldState | None, typer.Option("--state", help="Only these.", show_default=False)] = None,
    limit: Limit = None,
    ledger: Ledger = None,
    json: Json = False,
    csv: Csv = False,
) -> None:
    """
    List holds: calls in flight, and calls that ended without being charged. The newest come last.

    "In doubt" are calls whose answer nobody got although the provider may have worked: they may have cost you. --since and --until look at
    when a hold was placed.

    JSON and CSV: id, customer, meter, amount, state (open, released, expired, charged), placed_at, expires_at, ended_at, reason, sent (yes,
    no, unknown), transaction_id, endpoint, model, parent, is_unlimited, is_repeat, is_in_doubt. Without --limit they go by customer
    and meter.
    """
    one_format(json=json, csv=csv)
    check_filters(customer, meter)
    first, end = read_dates(since, until)
    with opened(ledger, is_read=True) as billing:
        every = billing.holds(customer, meter, state=None if state is None else state.value)
        found = (
            hold
            for hold in every
            if (first is None or hold.placed_at >= first) and (end is None or hold.placed_at < end)
        )
        if (json or csv) and not limit:
            print_list(HOLDS, (_hold_keys(hold) for hold in found), csv=csv)
            return
        with show.busy("Looking for the newest…"):
            rows, total = show.latest(found, _rows(limit), lambda hold: hold.placed_at)
        unknown = "" if rows else unknown_words(billing, customer, meter)

    if json or csv:
        print_list(HOLDS, (_hold_keys(hold) for hold in rows), csv=csv)
        return
    out = show.console()
    if not rows:
        out.print(f"No holds. {unknown}".strip())
        return
    out.print(show.hold_table(rows, customer=customer, meter=meter))
    if len(rows) < total:
        out.print(f"The newest {len(rows):,} of {show.count(total, 'hold')}; --limit 0 shows all.")


def _hold_keys(hold: Hold) -> dict[str, object]:
    return {**show.plain(hold), "is_in_doubt": hold.is_in_doubt}


@app.command()
def recover(ledger: Ledger = None, json: Json = False) -> int:
    """
    Resolve what processes that died have left behind.

    Holds whose lease is out are released or charged, by the policy they were placed with; records that were kept beside the ledger are brought
    in. Calls in flight are left alone. Every process that uses the ledger does the same by itself, from time to time. Exits with 1
    if a record had to be put aside that the ledger can never take.

    JSON: released, charged, in_doubt (calls), charged_amount, replayed, parked, still_open.
    """
    with opened(ledger, is_read=True) as billing, show.busy("Resolving what was left behind…"):
        found = billing.recover()
        still_open = sum(1 for _ in billing.holds(state="open"))

    if json:
        show.print_json({**show.plain(found), "still_open": still_open})
    else:
        out = show.console()
        for sentence in show.recovery_words(found, still_open):
            out.print(sentence)
    return 1 if found.parked else 0


@app.command()
def verify(ledger: Ledger = None, json: Json = False) -> int:
    """
    Add everything up again from the records, and say whether the ledger is sound. Exits with 1 if it is not.

    JSON: is_sound, accounts, events, grants, open_holds, in_doubt (calls), in_doubt_amount, debt, broken (sentences).
    """
    with opened(ledger, is_read=True) as billing, show.busy("Adding everything up again…"):
        found = billing.verify()

    if json:
        show.print_json({"is_sound": found.is_sound, **show.plain(found)})
    else:
        out = show.console()
        for sentence in show.verification_words(found):
            out.print(sentence, style="bold red" if sentence.startswith("Broken") else None)
    return 0 if found.is_sound else 1


# These have commands, too, and stand behind those above in --help.
from . import copying, migration, outbox, serving, story, usage  # noqa: E402

_MORE = (usage, story, outbox, migration, copying, serving)
