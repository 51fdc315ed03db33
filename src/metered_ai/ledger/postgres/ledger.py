"""`PostgresLedger`: one balance for a whole fleet."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

from ...core.steps import (
    AddGrant,
    Enlarge,
    Place,
    Record,
    Release,
    Renew,
    Revoke,
    Settle,
    SetUnlimited,
    Step,
    StepResult,
)
from ...errors import (
    BillingUnavailableError,
    ConfigurationError,
    LedgerCorruptError,
    MeteringError,
    SchemaTooNewError,
)
from .. import Outcomes
from ..book import Sweep
from ..commits import Handed, Job, Locked, OneOfSeveral, Several
from ..forks import ledgers
from ..inputs import check
from ..reading import Fetch
from ..reports import Verification
from ..rows import Row
from ..served import Served
from ..serving import Ask, Bind, Hear, ServiceStep
from ..statements import Statement
from ..verify import verify
from . import failures
from .address import Address
from .batches import ENDS, Batch, is_usual
from .dialect import check_schema, statements
from .driver import cursor_of, load
from .joined import Books
from .lanes import Lane
from .order import Order, Ticket
from .schema import is_made, migrate
from .sessions import Lender, Made, Sessions, connector, lender_of
from .transaction import PostgresBook, Statements, locking

if TYPE_CHECKING:
    from .driver import Connection, Cursor

__all__ = ["PostgresLedger"]

_log = logging.getLogger("metered_ai.ledger")

_DURABLE = frozenset({Settle, Record, AddGrant, Revoke, SetUnlimited, Enlarge, Sweep, Bind})
_HOLDS = frozenset({Place, Enlarge, Renew, Ask, Hear})
_RACES_AT_MOST = 5
_LOCK_WAIT = 0.1
"""Seconds that a batch waits for somebody else's lock, before it goes on without that account."""
_HOLD_LANES = 2


