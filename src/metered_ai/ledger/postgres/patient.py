"""A connection that does not wait for ever: a server that hangs ends no statement by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import psycopg

if TYPE_CHECKING:
    from psycopg.abc import PQGen

__all__ = ["PatientConnection"]

_T = TypeVar("_T")
_INTERVAL = 0.1
_LEAST = 0.25
"""Seconds that an answer is given even by the impatient: a healthy server must have the time to say that a row is locked."""


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
        if timeout is None:
            timeout = self.patience
        try:
            return super().wait(gen, interval, timeout)
        except psycopg.OperationalError:
            if self.pgconn.transaction_status == psycopg.pq.TransactionStatus.ACTIVE:
                self.pgconn.finish()
            raise
