"""`metered-ai copy` moves a ledger up: all of it, equal row by row, whenever it is killed, and never half of it in use."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta

import psycopg
import pytest

from metered_ai import (
    Billing,
    BillingUnavailableError,
    ConfigurationError,
    InsufficientCreditsError,
    LedgerCorruptError,
    connect,
)
from metered_ai.core.steps import Place, Release, Settle
from metered_ai.ledger import copying
from metered_ai.ledger.postgres import PostgresLedger
from metered_ai.ledger.spool import Spool
from metered_ai.ledger.sqlite import SqliteLedger
from metered_ai.records import Usage
from tests.delivery.tab import Tab
from tests.proof.children import LONG

CUSTOMERS = 40
UNFINISHED = "not complete.*metered-ai copy.*again"


@pytest.fixture
def path(tmp_path):
    """A SQLite ledger with something of everything, and no open hold."""
    path = tmp_path / "credits.db"
    with connect(f"sqlite:///{path}") as billing, closing(SqliteLedger(path)) as ledger:
        soon = datetime.now(UTC) + timedelta(days=30)
        for number in range(CUSTOMERS):
            customer = f"customer {number} ü\u0001"
            billing.grant(customer, "calls", 100, id="order", expires_at=soon if number % 3 else None)
            billing.grant(customer, "calls", 10, id="bonus")
            for turn in range(3):
                hold = f"h{number}.{turn}"
                ledger.run(
                    Place(
                        hold, customer, "calls", 4, None, operation=f"op_{turn % 2}", scope=f"s{turn}", on_repeat="free"
                    )
                )
                usage = Usage(model="m\0", endpoint="chat.completions", input_tokens=7, seconds=1.5)
                ledger.run(
                    Settle(hold, customer, "calls", 5, f"gen_{hold}", "reported", usage=usage, properties={"a": "ü"})
                )
            ledger.run(Place(f"r{number}", customer, "calls", 4, None))
            ledger.run(Release(f"r{number}", customer, "calls", "unknown", "unknown"))
            ledger.run(Release(f"t{number}", customer, "calls", "cancelled", "no"))
            billing.record(customer, "exports", transaction_id="export", amount=number)
        billing.revoke("customer 1 ü\u0001", "calls", "bonus")
        billing.set_unlimited("customer 2 ü\u0001", "calls", True)
        assert () == billing.verify().broken
    return path


def run(path, url, *more, check=True):
    done = subprocess.run(
        [sys.executable, "-m", "metered_ai.cli", "copy", f"sqlite:///{path}", url, *more],
        capture_output=True,
        text=True,
        check=False,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def content(path):
    """Everything that the source says of itself, but not who is alive."""
    with closing(sqlite3.connect(path)) as connection:
        return [line for line in connection.iterdump() if '"owner"' not in line]


def told(billing):
    """What a ledger says to those who ask: balances, events, grants and holds."""
    customers = [f"customer {number} ü\u0001" for number in range(CUSTOMERS)]
    return (
        [balance for customer in customers for balance in billing.balances(customer)],
        list(billing.usage_events()),
        list(billing.grants()),
        list(billing.holds()),
        list(billing.usage()),
    )


def equal(path, url):
    with connect(f"sqlite:///{path}") as here, connect(url) as there:
        mine, theirs = told(here), told(there)
        assert () == there.verify().broken
    # PostgreSQL stores no NUL.
    assert repr(mine).replace("\\x00", "\ufffd") == repr(theirs)


def test_copy(path, postgres):
    """Balances, events, grants, holds and operations are the same on both sides, the source is as before, and billing goes on."""
    before = content(path)
    out = json.loads(run(path, postgres, "--json").stdout)

    assert before == content(path)
    # Two of an operation's three settles were billed; the third was a repeat.
    assert (CUSTOMERS * 2, CUSTOMERS * 3, CUSTOMERS * 2, False) == (
        *(out["accounts"], out["events"], out["grants"]),
        out["was_done"],
    )
    equal(path, postgres)
    with connect(postgres) as billing:
        customer = "customer 0 ü\u0001"
        # An operation that was billed there is billed here, and what is new gets numbers of its own.
        again = billing.record(customer, "exports", transaction_id="export", amount=0)
        assert 0 == again.amount
        left = billing.balance(customer, "calls").available
        with pytest.raises(InsufficientCreditsError), billing.charge(customer, "calls", amount=left + 1):
            pass
        billing.grant("new", "calls", 5, id="first")
        with billing.charge("new", "calls", amount=2):
            pass
        assert 3 == billing.balance("new", "calls").available
        assert () == billing.verify().broken


def test_again(path, postgres):
    """Done once, the same command does nothing, whatever was billed since; it tells so."""
    run(path, postgres)
    with connect(postgres) as billing:
        billing.record("ada", "calls", transaction_id="new", amount=1)
    done = run(path, postgres)

    assert "Nothing was done" in done.stdout
    with connect(postgres) as billing:
        assert 1 == billing.balance("ada", "calls").used


def test_bound(tmp_path, postgres):
    """A ledger that serves a remote billing system goes on doing so: what was told stays told, and the rest is told from there."""
    path, tab = tmp_path / "bound.db", Tab(credits=100)
    with Billing(f"sqlite:///{path}", service=tab) as billing:
        billing.record("ada", "calls", transaction_id="before", amount=2)
        assert 0 == billing.deliver().waiting
        tab.fault = lambda _: "again"
        billing.record("ada", "calls", transaction_id="waiting", amount=3)
    run(path, postgres)
    tab.fault = lambda _: None
    with Billing(postgres, service=tab) as billing:
        with billing.charge("ada", "calls", amount=95, transaction_id="after"), pytest.raises(InsufficientCreditsError):
            billing.charge("ada", "calls", amount=1).__enter__()
        while billing.deliver().waiting:
            pass

        assert {("ada", "before"): 2, ("ada", "waiting"): 3, ("ada", "after"): 95} == tab.events
        assert [] == [event for event in billing.usage_events() if event.delivered is None]
        assert () == billing.verify().broken
    with pytest.raises(ConfigurationError, match="kept by 'tab"), connect(postgres) as billing:
        billing.grant("ada", "calls", 1, id="order")


def test_killed(path, postgres, fork, monkeypatch):
    """Killed after each step that it takes, it goes on where it was; until it is complete nobody can bill on the copy."""
    monkeypatch.setattr(copying, "PIECE", 4)

    def act(tell, die_at):
        seen = 0
        run_of = copying._Copy._run

        def dying(self, text, *parameters):
            nonlocal seen
            seen += 1
            if seen == die_at:
                os._exit(77)
            return run_of(self, text, *parameters)

        copying._Copy._run = dying
        with closing(SqliteLedger(path)) as here, closing(PostgresLedger(postgres)) as there:
            copied = copying.copy_ledger(here, there)
        tell([seen, copied.was_done])

    deaths, begun, die_at = 0, 0, 1
    while True:
        child = fork(act, die_at)
        heard = child.wait()
        if child.status == 0:
            break
        assert 77 == child.status, heard
        deaths += 1
        # Further on each time, so that every kind of step is died at, in runs that others have begun.
        die_at += 1
        server, _, name = postgres.rpartition("schema=")
        with psycopg.connect(server.rstrip("?&"), autocommit=True) as connection:
            (is_begun,) = connection.execute("SELECT to_regclass(%s)", (f"{name}.copy",)).fetchone()
        if is_begun is not None:
            begun += 1
            with connect(postgres, hold_patience=1) as billing, pytest.raises(ConfigurationError, match=UNFINISHED):
                billing.record("ada", "calls", transaction_id="early", amount=1)

    assert deaths > 15
    assert begun > 8
    equal(path, postgres)


def test_unfinished(path, postgres, monkeypatch):
    """Whoever opens a copy that is not complete is told so at once, and what to do: on the command line and in an application."""

    def stop(self, table):
        raise KeyboardInterrupt

    with (
        monkeypatch.context() as patched,
        closing(SqliteLedger(path)) as here,
        closing(PostgresLedger(postgres)) as there,
    ):
        patched.setattr(copying._Copy, "_compare", stop)
        with pytest.raises(KeyboardInterrupt):
            copying.copy_ledger(here, there)

    for command in ("balance ada", "grant ada calls 5 --id order", "events", "verify", "migrate", "recover"):
        done = subprocess.run(
            [sys.executable, "-m", "metered_ai.cli", *command.split(), "--ledger", postgres],
            capture_output=True,
            text=True,
            check=False,
        )
        said = " ".join(done.stderr.split())
        assert (2, "") == (done.returncode, done.stdout), command
        assert re.search(f"{UNFINISHED}.*remove the schema", said), said
    began = time.monotonic()
    with connect(postgres) as billing:
        for use in (
            lambda: billing.charge("ada", "calls", amount=1).__enter__(),
            lambda: billing.record("ada", "calls", transaction_id="early", amount=1),
            lambda: billing.balance("ada", "calls"),
        ):
            with pytest.raises(ConfigurationError, match=UNFINISHED):
                use()
    assert time.monotonic() - began < 4

    run(path, postgres)
    equal(path, postgres)


def test_storm(path, postgres):
    """Killed from outside, at moments of its own, again and again: the last run completes it."""
    for number in range(20 if LONG else 4):
        running = subprocess.Popen(
            [sys.executable, "-m", "metered_ai.cli", "copy", f"sqlite:///{path}", postgres],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(0.3 + 0.15 * number)
        running.send_signal(signal.SIGKILL)
        running.wait()
    run(path, postgres)

    equal(path, postgres)


class TestRefused:
    def test_open_holds(self, path, postgres):
        """While a hold is open it is refused, and says how many; with --wait it waits for the call to end."""
        with connect(f"sqlite:///{path}") as billing:
            billing.grant("ada", "calls", 5, id="order")
            with billing.charge("ada", "calls", amount=2):
                done = run(path, postgres, check=False)
                assert (2, True) == (done.returncode, "1 open holds" in done.stderr)
                done = run(path, postgres, "--wait", "0.3", check=False)
                assert (2, True) == (done.returncode, "1 open holds" in done.stderr)
                waiting = threading.Thread(target=run, args=(path, postgres, "--wait", "60"))
                waiting.start()
            waiting.join()
        with connect(postgres) as billing:
            assert 2 == billing.balance("ada", "calls").used

    def test_fenced(self, path, postgres):
        """What an application that was not stopped wants to bill on the source meanwhile is refused, and nothing of it is lost."""
        refused = []

        def tell(_):
            if not refused:
                with connect(f"sqlite:///{path}", hold_patience=0.1) as billing:
                    try:
                        with billing.charge("ada", "calls", amount=0):
                            pass
                    except BillingUnavailableError as error:
                        refused.append(error)

        with closing(SqliteLedger(path)) as here, closing(PostgresLedger(postgres)) as there:
            copying.copy_ledger(here, there, tell=tell)
        assert 1 == len(refused)
        equal(path, postgres)

    def test_spool(self, path, postgres):
        """Usage that waits in a spool would be missing: it is refused until that is brought in."""
        settle = Settle("gone", "ada", "calls", 3, "gen_late", "reported", fingerprint="late")
        Spool(path).write(settle)
        done = run(path, postgres, check=False)
        assert (2, True) == (done.returncode, "metered-ai recover" in done.stderr)

    def test_other_data(self, path, postgres):
        """A target that has a ledger's data already is left alone."""
        with connect(postgres) as billing:
            billing.grant("ada", "calls", 5, id="order")
        done = run(path, postgres, check=False)

        assert (2, True) == (done.returncode, "has a ledger's data already" in done.stderr)
        with connect(postgres) as billing:
            assert 5 == billing.balance("ada", "calls").available
            assert 1 == billing.verify().accounts

    def test_unknown_table(self, path, postgres):
        """A table that the copy does not know stops it before anything is done."""
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE novelty (no INTEGER)")
        with (
            closing(SqliteLedger(path)) as here,
            closing(PostgresLedger(postgres)) as there,
            pytest.raises(ConfigurationError, match="novelty"),
        ):
            copying.copy_ledger(here, there)

        with closing(PostgresLedger(postgres)) as there:
            assert not there.is_made()

    def test_unsound(self, path, postgres):
        """A source that is not sound is not copied."""
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE account SET used = used + 1 WHERE no = 1")
        done = run(path, postgres, check=False)

        assert (2, True) == (done.returncode, "not sound" in done.stderr)

    def test_changed(self, path, postgres, monkeypatch):
        """A source that somebody billed on after the copy was begun is told of, and the copy stays closed."""

        def stop(self, table):
            raise KeyboardInterrupt

        with (
            monkeypatch.context() as patched,
            closing(SqliteLedger(path)) as here,
            closing(PostgresLedger(postgres)) as there,
        ):
            patched.setattr(copying._Copy, "_compare", stop)
            with pytest.raises(KeyboardInterrupt):
                copying.copy_ledger(here, there)
        with connect(f"sqlite:///{path}") as billing:
            billing.record("ada", "calls", transaction_id="late", amount=1)
        done = run(path, postgres, check=False)

        assert (2, True) == (done.returncode, "the source has changed" in done.stderr)
        with connect(postgres) as billing, pytest.raises(ConfigurationError, match=UNFINISHED):
            billing.grant("ada", "calls", 5, id="order")

    def test_differs(self, path, postgres, monkeypatch):
        """A copy with one wrong row is found out and stays closed."""
        storable = copying._storable
        monkeypatch.setattr(copying, "_storable", lambda value: "other" if value == "export" else storable(value))
        rows = copying._Copy._all_here

        def true_rows(self, table):
            monkeypatch.undo()
            return rows(self, table)

        with (
            monkeypatch.context() as patched,
            closing(SqliteLedger(path)) as here,
            closing(PostgresLedger(postgres)) as there,
        ):
            patched.setattr(copying._Copy, "_all_here", true_rows)
            with pytest.raises(LedgerCorruptError, match="differ in the row"):
                copying.copy_ledger(here, there)
        with connect(postgres) as billing, pytest.raises(ConfigurationError, match=UNFINISHED):
            billing.grant("ada", "calls", 5, id="order")

    def test_other_way(self, path, postgres):
        """It goes from SQLite to PostgreSQL only."""
        done = subprocess.run(
            [sys.executable, "-m", "metered_ai.cli", "copy", postgres, f"sqlite:///{path}"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (2, True) == (done.returncode, "no other way" in done.stderr)
