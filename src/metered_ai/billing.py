"""`Billing`: a ledger with policies, and everything an application asks of it. `connect` makes one from a URL."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import re
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast
from urllib.parse import parse_qsl, quote, unquote, urlencode

from .errors import BillingUnavailableError, ConfigurationError, InsufficientCreditsError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from types import TracebackType
    from typing import Self, Unpack

    from .charge import Charge
    from .core.call import Policies
    from .core.steps import Enlarge, Place, Renew, Step
    from .ledger import Ledger, Recovery, ServiceLedger, Verification
    from .ledger.postgres.joined import Books
    from .records import Balance, Deliveries, Grant, Hold, OutboxSummary, Undelivered, UsageEvent, UsageSum
    from .services import BillingService
    from .services.remote import Remote
    from .settings import PolicyOptions, Settings
    from .settling import End, Settler

__all__ = ["Billing", "connect"]

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

DEFAULT_URL = "sqlite:///metered_ai.db"

DELIVER_AT_CLOSE = 5.0
"""Seconds that `close` tries to tell a remote service what it does not have yet."""


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


def _shown(url: str) -> str:
    """A URL for messages: where the ledger is, and nothing that could be a password."""
    if url.startswith("flowglad:"):
        ledger = ledger_url(url)
        # Its other options are shown only where no password could be among them, cut off by a stray character.
        return f"flowglad://?ledger={_shown(ledger)}" if ledger.startswith("postgresql:") else url
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


def connect(url: str | None = None, /, **policies: Unpack[PolicyOptions]) -> Billing:
    """
    Make a new `Billing` from a URL: `sqlite:///credits.db` (relative), `sqlite:////var/lib/credits.db`, `memory://`,
    `postgresql://user@host/database` (extra `postgres`; what psql takes, and `schema`, `connections` and `pgbouncer` as parameters),
    `flowglad://?ledger=sqlite:///credits.db` (with FLOWGLAD_SECRET_KEY; further options of `Flowglad` follow with `&`).

    Without a URL METERED_AI_BILLING is read, else it is `sqlite:///metered_ai.db`. Opens nothing yet. You close it.
    The keywords are the policies of `Billing`. Raises ConfigurationError naming the value that cannot be, TypeError for a misspelled one.
    """
    return Billing(billing_url(url), **policies)


class Billing:
    """
    A ledger with policies. Every method has an async form (`agrant`, `abalance`, …) that never blocks the loop.

    `ledger` is a URL or a `Ledger`; one given as an object is not closed by `close`. Opens nothing before the first use.

    Policies: `on_unknown` (no answer and no refusal) release or charge; `on_failure` (the provider breaks off) release or observed;
    `on_abort` (the consumer stops early) observed, hold or drain; `on_repeat` (an operation billed before) refuse or free;
    `on_settle_failure` return or raise; `lease`, `heartbeat`, `max_call`, `hold_patience`, `settle_patience`, `wait_for_credits` in
    seconds; `max_holds` of a customer; `durability` full or relaxed; `auto_migrate`; `spool` a folder; `default_max_output_tokens`;
    `upgrade_url` carried in refusals.

    With `service=` a remote system owns the balances: the ledger holds against what it says, heard at most `max_balance_age` seconds ago, and a
    background thread tells it of every usage event. The service is yours to close.
    """

    def __init__(self, ledger: str | Ledger, /, **policies: Unpack[PolicyOptions]) -> None:
        from .settings import settings

        self.settings: Settings = settings(cast("dict[str, Any]", policies))
        self._url = billing_url(ledger) if isinstance(ledger, str) else None
        self._given = None if isinstance(ledger, str) else ledger
        if self._url is not None and self._url.startswith("flowglad:") and self.settings.service is not None:
            raise ConfigurationError(
                "a flowglad:// URL names the service already; give service= with the ledger's own URL"
            )
        self._policies: Policies | None = None
        self._is_closed = False
        self._reset()
        _alive.add(self)

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._opened: tuple[Ledger, Settler] | None = None
        self._owner: str | None = None
        self._remote: Remote | None = None
        # What opening brought in and parked, until `recover` has told of it.
        self._replayed = (0, 0)
        self._streams: dict[int, Callable[[], None]] = {}
        self._drains = threading.BoundedSemaphore(8)

    def _after_fork(self) -> None:
        opened = self._opened
        self._lock = threading.RLock()
        self._owner = None
        self._streams = {}
        self._drains = threading.BoundedSemaphore(8)
        if self._remote is not None:
            self._remote.after_fork()
        if opened is not None:
            opened[1].after_fork()

    def __repr__(self) -> str:
        return f"<Billing {self._where or repr(self._given)}>"

    @property
    def _where(self) -> str | None:
        return None if self._url is None else _shown(self._url)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        await self.aclose()

    # Opening.

    @property
    def ledger(self) -> Ledger:
        """The ledger underneath, opened."""
        return self._open()[0]

    def _open(self) -> tuple[Ledger, Settler]:
        opened = self._opened
        if opened is not None and self._owner is not None:
            return opened
        with self._lock:
            if self._is_closed:
                raise self._closed_error()
            if self._opened is None:
                self._opened = self._make()
            if self._owner is None:
                self._own(self._opened[1])
            return self._opened

    def _closed_error(self) -> BillingUnavailableError:
        return BillingUnavailableError(
            f"the billing on {self._where or 'the given ledger'} is closed; connect() makes a new one"
        )

    def _make(self) -> tuple[Ledger, Settler]:
        from .ledger.spool import Spool, place_in, state_folder
        from .settling import Settler

        keeps = self.settings
        state = state_folder()
        ledger, place = self._make_ledger()
        self._remote = self._make_remote(ledger)
        if keeps.spool is not None:
            place = place_in(Path(keeps.spool), place)
        elif self._url is None or not ledger_url(self._url).startswith("sqlite:"):
            # No file of its own that the spool could stand beside.
            place = place_in(state or Path.cwd(), place)
        settler = Settler(ledger, Spool(place, state, makes_folder=keeps.spool is not None))
        if self._remote is not None:
            settler.after_settle = self._remote.sender.wake
        return ledger, settler

    def _make_remote(self, ledger: Ledger) -> Remote | None:
        """The service, if there is one, with the ledger bound to it."""
        service = self._make_service()
        if service is None:
            return None
        from .services.remote import Remote

        try:
            if not hasattr(ledger, "bind"):
                raise ConfigurationError(f"{ledger.name} cannot serve {service.name}: it keeps no outbox")
            bound = cast("ServiceLedger", ledger)
            bound.bind(service.name)
        except BaseException:
            if self._given is None:
                ledger.close()
            raise
        remote = Remote(service, bound, self.settings.max_balance_age, self.settings.upgrade_url)
        # Its threads keep what they need alive, but not a billing that nobody has any more.
        weakref.finalize(self, remote.sender.abandon).atexit = False
        return remote

    def _make_service(self) -> BillingService | None:
        if self._url is None or not self._url.startswith("flowglad:"):
            return cast("BillingService | None", self.settings.service)
        from importlib import import_module

        # By its name: whoever has no such URL loads nothing of it.
        flowglad: Callable[..., BillingService] = import_module("metered_ai.services.flowglad").Flowglad
        options: dict[str, Any] = dict(parse_qsl(self._url.partition("?")[2], keep_blank_values=True))
        del options["ledger"]
        try:
            options.update({name: float(options[name]) for name in {"timeout", "plan_age"} & set(options)})
            return flowglad(**options)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"Flowglad takes no such option in a URL: {error}") from error

    def _make_ledger(self) -> tuple[Ledger, Path]:
        """The ledger, and a path that stands for it and for no other."""
        keeps = self.settings
        if self._given is not None:
            return self._given, _place_of(self._given)
        url = None if self._url is None else ledger_url(self._url)
        if url == "memory://":
            from .ledger.memory import MemoryLedger

            return MemoryLedger(), Path(f"/memory-{os.urandom(8).hex()}")

        assert url is not None
        if url.startswith("postgresql:"):
            from .ledger.postgres import PostgresLedger

            fleet = PostgresLedger(
                url,
                durability=keeps.durability,
                hold_patience=keeps.hold_patience,
                settle_patience=keeps.settle_patience,
                auto_migrate=keeps.auto_migrate,
            )
            _log.info("credits are kept in %s", fleet.name)
            return fleet, _place_of(fleet)

        from .ledger.sqlite import SqliteLedger

        path = Path(url.removeprefix("sqlite:///"))
        _log.info("credits are kept in %s", path)
        ledger = SqliteLedger(
            path,
            durability=keeps.durability,
            hold_patience=keeps.hold_patience,
            settle_patience=keeps.settle_patience,
            auto_migrate=keeps.auto_migrate,
        )
        return ledger, path

    def _own(self, settler: Settler) -> None:
        from .core.steps import Renew
        from .ledger.leases import heartbeat, new_owner

        owner = new_owner()
        keeps = self.settings
        _end_with_child()
        # Now, because a finalizer cannot start it, and not in a call, where an interrupt could keep its lock.
        settler.start()
        if settler.adopt():
            self._replayed = settler.replay()
            settler.start_retrying()
        heartbeat.watch(
            owner,
            partial(_beat, weakref.ref(self), Renew(owner, keeps.lease)),
            keeps.heartbeat,
            sweep=partial(_sweep, weakref.ref(self)),
            sweep_every=keeps.lease / 2,
        )
        if self._remote is not None:
            self._remote.sender.look()
        self._owner = owner

    # Holds, for the clients and for charges.

    @property
    def policies(self) -> Policies:
        """The policies that decide how a call ends."""
        if self._policies is None:
            from .core.call import Policies

            keeps = self.settings
            self._policies = Policies(
                keeps.on_unknown, keeps.on_failure, keeps.on_abort, keeps.on_repeat, keeps.default_max_output_tokens
            )
        return self._policies

    def _ready(self) -> tuple[Ledger, Settler, str]:
        if self._is_closed:
            raise self._closed_error()
        ledger, settler = self._open()
        if settler.is_waiting:
            raise BillingUnavailableError(
                f"usage of earlier calls waits to be written to {ledger.name}; no new call is let through until it is"
            )
        assert self._owner is not None
        return ledger, settler, self._owner

    @property
    def _is_open(self) -> bool:
        return self._opened is not None and self._owner is not None

    async def _aready(self) -> tuple[Ledger, Settler, str]:
        if not self._is_open:
            await asyncio.to_thread(self._open)
        return self._ready()

    def _place(self, ledger: Ledger, settler: Settler, step: Place) -> Hold:
        patience: _Patience | None = None
        since = None if self._remote is None else self._remote.prepare(step)
        while True:
            try:
                return cast("Hold", ledger.run(step))
            except InsufficientCreditsError as error:
                if self._remote is not None and self._remote.has_news(step, since):
                    since = None
                    continue
                error.upgrade_url = error.upgrade_url or self.settings.upgrade_url
                patience = patience or _Patience(self.settings.wait_for_credits)
                pause = patience.pause(error)
                if pause is None:
                    raise
                since = None
                time.sleep(pause)
            except BaseException as error:
                if not isinstance(error, Exception):
                    settler.submit(_undo(step))
                raise

    async def _aplace(self, settler: Settler, step: Place) -> Hold:
        patience: _Patience | None = None
        since = None if self._remote is None else await self._remote.aprepare(step)
        while True:
            try:
                return cast("Hold", await settler.run(step))
            except InsufficientCreditsError as error:
                if self._remote is not None and await self._remote.ahas_news(step, since):
                    since = None
                    continue
                error.upgrade_url = error.upgrade_url or self.settings.upgrade_url
                patience = patience or _Patience(self.settings.wait_for_credits)
                pause = patience.pause(error)
                if pause is None:
                    raise
                since = None
                await asyncio.sleep(pause)
            except BaseException as error:
                if not isinstance(error, Exception):
                    # Cancelled while the hold was being placed: whichever arrives first, no hold stays.
                    settler.submit(_undo(step))
                raise

    def _enlarge(self, step: Enlarge) -> None:
        since = None if self._remote is None else self._remote.prepare(step)
        while True:
            try:
                self.ledger.run(step)
                return
            except InsufficientCreditsError as error:
                if self._remote is None or not self._remote.has_news(step, since):
                    error.upgrade_url = error.upgrade_url or self.settings.upgrade_url
                    raise
                since = None

    async def _aenlarge(self, step: Enlarge) -> None:
        since = None if self._remote is None else await self._remote.aprepare(step)
        while True:
            try:
                await self._settler.run(step)
                return
            except InsufficientCreditsError as error:
                if self._remote is None or not await self._remote.ahas_news(step, since):
                    error.upgrade_url = error.upgrade_url or self.settings.upgrade_url
                    raise
                since = None

    def _watch(self, call: object, stop: Callable[[], None]) -> None:
        """Remember a stream that has not ended, so that the end of the program ends it."""
        self._streams[id(call)] = stop

    def _unwatch(self, call: object) -> None:
        self._streams.pop(id(call), None)

    @property
    def _settler(self) -> Settler:
        return self._open()[1]

    # What an application asks.

    def grant(self, customer: str, meter: str, amount: int, *, id: str, expires_at: datetime | None = None) -> Grant:
        """
        Give `amount` credits (at least 1). Idempotent by customer, meter and `id`: the first stands.

        `expires_at` needs a time zone. Raises GrantConflictError when the id was used with another amount, ValueError naming bad input.
        """
        return cast("Grant", self._run(_grant_step(customer, meter, amount, id, expires_at)))

    async def agrant(
        self, customer: str, meter: str, amount: int, *, id: str, expires_at: datetime | None = None
    ) -> Grant:
        """`grant`, without blocking the loop."""
        return cast("Grant", await self._arun(_grant_step(customer, meter, amount, id, expires_at)))

    def revoke(self, customer: str, meter: str, id: str, /) -> Grant:
        """Take a grant back: what is unspent leaves the balance, the rest becomes debt. Idempotent. ValueError for an unknown id."""
        return cast("Grant", self._run(_revoke_step(customer, meter, id)))

    async def arevoke(self, customer: str, meter: str, id: str, /) -> Grant:
        """`revoke`, without blocking the loop."""
        return cast("Grant", await self._arun(_revoke_step(customer, meter, id)))

    def set_unlimited(self, customer: str, meter: str, is_unlimited: bool, /) -> None:
        """Refuse this account nothing from now on, or go back to its balance. Usage is counted either way."""
        self._run(_unlimited_step(customer, meter, is_unlimited))

    async def aset_unlimited(self, customer: str, meter: str, is_unlimited: bool, /) -> None:
        """`set_unlimited`, without blocking the loop."""
        await self._arun(_unlimited_step(customer, meter, is_unlimited))

    def record(
        self,
        customer: str,
        meter: str,
        *,
        transaction_id: str,
        amount: int = 1,
        properties: Mapping[str, Any] | None = None,
        price_slug: str | None = None,
    ) -> UsageEvent:
        """Record usage after the fact, without a hold; it may go into debt. The same id again gives the first event."""
        step = _record_step(customer, meter, transaction_id, amount, properties, price_slug)
        return cast("UsageEvent", self._recorded(self._run(step)))

    async def arecord(
        self,
        customer: str,
        meter: str,
        *,
        transaction_id: str,
        amount: int = 1,
        properties: Mapping[str, Any] | None = None,
        price_slug: str | None = None,
    ) -> UsageEvent:
        """`record`, without blocking the loop."""
        step = _record_step(customer, meter, transaction_id, amount, properties, price_slug)
        return cast("UsageEvent", self._recorded(await self._arun(step)))

    def _recorded(self, event: object) -> object:
        if self._remote is not None:
            self._remote.sender.wake()
        return event

    def in_transaction(self, connection: Any) -> AbstractContextManager[Books]:
        """
        Grant, revoke and record inside a transaction of your own database connection; only on PostgreSQL, with psycopg.

        `with billing.in_transaction(connection) as books: books.grant(…)`: a webhook and its grant are committed together, or not at
        all. ConfigurationError where the ledger is another one, or `connection` is in no transaction.
        """
        ledger = self._open()[0]
        join = getattr(ledger, "in_transaction", None)
        if join is None:
            raise ConfigurationError(
                f"only a PostgreSQL ledger joins a transaction of yours; this one is {ledger.name}"
            )
        return cast("AbstractContextManager[Books]", join(connection))

    def charge(
        self,
        customer: str,
        meter: str,
        *,
        amount: int,
        transaction_id: str | None = None,
        covers_calls: bool = False,
        price_slug: str | None = None,
        properties: Mapping[str, Any] | None = None,
    ) -> Charge:
        """
        Hold credits around anything: `with` or `async with`; leaving settles, an exception releases.

        With `covers_calls` it is also a `bill_to(customer)`: calls of that customer started inside, on any meter, cost 0 and are linked
        to it. InsufficientCreditsError and AlreadyBilledError come from entering.
        """
        from .charge import Charge

        return Charge(
            self,
            customer,
            meter,
            amount=amount,
            transaction_id=transaction_id,
            covers_calls=covers_calls,
            price_slug=price_slug,
            properties=properties,
        )

    def balance(self, customer: str, meter: str, /, *, refresh: bool = False) -> Balance:
        """
        The balance now, with everything that this process has handed over.

        `refresh` asks a remote service anew, which is done anyway where its word is older than `max_balance_age`; then its
        NoSubscriptionError and BillingUnavailableError come through. A ledger that keeps its own credits is always exact.
        """
        self._settle_queue()
        ledger = self.ledger
        if self._remote is not None:
            self._remote.refresh(customer, meter, is_forced=refresh)
        return ledger.balance(customer, meter)

    async def abalance(self, customer: str, meter: str, /, *, refresh: bool = False) -> Balance:
        """`balance`, without blocking the loop."""
        return await asyncio.to_thread(self.balance, customer, meter, refresh=refresh)

    def balances(self, customer: str, /) -> list[Balance]:
        """The balances of every meter that the customer has used or was granted. Of a remote service: as they were last heard."""
        self._settle_queue()
        return self.ledger.balances(customer)

    async def abalances(self, customer: str, /) -> list[Balance]:
        """`balances`, without blocking the loop."""
        return await asyncio.to_thread(self.balances, customer)

    def usage_events(
        self,
        customer: str | None = None,
        meter: str | None = None,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> Iterator[UsageEvent]:
        """Usage events, oldest first within each customer and meter; from `since`, before `until` (both with a time zone)."""
        self._settle_queue()
        return self.ledger.usage_events(customer, meter, since, until)

    def ausage_events(
        self,
        customer: str | None = None,
        meter: str | None = None,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> AsyncIterator[UsageEvent]:
        """`usage_events`, read in a thread."""
        return _in_thread(lambda: self.usage_events(customer, meter, since=since, until=until))

    def usage(
        self,
        customer: str | None = None,
        meter: str | None = None,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        by: Sequence[Literal["customer", "day", "meter", "model"]] = ("day", "meter", "model"),
    ) -> Iterator[UsageSum]:
        """Usage added up by any of customer, day (UTC), meter and model. Meters are never added together."""
        self._settle_queue()
        return self.ledger.usage(customer, meter, since, until, by)

    def ausage(
        self,
        customer: str | None = None,
        meter: str | None = None,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        by: Sequence[Literal["customer", "day", "meter", "model"]] = ("day", "meter", "model"),
    ) -> AsyncIterator[UsageSum]:
        """`usage`, read in a thread."""
        return _in_thread(lambda: self.usage(customer, meter, since=since, until=until, by=by))

    def holds(
        self,
        customer: str | None = None,
        meter: str | None = None,
        *,
        state: Literal["open", "released", "expired", "charged"] | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> Iterator[Hold]:
        """
        Holds of calls in flight, and those that ended without an answer being settled; `state` picks one kind.

        Placed from `since`, before `until` (both with a time zone).
        """
        self._settle_queue()
        return _between(self.ledger.holds(customer, meter, state=state), "placed_at", since, until)

    def aholds(
        self,
        customer: str | None = None,
        meter: str | None = None,
        *,
        state: Literal["open", "released", "expired", "charged"] | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> AsyncIterator[Hold]:
        """`holds`, read in a thread."""
        return _in_thread(lambda: self.holds(customer, meter, state=state, since=since, until=until))

    def grants(
        self,
        customer: str | None = None,
        meter: str | None = None,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> Iterator[Grant]:
        """Grants, oldest first within each customer and meter; given from `since`, before `until` (both with a time zone)."""
        return _between(self.ledger.grants(customer, meter), "created_at", since, until)

    def agrants(
        self,
        customer: str | None = None,
        meter: str | None = None,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> AsyncIterator[Grant]:
        """`grants`, read in a thread."""
        return _in_thread(lambda: self.grants(customer, meter, since=since, until=until))

    def recover(self) -> Recovery:
        """
        Resolve the holds of processes that died, by the policy each was placed with, and bring in what a spool kept.

        Runs by itself in every process each half lease. A hold counts as orphaned only when its lease is out.
        """
        from .ledger.reports import Recovery

        ledger, settler = self._open()
        settler.adopt()
        (at_start, parked_at_start), self._replayed = self._replayed, (0, 0)
        taken, parked = settler.replay()
        return ledger.recover() + Recovery(replayed=at_start + taken, parked=parked_at_start + parked)

    async def arecover(self) -> Recovery:
        """`recover`, without blocking the loop."""
        return await asyncio.to_thread(self.recover)

    def verify(self) -> Verification:
        """Recompute every invariant of the ledger from its records. `is_sound` tells, `broken` lists."""
        self._settle_queue()
        return self.ledger.verify()

    async def averify(self) -> Verification:
        """`verify`, without blocking the loop."""
        return await asyncio.to_thread(self.verify)

    def readiness(self) -> list[str]:
        """Why new calls would be refused now, or soon, because a remote service refuses us; empty when all is well. For a readiness probe."""
        reasons: list[str] = []
        try:
            ledger, settler = self._open()
            if settler.is_waiting:
                reasons.append(f"usage waits to be written to {ledger.name}")
            ledger.balance("readiness", "readiness")
            if self._remote is not None and self._remote.sender.alarm is not None:
                reasons.append(self._remote.sender.alarm)
        except BillingUnavailableError as error:
            reasons.append(str(error))
        return reasons

    async def areadiness(self) -> list[str]:
        """`readiness`, without blocking the loop."""
        return await asyncio.to_thread(self.readiness)

    # What a remote service must still be told.

    def deliver(self, timeout: float = 30.0) -> Deliveries:
        """
        Tell the remote service of the usage it does not have yet, in this thread, for at most `timeout` seconds and one request longer.

        For cron, and for processes that end early: where a program runs, a background thread does it. ConfigurationError without a service.
        """
        from .records import Deliveries

        self._settle_queue()
        ledger, _ = self._open()
        if self._remote is None:
            raise ConfigurationError(f"{ledger.name} has no service to deliver to; give Billing a service=")
        delivered = self._remote.sender.deliver(timeout)
        left = cast("ServiceLedger", ledger).undelivered_summary()
        return Deliveries(delivered, left.waiting, left.parked, left.dead, self._remote.sender.alarm)

    async def adeliver(self, timeout: float = 30.0) -> Deliveries:  # noqa: ASYNC109  as `deliver`
        """`deliver`, without blocking the loop."""
        return await asyncio.to_thread(self.deliver, timeout)

    def outbox(
        self,
        customer: str | None = None,
        meter: str | None = None,
        *,
        state: Literal["waiting", "parked", "dead"] | None = None,
    ) -> Iterator[Undelivered]:
        """Usage events that the remote service does not have yet, and why; in order within each customer and meter."""
        self._settle_queue()
        return self._keeps_outbox().undelivered(customer, meter, state=state)

    def aoutbox(
        self,
        customer: str | None = None,
        meter: str | None = None,
        *,
        state: Literal["waiting", "parked", "dead"] | None = None,
    ) -> AsyncIterator[Undelivered]:
        """`outbox`, read in a thread."""
        return _in_thread(lambda: self.outbox(customer, meter, state=state))

    def outbox_summary(self) -> OutboxSummary:
        """How many usage events the remote service does not have yet, by state, and the age of the oldest in seconds. For metrics."""
        self._settle_queue()
        return self._keeps_outbox().undelivered_summary()

    async def aoutbox_summary(self) -> OutboxSummary:
        """`outbox_summary`, without blocking the loop."""
        return await asyncio.to_thread(self.outbox_summary)

    def replay(
        self, customer: str | None = None, meter: str | None = None, *, transaction_id: str | None = None
    ) -> int:
        """
        Let parked and dead usage events be sent again, after what was wrong there has been put right. How many there are.

        All of them, or those of a customer, a meter, a transaction id. A customer's parked meter is replayed as a whole, in order.
        """
        count = self._keeps_outbox().replay(customer, meter, transaction_id)
        if count and self._remote is not None:
            self._remote.sender.wake()
        return count

    async def areplay(
        self, customer: str | None = None, meter: str | None = None, *, transaction_id: str | None = None
    ) -> int:
        """`replay`, without blocking the loop."""
        return await asyncio.to_thread(self.replay, customer, meter, transaction_id=transaction_id)

    def _keeps_outbox(self) -> ServiceLedger:
        ledger = self.ledger
        if not hasattr(ledger, "undelivered"):
            raise ConfigurationError(f"{ledger.name} keeps no outbox")
        return cast("ServiceLedger", ledger)

    def flush(self, timeout: float = 30.0) -> bool:
        """Wait until every call that has ended in this process is in the ledger. False when `timeout` seconds were not enough."""
        opened = self._opened
        return opened is None or opened[1].flush(timeout)

    async def aflush(self, timeout: float = 30.0) -> bool:  # noqa: ASYNC109  as `flush`
        """`flush`, without blocking the loop."""
        return await asyncio.to_thread(self.flush, timeout)

    def close(self) -> None:
        """
        Bring in what has ended, end streams that nobody reads any more, and close the ledger if this object opened it.

        A remote service is told what can be told within five seconds; the rest stays in the outbox. Holds of calls that are running stay.
        Closing twice changes nothing.
        """
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        if self._opened is None:
            return

        ledger, settler = self._opened
        for stop in list(self._streams.values()):
            stop()
        if not settler.close(self.settings.settle_patience):
            _log.warning("not everything could be written to %s; the spool keeps it for the next start", ledger.name)
        if self._owner is not None:
            from .ledger.leases import heartbeat

            heartbeat.forget(self._owner)
        remote, self._remote = self._remote, None
        if remote is not None:
            remote.sender.close(DELIVER_AT_CLOSE)
        self._opened = self._owner = None
        if self._given is None:
            ledger.close()
        if remote is not None and self.settings.service is None:
            remote.service.close()

    async def aclose(self) -> None:
        """`close`, without blocking the loop."""
        await asyncio.to_thread(self.close)

    def _settle_queue(self) -> None:
        opened = self._opened
        if opened is not None and not opened[1].flush(self.settings.settle_patience):
            _log.warning("what is read now may lack calls that have just ended")

    def _run(self, step: Step) -> object:
        return self.ledger.run(step)

    async def _arun(self, step: Step) -> object:
        if self._opened is None or self._owner is None:
            await asyncio.to_thread(self._open)
        return await self._settler.run(step)


class _Patience:
    """How long a call that would fit once others have ended waits for that: `wait_for_credits`."""

    def __init__(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds if seconds else None
        self._pause = 0.01

    def pause(self, error: InsufficientCreditsError) -> float | None:
        if self._deadline is None or not error.is_transient:
            return None
        left = self._deadline - time.monotonic()
        if left <= 0:
            return None
        self._pause = min(self._pause * 2, 0.25)
        return min(self._pause, left)


def _place_of(ledger: Ledger) -> Path:
    return Path(f"/ledger-{sha256(ledger.name.encode()).hexdigest()[:16]}")


def _undo(step: Place) -> End:
    from .core.steps import Release
    from .settling import End

    return End(Release(step.hold_id, step.customer, step.meter, "cancelled", "no"))


def _grant_step(customer: str, meter: str, amount: int, id: str, expires_at: datetime | None) -> Step:
    from .core.steps import AddGrant

    return AddGrant(customer, meter, amount, id, expires_at)


def _revoke_step(customer: str, meter: str, id: str) -> Step:
    from .core.steps import Revoke

    return Revoke(customer, meter, id)


def _unlimited_step(customer: str, meter: str, is_unlimited: bool) -> Step:
    from .core.steps import SetUnlimited

    return SetUnlimited(customer, meter, is_unlimited)


def _record_step(
    customer: str,
    meter: str,
    transaction_id: str,
    amount: int,
    properties: Mapping[str, Any] | None,
    price_slug: str | None,
) -> Step:
    from .core.steps import Record

    return Record(customer, meter, transaction_id, amount, None, properties, price_slug)


def _between(rows: Iterator[_T], time: str, since: datetime | None, until: datetime | None) -> Iterator[_T]:
    for bound in (since, until):
        if bound is not None and bound.tzinfo is None:
            raise ValueError(f"since and until need a time zone, unlike {bound!r}")
    if since is None and until is None:
        return rows
    return (
        row
        for row in rows
        if (since is None or getattr(row, time) >= since) and (until is None or getattr(row, time) < until)
    )


async def _in_thread(start: Callable[[], Iterator[_T]]) -> AsyncIterator[_T]:
    rows = await asyncio.to_thread(start)
    while page := await asyncio.to_thread(lambda: list(islice(rows, 500))):
        for row in page:
            yield row


def _beat(billing: weakref.ref[Billing], step: Renew) -> None:
    alive = billing()
    if alive is None:
        from .ledger.leases import heartbeat

        heartbeat.forget(step.owner)
    elif alive._opened is not None:
        alive._opened[0].run(step)


def _sweep(billing: weakref.ref[Billing]) -> None:
    alive = billing()
    if alive is not None and alive._opened is not None:
        ledger, settler = alive._opened
        settler.adopt()
        settler.start_retrying()
        found = ledger.recover()
        if alive._remote is not None:
            alive._remote.sender.look()
        if found.resolved:
            _log.warning(
                "%d holds of processes that died were resolved: %d released (in doubt: %d), %d charged",
                found.resolved,
                found.released,
                found.in_doubt,
                found.charged,
            )


_alive: weakref.WeakSet[Billing] = weakref.WeakSet()
_shared: dict[str, Billing] = {}
_shared_lock = threading.Lock()


def shared(url: str) -> Billing:
    """The `Billing` with default policies that clients given the same URL share. Closed when the program ends."""
    if url == "memory://":
        return Billing(url)
    with _shared_lock:
        billing = _shared.get(url)
        if billing is None or billing._is_closed:
            billing = _shared[url] = Billing(url)
        return billing


def _after_fork() -> None:
    global _shared_lock  # noqa: PLW0603  the parent's lock may be taken for ever
    _shared_lock = threading.Lock()
    for billing in list(_alive):
        billing._after_fork()


def _end_with_child() -> None:
    """A child of multiprocessing leaves without the handlers of atexit, but not without its own; it forgot its parent's."""
    process = sys.modules.get("multiprocessing.process")
    if process is not None and process.parent_process() is not None:
        from multiprocessing.util import Finalize

        Finalize(None, _at_exit, exitpriority=10)


def _at_exit() -> None:
    for billing in list(_alive):
        try:
            billing.close()
        except Exception as error:  # noqa: BLE001  the others are closed all the same
            _log.error("%r could not be closed: %s", billing, error)


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)