class PostgresLedger(Served):
    """
    Keeps credits in a PostgreSQL database, for any number of machines, processes, threads and event loops.

    `url` is what psql takes: `postgresql://…`, or `key=value` words. The database is connected to at the first use, and the schema made
    if it is not there. `durability` "full" acknowledges what the server has synced (never less than its own disk, whatever
    `synchronous_commit` says), "relaxed" may lose the last moments when the server's machine loses power. Before a call a lock, a lost
    connection or a restart of the server is waited for up to `hold_patience` seconds, after it up to `settle_patience`.

    `connections` is the most that one process opens; one of them is for settles alone. `pool`, a psycopg_pool.ConnectionPool, lends
    connections instead and is not closed; or it is a function that opens one, for a database that `url` names. `pgbouncer` says that
    sessions are shared: nothing is prepared on the server, and settings last for one transaction. `clock` gives microseconds since
    1970 to tests; else the server's clock counts.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        pool: object | None = None,
        schema: str | None = None,
        connections: int | None = None,
        pgbouncer: bool | None = None,
        durability: Literal["full", "relaxed"] = "full",
        hold_patience: float = 5.0,
        settle_patience: float = 30.0,
        auto_migrate: bool = True,
        clock: Callable[[], int] | None = None,
    ) -> None:
        load()
        if url is None:
            # A pool knows where its connections lead; of a function only the caller does.
            url = getattr(pool, "conninfo", None)
        if not isinstance(url, str):
            raise ConfigurationError(
                "a PostgreSQL ledger needs the URL of its database, also beside a function that connects: messages and the spool go by it"
            )
        if durability not in ("full", "relaxed"):
            raise ConfigurationError(f"durability must be 'full' or 'relaxed', not {durability!r}")
        for name, patience in (("hold_patience", hold_patience), ("settle_patience", settle_patience)):
            if isinstance(patience, bool) or not isinstance(patience, int | float) or not patience >= 0:
                raise ConfigurationError(f"{name} must be a number of seconds, not {patience!r}")
        self._address = Address.of(url)
        self.schema = check_schema(schema or self._address.schema)
        limit = self._address.connections if connections is None else connections
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 2:
            raise ConfigurationError(f"connections must be an int of at least 2, not {limit!r}")
        self._limit = limit
        self._is_pooled = self._address.pgbouncer if pgbouncer is None else pgbouncer
        self._pool = pool
        self._made_in = os.getpid()
        self._durability = durability
        self._hold_patience = float(hold_patience)
        self._settle_patience = float(settle_patience)
        self._auto_migrate = auto_migrate
        self._clock = clock
        self._sql = statements(self.schema)
        self._is_closed = False
        self._service: str | None = None
        self._was_open = False
        self._start()
        ledgers.add(self)

    def _start(self) -> None:
        """What a process has for itself: nothing open, nobody waiting."""
        self._pid = os.getpid()
        self._sessions = Sessions(self._lender(), self._limit, is_pooled=self._is_pooled, longest=self._longest)
        lane = partial(Lane, work=self._work, alone=self._alone, out_of_patience=self._out_of_patience)
        self._aside_lane = lane("metered_ai aside")
        self._end_lane = lane("metered_ai settles", is_settle=True)
        self._book_lane = lane("metered_ai books")
        self._hold_lanes = [lane(f"metered_ai holds {number}") for number in range(_HOLD_LANES)]
        self._order = Order(self._expire, self._end_lane)
        self._lanes = (*self._hold_lanes, self._end_lane, self._book_lane, self._aside_lane)
        self._opening = threading.Lock()
        self._closing = threading.Lock()
        self._is_ready = False
        self._here = threading.local()

    def _lender(self) -> Lender:
        if self._pool is not None:
            return lender_of(self._pool, self._made_in)
        return Made(
            connector(
                self._address.conninfo,
                patience=self._statement_patience,
                longest=self._longest,
                lock_wait=_LOCK_WAIT,
                is_pooled=self._is_pooled,
                secrets=self._address.secrets,
                name=self.name,
                was_open=lambda: self._was_open,
            )
        )

    @property
    def name(self) -> str:
        """The ledger's address for messages, without secrets."""
        place = self._address.shown
        return place if self.schema == "metered_ai" else f"{place} schema {self.schema}"

    def __repr__(self) -> str:
        return f"<PostgresLedger {self.name}>"

    def now(self) -> int:
        """The ledger's clock: microseconds since 1970, UTC, by the server."""
        if self._clock is not None:
            return self._clock()
        fetch: Fetch | None = getattr(self._here, "fetch", None)
        if fetch is None:
            with self._reading() as fetch:
                return self._server_time(fetch)
        return self._server_time(fetch)

    def _server_time(self, fetch: Fetch) -> int:
        ((now,),) = fetch("reads.clock", ())
        return cast("int", now)

    # Steps

    def run(self, step: Step, /) -> StepResult:
        """Do one step and return its result. A lone caller's step runs in its own thread; contended callers share a commit."""
        check(step)
        self._check_open()
        return cast("StepResult", self._do(step))

    def _do(self, step: Step | ServiceStep | Sweep) -> object:
        ticket = Ticket(step)
        lane, patience = self._lane_of(ticket), self._patience(step)
        job = Job(ticket, patience)
        job.lock = threading.Lock()
        job.lock.acquire()
        goes = self._order.enter(ticket, job, lane)
        if goes is not None:
            return goes.run(ticket, patience)
        # A callback in a lane's own thread must not wait for what that thread has still to do.
        if any(each.is_mine for each in self._lanes) and self._order.hurry(ticket):
            return lane.run(ticket, patience)
        return lane.wait(job)

    def submit(self, step: Step, /) -> Future[StepResult]:
        """Hand one step over and return at once. Never blocks; the step is done even if nobody waits for it."""
        try:
            check(step)
            self._check_open()
        except Exception as error:  # noqa: BLE001  It goes where the result would have gone.
            failed: Future[StepResult] = Future()
            failed.set_exception(error)
            return failed
        job = Handed(Ticket(step), self._patience(step))
        self._hand_over(job)
        return job.future

    def submit_all(self, steps: Sequence[Step], /) -> Future[Outcomes]:
        """Hand several steps over at once, in order. One step's failure never fails its neighbours."""
        group = Several(len(steps))
        if not steps:
            group.future.set_result([])
        # Once for all of them: asking the system which process this is costs as much as handing a step over.
        self._check_process()
        for index, step in enumerate(steps):
            try:
                if self._is_closed:
                    self._check_open()
                check(step)
            except Exception as error:  # noqa: BLE001  It goes where the result would have gone.
                group.note(index, error)
            else:
                self._hand_over(OneOfSeveral(Ticket(step), self._patience(step), group, index))
        return group.future

    def _hand_over(self, job: Job) -> None:
        ticket: Ticket = job.step
        lane = self._order.enter(ticket, job, self._lane_of(ticket))
        if lane is not None:
            lane.hand_over(job)

    def _lane_of(self, ticket: Ticket) -> Lane:
        if self._order.is_aside(ticket):
            self._order.put_aside(ticket)
            return self._aside_lane
        kind = type(ticket.step)
        if kind is Place or kind is Enlarge or kind is Renew:
            return self._hold_lane_of(ticket)
        return self._end_lane if kind in ENDS else self._book_lane

    def _hold_lane_of(self, ticket: Ticket) -> Lane:
        # An account's holds all go one way, so that no two connections of ours wait for each other at its row.
        return self._hold_lanes[hash(ticket.account) % len(self._hold_lanes)]

    def _patience(self, step: Step | ServiceStep | Sweep) -> float:
        return self._hold_patience if type(step) in _HOLDS else self._settle_patience

    def bind(self, service: str, /) -> None:
        """Open for this service and no other, for ever. ConfigurationError, naming both, where the ledger belongs to another."""
        # Binding locks everybody out for a moment, so that it is done once for all processes.
        if self.service != service:
            super().bind(service)
        self._service = service

    def _carry_out(self, step: ServiceStep | Sweep) -> object:
        self._check_open()
        return self._do(step)

    def verify(self) -> Verification:
        """Recompute every invariant from the records."""
        self._check_open()
        return verify(self._snapshot)

    def sync(self) -> None:
        """Return when everything that has returned before survives power loss, whatever the durability."""
        if self._durability == "relaxed":
            with self._translated(), self._sessions.use(self._settle_patience) as connection:
                cursor = cursor_of(connection)
                # A commit that waits for its own place in the log waits for every one before it.
                cursor.execute("BEGIN")
                cursor.execute("SET LOCAL synchronous_commit = on")
                cursor.execute("SELECT pg_current_xact_id()")
                cursor.execute("COMMIT")

    @contextmanager
    def in_transaction(self, connection: Connection) -> Generator[Books]:
        """
        Grant, revoke and record inside a transaction of your own, on your psycopg connection: all of it is committed together, or nothing.

        What is done shows, and counts, once you commit; until then the account is locked for others, so commit soon. Of SQLAlchemy's
        connection it is `connection.connection.driver_connection`. ConfigurationError where no transaction could be joined. The
        driver's own errors come as they are, because the transaction is yours to try again.
        """
        self._check_open()
        with self._translated():
            self._ready()
        books = Books(connection, self._sql, self._clock, self._service)
        try:
            yield books
        finally:
            books.is_over = True

    def migrate(self) -> bool:
        """Bring the schema to the newest version, whatever `auto_migrate` says; tell whether anything was to be done."""
        self._check_open()
        with self._translated(), self._sessions.use(self._hold_patience) as connection:
            self._check_server(connection)
            return migrate(connection, self.schema, self.name)

    def is_made(self) -> bool:
        """True if the schema is there. Looking makes nothing."""
        self._check_open()
        with self._translated(), self._sessions.use(self._hold_patience) as connection:
            return is_made(connection, self.schema, self.name)

    def close(self) -> None:
        """Finish what was handed over and close what was opened here. Open holds stay; closing twice changes nothing."""
        if self._pid != os.getpid():
            self.after_fork_in_child()
        with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
            while not self._order.is_idle:
                for lane in self._lanes:
                    lane.drain()
            for lane in self._lanes:
                lane.drain()
                lane.stop()
            self._order.stop()
            self._sessions.close()

    # Doing them

    def _alone(self, lane: Lane, ticket: Ticket) -> object:
        """Do one step in the caller's thread. Locked, with nothing done, where it has to wait in a queue."""
        (outcome,) = self._outcomes(lane, [ticket])
        if isinstance(outcome, Locked):
            raise outcome
        self._order.leave((ticket,))
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _work(self, lane: Lane, jobs: list[Job]) -> list[Job]:
        """Do jobs; return those that wait for the server, and take those out of the list that go on aside."""
        outcomes = self._outcomes(lane, [job.step for job in jobs])
        left: list[Job] = []
        ended: list[Job] = []
        moved: list[Job] = []
        for job, outcome in zip(jobs, outcomes, strict=True):
            if not isinstance(outcome, Locked):
                job.note(outcome)
                ended.append(job)
            elif job.step.goes_on is not None:
                moved.append(job)
            else:
                left.append(job)
        if moved:
            gone = set(map(id, moved))
            jobs[:] = [job for job in jobs if id(job) not in gone]
            for job in moved:
                ticket: Ticket = job.step
                where, ticket.goes_on = cast("Lane", ticket.goes_on), None
                ticket.where = where
                where.hand_over(job)
        self._order.leave(job.step for job in ended)
        return left

    def _outcomes(self, lane: Lane, tickets: list[Ticket]) -> list[object]:
        """What each step came to: its result, its error, or Locked for one that has to wait."""
        outcomes: dict[int, object] = {}
        patience = max(map(self._patience, (ticket.step for ticket in tickets)))
        try:
            self._ready()
            with self._sessions.use(patience, is_settle=lane.is_settle, is_step=True) as connection:
                for index, ticket in enumerate(tickets):
                    if lane is not self._aside_lane and self._order.is_aside(ticket):
                        # What came before it waits for a lock, and so does this then.
                        self._put_aside(ticket)
                        outcomes[index] = Locked()
                self._together(connection, lane, tickets, outcomes)
                self._one_by_one(connection, lane, tickets, outcomes)
        except Exception as error:  # noqa: BLE001  Nobody may wait for ever.
            told = self._told(error)
            # What is wrong with the schema is still wrong later.
            is_final = isinstance(error, LedgerCorruptError | SchemaTooNewError)
            waits = (isinstance(error, BillingUnavailableError) and not is_final) or failures.is_passing(error)
            if waits:
                # Others that are idle may be lost as well.
                self._sessions.forget_idle()
            for index, ticket in enumerate(tickets):
                if index not in outcomes:
                    ticket.trouble = told
                    ticket.is_in_doubt = ticket.is_in_doubt or failures.is_lost(error)
                    outcomes[index] = Locked() if waits else self._told(error)
        return [outcomes[index] for index in range(len(tickets))]

    def _together(self, connection: Connection, lane: Lane, tickets: list[Ticket], outcomes: dict[int, object]) -> None:
        """Do what is usual in one round trip."""
        import psycopg

        batch = Batch(self._sql, self._clock, self._service)
        is_durable = False
        for index, ticket in enumerate(tickets):
            if index not in outcomes and is_usual(ticket.step):
                try:
                    batch.add(index, ticket.step)
                except ValueError as error:
                    outcomes[index] = error
                    continue
                is_durable = is_durable or self._is_durable(ticket.step)
        if not len(batch):
            return
        settings = self._session_settings
        # Whoever waits for a lock anyway does not wait for it here.
        is_aside = lane is self._aside_lane
        try:
            outcomes |= batch.run(connection, settings, is_durable=is_durable, skips_locked=is_aside)
        except (psycopg.Error, UnicodeError) as error:
            if failures.is_passing(error):
                raise
            if not failures.is_locked(error):
                # One of them cannot be stored: each by itself then, so that it fails alone.
                return
            outcomes |= batch.run(connection, settings, is_durable=is_durable, skips_locked=True)
            for index, ticket in enumerate(tickets):
                if index not in outcomes and is_usual(ticket.step):
                    self._put_aside(ticket)
                    outcomes[index] = Locked()

    def _one_by_one(
        self, connection: Connection, lane: Lane, tickets: list[Ticket], outcomes: dict[int, object]
    ) -> None:
        """Do the rest, each in a transaction of its own."""
        locked: set[object] = set()
        for index, ticket in enumerate(tickets):
            if index in outcomes:
                continue
            if lane is self._end_lane and type(ticket.step) is Place:
                # Whatever takes longer must not keep settles waiting.
                ticket.goes_on = self._hold_lane_of(ticket)
                outcomes[index] = Locked()
                continue
            if ticket.account is not None and ticket.account in locked:
                outcomes[index] = Locked()
            else:
                outcomes[index] = self._singly(connection, ticket.step)
            if isinstance(outcomes[index], Locked):
                locked.add(ticket.account)
                if lane is not self._aside_lane:
                    self._put_aside(ticket)

    def _put_aside(self, ticket: Ticket) -> None:
        ticket.trouble = BillingUnavailableError(
            f"the ledger {self.name} has the account of {ticket.account} locked by another transaction"
        )
        self._order.put_aside(ticket)
        ticket.goes_on = self._aside_lane

    def _singly(self, connection: Connection, step: Step | ServiceStep | Sweep) -> object:
        """Do one step in a transaction of its own: its result, its error, or Locked."""
        for left in reversed(range(_RACES_AT_MOST)):
            try:
                return self._transact(connection, step)
            except Exception as error:
                if failures.is_locked(error):
                    return Locked()
                if failures.is_race(error) and left:
                    continue
                if failures.is_passing(error):
                    raise
                return self._told(error)
        raise AssertionError("a race is told of at last")

    def _transact(self, connection: Connection, step: Step | ServiceStep | Sweep) -> object:
        cursor = cursor_of(connection)
        book_statements = Statements(cursor, self._sql)
        is_done = False
        try:
            step, now, bound = self._begin(connection, step)
            book = PostgresBook(book_statements, bound, self._service)
            outcome: object
            try:
                outcome = book.do(step, now)
            except (MeteringError, ValueError) as error:
                if book.mark != book_statements.total_changes or isinstance(error, UnicodeError):
                    raise
                # A refusal. What was written before it stands by itself.
                outcome = error
            cursor.execute("COMMIT")
            is_done = True
        finally:
            if not is_done and not connection.closed:
                cursor.execute("ROLLBACK")
        return outcome

    def _begin(
        self, connection: Connection, step: Step | ServiceStep | Sweep
    ) -> tuple[Step | ServiceStep | Sweep, int, str | None]:
        """Begin a step's transaction and lock its accounts, in one round trip; what of the step can be done, the time, and the service
        that the ledger is bound to.
        """
        lock = locking(step)
        locked, clock, service = cursor_of(connection), cursor_of(connection), cursor_of(connection)
        with connection.pipeline():
            other = cursor_of(connection)
            other.execute("BEGIN")
            other.execute(
                self._sql["batches.settings"], (self._is_durable(step), *(self._session_settings or (None, None)))
            )
            if lock is not None:
                locked.execute(self._sql[lock[0]], lock[1])
            # Behind the lock, for which whoever binds the ledger is waited.
            service.execute(self._sql["outbox.service"])
            if self._clock is None:
                clock.execute(self._sql["reads.clock"])
        rows = [] if lock is None else locked.fetchall()
        if isinstance(step, Sweep):
            # What somebody else is at is left to the next sweep.
            mine = {no for no, *_ in rows}
            step = replace(step, holds=tuple(hold for hold in step.holds if hold[0] in mine))
        now = clock.fetchall()[0][0] if self._clock is None else self._clock()
        return step, now, next((name for name, _ in service.fetchall()), None)

    @property
    def _session_settings(self) -> tuple[str, str] | None:
        """What a session that is not ours has to be told in each transaction."""
        if self._pool is None and not self._is_pooled:
            return None
        return f"{int(_LOCK_WAIT * 1000)}ms", f"{int(self._statement_patience * 1000)}ms"

    @property
    def _statement_patience(self) -> float:
        """Seconds after which the server itself ends a statement."""
        return max(self._hold_patience, self._settle_patience, 1.0)

    @property
    def _longest(self) -> float:
        """Seconds after which a server hangs that has not even done that."""
        return self._statement_patience + 1

    def _is_durable(self, step: Step | ServiceStep | Sweep) -> bool:
        if self._durability == "relaxed":
            return False
        return type(step) in _DURABLE or (type(step) is Place and step.on_unknown == "charge")

    def _told(self, error: Exception) -> Exception:
        """What an error is for its caller."""
        told = failures.translate(
            copy(error) if isinstance(error, MeteringError) else error, self.name, self._address.secrets
        )
        if told is not error and not isinstance(error, MeteringError):
            told.__cause__ = None if self._is_secret(error) else error
        return told

    def _is_secret(self, error: Exception) -> bool:
        return failures.cleaned(str(error), self._address.secrets) != failures.cleaned(str(error), ())

    @contextmanager
    def _translated(self) -> Generator[None]:
        import psycopg

        try:
            yield
        except (psycopg.Error, OSError) as error:
            raise self._told(error) from (None if self._is_secret(error) else error)

    def _out_of_patience(self, job: Job) -> Exception:
        ticket: Ticket = job.step
        self._order.leave((ticket,))
        if ticket.is_in_doubt and isinstance(ticket.step, Place):
            # Its caller is refused, so no hold may stay; where it comes later than this, it finds that it was released.
            self.submit(
                Release(ticket.step.hold_id, ticket.step.customer, ticket.step.meter, reason="cancelled", sent="no")
            )
        trouble = ticket.trouble or BillingUnavailableError(f"the ledger {self.name} was not to be had")
        told = type(trouble)(f"{trouble}; waited {job.patience:g} s") if isinstance(trouble, MeteringError) else trouble
        told.__cause__ = trouble.__cause__
        return told

    def _expire(self, job: Job) -> None:
        """A step that waited for an earlier one of its account for too long."""
        job.error = BillingUnavailableError(
            f"an earlier step of {job.step.account} has not come to an end in the ledger {self.name}; waited {job.patience:g} s"
        )
        try:
            job.finish()
        except BaseException:  # noqa: BLE001  A callback's, and others wait.
            _log.exception("a callback of a step failed")

    # Opening

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            # Forked by something that does not tell Python.
            self.after_fork_in_child()

    def _check_open(self) -> None:
        self._check_process()
        if self._is_closed:
            raise BillingUnavailableError(f"the ledger {self.name} is closed")

    def _ready(self) -> None:
        """Have the schema there, once for each process."""
        if self._is_ready:
            return
        with self._opening:
            if self._is_ready:
                return
            with self._sessions.use(self._hold_patience) as connection:
                self._check_server(connection)
                migrate(connection, self.schema, self.name, auto_migrate=self._auto_migrate)
            self._is_ready = self._was_open = True

    def _check_server(self, connection: Connection) -> None:
        if connection.info.server_version < 130000:
            raise ConfigurationError(f"the server of {self.name} is older than PostgreSQL 13")
        encoding = connection.info.parameter_status("server_encoding")
        if encoding != "UTF8":
            raise ConfigurationError(f"the database of {self.name} is encoded as {encoding}; a ledger needs UTF8")

    # Reading

    @contextmanager
    def _reading(self) -> Generator[Fetch]:
        with self._cursor() as cursor, self._fetching(cursor) as fetch:
            yield fetch

    @contextmanager
    def _snapshot(self) -> Generator[Fetch]:
        with self._cursor() as cursor:
            cursor.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            with self._fetching(cursor) as fetch:
                yield fetch
            cursor.execute("COMMIT")

    @contextmanager
    def _cursor(self) -> Generator[Cursor]:
        self._check_open()
        with self._translated():
            self._ready()
            with self._sessions.use(self._hold_patience) as connection:
                yield cursor_of(connection)

    @contextmanager
    def _fetching(self, cursor: Cursor) -> Generator[Fetch]:
        def fetch(statement: str, parameters: Sequence[Any]) -> list[Row]:
            key = statement.key if isinstance(statement, Statement) else statement
            cursor.execute(self._sql[key], parameters)
            return cursor.fetchall()

        # So that asking for the time needs no second connection.
        outer, self._here.fetch = getattr(self._here, "fetch", None), fetch
        try:
            yield fetch
        finally:
            self._here.fetch = outer

    # Forks

    def before_fork(self) -> None:
        """Nothing: the child opens its own connections, and leaves these alone."""

    def after_fork_in_parent(self) -> None:
        """Nothing was touched."""

    def after_fork_in_child(self) -> None:
        """Forget connections, threads, locks and what waits: they are the parent's."""
        self._sessions.leave_to_parent()
        self._start()
