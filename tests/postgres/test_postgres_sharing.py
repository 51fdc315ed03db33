"""What the processes of a fleet share beside a balance: few connections, one clock, and one schema in two versions."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from psycopg_pool import ConnectionPool

from metered_ai import Billing, MeteredOpenAI, SchemaTooNewError, connect
from metered_ai.ledger.postgres import PostgresLedger, schema
from metered_ai.ledger.postgres.dialect import in_schema
from tests.client.shells import HELLO

CALL = {"model": "m", "messages": HELLO}
THREADS = 24
CALLS = 5


def parts(url: str) -> tuple[str, str]:
    """The server's URL and the schema."""
    server, _, name = url.rpartition("schema=")
    return server.rstrip("?&"), name


class TestFewConnections:
    """Two connections serve 24 threads, and one of them is the settles'."""

    def call(self, billing, provider):
        errors = []

        def work(client):
            for _ in range(CALLS):
                try:
                    client.chat.completions.create(**CALL)
                except Exception as error:
                    errors.append(error)

        billing.grant("ada", "generations", 1_000, id="order_1")
        with MeteredOpenAI(billing=billing, customer="ada", base_url=provider.base_url, api_key="k") as client:
            threads = [threading.Thread(target=work, args=(client,)) for _ in range(THREADS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert [] == errors
        assert (THREADS * CALLS, 0) == (
            billing.balance("ada", "generations").used,
            billing.balance("ada", "generations").held,
        )
        assert () == billing.verify().broken

    def test_pool(self, postgres, provider, spool):
        """A given pool of two serves 24 threads, and is left open with both its connections in it."""
        with ConnectionPool(parts(postgres)[0], min_size=1, max_size=2) as pool:
            ledger = PostgresLedger(postgres, pool=pool, connections=2)
            with Billing(ledger, spool=spool) as billing:
                self.call(billing, provider)
            ledger.close()
            with pool.connection(timeout=5) as one, pool.connection(timeout=5) as other:
                assert {(1,)} == {c.execute("SELECT 1").fetchone() for c in (one, other)}
                assert not one.autocommit

    def test_own(self, postgres, provider, spool):
        """Connections of our own, two at most."""
        counted = f"{postgres}&connections=2&application_name=few"
        with connect(counted, spool=spool) as billing, psycopg.connect(parts(postgres)[0], autocommit=True) as watching:
            most, is_over = [0], threading.Event()

            def watch():
                while not is_over.wait(0.02):
                    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'few'"
                    most[0] = max(most[0], watching.execute(query).fetchone()[0])

            watcher = threading.Thread(target=watch)
            watcher.start()
            self.call(billing, provider)
            is_over.set()
            watcher.join()
            assert 1 <= most[0] <= 2


class TestClock:
    """Leases are the server's: a client whose clock is wrong frees nobody's hold, and keeps none."""

    @pytest.mark.parametrize("hours", [-1, 1])
    def test_wrong(self, postgres, spool, fork, hours):
        """A process whose clock is an hour off finds nothing to resolve among holds that live, and its own holds live as long as it."""
        with connect(postgres, spool=spool, lease=1.5, heartbeat=0.5) as billing:
            billing.grant("ada", "generations", 10, id="order_1")

            def act(tell):
                _turn_clocks(hours)
                with connect(postgres, spool=spool, lease=1.5, heartbeat=0.5) as theirs:
                    recovered = theirs.recover().resolved
                    with theirs.charge("ada", "generations", amount=2):
                        held = theirs.balance("ada", "generations").held
                        tell([recovered, held, theirs.ledger.now()])
                        time.sleep(60)

            with billing.charge("ada", "generations", amount=3):
                child = fork(act)
                recovered, held, now = child.hear()[0]
                assert (0, 5) == (recovered, held)
                # Its lease is renewed, by a process that thinks it is another hour.
                time.sleep(2.5)
                assert 0 == billing.recover().resolved
                assert 5 == billing.balance("ada", "generations").held
                assert abs(datetime.fromtimestamp(now / 1e6, UTC) - datetime.now(UTC)) < timedelta(minutes=5)

                # And ends within its lease once it is dead.
                child.signal(9)
                child.wait()
                deadline = time.monotonic() + 30
                while billing.balance("ada", "generations").held > 3:
                    billing.recover()
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
            assert (3, 0) == (
                billing.balance("ada", "generations").used,
                billing.balance("ada", "generations").held,
            )
            assert () == billing.verify().broken


def _turn_clocks(hours: int) -> None:
    """In this process it is that many hours later, for whoever asks."""
    real, real_ns = time.time, time.time_ns
    time.time = lambda: real() + hours * 3600
    time.time_ns = lambda: real_ns() + hours * 3600 * 10**9


class TestVersions:
    """Two releases side by side, of which the newer one has migrated."""

    NEWER = """
        ALTER TABLE metered_ai.usage_event ADD COLUMN invoice text;
        ALTER TABLE metered_ai.account ADD COLUMN remark text;
        CREATE TABLE metered_ai.invoice (no bigint PRIMARY KEY);
    """

    def migrate(self, url: str, works_for: int) -> None:
        """What a newer release does when it opens the ledger."""
        server, name = parts(url)
        migrations = (*schema.MIGRATIONS, schema.Migration("newer.sql", works_for))

        def read(file, schema_name):
            return in_schema(self.NEWER, schema_name) if file == "newer.sql" else schema.migration(file, schema_name)

        with psycopg.connect(server, autocommit=True) as connection:
            assert schema.migrate(connection, name, "newer", migrations=migrations, read=read)

    def test_older_works_on(self, postgres, provider, spool):
        """While calls of an older release run, a newer one migrates: every call goes on, and the older release also opens anew."""
        with connect(postgres, spool=spool) as billing:
            billing.grant("ada", "generations", 1_000, id="order_1")
            answered, errors, is_over = [], [], threading.Event()

            def work(client):
                while not is_over.is_set():
                    try:
                        answered.append(client.chat.completions.create(**CALL).id)
                    except Exception as error:
                        errors.append(error)

            with MeteredOpenAI(billing=billing, customer="ada", base_url=provider.base_url, api_key="k") as client:
                threads = [threading.Thread(target=work, args=(client,)) for _ in range(4)]
                for thread in threads:
                    thread.start()
                provider.wait_for_completed(20)
                self.migrate(postgres, len(schema.MIGRATIONS))
                provider.wait_for_completed(len(provider.requests) + 20)
                is_over.set()
                for thread in threads:
                    thread.join()
            assert [] == errors
            assert {f"gen_{answer_id}" for answer_id in answered} == {
                event.transaction_id for event in billing.usage_events()
            }
            assert () == billing.verify().broken

        with connect(postgres, spool=spool, auto_migrate=False) as billing:
            assert 1_000 - len(answered) == billing.balance("ada", "generations").available
            billing.record("ada", "generations", transaction_id="after", amount=1)
            assert () == billing.verify().broken

    def test_too_new(self, postgres, spool):
        """A schema that says it no longer works for this release is refused as SchemaTooNewError, and nothing is changed."""
        with connect(postgres, spool=spool) as billing:
            billing.grant("ada", "generations", 10, id="order_1")
        newest = len(schema.MIGRATIONS) + 1
        self.migrate(postgres, newest)

        with (
            connect(postgres, spool=spool) as billing,
            pytest.raises(SchemaTooNewError, match=f"version {newest}.*upgrade"),
        ):
            billing.record("ada", "generations", transaction_id="after", amount=1)
        server, name = parts(postgres)
        with psycopg.connect(server, autocommit=True) as connection:
            assert (0,) == connection.execute(f"SELECT count(*) FROM {name}.usage_event").fetchone()
