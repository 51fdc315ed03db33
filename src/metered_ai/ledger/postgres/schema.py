"""A ledger's schema: makes it, brings it to the newest version, and prints what that takes for people with their own tools."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ...errors import BillingUnavailableError, ConfigurationError, LedgerCorruptError, SchemaTooNewError
from ..statements import read_text
from .dialect import in_schema, migration
from .driver import cursor_of

if TYPE_CHECKING:
    from .driver import Connection, Cursor

__all__ = ["MIGRATIONS", "UNFINISHED", "Migration", "is_made", "migrate", "migration_sql", "role_sql"]


class Migration(NamedTuple):
    """
    One step of the schema, and the oldest schema version whose code still works on what it makes.

    A migration that only adds keeps the `works_for` of the one before, so that a fleet can be upgraded one process after the other.
    """

    file: str
    works_for: int


MIGRATIONS = (Migration("0001_first.sql", 1), Migration("0002_outbox.sql", 1))
"""In order; a schema's version is how many of them it has had."""

UNFINISHED = 2_000_000_000
"""What the schema of a copy that is not complete says it works for: no release knows so many versions."""


_VERSIONS = """
CREATE TABLE metered_ai.migration (
    version integer PRIMARY KEY,
    name text NOT NULL,
    -- The oldest schema version whose code still works here.
    works_for integer NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
)"""


def migrate(
    connection: Connection,
    schema: str,
    name: str,
    *,
    auto_migrate: bool = True,
    migrations: Sequence[Migration] = MIGRATIONS,
    read: Callable[[str, str], bytes] = migration,
) -> bool:
    """
    Bring a schema to the newest version in one transaction, under an advisory lock; tell whether anything was to be done.

    A schema that is not there is made even with auto_migrate=False: there is nothing in it that a migration could change.
    """
    cursor = cursor_of(connection)
    version = _version(cursor, schema, name, migrations)
    if version is not None and version >= len(migrations):
        return False
    if version and not auto_migrate:
        raise ConfigurationError(
            f"the ledger {name} has schema version {version}, this release needs {len(migrations)}; "
            "run `metered-ai migrate`, or open it with auto_migrate=True"
        )
    cursor.execute("BEGIN")
    is_done = False
    try:
        # Others that start at the same moment wait here, and find everything done. No time-out of ours cuts a long migration short.
        cursor.execute("SELECT set_config('lock_timeout', '0', true), set_config('statement_timeout', '0', true)")
        cursor.execute("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", (f"metered_ai {schema}",))
        version = _version(cursor, schema, name, migrations)
        if version is None:
            _create(cursor, schema)
        for number, (file, works_for) in enumerate(migrations[version or 0 :], (version or 0) + 1):
            cursor.execute(read(file, schema))
            cursor.execute(
                in_schema("INSERT INTO metered_ai.migration (version, name, works_for) VALUES ($1, $2, $3)", schema),
                (number, file, works_for),
            )
        cursor.execute("COMMIT")
        is_done = True
    finally:
        if not is_done and not connection.closed:
            cursor.execute("ROLLBACK")
    return True


def is_made(connection: Connection, schema: str, name: str) -> bool:
    """True if the schema has had a migration."""
    return _version(cursor_of(connection), schema, name, MIGRATIONS) is not None


def migration_sql(schema: str, since: int = 0) -> str:
    """What `migrate` would do to a schema of version `since`, as a script for psql; 0 is a database without one."""
    lines = ["BEGIN;", f"SELECT pg_advisory_xact_lock(hashtextextended('metered_ai {schema}', 0));"]
    if since == 0:
        lines += [f'CREATE SCHEMA IF NOT EXISTS "{schema}";', in_schema(_VERSIONS, schema).decode().strip() + ";"]
    for number, (file, works_for) in enumerate(MIGRATIONS[since:], since + 1):
        lines += ["", f"-- {file}", migration(file, schema).decode().strip(), ""]
        lines.append(
            f'INSERT INTO "{schema}".migration (version, name, works_for) '  # noqa: S608  A checked name.
            f"VALUES ({number}, '{file}', {works_for});"
        )
    return "\n".join([*lines, "COMMIT;", ""])


def role_sql(schema: str, role: str) -> str:
    """What lets a role work with the ledger and neither change nor remove usage events and grants, as a script for psql."""
    if not role or "\0" in role:
        raise ConfigurationError(f"a role has a name, unlike {role!r}")
    text = in_schema(read_text("postgres/role.sql"), schema).decode()
    quoted = role.replace('"', '""')
    return text.replace("SCHEMA metered_ai TO", f'SCHEMA "{schema}" TO').replace(
        "metered_ai_application", f'"{quoted}"'
    )


def _version(cursor: Cursor, schema: str, name: str, migrations: Sequence[Migration]) -> int | None:
    """The schema's version; None where there is none. Raises where its tables are not ours, too new, or half a copy."""
    cursor.execute(
        "SELECT count(*) FILTER (WHERE c.relname = 'migration'), count(*) FILTER (WHERE c.relname = 'account') "
        "FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace "
        "WHERE n.nspname = $1 AND c.relkind IN ('r', 'p')",
        (schema,),
    )
    ((is_ours, has_accounts),) = cursor.fetchall()
    if not is_ours:
        if has_accounts:
            raise LedgerCorruptError(
                f"the schema {schema!r} of {name} has tables that are not a ledger of metered_ai; they are left alone"
            )
        return None
    cursor.execute(in_schema("SELECT max(version), max(works_for) FROM metered_ai.migration", schema))
    ((version, works_for),) = cursor.fetchall()
    if works_for == UNFINISHED:
        raise ConfigurationError(
            f"the ledger {name} is a copy that is not complete, and nobody can use it before it is: run the same `metered-ai copy` "
            f"again, which goes on where it was, or give the copy up and remove the schema {schema!r}"
        )
    if (works_for or 0) > len(migrations):
        raise SchemaTooNewError(
            f"the ledger {name} has schema version {version}, which works for releases that know version {works_for}; "
            f"this release of metered_ai knows {len(migrations)}: upgrade it"
        )
    return version or 0


def _create(cursor: Cursor, schema: str) -> None:
    cursor.execute("SELECT 1 FROM pg_catalog.pg_namespace WHERE nspname = $1", (schema,))
    if not cursor.fetchall():
        cursor.execute("SELECT has_database_privilege(current_database(), 'CREATE')")
        if cursor.fetchall() != [(True,)]:
            raise BillingUnavailableError(
                f"there is no ledger in the schema {schema!r}, and this role may not create it; "
                "`metered-ai migrate --sql` prints what an owner has to run"
            )
        cursor.execute(f'CREATE SCHEMA "{schema}"'.encode())
    cursor.execute(in_schema(_VERSIONS, schema))
