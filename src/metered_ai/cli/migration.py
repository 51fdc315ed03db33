"""`metered-ai migrate`: the schema of a PostgreSQL ledger, by hand."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated

import typer

from ..errors import ConfigurationError
from ..urls import billing_url
from . import show
from .commands import PATIENCE, Json, Ledger, app

__all__ = ["migrate"]


@app.command()
def migrate(
    sql: Annotated[bool, typer.Option("--sql", help="Print the statements instead, for tools of your own.")] = False,
    since: Annotated[
        int,
        typer.Option(
            "--since", min=0, metavar="N", help="With --sql: the version that the schema has; 0 if there is none."
        ),
    ] = 0,
    role: Annotated[
        str | None,
        typer.Option("--role", metavar="NAME", help="With --sql: also what this role of an application needs."),
    ] = None,
    ledger: Ledger = None,
    json: Json = False,
) -> None:
    """
    Bring a PostgreSQL ledger's schema to this release's version. Processes that run the release before go on working.

    With --sql nothing is connected to: the statements are printed, for psql or a migration tool, as one transaction.

    JSON: is_changed.
    """
    url = billing_url(ledger)
    if not url.startswith("postgresql:"):
        raise ConfigurationError("only a PostgreSQL ledger is migrated by hand; a SQLite file is when it is opened")
    if sql:
        from ..ledger.postgres.address import Address
        from ..ledger.postgres.dialect import check_schema
        from ..ledger.postgres.schema import migration_sql, role_sql

        schema = check_schema(Address.of(url).schema)
        print(migration_sql(schema, since), end="")
        if role is not None:
            print(role_sql(schema, role), end="")
        return
    if since or role is not None:
        raise ConfigurationError("--since and --role go with --sql")
    from ..ledger.postgres import PostgresLedger

    with closing(PostgresLedger(url, hold_patience=PATIENCE, settle_patience=PATIENCE)) as found:
        is_changed = found.migrate()
    if json:
        show.print_json({"is_changed": is_changed})
    else:
        show.console().print(
            "The schema was brought to this release's version." if is_changed else "Nothing was to be done."
        )
