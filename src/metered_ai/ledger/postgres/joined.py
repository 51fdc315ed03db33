"""Steps inside a transaction of the application's: a payment and its grant are committed together, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, cast

from ...core.steps import AddGrant, Record, Revoke, SetUnlimited, Step
from ...errors import BillingUnavailableError, ConfigurationError
from ...records import Grant, UsageEvent
from ..inputs import check
from . import failures
from .driver import cursor_of
from .transaction import PostgresBook, Statements, locking

if TYPE_CHECKING:
    from .driver import Connection

__all__ = ["Books"]

_RACES_AT_MOST = 5


class Books:
    """
    What may be done to the books inside a transaction of yours. Each is as idempotent as on `Billing`, and takes back what it did
    if it raises, while your transaction goes on.
    """

    def __init__(
        self, connection: Connection, texts: Mapping[str, bytes], clock: Callable[[], int] | None, service: str | None
    ) -> None:
        import psycopg

        if not isinstance(connection, psycopg.Connection):
            raise ConfigurationError(
                f"in_transaction takes a psycopg.Connection (of SQLAlchemy: connection.connection.driver_connection), not {connection!r}"
            )
        self._connection = connection
        self._texts = texts
        self._clock = clock
        self._service = service
        self.is_over = False

    def grant(self, customer: str, meter: str, amount: int, *, id: str, expires_at: datetime | None = None) -> Grant:
        """Give `amount` credits, once for each `id`. GrantConflictError when the id was used with another amount."""
        return cast("Grant", self._do(AddGrant(customer, meter, amount, id, expires_at)))

    def revoke(self, customer: str, meter: str, id: str, /) -> Grant:
        """Take a grant back: what is unspent leaves the balance, the rest becomes debt. ValueError for an unknown id."""
        return cast("Grant", self._do(Revoke(customer, meter, id)))

    def set_unlimited(self, customer: str, meter: str, is_unlimited: bool, /) -> None:
        """Refuse this account nothing from now on, or go back to its balance."""
        self._do(SetUnlimited(customer, meter, is_unlimited))

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
        """Record usage after the fact; it may go into debt. The same id again gives the first event."""
        return cast(
            "UsageEvent", self._do(Record(customer, meter, transaction_id, amount, None, properties, price_slug))
        )

    def _do(self, step: Step) -> object:
        check(step)
        if self.is_over:
            raise BillingUnavailableError("the block of in_transaction is over; begin another one")
        for left in reversed(range(_RACES_AT_MOST)):
            try:
                return self._try(step)
            except Exception as error:
                # Another transaction has made the account at the same moment; now it is there to be locked.
                if failures.state_of(error) != "23505" or not left:
                    raise
        raise AssertionError("a race is told of at last")

    def _try(self, step: Step) -> object:
        from psycopg.pq import TransactionStatus

        connection = self._connection
        cursor = cursor_of(connection)
        # The first statement begins the transaction, unless the connection commits each by itself.
        cursor.execute(self._texts["reads.clock"])
        ((now,),) = cursor.fetchall()
        if connection.info.transaction_status != TransactionStatus.INTRANS:
            raise ConfigurationError(
                "in_transaction needs a transaction: the connection is in autocommit, so begin one (connection.transaction())"
            )
        lock = locking(step)
        with connection.transaction():
            if lock is not None:
                cursor.execute(self._texts[lock[0]], lock[1])
            cursor.execute(self._texts["outbox.service"])
            bound = next((name for name, _ in cursor.fetchall()), None)
            book = PostgresBook(Statements(cursor, self._texts), bound, self._service)
            return book.do(step, now if self._clock is None else self._clock())
