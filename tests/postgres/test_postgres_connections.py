"""Where a PostgreSQL ledger's connections come from and go back to, and what they may not say."""

from __future__ import annotations

import os
import random
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import psycopg
import pytest
from psycopg_pool import ConnectionPool

from metered_ai import connect
from metered_ai.core.steps import AddGrant, Place, Record, Settle, Step
from metered_ai.errors import BillingUnavailableError, ConfigurationError
from metered_ai.ledger.postgres import PostgresLedger
from metered_ai.ledger.postgres.address import Address
from tests.postgres.server import ADDRESS, NEEDS_PASSWORD

PASSWORD = "s3cret+word %"


def server_of(url: str) -> str:
    return url.rpartition("schema=")[0].rstrip("?&")


def schema_of(url: str) -> str:
    return url.rpartition("schema=")[2]


def use(ledger: PostgresLedger) -> int:
    """A little of everything; what ada has left of 100 credits."""
    steps: list[Step] = [AddGrant("ada", "calls", 100, "g1")]
    steps += [Place(f"h{number}", "ada", "calls", 2, "p1") for number in range(10)]
    steps += [Settle(f"h{number}", "ada", "calls", 1, f"gen_{number}", "reported") for number in range(10)]
    assert [] == [outcome for outcome in ledger.submit_all(steps).result(20) if isinstance(outcome, Exception)]
    assert () == ledger.verify().broken
    return ledger.balance("ada", "calls").available or 0


class TestPool:
    def test_given(self, postgres: str) -> None:
        """A pool that was given lends its connections, gets each back as it was, and is not closed."""
        with ConnectionPool(server_of(postgres), min_size=1, max_size=3, open=True) as pool:
            with pool.connection() as connection:
                before = (connection.autocommit, connection.prepare_threshold)
            ledger = PostgresLedger(pool=pool, schema=schema_of(postgres))

            assert 90 == use(ledger)
            ledger.close()

            lent = [pool.getconn(timeout=2) for _ in range(3)]
            assert [before] * 3 == [(connection.autocommit, connection.prepare_threshold) for connection in lent]
            assert not any(connection.closed for connection in lent)
            for connection in lent:
                pool.putconn(connection)
            assert not pool.closed

    def test_exhausted(self, postgres: str) -> None:
        """A pool that has nothing to lend is waited for, then it is a BillingUnavailableError."""
        with ConnectionPool(server_of(postgres), min_size=1, max_size=1, open=True) as pool, pool.connection():
            ledger = PostgresLedger(pool=pool, schema=schema_of(postgres), hold_patience=0.2, settle_patience=0.2)

            with pytest.raises(BillingUnavailableError):
                ledger.run(Place("h1", "ada", "calls", 0, None))
            ledger.close()

    def test_function(self, postgres: str) -> None:
        """A function that connects is called as often as is needed; what it opened is closed with the ledger."""
        opened: list[psycopg.Connection[Any]] = []

        def open_one() -> psycopg.Connection[Any]:
            opened.append(psycopg.connect(server_of(postgres)))
            return opened[-1]

        with closing(PostgresLedger(postgres, pool=open_one)) as ledger:
            assert 90 == use(ledger)
            assert 1 <= len(opened) <= 6
        assert all(connection.closed for connection in opened)

    def test_refused(self) -> None:
        """What is no pool is refused, and so is a function without a URL that names its database."""
        with pytest.raises(ConfigurationError, match="pool must be"):
            PostgresLedger("postgresql://host/db", pool=7)
        with pytest.raises(ConfigurationError, match="needs the URL"):
            PostgresLedger(pool=lambda: None)
        with pytest.raises(ConfigurationError, match="needs the URL"):
            PostgresLedger()

    def test_after_a_fork(self, postgres: str) -> None:
        """A pool of the parent's is not used in a child: it would speak on the parent's connections."""
        with ConnectionPool(server_of(postgres), min_size=1, open=True) as pool:
            ledger = PostgresLedger(pool=pool, schema=schema_of(postgres), hold_patience=1)
            use(ledger)
            read, write = os.pipe()
            pid = os.fork()
            if pid == 0:
                try:
                    ledger.balance("ada", "calls")
                except BaseException as error:
                    os.write(write, type(error).__name__.encode())
                os._exit(0)
            os.close(write)
            with open(read, "rb") as pipe:
                told = pipe.read()
            os.waitpid(pid, 0)

            assert b"ConfigurationError" == told
            assert 90 == ledger.balance("ada", "calls").available
            ledger.close()


class SharedSessions:
    """A pool like PgBouncer in transaction mode: each transaction may meet another session, and all of them are set to our worst."""

    def __init__(self, url: str) -> None:
        self.conninfo = url
        self.sessions = [psycopg.connect(url) for _ in range(3)]
        self._free = list(self.sessions)
        self._changed = threading.Condition()
        for session in self.sessions:
            session.autocommit = True
            for setting in (
                "synchronous_commit = off",
                "search_path = pg_catalog",
                "lock_timeout = 0",
                "statement_timeout = 0",
            ):
                session.execute(f"SET {setting}")
            session.autocommit = False

    def getconn(self, timeout: float) -> psycopg.Connection[Any]:
        with self._changed:
            assert self._changed.wait_for(lambda: self._free, timeout)
            return self._free.pop(random.randrange(len(self._free)))

    def putconn(self, connection: psycopg.Connection[Any]) -> None:
        with self._changed:
            self._free.append(connection)
            self._changed.notify()


