"""One step in a transaction of its own: its accounts' rows are locked, then the book that every ledger shares does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...core.steps import Place, Renew, Settle, Step
from ..accounts import SQL, Rows
from ..book import Book, Sweep
from ..rows import Row
from ..statements import Statement

if TYPE_CHECKING:
    from .driver import Cursor

__all__ = ["PostgresBook", "Statements", "locking"]


class Statements:
    """Runs the book's statements in PostgreSQL's words, and counts the rows that they change."""

    def __init__(self, cursor: Cursor, texts: Mapping[str, bytes]) -> None:
        self._cursor = cursor
        self._texts = texts
        self.total_changes = 0

    def execute(self, statement: str, parameters: Sequence[Any] = ()) -> Rows:
        """Run a statement that goes by this name."""
        assert isinstance(statement, Statement)
        return self.run(statement.key, parameters)

    def run(self, key: str, parameters: Sequence[Any] = ()) -> Rows:
        """Run a statement of PostgreSQL's own, by its file and name."""
        text = self._texts[key]
        self._cursor.execute(text, parameters)
        if not text.startswith(b"SELECT"):
            self.total_changes += self._cursor.rowcount
        return self._cursor


class PostgresBook(Book):
    """The book without its quick ways: those take many steps at once here, and are in batches."""

    def __init__(self, statements: Statements) -> None:
        super().__init__(statements.execute, statements.execute, statements)
        self._ways[Place] = self._place_slowly
        self._ways[Settle] = self._settle_slowly

    def _insert(self, statement: str, always: Row, perhaps: Row) -> None:
        self._execute(SQL[statement], (*always, *map(_storable, perhaps)))


def _storable(value: Any) -> Any:
    """PostgreSQL stores no NUL. Names cannot have one; in what describes a call it stands for nothing that would be missed."""
    return value.replace("\0", "\ufffd") if type(value) is str and "\0" in value else value


def locking(step: Step | Sweep) -> tuple[str, Sequence[Any]] | None:
    """The statement that locks what a step may write to, accounts in the order of their numbers; None if that is no account."""
    if isinstance(step, Renew):
        return None
    if isinstance(step, Sweep):
        return "batches.lock_numbers", (sorted({no for no, _ in step.holds}),)
    if isinstance(step, Place):
        # All of the customer's, whose open holds are counted together.
        return "batches.lock_customers", ([step.customer],)
    return "batches.lock_accounts", ([step.customer], [step.meter])
