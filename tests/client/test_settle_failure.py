"""A ledger that fails between the answer and its settle: the answer is given, its usage is kept, and nothing is lost or doubled."""

from __future__ import annotations

import logging
import os
import pickle
import sqlite3
import subprocess
import sys
import threading
from typing import Any

import pytest

from metered_ai import BillingUnavailableError, ConfigurationError, UsageNotRecordedError, bill_to, connect
from metered_ai.core.steps import Release, Settle
from metered_ai.ledger.memory import MemoryLedger
from metered_ai.ledger.spool import Spool
from tests.client.ledgers import Gated, wait_for_ends
from tests.client.shells import HELLO, Shell

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "a secret question"}]}
ANSWER = "a secret answer"


@pytest.fixture
def ledger():
    """A real ledger that refuses settles on demand; sound when the test is over."""
    ledger = Gated(MemoryLedger())
    yield ledger

    assert () == ledger.verify().broken
    ledger.close()


@pytest.fixture
def spool(tmp_path):
    """The folder that keeps what the ledger does not take."""
    return tmp_path / "spool"


@pytest.fixture(autouse=True)
def folder(spool, tmp_path, monkeypatch):
    """The spool's folder exists, as that of a SQLite file does; and the home of whoever runs this is left alone."""
    spool.mkdir()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def fails(ledger, error=BillingUnavailableError, kinds=(Settle,)):
    ledger.refuse = lambda step: error("the disk is gone") if isinstance(step, kinds) else None


def works_again(shell, ledger, count=1):
    """The ledger is back, and what was kept has been brought in by the background."""
    ledger.refuse = lambda step: None
    wait_for_ends(shell, ledger, count)
    for thread in threading.enumerate():
        if thread.name == "metered-ai-retry":
            thread.join(10)


def create(shell, client):
    return shell.run(client.chat.completions.create(**CHAT))


def stream(shell, client):
    return shell.read(shell.run(client.chat.completions.create(**CHAT, stream=True)))


def opened(shell, client):
    with shell.within(client.chat.completions.with_streaming_response.create(**CHAT)) as response:
        return shell.run(response.read())


def dropped(shell, client):
    """A stream whose end comes from the queue."""
    shell.close(shell.run(client.chat.completions.create(**CHAT, stream=True)))
    return True


def parked(spool):
    (path,) = spool.glob("ledger-*.parked")
    return Spool(path.with_suffix("")).parked()


CALLS = {call.__name__: call for call in (create, stream, opened, dropped)}


@pytest.mark.parametrize("call", CALLS)
def test_kept(call, shell, ledger, provider, billing, spool):
    """The answer is given; its usage is on the disk; no new call is let through until the background has brought it in."""
    client = shell.client(customer=None)
    fails(ledger)
    with bill_to("ada") as bill:
        assert CALLS[call](shell, client)
        billing.flush()

        assert [] == bill.events
    assert 1 == len(list(spool.glob("ledger-*.spool-*")))
    assert 1 == billing.balance("ada", "generations").held
    assert ["usage waits to be written" in reason for reason in billing.readiness()] == [True]

    with pytest.raises(BillingUnavailableError), bill_to("ada"):
        create(shell, client)
    assert 1 == len(provider.requests)

    works_again(shell, ledger)
    assert [] == billing.readiness()
    assert [] == list(spool.iterdir())
    assert [event.transaction_id for event in ledger.usage_events("ada")] == [
        event.transaction_id for event in bill.events
    ]
    assert (1, 0) == (billing.balance("ada", "generations").used, billing.balance("ada", "generations").held)
    with bill_to("ada"):
        create(shell, client)
    assert 2 == billing.balance("ada", "generations").used


def test_many(shell, ledger, provider, billing, spool):
    """Calls that were under way when the ledger failed are kept as well, each once."""
    client = shell.client()
    streams = [shell.run(client.chat.completions.create(**CHAT, stream=True)) for _ in range(5)]
    fails(ledger)

    for each in streams:
        shell.read(each)
    assert [] == list(ledger.usage_events("ada"))
    works_again(shell, ledger, 5)

    assert {f"gen_{issued.id}" for issued in provider.issued} == {
        event.transaction_id for event in ledger.usage_events("ada")
    }
    assert (5, 0) == (billing.balance("ada", "generations").used, billing.balance("ada", "generations").held)


def test_recover(shell, ledger, provider, billing):
    """`recover` brings in what waits, and says so."""
    fails(ledger)
    create(shell, shell.client())
    ledger.refuse = lambda step: None

    # The background may have been faster.
    assert 1 >= billing.recover().replayed
    assert 1 == billing.balance("ada", "generations").used


