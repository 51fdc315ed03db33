"""A PostgreSQL ledger beside a remote service: several processes, what was open before, roles, locks and addresses."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from contextlib import closing
from types import ModuleType

import psycopg
import pytest
from psycopg import sql

from metered_ai import Billing, connect
from metered_ai.billing import billing_url, ledger_url
from metered_ai.core.delivery import Claimed, Mark
from metered_ai.core.steps import AddGrant, Enlarge, Place, Record, Settle, SetUnlimited
from metered_ai.errors import ConfigurationError, InsufficientCreditsError
from metered_ai.ledger.postgres import PostgresLedger
from metered_ai.ledger.postgres.dialect import in_schema
from metered_ai.ledger.postgres.schema import role_sql
from tests.delivery.tab import RemoteTab, Tab, serving
from tests.postgres.test_postgres_schema import schema_of, server_of
from tests.proof.children import Child, reap

GEN = "generations"
SERVICE = "tab (test)"


@pytest.fixture(autouse=True)
def bury():
    yield
    reap()


@pytest.fixture
def ledger(postgres):
    """Bound, and sound when the test is over."""
    with closing(PostgresLedger(postgres)) as ledger:
        ledger.bind(SERVICE)
        yield ledger

        assert () == ledger.verify().broken


@pytest.fixture
def admin(postgres):
    with psycopg.connect(server_of(postgres), autocommit=True) as connection:
        yield connection


def hear(ledger, available, customer="ada", **more):
    return ledger.hear(ledger.ask(customer, GEN), available, **more)


def use(ledger, name, amount=1, customer="ada"):
    ledger.run(Place(f"h_{name}", customer, GEN, amount, None))
    return ledger.run(Settle(f"h_{name}", customer, GEN, amount, name, "reported")).event


def deliver(ledger):
    """Everything that is due is acknowledged; the ids, in order."""
    sent = []
    while isinstance(claimed := ledger.claim("all", 60.0), Claimed):
        sent += [outgoing.event.transaction_id for outgoing in claimed.events]
        ledger.mark(claimed, [Mark(outgoing.no, "delivered") for outgoing in claimed.events])
    return sent


class TestFleet:
    def test_ten_credits(self, postgres, tmp_path):
        """Fifty threads on a customer's ten credits let ten through; the service is told of these, each once."""
        tab = Tab()
        tab.give("ada", 10)
        start = threading.Barrier(50)
        results = []
        with Billing(postgres, service=tab, spool=tmp_path) as billing:

            def work():
                start.wait()
                try:
                    with billing.charge("ada", GEN, amount=1) as charge:
                        pass
                    results.append(charge.event.transaction_id)
                except InsufficientCreditsError:
                    results.append(None)

            threads = [threading.Thread(target=work) for _ in range(50)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            done = billing.deliver(timeout=20)
            found = billing.verify()
            left = billing.balance("ada", GEN, refresh=True).available

        assert (50, 40) == (len(results), results.count(None))
        assert (0, 0) == (done.waiting, left)
        assert () == found.broken
        assert {("ada", name): 1 for name in results if name} == tab.events
        assert {1} == set(tab.most_in_flight.values())

    def test_two_deliver(self, postgres, tmp_path):
        """Two processes that call and deliver at once never have two requests in flight for an account, and leave nothing."""
        tab = Tab(credits=10_000)
        tab.writing = lambda event: threading.Event().wait(0.002)

        def work(tell, number):
            with Billing(postgres, service=RemoteTab(address), spool=tmp_path / str(number)) as billing:
                for call in range(40):
                    with billing.charge(f"c{call % 2}", GEN, amount=1) as charge:
                        pass
                    tell(charge.event.transaction_id)

        with serving(tab) as address:
            children = [Child(work, number) for number in range(2)]
            names = [name for child in children for name in child.wait()]
            with Billing(postgres, service=RemoteTab(address), spool=tmp_path / "last") as billing:
                done = billing.deliver(timeout=20)
                assert () == billing.verify().broken

        assert [0, 0] == [child.status for child in children]
        assert 0 == done.waiting
        assert sorted(names) == sorted(name for _, name in tab.events)
        assert {1} == set(tab.most_in_flight.values())
        assert len(tab.told) == len(tab.events)

    def test_killed(self, postgres):
        """Who dies with a claim keeps its account for the lease and no longer; other accounts go on, and nothing is lost."""

        def claim(tell):
            with closing(PostgresLedger(postgres)) as own:
                own.bind(SERVICE)
                tell(own.claim("mine", 1.0).customer)
                threading.Event().wait(60)

        with closing(PostgresLedger(postgres)) as ledger:
            ledger.bind(SERVICE)
            for customer in ("ada", "bob"):
                hear(ledger, 10, customer)
                use(ledger, f"gen_{customer}", 1, customer)
            child = Child(claim)
            assert ["ada"] == child.hear()
            child.signal(signal.SIGKILL)
            child.wait()

            assert ["gen_bob"] == deliver(ledger)
            left = ledger.claim("other", 60.0)
            assert 0 < left <= 1.0
            threading.Event().wait(left)
            assert ["gen_ada"] == deliver(ledger)
            assert () == ledger.verify().broken

    def test_claimed_once(self, postgres):
        """Of many processes' claims at the same moment, one gets the account, however often that is tried."""
        with closing(PostgresLedger(postgres)) as first, closing(PostgresLedger(postgres)) as second:
            for ledger in (first, second):
                ledger.bind(SERVICE)
            hear(first, 100)
            for number in range(30):
                use(first, f"gen_{number}")
            for number in range(30):
                start = threading.Barrier(2)
                found = []

                def work(ledger, name, start=start, found=found):
                    start.wait()
                    found.append(ledger.claim(name, 60.0))

                threads = [
                    threading.Thread(target=work, args=(ledger, name)) for ledger, name in ((first, "a"), (second, "b"))
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                claims = [claimed for claimed in found if isinstance(claimed, Claimed)]
                assert 1 == len(claims), found
                assert [f"gen_{number}"] == [outgoing.event.transaction_id for outgoing in claims[0].events]
                first.mark(claims[0], [Mark(claims[0].events[0].no, "delivered")])

            assert () == first.verify().broken


class TestBound:
    def test_open_before(self, postgres):
        """A process that has had the ledger open since before it was bound writes the outbox, gives nothing and holds nothing any more."""
        with closing(PostgresLedger(postgres)) as before, closing(PostgresLedger(postgres)) as ledger:
            assert [] == before.balances("ada")
            ledger.bind(SERVICE)
            hear(ledger, 10)

            before.run(Record("ada", GEN, "rec_1", 2))
            before.run(Record("new", GEN, "rec_2", 3))
            for step in (AddGrant("ada", GEN, 5, "g1"), SetUnlimited("ada", GEN, is_unlimited=True)):
                with pytest.raises(ConfigurationError, match="kept by"):
                    before.run(step)
            with pytest.raises(ConfigurationError, match="without it"):
                before.run(Place("h1", "ada", GEN, 1, None))

            assert ["rec_1", "rec_2"] == deliver(ledger)
            assert () == ledger.verify().broken

    def test_without_its_service(self, postgres, ledger):
        """Opened without its service the ledger settles and releases, many at once, too, and places or enlarges no hold."""
        hear(ledger, 10, reference="sub_1")
        ledger.run(Place("h0", "ada", GEN, 1, None))
        with closing(PostgresLedger(postgres)) as other:
            outcomes = other.submit_all(
                [
                    *(Place(f"h{number}", "ada", GEN, 1, None) for number in range(1, 9)),
                    Enlarge("h0", "ada", GEN, 2),
                    Settle("h0", "ada", GEN, 1, "gen_0", "reported"),
                ]
            ).result(20)

            assert [ConfigurationError] * 9 == [type(outcome) for outcome in outcomes[:9]]
            assert "bound to 'tab (test)'" in str(outcomes[0])
            assert "settled" == outcomes[9].outcome
        assert [("gen_0", "sub_1")] == [(event.transaction_id, event.reference) for event in ledger.usage_events()]
        assert ["gen_0"] == deliver(ledger)

    def test_joined(self, postgres, ledger):
        """In a transaction of the application's nothing is given either; what is recorded there is told once it is committed."""
        hear(ledger, 10)
        with psycopg.connect(server_of(postgres)) as connection, ledger.in_transaction(connection) as books:
            with pytest.raises(ConfigurationError, match="kept by"):
                books.grant("ada", GEN, 5, id="g1")
            books.record("ada", GEN, transaction_id="rec_1", amount=2)
            assert None is ledger.claim("c1", 60.0)
            connection.commit()

        assert ["rec_1"] == deliver(ledger)

    def test_two_services(self, postgres):
        """Of two processes that bind a new ledger at the same moment to two services, one does, and the other is refused, naming both."""
        start = threading.Barrier(2)
        outcomes = []

        def work(name):
            with closing(PostgresLedger(postgres)) as ledger:
                ledger.balances("ada")
                start.wait()
                try:
                    ledger.bind(name)
                    outcomes.append(None)
                except ConfigurationError as error:
                    outcomes.append(str(error))

        threads = [threading.Thread(target=work, args=(name,)) for name in ("one", "two")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        (refusal,) = [outcome for outcome in outcomes if outcome]
        assert "'one'" in refusal
        assert "'two'" in refusal

    def test_grant_meanwhile(self, postgres, admin):
        """A grant that is under way while a ledger is bound is waited for, and then the ledger has credits of its own."""
        with closing(PostgresLedger(postgres)) as ledger, psycopg.connect(server_of(postgres)) as connection:
            failed = []
            with ledger.in_transaction(connection) as books:
                books.grant("ada", GEN, 5, id="g1")

                def bind():
                    try:
                        ledger.bind(SERVICE)
                    except ConfigurationError as error:
                        failed.append(str(error))

                thread = threading.Thread(target=bind)
                thread.start()
                thread.join(0.3)
                assert thread.is_alive()
                connection.commit()
            thread.join()

            assert ["of its own" in text for text in failed] == [True]
            assert None is ledger.service


class TestLocks:
    def test_passed_over(self, postgres, ledger, admin):
        """An account that a transaction of somebody else's has locked does not hold up the delivery of another's usage."""
        for customer in ("ada", "bob"):
            hear(ledger, 10, customer)
            use(ledger, f"gen_{customer}", 1, customer)
        with psycopg.connect(server_of(postgres)) as other:
            other.execute(
                in_schema("SELECT 1 FROM metered_ai.account WHERE customer = 'ada' FOR UPDATE", schema_of(postgres))
            )
            claimed = ledger.claim("c1", 60.0)
            assert ["gen_bob"] == [outgoing.event.transaction_id for outgoing in claimed.events]
            ledger.mark(claimed, [Mark(claimed.events[0].no, "delivered")])

            # The last one that waits is waited for.
            found = []
            thread = threading.Thread(target=lambda: found.append(ledger.claim("c2", 60.0)))
            thread.start()
            thread.join(0.3)
            assert thread.is_alive()
            other.rollback()
            thread.join()

        assert ["gen_ada"] == [outgoing.event.transaction_id for outgoing in found[0].events]

    def test_mark_waits(self, postgres, ledger):
        """A mark waits for somebody else's lock beyond the server's lock time-out, and is noted then."""
        hear(ledger, 10)
        use(ledger, "gen_1")
        claimed = ledger.claim("c1", 60.0)
        marked = []
        with psycopg.connect(server_of(postgres)) as other:
            other.execute(in_schema("SELECT 1 FROM metered_ai.account FOR UPDATE", schema_of(postgres)))
            thread = threading.Thread(
                target=lambda: marked.append(ledger.mark(claimed, [Mark(claimed.events[0].no, "delivered")]))
            )
            thread.start()
            thread.join(0.3)
            assert thread.is_alive()
            other.rollback()
            thread.join()

        assert [("delivered",)] == marked
        assert [] == list(ledger.undelivered())


def test_role(postgres, admin):
    """An application's role, which may make no triggers, binds the ledger and serves; without its rights it is told who gives them."""
    with closing(PostgresLedger(postgres)) as owner:
        owner.migrate()
    name = f"app_{schema_of(postgres)}"
    admin.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name)))
    try:
        script = role_sql(schema_of(postgres), name)
        old = "\n".join(line for line in script.splitlines() if not any(word in line for word in ("service", "outbox")))
        admin.execute(old.encode())
        url = postgres.replace("://postgres:@", f"://{name}@", 1) + "&options=-c%20role%3D" + name
        with (
            closing(PostgresLedger(url)) as ledger,
            pytest.raises(ConfigurationError, match="migrate --sql --role"),
        ):
            ledger.bind(SERVICE)

        admin.execute(script.encode())
        with closing(PostgresLedger(url)) as ledger:
            ledger.bind(SERVICE)
            hear(ledger, 10, reference="sub_1")
            use(ledger, "gen_1")
            ledger.run(Record("new", GEN, "rec_1", 1))
            claimed = ledger.claim("c1", 60.0)
            ledger.mark(claimed, [Mark(claimed.events[0].no, "dead", "no such price")])
            assert 1 == ledger.replay()

            assert ["gen_1", "rec_1"] == deliver(ledger)
            assert () == ledger.verify().broken
    finally:
        admin.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(name)))


