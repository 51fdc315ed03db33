"""The commands. Each opens the ledger, asks `Billing` one thing, and shows it."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..billing import Billing, billing_url, connect
from ..core.checks import check_amount, check_name
from ..errors import BillingUnavailableError, ConfigurationError
from ..records import Balance, Hold
from . import show
from .dates import read_date

__all__ = ["app"]

PATIENCE = 5.0
"""Seconds to wait for a ledger that somebody else has locked."""

ROWS = 50
"""Rows of a table, unless --limit says otherwise."""

BROKEN_PIPE = 141
"""The exit code of a program whose reader has gone away (128 + SIGPIPE), as shells know it."""


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
    "Exit codes: 0 done; 1 refused, or a broken invariant was found; 2 used wrongly, or the ledger is not available. "
    "Every mistake is one line on stderr. Times are UTC.",
    epilog='Dates: "2026-12-31", "2026-12-31 18:00", ISO 8601, "now", or from now "+30d", "-12h" (s, m, h, d, w).',
    rich_markup_mode=None,
    add_completion=False,
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
def _opened(url: str | None, *, creates: bool = False) -> Generator[Billing]:
    url = billing_url(url)
    if url == "memory://":
        raise ConfigurationError(
            "memory:// lives inside one program; the command line needs a file: --ledger sqlite:///credits.db"
        )
    path = url.removeprefix("sqlite:///")
    if not creates and path != url and not _has_content(path):
        raise _nothing_at(repr(path))
    with connect(url, hold_patience=PATIENCE, settle_patience=PATIENCE) as billing:
        if not creates and path == url and not _has_schema(billing):
            raise _nothing_at(billing.ledger.name)
        yield billing


def _nothing_at(place: str) -> BillingUnavailableError:
    return BillingUnavailableError(
        f"there is no ledger at {place}; --ledger or METERED_AI_BILLING names another, `metered-ai grant` makes one"
    )


def _has_schema(billing: Billing) -> bool:
    from ..ledger.postgres import PostgresLedger

    return not isinstance(billing.ledger, PostgresLedger) or billing.ledger.is_made()


def _has_content(path: str) -> bool:
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
    with _opened(ledger, creates=True) as billing:
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
def balance(
    customer: Annotated[str, typer.Argument(help="Whose credits.")],
    meter: Annotated[
        str | None, typer.Argument(help="One meter; else all of the customer's.", show_default=False)
    ] = None,
    ledger: Ledger = None,
    json: Json = False,
) -> None:
    """
    Show a customer's credits as bars: yellow over 75 % used, red over 90 %.

    A customer nobody has heard of has no account, and 0 credits.

    JSON, a list by meter: customer, meter, limit, used, held, available, debt, unlimited_used, is_estimate, percent_used, level
    (ok, high, critical, exhausted, unlimited), show_upgrade, is_exhausted, has_account. limit, available and percent_used are null when
    unlimited.
    """
    check_name(customer, "CUSTOMER")
    _name(meter, "METER")
    with _opened(ledger) as billing:
        known = billing.balances(customer)
        wanted = [found for found in known if meter in (None, found.meter)]
        found = wanted if wanted or meter is None else [billing.balance(customer, meter)]

    if json:
        show.print_json_list(_balance_keys(each, has_account=bool(wanted)) for each in found)
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
) -> None:
    """
    List usage events: what was charged, for what. The newest come last.

    JSON, a list: customer, meter, transaction_id, amount, created_at, basis (reported, observed, estimated, held), kind (call, charge,
    record, expired, correction), hold_id, usage, request_id, attempts, properties, price_slug, parent, is_unlimited, is_late. usage is null
    or an object: model, endpoint, service_tier, input_tokens, cached_input_tokens, cache_write_tokens, output_tokens, reasoning_tokens,
    audio_tokens, seconds, images, characters. Without --limit the list goes by customer and meter.
    """
    _name(customer, "--customer")
    _name(meter, "--meter")
    first, end = _date(since, "--since"), _date(until, "--until")
    with _opened(ledger) as billing:
        found = billing.usage_events(customer, meter, since=first, until=end)
        if json and not limit:
            show.print_json_list(found)
            return
        rows, total = show.latest(found, _rows(limit), lambda event: event.created_at)

    if json:
        show.print_json_list(rows)
        return
    out = show.console()
    if not rows:
        out.print("No usage events.")
        return
    out.print(show.event_table(rows, customer=customer, meter=meter))
    if len(rows) < total:
        out.print(f"The newest {len(rows):,} of {show.count(total, 'usage event')}; --limit 0 shows all.")


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
) -> None:
    """
    List holds: calls in flight, and calls that ended without being charged. The newest come last.

    "In doubt" are calls whose answer nobody got although the provider may have worked: they may have cost you. --since and --until look at
    when a hold was placed.

    JSON, a list: id, customer, meter, amount, state (open, released, expired, charged), placed_at, expires_at, ended_at, reason, sent (yes,
    no, unknown), transaction_id, endpoint, model, parent, is_unlimited, is_repeat, is_in_doubt. Without --limit the list goes by customer
    and meter.
    """
    _name(customer, "--customer")
    _name(meter, "--meter")
    first, end = _date(since, "--since"), _date(until, "--until")
    with _opened(ledger) as billing:
        every = billing.holds(customer, meter, state=None if state is None else state.value)
        found = (
            hold
            for hold in every
            if (first is None or hold.placed_at >= first) and (end is None or hold.placed_at < end)
        )
        if json and not limit:
            show.print_json_list(_hold_keys(hold) for hold in found)
            return
        rows, total = show.latest(found, _rows(limit), lambda hold: hold.placed_at)

    if json:
        show.print_json_list(_hold_keys(hold) for hold in rows)
        return
    out = show.console()
    if not rows:
        out.print("No holds.")
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
    with _opened(ledger) as billing:
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
    with _opened(ledger) as billing:
        found = billing.verify()

    if json:
        show.print_json({"is_sound": found.is_sound, **show.plain(found)})
    else:
        out = show.console()
        for sentence in show.verification_words(found):
            out.print(sentence, style="bold red" if sentence.startswith("Broken") else None)
    return 0 if found.is_sound else 1


@app.command()
def migrate(
    sql: Annotated[bool, typer.Option("--sql", help="Print the statements instead, for tools of your own.")] = False,
    since: Annotated[
        int,
        typer.Option(
            "--since", min=0, metavar="N", help="With --sql: the version that the schema has; 0 if there is none."
        ),
    ] = 0,
    role: Annotated[
        str | None,
        typer.Option("--role", metavar="NAME", help="With --sql: also what this role of an application needs."),
    ] = None,
    ledger: Ledger = None,
    json: Json = False,
) -> None:
    """
    Bring a PostgreSQL ledger's schema to this release's version. Processes that run the release before go on working.

    With --sql nothing is connected to: the statements are printed, for psql or a migration tool, as one transaction.

    JSON: is_changed.
    """
    url = billing_url(ledger)
    if not url.startswith("postgresql:"):
        raise ConfigurationError("only a PostgreSQL ledger is migrated by hand; a SQLite file is when it is opened")
    if sql:
        from ..ledger.postgres.address import Address
        from ..ledger.postgres.dialect import check_schema
        from ..ledger.postgres.schema import migration_sql, role_sql

        schema = check_schema(Address.of(url).schema)
        print(migration_sql(schema, since), end="")
        if role is not None:
            print(role_sql(schema, role), end="")
        return
    if since or role is not None:
        raise ConfigurationError("--since and --role go with --sql")
    from ..ledger.postgres import PostgresLedger

    with closing(PostgresLedger(url, hold_patience=PATIENCE, settle_patience=PATIENCE)) as found:
        is_changed = found.migrate()
    if json:
        show.print_json({"is_changed": is_changed})
    else:
        show.console().print(
            "The schema was brought to this release's version." if is_changed else "Nothing was to be done."
        )
