"""One step in a transaction of its own: its accounts' rows are locked, then the book that every ledger shares does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...core.delivery import Claimed
from ...core.steps import Place, Renew, Settle, Settled, Step
from ...records import Hold
from ..accounts import SQL, Rows
from ..book import Sweep
from ..rows import Row
from ..serving import Ask, Bind, Claim, Hear, MarkSent, Replay, ServiceStep, Serving
from ..statements import Statement

if TYPE_CHECKING:
    from .driver import Cursor

__all__ = ["PostgresBook", "Statements", "locking"]

_LOCKING = {"outbox.claimable": "outbox.claimable_free"}
"""What a step looks up in order to change it. Outside of a step the same is only looked at."""


class Statements:
    """Runs the book's statements in PostgreSQL's words, and counts the rows that they change."""

    def __init__(self, cursor: Cursor, texts: Mapping[str, bytes]) -> None:
        self._cursor = cursor
        self._texts = texts
        self.total_changes = 0

    def execute(self, statement: str, parameters: Sequence[Any] = ()) -> Rows:
        """Run a statement that goes by this name."""
        assert isinstance(statement, Statement)
        return self.run(_LOCKING.get(statement.key, statement.key), parameters)

    def run(self, key: str, parameters: Sequence[Any] = ()) -> Rows:
        """Run a statement of PostgreSQL's own, by its file and name."""
        text = self._texts[key]
        self._cursor.execute(text, parameters)
        if not text.startswith(b"SELECT"):
            self.total_changes += self._cursor.rowcount
        return self._cursor


class PostgresBook(Serving):
    """
    The book without its quick ways: those take many steps at once here, and are in batches.

    `bound` is the name of the service that the ledger was found to be bound to once the step's accounts were locked, `service` the one
    on whose behalf it was opened.
    """

    def __init__(self, statements: Statements, bound: str | None, service: str | None) -> None:
        super().__init__(statements.execute, statements.execute, statements)
        self._run_own = statements.run
        self._found: tuple[str | None] | None = (bound,)
        self.serve(service)

    def bound_to(self) -> str | None:
        """The service that the ledger is bound to: as it was found, and once that may have changed, as it is."""
        found, self._found = self._found, None
        return super().bound_to() if found is None else found[0]

    def _keep_outbox(self) -> None:
        self._run_own("outbox.kept")

    def _place(self, step: Place, now: int) -> Hold:
        return self._place_slowly(step, now)

    def _settle(self, step: Settle, now: int) -> Settled:
        return self._settle_slowly(step, now)

    def _claim(self, step: Claim, now: int) -> Claimed | float | None:
        found = super()._claim(step, now)
        if found != 0:
            return found
        # What is due is of an account that somebody has locked just now. One that is busy all the time has to be waited for.
        rows = self._run_own("outbox.claimable", (0, now)).fetchall()
        if not rows:
            return found
        self._run_own("outbox.lock_account", (rows[0][0],))
        return super()._claim(step, now)

    def _insert(self, statement: str, always: Row, perhaps: Row) -> None:
        self._execute(SQL[statement], (*always, *map(_storable, perhaps)))


def _storable(value: Any) -> Any:
    """PostgreSQL stores no NUL. Names cannot have one; in what describes a call it stands for nothing that would be missed."""
    return value.replace("\0", "\ufffd") if type(value) is str and "\0" in value else value


def locking(step: Step | ServiceStep | Sweep) -> tuple[str, Sequence[Any]] | None:
    """The statement that locks what a step may write to, accounts in the order of their numbers; None if that is no account."""
    if isinstance(step, Renew | Ask | Claim):
        # A question is counted in a row of its own; a claim locks what it finds.
        return None
    if isinstance(step, Sweep):
        return "batches.lock_numbers", (sorted({no for no, _ in step.holds}),)
    if isinstance(step, Place):
        # All of the customer's, whose open holds are counted together.
        return "batches.lock_customers", ([step.customer],)
    if isinstance(step, Bind):
        return "outbox.lock_everything", ()
    if isinstance(step, MarkSent):
        return "outbox.lock_account", (step.claimed.account_no,)
    if isinstance(step, Replay):
        return "outbox.lock_put_aside", (step.customer, step.meter)
    account = step.question if isinstance(step, Hear) else step
    return "batches.lock_accounts", ([account.customer], [account.meter])