class TestPgBouncer:
    def test_shared_sessions(self, postgres: str) -> None:
        """Sessions that are shared keep nothing of ours: no prepared statement, no setting, no transaction."""
        pool = SharedSessions(server_of(postgres))
        with closing(PostgresLedger(pool=pool, schema=schema_of(postgres), pgbouncer=True)) as ledger:
            assert 90 == use(ledger)
            for number in range(20, 40):
                ledger.run(Place(f"h{number}", "ada", "calls", 1, "p1"))
        for session in pool.sessions:
            session.autocommit = True
            kept = session.execute(
                "SELECT (SELECT count(*) FROM pg_prepared_statements), current_setting('lock_timeout'), "
                "current_setting('synchronous_commit'), current_setting('metered_ai_step.locked', true)"
            ).fetchone()
            session.close()

            assert kept is not None
            assert (0, "0", "off") == kept[:3]
            assert not kept[3]

    def test_durable(self, postgres: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A settle waits for the disk even in a session that is set not to; a hold need not; with "relaxed" neither does."""
        seen = watch_commits(monkeypatch)
        pool = SharedSessions(server_of(postgres))
        with closing(PostgresLedger(pool=pool, schema=schema_of(postgres), pgbouncer=True)) as ledger:
            ledger.run(AddGrant("ada", "calls", 100, "g1"))
            ledger.run(Place("h0", "ada", "calls", 1, "p1"))
            seen.clear()
            ledger.run(Place("h1", "ada", "calls", 1, "p1"))
            ledger.run(Place("h2", "ada", "calls", 1, "p1", on_unknown="charge"))
            ledger.run(Settle("h1", "ada", "calls", 1, "gen_1", "reported"))
        with closing(PostgresLedger(postgres, durability="relaxed")) as ledger:
            ledger.run(Settle("h2", "ada", "calls", 1, "gen_2", "reported"))
            ledger.sync()
        for session in pool.sessions:
            session.close()

        assert ["off", "on", "on", "off"] == seen

    def test_by_url(self, postgres: str) -> None:
        """`pgbouncer=true` in the URL says the same."""
        with closing(PostgresLedger(f"{postgres}&pgbouncer=true&connections=3")) as ledger:
            assert 90 == use(ledger)
            for connection in ledger._sessions._idle:
                row = connection.execute("SELECT count(*) FROM pg_prepared_statements").fetchone()
                assert (0,) == row


def watch_commits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How each batch is committed from now on, as the server sees it in the middle of one."""
    from metered_ai.ledger.postgres.batches import Batch

    seen: list[str] = []
    inner = Batch._execute

    def execute(self: Batch, connection: Any, name: str, now: Any, rows: Any, *more: Any) -> Any:
        cursor = inner(self, connection, name, now, rows, *more)
        setting = psycopg.RawCursor(connection).execute("SELECT current_setting('synchronous_commit')")
        fetch = cursor.fetchall
        monkeypatch.setattr(cursor, "fetchall", lambda: (seen.append(setting.fetchone()[0]), fetch())[1], raising=False)
        return cursor

    monkeypatch.setattr(Batch, "_execute", execute)
    return seen


class TestAddresses:
    @pytest.mark.parametrize(
        ("url", "shown"),
        [
            ("postgresql://ada:s3cret@db.example:5433/credits", "postgresql://db.example:5433/credits"),
            ("postgres://ada:s3cret@db.example/credits?sslmode=require", "postgresql://db.example/credits"),
            ("postgresql://a,b:5433/credits?password=s3cret", "postgresql://a,b:,5433/credits"),
            ("postgresql:///credits?host=/run/postgresql", "postgresql://%2Frun%2Fpostgresql/credits"),
            ("postgresql://?service=billing", "postgresql://?service=billing"),
            ("host=db.example dbname=credits password=s3cret", "postgresql://db.example/credits"),
        ],
    )
    def test_shown(self, url: str, shown: str) -> None:
        """An address is shown without user, password and settings."""
        assert shown == Address.of(url).shown
        assert "s3cret" not in repr(Address.of(url))

    def test_ours(self) -> None:
        """Our own parameters are ours, and libpq gets the others, a plus being a plus."""
        address = Address.of("postgresql://db/credits?schema=team_a&application_name=a+b&connections=9&pgbouncer=true")

        assert ("team_a", 9, True) == (address.schema, address.connections, address.pgbouncer)
        assert "a+b" == address.conninfo["application_name"]
        assert not {"schema", "connections", "pgbouncer"} & set(address.conninfo)

    @pytest.mark.parametrize(
        "query",
        [
            "schema=Team",
            "schema=pg_x",
            "schema=a-b",
            "connections=1",
            "connections=two",
            "pgbouncer=yes",
            "sslmod=require",
        ],
    )
    def test_refused(self, query: str) -> None:
        """A parameter that cannot be is refused, and so is one that nobody knows."""
        with pytest.raises(ConfigurationError):
            PostgresLedger(f"postgresql://db/credits?{query}")


class TestPasswords:
    @pytest.fixture(autouse=True)
    def _role(self, postgres: str) -> Iterator[None]:
        # Our own server is told to want a password for this role; somebody else's pg_hba.conf is not ours to write.
        if os.environ.get(ADDRESS):
            pytest.skip(f"the server that {ADDRESS} names has its own rules of who needs a password")
        with psycopg.connect(server_of(postgres), autocommit=True) as connection:
            connection.execute(f"CREATE ROLE {NEEDS_PASSWORD} LOGIN PASSWORD '{PASSWORD}'")
            connection.execute(f"GRANT CREATE ON DATABASE postgres TO {NEEDS_PASSWORD}")
        yield
        with psycopg.connect(server_of(postgres), autocommit=True) as connection:
            connection.execute(f"DROP OWNED BY {NEEDS_PASSWORD} CASCADE")
            connection.execute(f"DROP ROLE {NEEDS_PASSWORD}")

    @pytest.fixture
    def url(self, postgres: str) -> str:
        host = parse_qs(urlsplit(postgres).query)["host"][0]
        return f"postgresql://{NEEDS_PASSWORD}@/postgres?host={host}&schema={schema_of(postgres)}"

    @pytest.mark.parametrize("way", ["url", "parameter", "PGPASSWORD", "PGPASSFILE", "service"])
    def test_ways(self, way: str, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """A password comes from where psql takes it, and no message, name or repr has it."""
        quoted = "s3cret%2Bword%20%25"
        file = tmp_path / "file"
        if way == "url":
            url = url.replace(NEEDS_PASSWORD, f"{NEEDS_PASSWORD}:{quoted}", 1)
        elif way == "parameter":
            url += f"&password={quoted}"
        elif way == "PGPASSWORD":
            monkeypatch.setenv("PGPASSWORD", PASSWORD)
        elif way == "PGPASSFILE":
            file.write_text(f"*:*:*:{NEEDS_PASSWORD}:{PASSWORD}\n")
            file.chmod(0o600)
            monkeypatch.setenv("PGPASSFILE", str(file))
        else:
            host, schema = parse_qs(urlsplit(url).query)["host"][0], url.rpartition("schema=")[2]
            file.write_text(f"[billing]\nhost={host}\ndbname=postgres\nuser={NEEDS_PASSWORD}\npassword={PASSWORD}\n")
            monkeypatch.setenv("PGSERVICEFILE", str(file))
            url = f"postgresql://?service=billing&schema={schema}"

        with connect(url, spool=str(tmp_path)) as billing:
            billing.grant("ada", "calls", 5, id="g1")
            shown = f"{billing!r} {billing.ledger!r} {billing.ledger.name}"

            assert 5 == billing.balance("ada", "calls").available
        assert "s3cret" not in shown

    @pytest.mark.parametrize("mistake", ["password", "no password", "database", "role"])
    def test_wrong(self, mistake: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A wrong password, database or role is a ConfigurationError at once, which names the user and the place and no password."""
        if mistake == "no password":
            monkeypatch.delenv("PGPASSWORD", raising=False)
        else:
            monkeypatch.setenv("PGPASSWORD", PASSWORD if mistake == "database" else "n0t-it")
        user = NEEDS_PASSWORD
        if mistake == "database":
            url = url.replace("/postgres?", "/n0where?", 1)
        elif mistake == "role":
            user = "n0body"
            url = url.replace(NEEDS_PASSWORD, user, 1)
        began = time.monotonic()
        with closing(PostgresLedger(url)) as ledger:
            for use in (lambda: ledger.balance("ada", "calls"), lambda: ledger.run(Record("ada", "calls", "r1", 1))):
                with pytest.raises(ConfigurationError) as caught:
                    use()

                assert f"user {user!r}" in str(caught.value)
                assert ledger.name in str(caught.value)
                told = "".join(traceback.format_exception(caught.value))
                assert "n0t-it" not in told
                assert PASSWORD not in told
        assert time.monotonic() - began < 4

    def test_changed_meanwhile(self, url: str, postgres: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A password that is changed while a ledger is in use is waited for, so that what was used meanwhile is kept and not given up."""
        monkeypatch.setenv("PGPASSWORD", PASSWORD)
        with closing(PostgresLedger(url, settle_patience=0.3)) as ledger:
            ledger.run(Record("ada", "calls", "r1", 1))
            monkeypatch.setenv("PGPASSWORD", "n0t-it")
            ledger._sessions.forget_idle()

            with pytest.raises(BillingUnavailableError, match="password authentication failed"):
                ledger.run(Record("ada", "calls", "r2", 1))
