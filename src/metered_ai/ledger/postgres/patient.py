"""Connections that do not wait for ever: a server that hangs ends no statement by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg

if TYPE_CHECKING:
    from psycopg.abc import PQGen

    from .driver import Connection

__all__ = ["LentPatience", "PatientConnection"]

_T = TypeVar("_T")
_INTERVAL = 0.1
_LEAST = 0.25
"""Seconds that an answer is given even by the impatient: a healthy server must have the time to say that a row is locked."""


def _wait(
    connection: Connection, wait: Callable[..., _T], gen: PQGen[_T], interval: float, timeout: float | None
) -> _T:
    """Wait for the server as psycopg does, but no longer than this; then the connection is closed, as nobody knows what was done."""
    try:
        return wait(gen, interval, timeout)
    except psycopg.OperationalError:
        if connection.pgconn.transaction_status == psycopg.pq.TransactionStatus.ACTIVE:
            connection.pgconn.finish()
        raise


class PatientConnection(psycopg.Connection[Any]):
    """Gives up on an answer after `patience` seconds and is closed then, because nobody knows what became of the statement."""

    longest: float | None = None
    """Seconds that any answer may take."""
    patience: float | None = None
    """Seconds that the next answers may take."""

    def limit_wait(self, patience: float | None) -> None:
        """Wait for the next answers no longer than so many seconds; None: as long as any may take."""
        self.patience = self.longest if patience is None else max(patience, _LEAST)

    def wait(self, gen: PQGen[_T], interval: float = _INTERVAL, timeout: float | None = None) -> _T:
        """Wait for the server as psycopg does, but not longer than this connection's patience."""
        return _wait(self, super().wait, gen, interval, self.patience if timeout is None else timeout)


class LentPatience:
    """
    The same patience for a connection of somebody else's, of whatever class, until `undo`.

    It is the one connection whose `wait` is another meanwhile; its class, and what its owner has set, stay as they are.
    """

    def __init__(self, connection: Connection, longest: float) -> None:
        self._connection = connection
        self._had = vars(connection).get("wait")
        self._theirs = connection.wait
        self._longest = longest
        self._patience = longest
        connection.wait = self._wait  # type: ignore[method-assign]

    def limit_wait(self, patience: float | None) -> None:
        """Wait for the next answers no longer than so many seconds; None: as long as any may take."""
        self._patience = self._longest if patience is None else max(patience, _LEAST)

    def undo(self) -> None:
        """Have the connection wait as it did."""
        if self._had is None:
            del self._connection.wait
        else:
            self._connection.wait = self._had  # type: ignore[method-assign]

    def _wait(self, gen: PQGen[_T], interval: float = _INTERVAL, timeout: float | None = None) -> _T:
        return _wait(self._connection, self._theirs, gen, interval, self._patience if timeout is None else timeout)
