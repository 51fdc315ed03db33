"""
Copies a SQLite ledger into a PostgreSQL schema, for an application that grows from one machine to a fleet.

One table after the other, in pieces, each piece in one transaction with the note of how far it is: killed anywhere, the same command
goes on where it was. The copy is in use only when it was compared with its source and both are sound: until then the schema says that
it works for no release, so that nobody can bill on half of it.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import BillingUnavailableError, ConfigurationError, LedgerCorruptError
from . import files
from .postgres import schema as schemas
from .postgres.dialect import in_schema
from .postgres.driver import cursor_of
from .postgres.ledger import PostgresLedger
from .reports import Verification
from .rows import Row
from .sqlite import SqliteLedger

if TYPE_CHECKING:
    from .postgres.driver import Connection

__all__ = ["Copied", "Progress", "copy_ledger"]

PIECE = 2_000
"""Rows of one transaction."""


class Table(NamedTuple):
    """A table, with the key in whose order it is copied, and a statement that writes what the target keeps of its rows besides."""

    name: str
    key: tuple[str, ...] = ("no",)
    also: str | None = None
    is_numbered: bool = False
    """The target gives its rows their numbers."""


TABLES = (
    Table("account", is_numbered=True),
    Table("credit_grant", is_numbered=True),
    Table("ended_hold", ("account_no", "hold_id")),
    Table("operation_number", ("account_no", "operation", "scope", "is_free", "number")),
    Table(
        "usage_event",
        also="INSERT INTO metered_ai.usage_key (account_no, transaction_id, hold_id, event_no, created_at) "
        "SELECT account_no, transaction_id, CASE WHEN kind <> 'correction' THEN hold_id END, no, created_at "
        "FROM metered_ai.usage_event WHERE no > $1 AND no <= $2",
    ),
    Table("service_account", ("account_no",)),
    Table("service_reference", ("account_no", "since")),
    Table("outbox", ("event_no",)),
    Table("delivery", ("event_no",)),
    # Last, because a ledger that is bound writes an outbox of its own from then on.
    Table("service", ("one",), also="SELECT metered_ai.keep_outbox() WHERE $1::bigint < $2::bigint"),
)
"""What is copied. A table of the source that is neither here nor below makes a copy fail before it begins."""

LEFT = ("open_hold", "owner")
"""Without open holds nobody owns any, and the first must be empty."""

_NOTES = """
CREATE TABLE metered_ai.copy (
    name text PRIMARY KEY,
    source text NOT NULL,
    last text,
    rows bigint NOT NULL DEFAULT 0
)"""
_OVER = "(over)"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a copy is: rows of a table that are there, or compared, and those that are to be."""

    work: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Copied:
    """What was copied and compared: rows by table, and what `verify` counts on both sides. `was_done`: by an earlier run, all of it."""

    source: str
    target: str
    rows: dict[str, int]
    accounts: int
    events: int
    grants: int
    was_done: bool


def copy_ledger(
    source: SqliteLedger,
    target: PostgresLedger,
    *,
    wait: float = 0.0,
    tell: Callable[[Progress], None] = lambda _: None,
) -> Copied:
    """
    Copy a SQLite ledger into an empty PostgreSQL schema and compare both, row by row. No record of the source is changed.

    While it runs the source is locked against writing: calls that bill there are refused as BillingUnavailableError and nothing is
    sent. Stop the application first all the same, because what it bills there afterwards is there only. Open holds are waited for
    up to `wait` seconds; meanwhile those of dead processes end by their policy, as they would anyway. Killed, the same copy begun
    again goes on where it was. Nobody can bill on the target before it is complete: ConfigurationError, which says so.

    Raises ConfigurationError where the target has other data or the source something that is not known here, BillingUnavailableError
    where holds are open or a database is away, LedgerCorruptError where one side is not sound or the two are not equal.
    """
    _wait_for_holds(source, wait)
    _check_spool(source)
    with _fenced(source) as here, target._translated(), target._sessions.use(5.0) as there:
        return _Copy(here, there, source, target, tell).run()


def _wait_for_holds(source: SqliteLedger, wait: float) -> None:
    deadline = time.monotonic() + wait
    while count := sum(1 for _ in source.holds(state="open")):
        if time.monotonic() >= deadline:
            raise _has_holds(source, count)
        source.sweep()
        time.sleep(min(0.5, max(0.01, deadline - time.monotonic())))


def _check_spool(source: SqliteLedger) -> None:
    """What lies in a spool is billed when the source is opened next, and would be missing from the copy."""
    path = Path(source.path)
    if any(found.name.startswith(f"{path.name}.spool-") for found in path.parent.iterdir()):
        raise BillingUnavailableError(
            f"usage waits beside {source.name} to be written to it; `metered-ai recover` brings it in"
        )


