"""The connections of one process: opened when they are needed, few, one of them for settles alone."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from ...errors import BillingUnavailableError, ConfigurationError
from ..forks import inherited
from .failures import cleaned, is_mistaken

if TYPE_CHECKING:
    import psycopg

    from .driver import Connection
    from .patient import LentPatience

__all__ = ["Given", "Lender", "Sessions", "connector", "lender_of"]


class Lender(Protocol):
    """Where connections come from and go back to."""

    spares_one: bool
    """A connection may be kept for settles."""

    def take(self, patience: float) -> Connection: ...
    def give_back(self, connection: Connection) -> None: ...


class Given:
    """A psycopg_pool.ConnectionPool of the user's: it is asked for connections, and gets every one back. It is never closed."""

    def __init__(self, pool: Any, pid: int) -> None:
        self._pool = pool
        self._pid = pid
        self.spares_one = getattr(pool, "max_size", None) != 1

    def take(self, patience: float) -> Connection:
        if self._pid != os.getpid():
            raise ConfigurationError(
                "the given pool was made before this process was forked; make pool and ledger after it"
            )
        connection: Connection = self._pool.getconn(timeout=patience)
        return connection

    def give_back(self, connection: Connection) -> None:
        self._pool.putconn(connection)


class Made:
    """Connections that a function opens; kept by `Sessions`, and closed by it."""

    spares_one = True

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self._connect = connect

    def take(self, patience: float) -> Connection:  # noqa: ARG002  The function knows its own.
        return self._connect()

    def give_back(self, connection: Connection) -> None:
        connection.close()


def lender_of(pool: object, pid: int) -> Lender:
    """What `pool=` may be: a psycopg pool, which was given to process `pid`, or a function that opens a connection."""
    if hasattr(pool, "getconn") and hasattr(pool, "putconn"):
        return Given(pool, pid)
    if callable(pool):
        return Made(cast("Callable[[], Connection]", pool))
    raise ConfigurationError(f"pool must be a psycopg_pool.ConnectionPool or a function that connects, not {pool!r}")


class _Before(NamedTuple):
    """How a connection was when it was opened or lent, and what it has of ours since."""

    autocommit: bool
    prepare_threshold: int | None
    patience: LentPatience | None


