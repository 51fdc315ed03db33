"""The schema of a PostgreSQL ledger: how it is made and moved on, who may do what in it, and that books outlive both."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from metered_ai.cli import main
from metered_ai.core.steps import AddGrant, Enlarge, Place, Record, Release, Renew, Revoke, Settle, SetUnlimited, Step
from metered_ai.errors import BillingUnavailableError, ConfigurationError, LedgerCorruptError, SchemaTooNewError
from metered_ai.ledger.postgres import PostgresLedger
from metered_ai.ledger.postgres import schema as module
from metered_ai.ledger.postgres.dialect import in_schema, statements
from metered_ai.ledger.postgres.schema import MIGRATIONS, Migration, migrate, role_sql
from metered_ai.ledger.statements import named_parts
from metered_ai.testing import Clock
from tests.postgres.server import new_schema


def server_of(url: str) -> str:
    return url.rpartition("schema=")[0].rstrip("?&")


def schema_of(url: str) -> str:
    return url.rpartition("schema=")[2]


@pytest.fixture
def admin(postgres: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(server_of(postgres), autocommit=True) as connection:
        yield connection


EVERYTHING: list[Step] = [
    Renew("p1", 120.0),
    AddGrant("ada", "calls", 100, "g1"),
    AddGrant("ada", "calls", 10, "g2"),
    Place("h1", "ada", "calls", 5, "p1"),
    Place("h2", "ada", "calls", 5, "p1", operation="op", scope="s"),
    Place("h3", "ada", "calls", 5, "p2"),
    Enlarge("h1", "ada", "calls", 6),
    Settle("h1", "ada", "calls", 4, "gen_1", "reported"),
    Settle("h2", "ada", "calls", 4, "gen_2", "reported"),
    Release("h3", "ada", "calls", "provider_error", "yes"),
    Release("h4", "ada", "calls", "cancelled", "no"),
    Record("ada", "exports", "r1", 2),
    Revoke("ada", "calls", "g2"),
    SetUnlimited("vip", "calls", is_unlimited=True),
]


def test_the_same_names() -> None:
    """Every statement that the book, the outbox and the reports run on SQLite is there for PostgreSQL, but those of quick ways of its own."""
    own_ways = {"reserve_fast", "settle_fast", "used", "used_unlimited"}
    for file in ("steps", "reads", "verify", "outbox"):
        assert set(named_parts(f"{file}.sql")) - own_ways <= set(named_parts(f"postgres/{file}.sql"))


def test_schema_in_every_statement() -> None:
    """No statement leans on a search_path: each table is named with its schema, which may be any."""
    for name, text in statements("team_a").items():
        assert b"metered_ai." not in text, name


class TestMigrating:
    def test_two_at_once(self, postgres: str) -> None:
        """Eight processes that open a new database at the same moment make one schema, and all of them can use it."""
        start = threading.Barrier(8)
        failed: list[Exception] = []

        def work() -> None:
            with closing(PostgresLedger(postgres)) as ledger:
                start.wait()
                try:
                    ledger.balance("ada", "calls")
                except Exception as error:
                    failed.append(error)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert [] == failed

    def test_foreign_tables(self, postgres: str, admin: psycopg.Connection[Any]) -> None:
        """A schema with somebody else's tables is left alone."""
        admin.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema_of(postgres))))
        admin.execute(sql.SQL("CREATE TABLE {}.account (x int)").format(sql.Identifier(schema_of(postgres))))

        with closing(PostgresLedger(postgres)) as ledger, pytest.raises(LedgerCorruptError, match="not a ledger"):
            ledger.balance("ada", "calls")

    def test_cut_off(self, postgres: str, admin: psycopg.Connection[Any]) -> None:
        """A migration that fails leaves nothing behind."""
        broken = (*MIGRATIONS, Migration("broken", 1))

        def read(file: str, schema: str) -> bytes:
            made = file.removesuffix(".sql")
            return b"SELECT 1 / 0" if file == "broken" else in_schema(f'CREATE TABLE metered_ai."{made}" ()', schema)

        with pytest.raises(psycopg.errors.DivisionByZero):
            migrate(admin, schema_of(postgres), "here", migrations=broken, read=read)

        found = admin.execute("SELECT count(*) FROM pg_namespace WHERE nspname = %s", (schema_of(postgres),)).fetchone()
        assert (0,) == found

    def test_side_by_side(self, postgres: str, admin: psycopg.Connection[Any]) -> None:
        """After a migration that only adds, code of the version before goes on working; of one that does not, it refuses."""
        with closing(PostgresLedger(postgres)) as old:
            old.run(AddGrant("ada", "calls", 10, "g1"))
            later = (*MIGRATIONS, Migration("0002_more", 1))
            more = in_schema("ALTER TABLE metered_ai.account ADD COLUMN note text", schema_of(postgres))

            assert migrate(admin, schema_of(postgres), "here", migrations=later, read=lambda *_: more)
            assert not migrate(admin, schema_of(postgres), "here", migrations=later, read=lambda *_: more)
            old.run(Place("h1", "ada", "calls", 5, "p1"))
            with closing(PostgresLedger(postgres)) as opened_later:
                opened_later.run(Settle("h1", "ada", "calls", 5, "gen_1", "reported"))
            assert () == old.verify().broken

            newest = (*later, Migration("0003_other", 3))
            migrate(admin, schema_of(postgres), "here", migrations=newest, read=lambda *_: b"SELECT 1")
            with closing(PostgresLedger(postgres)) as refused, pytest.raises(SchemaTooNewError, match="upgrade"):
                refused.balance("ada", "calls")

    def test_not_by_itself(self, postgres: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """With auto_migrate=False an older schema is refused and left as it is."""
        with closing(PostgresLedger(postgres)) as ledger:
            ledger.balance("ada", "calls")
        monkeypatch.setattr(
            module.migrate,
            "__kwdefaults__",
            {**module.migrate.__kwdefaults__, "migrations": (*MIGRATIONS, Migration("x", 1))},
        )

        with (
            closing(PostgresLedger(postgres, auto_migrate=False)) as ledger,
            pytest.raises(ConfigurationError, match="version 2"),
        ):
            ledger.balance("ada", "calls")

    def test_named_schemas(self, postgres: str, postgres_server: str) -> None:
        """Two schemas of one database are two ledgers."""
        other = new_schema()
        with closing(PostgresLedger(postgres)) as one, closing(PostgresLedger(postgres_server, schema=other)) as two:
            one.run(AddGrant("ada", "calls", 10, "g1"))
            two.run(AddGrant("ada", "calls", 5, "g1"))

            assert (10, 5) == (one.balance("ada", "calls").available, two.balance("ada", "calls").available)
            assert one.name != two.name
        with psycopg.connect(postgres_server, autocommit=True) as connection:
            connection.execute(sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier(other)))