def _has_holds(source: SqliteLedger, count: int) -> BillingUnavailableError:
    return BillingUnavailableError(
        f"the ledger {source.name} has {count} open holds; stop the application, and let their calls end (--wait)"
    )


@contextmanager
def _fenced(source: SqliteLedger) -> Generator[sqlite3.Connection]:
    """A connection that keeps everybody from writing to the source, while no hold is open there."""
    try:
        with closing(files.connect(source.path, patience=5.0)) as here:
            here.execute("BEGIN IMMEDIATE")
            (count,) = here.execute("SELECT count(*) FROM open_hold").fetchone()
            if count:
                raise _has_holds(source, count)
            try:
                yield here
            finally:
                here.execute("ROLLBACK")
    except sqlite3.Error as error:
        raise files.translate(error, source.path) from error


class _Copy:
    """One run of a copy, with its two connections."""

    def __init__(
        self,
        here: sqlite3.Connection,
        there: Connection,
        source: SqliteLedger,
        target: PostgresLedger,
        tell: Callable[[Progress], None],
    ) -> None:
        self._here = here
        self._there = there
        self._source = source
        self._target = target
        self._tell = tell
        self._columns: dict[str, list[str]] = {}
        self._total: dict[str, int] = {}

    def run(self) -> Copied:
        self._look()
        identity = self._identity()
        if self._noted(_OVER, identity):
            # Somebody may be billing there by now: what is there is the truth, and differs from the source.
            rows = {table.name: self._noted(table.name, identity)[0][1] for table in TABLES}
            return Copied(
                *(self._source.name, self._target.name, rows, rows["account"], rows["usage_event"]),
                *(rows["credit_grant"], True),
            )
        before = _sound(self._source.verify(), self._source.name)
        self._close(identity)
        # Closed to everybody, but not to this copy, which is going to verify it.
        self._target._is_ready = True
        self._check_columns()
        for table in TABLES:
            self._copy(table, identity)
        for table in TABLES:
            self._compare(table)
        after = _sound(self._target.verify(), self._target.name)
        if before != after:
            raise LedgerCorruptError(f"{self._source.name} and its copy are not equal: {before} and {after}")
        self._open(identity)
        return Copied(
            *(self._source.name, self._target.name, self._total, after.accounts, after.events, after.grants, False)
        )

    # The source.

    def _look(self) -> None:
        """What is there to be copied; refused where we would not know how."""
        found = {
            name
            for (name,) in self._here.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            if not name.startswith("sqlite_")
        }
        known = {table.name for table in TABLES}
        if unknown := found - known - set(LEFT):
            raise ConfigurationError(
                f"the ledger {self._source.name} has a table {min(unknown)!r} that this release cannot copy; nothing was done"
            )
        for table in TABLES:
            self._columns[table.name] = [row[1] for row in self._here.execute(f"PRAGMA table_info({table.name})")]
            (self._total[table.name],) = self._here.execute(f"SELECT count(*) FROM {table.name}").fetchone()  # noqa: S608

    def _identity(self) -> str:
        """The source's content in few words: every account with its counters, and each grant."""
        text = sha256()
        for name in ("account", "credit_grant"):
            for row in self._here.execute(f"SELECT * FROM {name} ORDER BY no"):  # noqa: S608  Our own names.
                text.update(json.dumps(row).encode())
        text.update(json.dumps(self._total).encode())
        return text.hexdigest()

    def _rows(self, table: Table, after: Row | None, limit: int) -> list[Row]:
        names, key = ", ".join(self._columns[table.name]), ", ".join(table.key)
        where = "" if after is None else f"WHERE ({key}) > ({', '.join('?' * len(table.key))})"
        query = f"SELECT {names} FROM {table.name} {where} ORDER BY {key} LIMIT {limit}"  # noqa: S608  Our own names.
        return [tuple(map(_storable, row)) for row in self._here.execute(query, after or ())]

    # The target.

    def _run(self, text: str, *parameters: Any) -> list[Row]:
        cursor = cursor_of(self._there)
        cursor.execute(in_schema(text, self._target.schema), parameters)
        return cursor.fetchall() if cursor.description else []

    def _noted(self, name: str, identity: str) -> list[Row]:
        """What an earlier run has noted: the last key and how many rows. Refused where that was a copy of something else."""
        if self._run("SELECT to_regclass('metered_ai.copy')") == [(None,)]:
            return []
        found = self._run("SELECT last, rows, source FROM metered_ai.copy WHERE name = $1", name)
        if found and found[0][2] != identity:
            raise ConfigurationError(
                f"{self._target.name} holds a copy, or part of one, of another ledger, or the source has changed since it began; "
                f"to begin again remove the schema {self._target.schema!r} there"
            )
        return [(last, rows) for last, rows, _ in found]

    def _close(self, identity: str) -> None:
        """Have an empty schema that nobody else can use, or the one that an earlier run has begun to fill."""
        if self._noted(TABLES[0].name, identity):
            return
        schemas.migrate(self._there, self._target.schema, self._target.name)
        with self._there.transaction():
            for name in (*(table.name for table in TABLES), *LEFT):
                self._run(f"LOCK TABLE metered_ai.{name} IN SHARE ROW EXCLUSIVE MODE")
                if self._run(f"SELECT 1 FROM metered_ai.{name} LIMIT 1"):  # noqa: S608  Our own names.
                    raise ConfigurationError(
                        f"{self._target.name} has a ledger's data already (in {name}); a copy needs a schema that is empty or new"
                    )
            self._run(_NOTES)
            for table in TABLES:
                self._run("INSERT INTO metered_ai.copy (name, source) VALUES ($1, $2)", table.name, identity)
            self._run(
                "INSERT INTO metered_ai.migration (version, name, works_for) VALUES (0, 'a copy that is not complete', $1)",
                schemas.UNFINISHED,
            )

    def _open(self, identity: str) -> None:
        with self._there.transaction():
            self._run("DELETE FROM metered_ai.migration WHERE version = 0 AND works_for = $1", schemas.UNFINISHED)
            self._run("INSERT INTO metered_ai.copy (name, source) VALUES ($1, $2)", _OVER, identity)

    def _check_columns(self) -> None:
        for name, columns in self._columns.items():
            there = self._run(
                "SELECT column_name FROM information_schema.columns WHERE table_schema = $1 AND table_name = $2",
                *(self._target.schema, name),
            )
            if different := {column for (column,) in there} ^ set(columns):
                raise ConfigurationError(
                    f"{self._source.name} and {self._target.name} differ in the column {name}.{min(different)}; "
                    "bring both to this release's schema first"
                )

    # Between them.

    def _copy(self, table: Table, identity: str) -> None:
        ((last, done),) = self._noted(table.name, identity)
        after: Row | None = None if last is None else tuple(json.loads(last))
        key = [self._columns[table.name].index(column) for column in table.key]
        names = ", ".join(self._columns[table.name])
        while rows := self._rows(table, after, PIECE):
            first, after = after, tuple(rows[-1][at] for at in key)
            done += len(rows)
            with self._there.transaction():
                with self._there.cursor() as cursor:
                    text = in_schema(f"COPY metered_ai.{table.name} ({names}) FROM STDIN", self._target.schema)
                    with cursor.copy(text) as copy:
                        for row in rows:
                            copy.write_row(row)
                if table.also is not None:
                    self._run(table.also, 0 if first is None else first[0], after[0])
                self._run(
                    "UPDATE metered_ai.copy SET last = $2, rows = $3 WHERE name = $1",
                    table.name,
                    json.dumps(after),
                    done,
                )
            self._tell(Progress(f"copy {table.name}", done, self._total[table.name]))
        if table.is_numbered:
            self._run(
                f"SELECT setval(pg_get_serial_sequence('metered_ai.{table.name}', 'no'), max(no)) "  # noqa: S608
                f"FROM metered_ai.{table.name} HAVING max(no) IS NOT NULL"
            )

    def _compare(self, table: Table) -> None:
        """Every row of the one side is on the other, and no other."""
        for number, (here, there) in enumerate(zip_longest(self._all_here(table), self._all_there(table)), 1):
            if here != there:
                key = [self._columns[table.name].index(column) for column in table.key]
                found = here or there or ()
                raise LedgerCorruptError(
                    f"{self._source.name} and its copy in {self._target.name} differ in the row "
                    f"{tuple(found[at] for at in key)} of {table.name}"
                )
            if number % PIECE == 0 or number == self._total[table.name]:
                self._tell(Progress(f"compare {table.name}", number, self._total[table.name]))

    def _all_here(self, table: Table) -> Iterator[Row]:
        after: Row | None = None
        key = [self._columns[table.name].index(column) for column in table.key]
        while rows := self._rows(table, after, PIECE):
            yield from rows
            after = tuple(rows[-1][at] for at in key)

    def _all_there(self, table: Table) -> Iterator[Row]:
        names, key = ", ".join(self._columns[table.name]), ", ".join(table.key)
        text = f"SELECT {names} FROM metered_ai.{table.name} ORDER BY {key}"  # noqa: S608  Our own names.
        with self._there.transaction(), self._there.cursor("compared") as cursor:
            cursor.itersize = PIECE
            yield from cursor.execute(in_schema(text, self._target.schema))


def _sound(found: Verification, name: str) -> Verification:
    if not found.is_sound:
        raise LedgerCorruptError(f"the ledger {name} is not sound, see `metered-ai verify`: {found.broken[0]}")
    return found


def _storable(value: Any) -> Any:
    """PostgreSQL stores no NUL; as its ledger does with new records."""
    return value.replace("\0", "\ufffd") if type(value) is str and "\0" in value else value