def test_release_fails(shell, ledger, provider, billing, spool):
    """A release that fails is no reason to refuse calls; it is tried again, without the disk."""
    fails(ledger, kinds=(Release,))
    provider.answer(status=400)
    client = shell.client()

    with pytest.raises(Exception, match="400"):
        create(shell, client)
    assert [] == list(spool.iterdir())
    assert create(shell, client)
    works_again(shell, ledger, 2)

    assert (1, 0) == (billing.balance("ada", "generations").used, billing.balance("ada", "generations").held)


@pytest.mark.parametrize("call", ["create", "stream", "opened"])
def test_raise(call, shell, ledger, provider, make_billing):
    """on_settle_failure="raise" says it with the answer in hand; the usage is brought in all the same."""
    billing = make_billing(on_settle_failure="raise")
    billing.grant("bob", "generations", 10, id="start")
    client = shell.client(billing=billing, customer="bob")
    provider.answer(text=ANSWER)
    fails(ledger)

    with pytest.raises(UsageNotRecordedError) as raised:
        CALLS[call](shell, client)
    error = raised.value
    assert (500, False) == (error.http_status, ANSWER in str(error))
    if call == "create":
        assert ANSWER == error.result.choices[0].message.content
    copied = pickle.loads(pickle.dumps(error))
    assert (str(error), error.result if call == "create" else None) == (str(copied), copied.result)
    works_again(shell, ledger)

    assert (1, 0) == (billing.balance("bob", "generations").used, billing.balance("bob", "generations").held)


@pytest.mark.parametrize("error", [BillingUnavailableError, ConfigurationError])
def test_wiring(error, shell, ledger, provider, billing, spool):
    """A ledger that is wired wrongly, say by a role that lost a right, is no fault of the usage: it waits until that is mended."""
    client = shell.client()
    fails(ledger, error)
    assert create(shell, client)
    assert 1 == len(list(spool.glob("ledger-*.spool-*")))
    # Tried again while nothing is mended.
    assert 0 == billing.recover().parked

    works_again(shell, ledger)
    assert [f"gen_{provider.issued[0].id}"] == [event.transaction_id for event in ledger.usage_events("ada")]
    assert [] == list(spool.iterdir())


def test_parked(shell, ledger, provider, billing, spool, caplog):
    """A settle that can never succeed is parked where the operator finds it, and blocks nobody."""
    client = shell.client()
    fails(ledger, ValueError)

    assert create(shell, client)
    ledger.refuse = lambda step: None

    assert [] == billing.readiness()
    assert create(shell, client)
    assert (1, 1) == (billing.balance("ada", "generations").used, billing.balance("ada", "generations").held)
    ((step, why),) = parked(spool)
    assert (f"gen_{provider.issued[0].id}", 1, "the disk is gone") == (step.transaction_id, step.amount, why)
    assert "parked" in caplog.text


def test_parked_later(shell, ledger, provider, billing, spool):
    """One that turns out to be impossible only when it is tried again is parked then, and what is behind it comes in."""
    client = shell.client()
    streams = [shell.run(client.chat.completions.create(**CHAT, stream=True)) for _ in range(2)]
    fails(ledger)
    for each in streams:
        shell.read(each)
    bad = f"gen_{provider.issued[0].id}"

    ledger.refuse = lambda step: ValueError("never") if getattr(step, "transaction_id", "") == bad else None
    wait_for_ends(shell, ledger, 1)
    billing.recover()

    assert [f"gen_{provider.issued[1].id}"] == [event.transaction_id for event in ledger.usage_events("ada")]
    assert [bad] == [step.transaction_id for step, _ in parked(spool)]
    assert [] == billing.readiness()


@pytest.mark.parametrize("call", CALLS)
def test_nothing_can_be_written(call, shell, ledger, provider, make_billing, tmp_path, monkeypatch, caplog):
    """Where the spool fails, too, the answer is given all the same; what is said of it holds no prompt and no answer."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    billing = make_billing(spool=tmp_path / "file" / "spool")
    billing.grant("bob", "generations", 10, id="start")
    provider.answer(text=ANSWER)
    fails(ledger)
    caplog.set_level(logging.DEBUG, "metered_ai")

    assert CALLS[call](shell, shell.client(billing=billing, customer="bob"))
    billing.flush()

    (error,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert "neither to the ledger" in error
    assert "bob" in error
    ours = "".join(record.getMessage() for record in caplog.records if record.name.startswith("metered_ai"))
    assert "secret" not in ours
    assert 1 == billing.balance("bob", "generations").held
    assert billing.readiness()

    # As long as this process lives it tries again.
    works_again(shell, ledger)
    assert (1, 0) == (billing.balance("bob", "generations").used, billing.balance("bob", "generations").held)


# Failures of a real file.


@pytest.fixture
def credits(tmp_path):
    """A SQLite ledger whose settles wait but a moment for a lock."""
    path = tmp_path / "credits.db"
    with connect(f"sqlite:///{path}", hold_patience=0.05, settle_patience=0.05) as billing:
        billing.grant("ada", "generations", 10, id="start")
        yield path, billing


@pytest.fixture(params=["sync", "async"])
def real(request, provider, credits):
    """The shells on that ledger."""
    shell = Shell(provider, credits[1], is_async=request.param == "async")
    yield shell
    shell.finish()


def locked(path):
    """Another process has the file."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    return lambda: (connection.execute("ROLLBACK"), connection.close())