def test_partitioned_outbox(postgres: str, admin: psycopg.Connection[Any]) -> None:
    """Partitioned so beside a remote service, what is recorded is told to it, whichever partition it is in."""
    page = Path(__file__).parents[2] / "docs" / "postgresql.md"
    script, *_ = re.findall(r"```sql\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    clock = Clock()
    with closing(PostgresLedger(postgres, clock=clock)) as ledger:
        ledger.bind("tab (test)")
        ledger.run(Record("ada", "calls", "r1", 1))
        admin.execute(in_schema(script, schema_of(postgres)))
        ledger.run(Record("ada", "calls", "r2", 1))
        clock.advance(4 * 365 * 86400)
        ledger.run(Record("ada", "calls", "r3", 1))

        assert ["r1", "r2", "r3"] == [found.event.transaction_id for found in ledger.undelivered()]
        assert () == ledger.verify().broken


def test_partitioned(postgres: str, admin: psycopg.Connection[Any]) -> None:
    """Partitioned as the documentation says, the ledger goes on: a transaction id is billed once over all partitions, for ever."""
    page = Path(__file__).parents[2] / "docs" / "postgresql.md"
    script, *_ = re.findall(r"```sql\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    clock = Clock()
    with closing(PostgresLedger(postgres, clock=clock)) as ledger:
        ledger.submit_all(EVERYTHING).result(20)
        admin.execute(in_schema(script, schema_of(postgres)))

        ledger.run(Record("ada", "calls", "r8", 1))
        clock.advance(4 * 365 * 86400)
        ledger.run(Record("ada", "calls", "r9", 1))
        assert "late" == ledger.run(Settle("h7", "ada", "calls", 1, "gen_7", "reported")).outcome
        # Billed long ago, in another partition.
        assert "again" == ledger.run(Settle("h1", "ada", "calls", 4, "gen_1", "reported")).outcome
        counts = [
            admin.execute(
                in_schema(f"SELECT count(*) FROM metered_ai.usage_event_{name}", schema_of(postgres))
            ).fetchone()
            for name in ("first", "2030")
        ]

        assert () == ledger.verify().broken
        assert len(list(ledger.usage_events())) == sum(count[0] for count in counts if count)
        assert all(count and count[0] for count in counts)
        with pytest.raises(psycopg.errors.RestrictViolation):
            admin.execute(in_schema("DELETE FROM metered_ai.usage_event", schema_of(postgres)))


class TestCommand:
    def test_printed(self, postgres: str, admin: psycopg.Connection[Any], capsys: pytest.CaptureFixture[str]) -> None:
        """What `migrate --sql` prints makes the schema that the library makes, and needs no server to be printed."""
        assert 0 == main(
            ["migrate", "--sql", "--ledger", f"postgresql://nowhere.invalid/db?schema={schema_of(postgres)}"]
        )
        admin.execute(capsys.readouterr().out.encode())

        with closing(PostgresLedger(postgres, auto_migrate=False)) as ledger:
            outcomes = ledger.submit_all(EVERYTHING).result(20)
            assert [] == [outcome for outcome in outcomes if isinstance(outcome, Exception)]
            assert () == ledger.verify().broken

    def test_run(self, postgres: str, capsys: pytest.CaptureFixture[str]) -> None:
        """`migrate` makes the schema, and a second time finds nothing to do."""
        assert [0, 0] == [main(["migrate", "--ledger", postgres]), main(["migrate", "--ledger", postgres])]
        assert [
            "The schema was brought to this release's version.",
            "Nothing was to be done.",
        ] == capsys.readouterr().out.splitlines()

    def test_reading_makes_nothing(
        self, postgres: str, admin: psycopg.Connection[Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A command that reads makes no schema where there is none."""
        assert 2 == main(["balance", "ada", "--ledger", postgres])
        assert "there is no ledger" in capsys.readouterr().err
        assert (0,) == admin.execute(
            "SELECT count(*) FROM pg_namespace WHERE nspname = %s", (schema_of(postgres),)
        ).fetchone()

    def test_commands(self, postgres: str, capsys: pytest.CaptureFixture[str]) -> None:
        """The other commands work on it as on a file."""
        assert 0 == main(["grant", "ada", "calls", "5", "--id", "g1", "--ledger", postgres])
        assert 0 == main(["verify", "--ledger", postgres])
        assert "sound" in capsys.readouterr().out.lower()

    def test_sqlite(self, capsys: pytest.CaptureFixture[str]) -> None:
        """A SQLite file is not migrated by hand."""
        assert 2 == main(["migrate", "--sql", "--ledger", "sqlite:///x.db"])
        assert "PostgreSQL" in capsys.readouterr().err


class TestRole:
    @pytest.fixture
    def role(self, postgres: str, admin: psycopg.Connection[Any]) -> Iterator[str]:
        """A role that has what `migrate --sql --role` prints; the schema is the owner's."""
        with closing(PostgresLedger(postgres)) as ledger:
            ledger.migrate()
        name = f"app_{schema_of(postgres)}"
        admin.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name)))
        admin.execute(role_sql(schema_of(postgres), name).encode())
        admin.execute(role_sql(schema_of(postgres), name).encode())
        yield name
        admin.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(name)))

    def as_role(self, postgres: str, role: str) -> str:
        return postgres.replace("://postgres:@", f"://{role}@", 1) + "&options=-c%20role%3D" + role

    def test_works(self, postgres: str, role: str) -> None:
        """With it an application can do everything, also sweep and verify."""
        with closing(PostgresLedger(self.as_role(postgres, role))) as ledger:
            outcomes = ledger.submit_all(EVERYTHING).result(20)

            assert [] == [outcome for outcome in outcomes if isinstance(outcome, Exception)]
            assert 0 == ledger.recover().resolved
            assert () == ledger.verify().broken

    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE metered_ai.usage_event SET amount = 0",
            "DELETE FROM metered_ai.usage_event",
            "TRUNCATE metered_ai.usage_event",
            "UPDATE metered_ai.usage_key SET transaction_id = 'x'",
            "DELETE FROM metered_ai.usage_key",
            "UPDATE metered_ai.credit_grant SET amount = 1000000",
            "UPDATE metered_ai.credit_grant SET grant_id = 'x'",
            "DELETE FROM metered_ai.credit_grant",
            "UPDATE metered_ai.account SET customer = 'eve'",
            "DELETE FROM metered_ai.account",
            "DROP TABLE metered_ai.usage_event",
            "ALTER TABLE metered_ai.usage_event DISABLE TRIGGER ALL",
            "CREATE TABLE metered_ai.other (x int)",
            "UPDATE metered_ai.delivery SET amount = 0",
            "DELETE FROM metered_ai.delivery",
            "TRUNCATE metered_ai.outbox",
            "UPDATE metered_ai.service SET name = 'other'",
            "DELETE FROM metered_ai.service",
            "DROP FUNCTION metered_ai.outbox_of_event()",
        ],
    )
    def test_may_not(self, postgres: str, role: str, admin: psycopg.Connection[Any], statement: str) -> None:
        """It cannot change or remove a usage event, a grant's id, amount or times, or the tables."""
        with closing(PostgresLedger(postgres)) as ledger:
            ledger.submit_all(EVERYTHING).result(20)
        admin.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(role)))

        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            admin.execute(in_schema(statement, schema_of(postgres)))
        admin.execute("RESET ROLE")

    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE metered_ai.usage_event SET amount = 0",
            "DELETE FROM metered_ai.usage_event",
            "TRUNCATE metered_ai.usage_event",
            "DELETE FROM metered_ai.usage_key",
            "TRUNCATE metered_ai.usage_key",
            "UPDATE metered_ai.credit_grant SET amount = 1000000",
            "DELETE FROM metered_ai.credit_grant",
            "TRUNCATE metered_ai.credit_grant",
        ],
    )
    def test_nor_the_owner(self, postgres: str, admin: psycopg.Connection[Any], statement: str) -> None:
        """Not even the owner does it by mistake: triggers refuse."""
        with closing(PostgresLedger(postgres)) as ledger:
            ledger.submit_all(EVERYTHING).result(20)

        with pytest.raises(psycopg.errors.RestrictViolation, match="never"):
            admin.execute(in_schema(statement, schema_of(postgres)))

    def test_may_not_make(self, postgres: str, role: str) -> None:
        """A role that may not make a schema is told who can, and how."""
        missing = self.as_role(postgres, role).replace(f"schema={schema_of(postgres)}", f"schema={new_schema()}")

        with (
            closing(PostgresLedger(missing, hold_patience=0.2)) as ledger,
            pytest.raises(BillingUnavailableError, match="migrate --sql"),
        ):
            ledger.balance("ada", "calls")
