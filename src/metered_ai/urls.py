"""What a billing URL names: a ledger, and perhaps a service beside it."""

from __future__ import annotations

import logging
import os
import re
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import parse_qsl, quote, unquote, urlencode

from .errors import ConfigurationError

if TYPE_CHECKING:
    from .ledger import Ledger
    from .services import BillingService
    from .settings import Settings

__all__ = ["DEFAULT_URL", "billing_url", "ledger_url", "make_ledger", "make_service", "place_of", "shown_url"]

_log = logging.getLogger(__name__)

DEFAULT_URL = "sqlite:///metered_ai.db"


def billing_url(url: str | None = None) -> str:
    """`url`, else METERED_AI_BILLING, else a SQLite file in this folder; with the absolute path, so that a later chdir changes nothing."""
    given = url if url is not None else os.environ.get("METERED_AI_BILLING") or DEFAULT_URL
    if not isinstance(given, str):
        raise ConfigurationError(f"a billing URL is a str such as {DEFAULT_URL!r}, not {given!r}")
    scheme, separator, rest = given.partition("://")
    if separator and scheme == "memory":
        if rest:
            raise ConfigurationError(f"memory:// takes no path, but got {given!r}")
        return "memory://"
    if separator and scheme == "sqlite":
        if not rest.startswith("/") or len(rest) < 2 or "?" in rest or "#" in rest:
            raise ConfigurationError(
                f"a SQLite ledger is sqlite:///file.db or sqlite:////folder/file.db, not {given!r}"
            )
        return f"sqlite:///{Path(unquote(rest[1:])).resolve()}"
    if separator and scheme == "flowglad":
        return _flowglad_url(rest)
    if separator and scheme in ("postgresql", "postgres"):
        return f"postgresql://{rest}"
    shown = f"{scheme}://…" if separator else given
    raise ConfigurationError(
        f"cannot bill through {shown!r}; known are sqlite:///file.db, postgresql://host/database, flowglad:// and memory://"
    )


def shown_url(url: str) -> str:
    """A URL for messages: where the ledger is, and nothing that could be a password."""
    if url.startswith("flowglad:"):
        ledger = ledger_url(url)
        # Its other options are shown only where no password could be among them, cut off by a stray character.
        return f"flowglad://?ledger={shown_url(ledger)}" if ledger.startswith("postgresql:") else url
    if not url.startswith("postgresql:"):
        return url
    # One with a stray character in its password could be cut in the middle of that; so all of it or nothing.
    parts = re.fullmatch(r"postgresql://(?:[^@/?#]*@)?([^@/?#]*(?:/[^@/?#:=]*)?)(?:\?[^@]*)?", url)
    return f"postgresql://{parts[1]}" if parts else "postgresql://…"


def _flowglad_url(rest: str) -> str:
    """`?ledger=…` and options of `Flowglad`, with the ledger's absolute path. Nothing of it is shown in errors: it may hold a key."""
    path, _, query = rest.partition("?")
    # A plus is a plus, as in a PostgreSQL URL.
    options = dict(parse_qsl(query.replace("+", "%2B"), keep_blank_values=True))
    if {"secret_key", "key", "api_key"} & set(options) or "@" in path:
        raise ConfigurationError(
            "Flowglad's key is never part of a URL, where logs would show it; set FLOWGLAD_SECRET_KEY"
        )
    if not all(map(str.isidentifier, options)):
        raise ConfigurationError("in a flowglad:// URL the ledger's address is written with %26 for & and %25 for %")
    if path.strip("/"):
        raise ConfigurationError("Flowglad is flowglad://?ledger=sqlite:///file.db; its address is the option base_url")
    ledger = billing_url(options.pop("ledger", DEFAULT_URL))
    if ledger.startswith("flowglad:"):
        raise ConfigurationError(
            "the ledger beside Flowglad is sqlite:///file.db, postgresql://host/database or memory://, not another service"
        )
    return "flowglad://?" + urlencode({"ledger": ledger, **options}, quote_via=quote, safe="/:")


def ledger_url(url: str) -> str:
    """The ledger of a billing URL: what stands beside a service, else the URL itself."""
    return dict(parse_qsl(url.partition("?")[2])).get("ledger", url) if url.startswith("flowglad:") else url


def make_service(url: str | None, settings: Settings) -> BillingService | None:
    """The service that a billing URL names, else the one among the policies."""
    if url is None or not url.startswith("flowglad:"):
        return cast("BillingService | None", settings.service)
    from .services.flowglad import Flowglad

    options: dict[str, Any] = dict(parse_qsl(url.partition("?")[2], keep_blank_values=True))
    del options["ledger"]
    try:
        options.update({name: float(options[name]) for name in {"timeout", "plan_age"} & set(options)})
        return Flowglad(**options)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"Flowglad takes no such option in a URL: {error}") from error


def make_ledger(url: str, settings: Settings) -> tuple[Ledger, Path]:
    """The ledger that a billing URL names, and a path that stands for it and for no other. Opens nothing yet."""
    url = ledger_url(url)
    if url == "memory://":
        from .ledger.memory import MemoryLedger

        return MemoryLedger(), Path(f"/memory-{os.urandom(8).hex()}")
    if url.startswith("postgresql:"):
        from .ledger.postgres import PostgresLedger

        fleet = PostgresLedger(
            url,
            durability=settings.durability,
            hold_patience=settings.hold_patience,
            settle_patience=settings.settle_patience,
            auto_migrate=settings.auto_migrate,
        )
        _log.info("credits are kept in %s", fleet.name)
        return fleet, place_of(fleet)

    from .ledger.sqlite import SqliteLedger

    path = Path(url.removeprefix("sqlite:///"))
    _log.info("credits are kept in %s", path)
    ledger = SqliteLedger(
        path,
        durability=settings.durability,
        hold_patience=settings.hold_patience,
        settle_patience=settings.settle_patience,
        auto_migrate=settings.auto_migrate,
    )
    return ledger, path


def place_of(ledger: Ledger) -> Path:
    """A path that stands for a ledger without a file of its own."""
    return Path(f"/ledger-{sha256(ledger.name.encode()).hexdigest()[:16]}")