def test_locked(real, provider, credits):
    """A ledger that another program keeps locked: the answer is given, its usage is spooled beside the file, and comes in."""
    path, billing = credits
    gate = threading.Event()
    provider.answer(gate=gate)
    client = real.client()
    unlock = None

    def lock():
        nonlocal unlock
        provider.wait_for_requests(1)
        unlock = locked(path)
        gate.set()

    # The connection is made and used in the thread that locks; the rollback comes from here.
    sqlite3_connect, sqlite3.connect = (
        sqlite3.connect,
        lambda *a, **k: sqlite3_connect(*a, **k, check_same_thread=False),
    )
    try:
        thread = threading.Thread(target=lock)
        thread.start()
        assert real.run(client.chat.completions.create(model="m", messages=HELLO))
        thread.join(10)
    finally:
        sqlite3.connect = sqlite3_connect
    kept = list(path.parent.glob("credits.db.spool-*"))
    reasons = billing.readiness()
    unlock()
    billing.recover()

    assert (1, 1) == (len(kept), len(reasons))
    assert (1, 0) == (billing.balance("ada", "generations").used, billing.balance("ada", "generations").held)
    assert [] == billing.readiness()


KILLED = """
import os, resource, signal, sqlite3, sys, threading
from metered_ai import MeteredOpenAI, connect
from metered_ai.testing.provider import FakeProvider

path, how = sys.argv[1:]
gate = threading.Event()
with FakeProvider() as provider:
    billing = connect("sqlite:///" + path, hold_patience=0.2, settle_patience=0.2)
    billing.grant("ada", "generations", 10, id="start")
    client = MeteredOpenAI(billing=billing, customer="ada", base_url=provider.base_url, api_key="k", max_retries=0)
    provider.answer(gate=gate, id="chatcmpl-1")

    def break_it():
        global other
        provider.wait_for_requests(1)
        if how == "locked":
            other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            other.execute("BEGIN IMMEDIATE")
        elif how == "full":
            # No file may grow beyond what the log has reached: a full disk to SQLite, while a small spool still fits.
            resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(path + "-wal"), resource.RLIM_INFINITY))
        gate.set()

    threading.Thread(target=break_it).start()
    answer = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hello"}])
    print(answer.id, len(billing.readiness()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["locked", "full"])
def test_killed(how, tmp_path):
    """Usage that only the spool knows survives kill -9: whoever opens the ledger next brings it in, once."""
    path = tmp_path / "credits.db"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(path), how],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert (-9, "chatcmpl-1 1\n") == (done.returncode, done.stdout), done.stderr
    assert 1 == len(list(tmp_path.glob("credits.db.spool-*")))
    for _ in range(2):
        with connect(f"sqlite:///{path}") as billing:
            assert ["gen_chatcmpl-1"] == [event.transaction_id for event in billing.usage_events("ada")]
            assert (1, 0) == (billing.balance("ada", "generations").used, billing.balance("ada", "generations").held)
            assert billing.verify().is_sound
    assert [] == list(tmp_path.glob("credits.db.spool-*"))


def test_closed_while_waiting(shell, ledger, provider, make_billing, spool):
    """A billing that is closed while usage waits leaves it in the spool, from which the next one takes it."""
    first = make_billing()
    first.settings = first.settings.model_copy(update={"settle_patience": 0.1})
    client = shell.client(billing=first)
    fails(ledger)
    create(shell, client)
    first.close()
    assert 1 == len(list(spool.glob("ledger-*.spool-*")))

    ledger.refuse = lambda step: None
    second = make_billing()

    assert 1 == len(list(second.usage_events("ada"))) or second.recover().replayed == 1
    assert (1, 0) == (second.balance("ada", "generations").used, second.balance("ada", "generations").held)
    assert [] == list(spool.glob("ledger-*.spool-*"))