class Sessions:
    """
    Lends connections to whoever has something to do right now, and takes them back.

    At most `limit` are out or kept, one of which is the settles': whoever else waits, they do not. Of a given pool none is kept but that
    one. `is_pooled` means that a session is not ours (PgBouncer): nothing is prepared, nothing set for longer than a transaction.
    `longest` is how many seconds any answer may take, whoever opened the connection.
    """

    def __init__(self, lender: Lender, limit: int, *, is_pooled: bool, longest: float) -> None:
        self._lender = lender
        self._limit = limit
        self._is_pooled = is_pooled
        self._longest = longest
        self._free = threading.Condition()
        self._idle: list[Connection] = []
        self._out = 0
        self._own: Connection | None = None
        self._own_lock = threading.Lock()
        self._before: dict[int, _Before] = {}
        self.is_over = False

    @contextmanager
    def use(self, patience: float, *, is_settle: bool = False, is_step: bool = False) -> Generator[Connection]:
        """
        A connection in autocommit, in no transaction. One that comes back in any other state is not lent again.

        A step waits for each answer no longer than for a connection; what reads a lot may take as long as any connection allows.
        """
        if is_settle:
            with self._own_lock:
                connection, self._own = self._own or self._open(patience), None
                try:
                    self._limit_wait(connection, patience if is_step else None)
                    yield connection
                finally:
                    if self._lender.spares_one and self._is_well(connection) and not self.is_over:
                        self._own = connection
                    else:
                        self._part(connection)
            return
        connection = self._take(patience)
        try:
            self._limit_wait(connection, patience if is_step else None)
            yield connection
        finally:
            with self._free:
                keeps = not isinstance(self._lender, Given) and not self.is_over and self._is_well(connection)
                if keeps:
                    self._idle.append(connection)
                self._out -= 1
                self._free.notify()
            if not keeps:
                self._part(connection)

    def _take(self, patience: float) -> Connection:
        until = time.monotonic() + patience
        limit = max(1, self._limit - 1)
        with self._free:
            while self._out >= limit:
                left = until - time.monotonic()
                if left <= 0 or not self._free.wait(left):
                    raise BillingUnavailableError(
                        f"all {self._limit} connections of the ledger are busy; waited {patience:g} s"
                    )
            self._out += 1
            if self._idle:
                return self._idle.pop()
        try:
            return self._open(patience)
        except BaseException:
            with self._free:
                self._out -= 1
                self._free.notify()
            raise

    def _open(self, patience: float) -> Connection:
        connection = self._lender.take(patience)
        self._before[id(connection)] = _Before(
            connection.autocommit, connection.prepare_threshold, self._lend_patience(connection)
        )
        if not connection.autocommit:
            connection.autocommit = True
        if self._is_pooled:
            connection.prepare_threshold = None
        return connection

    def _part(self, connection: Connection) -> None:
        before = self._before.pop(id(connection), None)
        if before is not None and self._is_well(connection):
            connection.autocommit, connection.prepare_threshold = before.autocommit, before.prepare_threshold
        elif not connection.closed and isinstance(self._lender, Given):
            connection.close()
        if before is not None and before.patience is not None:
            before.patience.undo()
        self._lender.give_back(connection)

    def _lend_patience(self, connection: Connection) -> LentPatience | None:
        from .patient import LentPatience, PatientConnection

        return None if isinstance(connection, PatientConnection) else LentPatience(connection, self._longest)

    def _limit_wait(self, connection: Connection, patience: float | None) -> None:
        from .patient import PatientConnection

        limited = connection if isinstance(connection, PatientConnection) else self._before[id(connection)].patience
        if limited is not None:
            limited.limit_wait(patience)

    @staticmethod
    def _is_well(connection: Connection) -> bool:
        from psycopg.pq import TransactionStatus

        return not connection.closed and connection.info.transaction_status == TransactionStatus.IDLE

    def forget_idle(self) -> None:
        """Part with what is idle: one connection was lost, so the others may be, too."""
        with self._free:
            idle, self._idle = self._idle, []
        for connection in idle:
            self._part(connection)

    def close(self) -> None:
        """Part with everything that is not in use now; the rest goes when it comes back."""
        self.is_over = True
        self.forget_idle()
        with self._own_lock:
            connection, self._own = self._own, None
            if connection is not None:
                self._part(connection)

    def leave_to_parent(self) -> None:
        """In a forked child: none of these connections may be used or closed here."""
        inherited.append((self._idle, self._own, self._lender))
        self._idle = []
        self._own = None


def connector(
    conninfo: Mapping[str, Any],
    *,
    patience: float,
    longest: float,
    lock_wait: float,
    is_pooled: bool,
    secrets: tuple[str, ...],
    name: str,
    was_open: Callable[[], bool],
) -> Callable[[], Connection]:
    """A function that opens connections of our own, with what a session has to have."""
    import psycopg

    from .patient import PatientConnection

    given = dict(conninfo)
    given.setdefault("application_name", "metered_ai")
    given.setdefault("connect_timeout", max(2, int(patience)))
    given["client_encoding"] = "utf8"
    if not is_pooled:
        milliseconds = {
            "lock_timeout": lock_wait,
            "statement_timeout": patience,
            "idle_in_transaction_session_timeout": 2 * patience,
        }
        ours = " ".join(f"-c {setting}={max(1, int(seconds * 1000))}" for setting, seconds in milliseconds.items())
        given["options"] = f"{given['options']} {ours}" if given.get("options") else ours

    def connect() -> Connection:
        try:
            connection: psycopg.Connection[Any] = PatientConnection.connect(autocommit=True, **given)
        except psycopg.OperationalError as error:
            if is_mistaken(error) and not was_open():
                # Of the address, and nothing that waiting would mend. Once it has gone well, somebody is changing the server.
                raise ConfigurationError(
                    f"the ledger {name} refuses the connection of {_user(given)}: {cleaned(str(error), secrets)}"
                ) from None
            raise BillingUnavailableError(
                f"the ledger {name} cannot be reached: {cleaned(str(error), secrets)}"
            ) from None
        if isinstance(connection, PatientConnection):
            connection.longest = connection.patience = longest
        return connection

    return connect


def _user(given: Mapping[str, Any]) -> str:
    """Who wants to connect, as far as we know: libpq may have it from a file."""
    user = given.get("user") or os.environ.get("PGUSER")
    return f"user {user!r}" if user else "the default user"