class TestUrl:
    @pytest.fixture
    def made(self, monkeypatch):
        """Stands where Flowglad does: what it was built with."""
        made = []

        class Flowglad(Tab):
            def __init__(self, **options):
                super().__init__("flowglad", credits=5)
                made.append(options)

        module = ModuleType("metered_ai.services.flowglad")
        module.Flowglad = Flowglad
        monkeypatch.setitem(sys.modules, "metered_ai.services.flowglad", module)
        return made

    def test_used(self, made, postgres, tmp_path):
        """A flowglad:// URL names a PostgreSQL ledger."""
        quoted = postgres.replace("%", "%25").replace("&", "%26")
        with connect(f"flowglad://?ledger={quoted}&timeout=2.5", spool=tmp_path) as billing:
            with billing.charge("ada", GEN, amount=2):
                pass
            assert "flowglad" == billing.ledger.service
            assert postgres == ledger_url(billing_url(f"flowglad://?ledger={quoted}"))
        assert [{"timeout": 2.5}] == made

    @pytest.mark.parametrize("password", ["hush", "hu+sh", "hush%2540x", "hush%40x", "hu%2526sh"], ids=range(5))
    def test_secret(self, made, password, tmp_path, caplog):
        """No repr, error or log shows the password of the database; the address can be read again and again."""
        caplog.set_level(logging.DEBUG)
        url = f"flowglad://?ledger=postgresql://ada:{password}@127.0.0.1:9/db"
        assert billing_url(url) == billing_url(billing_url(url))
        billing = connect(url, spool=tmp_path, hold_patience=0.1, settle_patience=0.1)
        told = [repr(billing), str(billing._where)]
        try:
            billing.ledger  # noqa: B018  It connects.
            billing.balance("ada", GEN)
        except Exception as error:
            told.append(f"{error!r} {error}")
        billing.close()

        # One that is written wrongly is not shown at all.
        assert ("…" if password == "hush%40x" else "127.0.0.1:9/db") in told[0]
        assert 3 == len(told)
        for text in (*told, caplog.text):
            assert "hu" not in text

    def test_cut(self):
        """An address whose & was not escaped is refused, without its pieces."""
        with pytest.raises(ConfigurationError, match="%26") as refusal:
            connect("flowglad://?ledger=postgresql://ada:hu&sh@host/db")

        assert "sh@" not in str(refusal.value)
