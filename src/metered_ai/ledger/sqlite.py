"""The default ledger: one SQLite file."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from copy import copy
from typing import Any, Literal, cast

from ..core.steps import AddGrant, Enlarge, Place, Record, Renew, Revoke, Settle, SetUnlimited, Step, StepResult
from ..errors import BillingUnavailableError, ConfigurationError, MeteringError
from . import Outcomes, files
from .book import Sweep
from .commits import Commits, Job, Locked
from .forks import FORK_PATIENCE, inherited, ledgers
from .inputs import check
from .reading import Fetch, rows_of
from .reports import Verification
from .served import Served
from .serving import Ask, Bind, Hear, ServiceStep, Serving
from .statements import Statement
from .upkeep import Checkpoints, Slot, Syncs
from .verify import verify

__all__ = ["SqliteLedger"]

_log = logging.getLogger("metered_ai.ledger")

_DURABLE = frozenset({Settle, Record, AddGrant, Revoke, SetUnlimited, Enlarge, Sweep, Bind})
_HOLDS = frozenset({Place, Enlarge, Renew})
_READERS = 3
_CHECKPOINT_EVERY = 1_000
_UNFIT = (OverflowError, UnicodeError, sqlite3.InterfaceError, sqlite3.ProgrammingError, sqlite3.DataError)
_RECHECK_AFTER = 0.02


class SqliteLedger(Served):
    """
    Keeps credits in one SQLite file, for any number of threads, event loops and processes of one machine.

    The file is opened at the first use and created (readable by its owner only) if its folder exists. What `durability` "full"
    acknowledges survives a power loss; "relaxed" may lose what was acknowledged in the last 20 ms then (where the machine is too busy
    for a sync in time, until the next commit, which waits for it), and nothing when only the process dies.
    `hold_patience` and `settle_patience` are seconds to wait for a lock that another process holds: before a call, and after
    it. `clock` gives microseconds since 1970, UTC.

    All statements that write, and each BEGIN and COMMIT, go through `_execute`: a test that wants to fail or die at one of
    them overrides it in a subclass.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        durability: Literal["full", "relaxed"] = "full",
        hold_patience: float = 5.0,
        settle_patience: float = 30.0,
        auto_migrate: bool = True,
        clock: Callable[[], int] | None = None,
    ) -> None:
        if durability not in ("full", "relaxed"):
            raise ConfigurationError(f"durability must be 'full' or 'relaxed', not {durability!r}")
        for name, patience in (("hold_patience", hold_patience), ("settle_patience", settle_patience)):
            if isinstance(patience, bool) or not isinstance(patience, int | float) or not patience >= 0:
                raise ConfigurationError(f"{name} must be a number of seconds, not {patience!r}")
        self.path = os.path.abspath(os.fspath(path))
        self._durability = durability
        self._hold_patience = float(hold_patience)
        self._settle_patience = float(settle_patience)
        self._auto_migrate = auto_migrate
        self._clock = clock
        self._identity: files.Identity | None = None
        self._is_closed = False
        self._is_shut = False
        self._is_torn = False
        self._service: str | None = None
        # Without an fsync there is little to share, and handing a step to another thread costs as much as doing it.
        self._commits = Commits(self._alone, self._work, self._locked, "metered_ai", shares=durability == "full")
        self._quiet: list[Slot] = []
        self._start()
        ledgers.add(self)

    def _start(self) -> None:
        """What a process has for itself: nothing open, nobody waiting."""
        self._pid = os.getpid()
        self._writer = Slot()
        self._readers = [Slot() for _ in range(_READERS)]
        self._aside = Slot()
        self._closing = threading.Lock()
        self._is_full = False
        self._is_clean = True
        self._recheck_at = 0.0
        self._since_checkpoint = 0
        self._checkpoints = Checkpoints(
            self.path, self._aside, lambda: not self._is_shut and self._writer.connection is not None
        )
        self._syncs = Syncs(self.path)

    @property
    def name(self) -> str:
        """The ledger's address for messages."""
        return f"sqlite:///{self.path}"

    def now(self) -> int:
        """The ledger's clock: microseconds since 1970, UTC."""
        return time.time_ns() // 1000 if self._clock is None else self._clock()

    # Steps

    def run(self, step: Step, /) -> StepResult:
        """Do one step and return its result. A lone caller's step runs in its own thread; contended callers share a commit."""
        check(step)
        self._check_open()
        return cast("StepResult", self._commits.run(step, self._patience(step)))

    def submit(self, step: Step, /) -> Future[StepResult]:
        """Hand one step over and return at once. Never blocks; the step is done even if nobody waits for it."""
        try:
            check(step)
            self._check_open()
        except Exception as error:  # noqa: BLE001  It goes where the result would have gone.
            failed: Future[StepResult] = Future()
            failed.set_exception(error)
            return failed
        return self._commits.submit(step, self._patience(step))

    def submit_all(self, steps: Sequence[Step], /) -> Future[Outcomes]:
        """Hand several steps over at once, in order. One step's failure never fails its neighbours."""
        handed: list[tuple[Any, float, Exception | None]] = []
        for step in steps:
            try:
                check(step)
                self._check_open()
            except Exception as error:  # noqa: BLE001  It goes where the result would have gone.
                handed.append((step, 0.0, error))
            else:
                handed.append((step, self._patience(step), None))
        return self._commits.submit_all(handed)

    def bind(self, service: str, /) -> None:
        """Open for this service and no other, for ever. ConfigurationError, naming both, where the ledger belongs to another."""
        super().bind(service)
        self._service = service

    def _carry_out(self, step: ServiceStep | Sweep) -> object:
        self._check_open()
        patience = self._hold_patience if type(step) in (Ask, Hear) else self._settle_patience
        return self._commits.run(step, patience)

    def verify(self) -> Verification:
        """Recompute every invariant from the records."""
        return verify(self._snapshot)

    def sync(self) -> None:
        """Return when everything that has returned before survives power loss, whatever the durability."""
        if self._durability == "relaxed":
            self._syncs.sync()

    def close(self) -> None:
        """Finish what was handed over and close. Open holds stay; closing twice changes nothing."""
        if self._pid != os.getpid():
            self.after_fork_in_child()
        with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
            self._commits.drain()
            self._commits.stop()
            with self._writer.lock:
                # Nothing is committed from here on that the syncs could miss.
                self._is_shut = True
            self._syncs.stop()
            self._checkpoints.stop()
            for slot in self._readers:
                with slot.lock:
                    self._close_slot(slot)
            with self._writer.lock:
                self._last_checkpoint()
                self._close_slot(self._writer)

    # One transaction

    def _execute(self, statement: str, parameters: Sequence[Any] = ()) -> sqlite3.Cursor:
        if type(statement) is Statement and statement.spread is not None:
            parameters = statement.spread(parameters)
        return self._cursor.execute(statement, parameters)

    def _alone(self, step: Step | ServiceStep | Sweep) -> object:
        """Do one step in a transaction of its own. Locked, with nothing done, if another process has the ledger."""
        with self._writer.lock:
            try:
                (outcome,) = self._transact((step,))
            except Exception as error:  # noqa: BLE001  The caller is told; the writer lives on.
                if files.is_locked(error):
                    raise Locked from None
                self._drop_if_broken(error)
                outcome = self._told(error)
        self._syncs.catch_up()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _work(self, jobs: list[Job]) -> list[Job]:
        """Do jobs in one transaction; return those that could not begin because another process has the ledger."""
        with self._writer.lock:
            groups = [jobs]
            while groups:
                group = groups[0]
                try:
                    outcomes = self._transact([job.step for job in group])
                except Exception as error:  # noqa: BLE001  Each caller is told; the writer lives on.
                    if files.is_locked(error):
                        return [job for group in groups for job in group]
                    self._drop_if_broken(error)
                    # One for each, because each caller's traceback is written into its own.
                    outcomes = [self._told(copy(error) if isinstance(error, MeteringError) else error) for _ in group]
                if outcomes:
                    for job, outcome in zip(group, outcomes, strict=True):
                        job.note(outcome)
                    groups = groups[1:]
                else:
                    # One of them was cut in the middle: each by itself then, so that it fails alone.
                    groups = [[job] for job in group]
        self._syncs.catch_up()
        return []

    def _transact(self, steps: Sequence[Step | ServiceStep | Sweep]) -> Sequence[object]:
        """Do steps in one transaction and give their results or errors; nothing, and nothing done, if one of several was cut in the middle."""
        is_durable = False
        for step in steps:
            if type(step) in _DURABLE or (type(step) is Place and step.on_unknown == "charge"):
                is_durable = True
                break
        if self._writer.connection is None or self._is_shut or is_durable or time.monotonic() >= self._recheck_at:
            self._ready(must_exist=is_durable)
        connection = cast("sqlite3.Connection", self._writer.connection)
        if not self._is_clean or connection.in_transaction:
            # A KeyboardInterrupt fell between a BEGIN and its handler.
            self._roll_back()
        if (is_durable and self._durability == "full") is not self._is_full:
            self._set_synchronous(connection, not self._is_full)
        book, run = self._book, self._run
        outcomes: list[object] = []
        self._is_clean = False
        try:
            run("BEGIN IMMEDIATE")
            now = self.now()
            for step in steps:
                try:
                    outcomes.append(book.do(step, now))
                except Exception as error:
                    if book.mark != connection.total_changes or _concerns_all(error):
                        if len(steps) > 1 and not _concerns_all(error):
                            return ()
                        raise
                    outcomes.append(self._told(error))
            run("COMMIT")
            self._is_clean = True
        finally:
            if not self._is_clean:
                self._roll_back()
        self._upkeep(is_durable, len(steps))
        return outcomes

    def _roll_back(self) -> None:
        self._book.forget()
        # A full disk may have ended the transaction already.
        if cast("sqlite3.Connection", self._writer.connection).in_transaction:
            self._execute("ROLLBACK")
        self._is_clean = True

    def _upkeep(self, is_durable: bool, steps: int) -> None:
        if is_durable and self._durability == "relaxed":
            self._syncs.note()
        self._since_checkpoint += steps
        if self._since_checkpoint >= _CHECKPOINT_EVERY:
            self._since_checkpoint = 0
            self._checkpoints.wake()

    def _set_synchronous(self, connection: sqlite3.Connection, is_full: bool) -> None:
        # Noted before it is taken away and after it was given: a KeyboardInterrupt in between must not leave a settle unsynced.
        self._is_full = False
        # As a script, which is parsed each time: a prepared PRAGMA would be remembered and not applied again.
        connection.executescript(f"PRAGMA synchronous = {'FULL' if is_full else 'NORMAL'}")
        self._is_full = is_full

    def _drop_if_broken(self, error: Exception) -> None:
        if isinstance(error, sqlite3.Error) and files.is_broken(error):
            # What the connection remembers of the file may be wrong now.
            self._close_slot(self._writer)

    def _told(self, error: Exception) -> Exception:
        """What a step's error is for its caller."""
        if isinstance(error, MeteringError) or (isinstance(error, ValueError) and not isinstance(error, UnicodeError)):
            return error
        if isinstance(error, _UNFIT):
            told: Exception = ValueError(f"a value of the step cannot be stored: {error}")
        elif isinstance(error, sqlite3.Error | OSError):
            told = files.translate(error, self.path)
        else:
            return error
        told.__cause__ = error
        return told

    def _locked(self, job: Job) -> Exception:
        return BillingUnavailableError(
            f"the ledger {self.path!r} is locked by another process; waited {job.patience:g} s"
        )

    def _patience(self, step: Step) -> float:
        return self._hold_patience if type(step) in _HOLDS else self._settle_patience

    # Opening and closing

    def _check_open(self) -> None:
        self._check_process()
        if self._is_closed:
            raise BillingUnavailableError(f"the ledger {self.path!r} is closed")

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            # Forked by something that does not tell Python.
            self.after_fork_in_child()
        if self._is_torn:
            raise ConfigurationError(
                f"the ledger {self.path!r} was open and in use when this process was forked; open a new one after the fork"
            )

    def _ready(self, *, must_exist: bool = True) -> None:
        """Have the file open for writing, and be sure that it is the one of before. The writer's lock is held."""
        self._check_shut()
        if self._writer.connection is None:
            self._open()
        else:
            self._check_file(must_exist=must_exist)

    def _check_shut(self) -> None:
        if self._is_shut:
            raise BillingUnavailableError(f"the ledger {self.path!r} is closed")

    def _check_file(self, *, must_exist: bool = True) -> None:
        """
        Be sure, now and then, that the file is the same one; and with `must_exist` that it is there: what is acknowledged must not
        go into a file that was removed. Asking costs as much as a statement, so that a hold, which need not last, does without.
        """
        now = time.monotonic()
        if now >= self._recheck_at or (must_exist and not os.access(self.path, os.F_OK)):
            files.check_identity(self.path, self._identity)
            self._recheck_at = now + _RECHECK_AFTER

    def _open(self) -> None:
        is_first = self._identity is None
        files.refuse_network(os.path.dirname(self.path))
        is_new = is_first and files.create(self.path)
        identity = files.check_identity(self.path, self._identity)
        connection = files.connect(self.path)
        self._use(connection)
        self._is_full = False
        try:
            files.prepare(connection, self.path, is_first=is_first)
            was_empty = files.migrate(connection, self.path, auto_migrate=self._auto_migrate, execute=self._execute)
            if is_new or was_empty:
                files.sync_folder(self.path)
            self._book.serve(self._service)
        except BaseException:
            self._close_slot(self._writer)
            raise
        self._identity = identity
        # What a process that died has left in the log.
        self._since_checkpoint = _CHECKPOINT_EVERY if files.has_long_log(self.path) else 0

    def _use(self, connection: sqlite3.Connection) -> None:
        """Write through this connection. One cursor serves all statements, because the rows of each are fetched at once."""
        self._writer.connection = connection
        self._cursor = connection.cursor()
        # A statement with plain parameters needs no step between, unless somebody watches.
        is_watched = type(self)._execute is not SqliteLedger._execute
        self._run = self._execute if is_watched else self._cursor.execute
        self._is_clean = True
        self._book = Serving(self._execute, self._run, connection)

    def _open_patiently(self) -> None:
        """Have the file open, for a reader."""
        deadline = time.monotonic() + self._hold_patience
        while self._writer.connection is None:
            try:
                with self._writer.lock:
                    self._ready()
            except (sqlite3.Error, OSError) as error:
                if not files.is_locked(error) or time.monotonic() >= deadline:
                    raise files.translate(error, self.path) from error
                time.sleep(0.005)

    def _last_checkpoint(self) -> None:
        connection = self._writer.connection
        if connection is not None:
            try:
                connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            except sqlite3.Error as error:
                # What was committed stays in the log; whoever opens the ledger next reads it there.
                _log.warning("the ledger %r was not checkpointed: %s", self.path, error)

    def _close_slot(self, slot: Slot) -> None:
        try:
            slot.close()
        except sqlite3.Error as error:
            _log.warning("the ledger %r was not closed properly: %s", self.path, error)

    # Reading

    @contextmanager
    def _reading(self) -> Generator[Fetch]:
        self._check_open()
        try:
            if self._writer.connection is None:
                # It creates the file and its schema, and checks what is there.
                self._open_patiently()
            slot = self._reader()
            with slot.lock:
                yield rows_of(self._reading_connection(slot))
        except (sqlite3.Error, OSError) as error:
            raise files.translate(error, self.path) from error

    @contextmanager
    def _snapshot(self) -> Generator[Fetch]:
        with self._reading() as fetch:
            fetch("BEGIN", ())
            try:
                yield fetch
            finally:
                fetch("ROLLBACK", ())

    def _reader(self) -> Slot:
        """A slot for a reader, one that is free if there is any."""
        for slot in self._readers:
            if not slot.lock.locked():
                return slot
        return self._readers[threading.get_ident() // 64 % len(self._readers)]

    def _reading_connection(self, slot: Slot) -> sqlite3.Connection:
        self._check_shut()
        self._check_file()
        connection = slot.connection
        if connection is None:
            connection = slot.connection = files.connect(self.path, patience=self._hold_patience)
            connection.execute("PRAGMA query_only = ON").fetchall()
        if connection.in_transaction:
            # A KeyboardInterrupt fell between a BEGIN and its handler; what it saw may be long ago.
            connection.execute("ROLLBACK")
        return connection

    # Forks

    def before_fork(self) -> None:
        """
        Leave SQLite and close its connections, so that a child inherits none.

        A child that opened the file beside an inherited connection would believe to have that one's locks, and SQLite in
        another process could remove the log under it.
        """
        self._quiet = [slot for slot in self._slots() if slot.lock.acquire(timeout=FORK_PATIENCE)]
        for slot in self._quiet:
            self._leave(slot)

    def after_fork_in_parent(self) -> None:
        """Go on; the file is opened again at the next use."""
        for slot in self._quiet:
            slot.lock.release()
        self._quiet = []

    def after_fork_in_child(self) -> None:
        """Forget threads, locks and what waits: they are the parent's."""
        # A thread of the parent may have been inside SQLite, unless its lock was ours or free.
        left = [slot for slot in self._slots() if slot.connection or (slot.lock.locked() and slot not in self._quiet)]
        if left:
            # Never closed here: that would end the parent's transaction in a file that both have.
            inherited.extend(left)
            self._is_torn = True
        self._quiet = []
        self._commits.reset()
        self._start()

    def _slots(self) -> tuple[Slot, ...]:
        return (self._writer, *self._readers, self._aside)

    def _leave(self, slot: Slot) -> None:
        self._close_slot(slot)


def _concerns_all(error: Exception) -> bool:
    """The storage failed, not this one step."""
    return isinstance(error, sqlite3.DatabaseError) and not isinstance(
        error, sqlite3.IntegrityError | sqlite3.ProgrammingError | sqlite3.DataError
    )
