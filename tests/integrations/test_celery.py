"""Celery, with a real worker process: who pays travels with the task, and a task that is retried is billed once."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

from metered_ai import AlreadyBilledError, CustomerRequiredError, bill_to, connect, per_call

ROOT = Path(__file__).parents[2]


@pytest.fixture
def shop(tmp_path, monkeypatch, provider):
    """The application as a web process sees it, on credits for nine."""
    monkeypatch.setenv("SHOP_FOLDER", str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", "test")
    monkeypatch.setenv("OPENAI_BASE_URL", provider.base_url)
    name = "tests.integrations.celery_shop"
    sys.modules.pop(name, None)
    shop = importlib.import_module(name)
    for customer in ("ada", "bob"):
        shop.client.billing.grant(customer, "generations", 9, id="order_1")
    yield shop
    shop.client.billing.close()
    shop.app.close()


@pytest.fixture
def worker(shop, tmp_path):
    """A worker with two processes, which has ended when the test has."""
    arguments = ["-A", "tests.integrations.celery_shop", "worker", "--pool=prefork", "-c", "2", "-l", "warning"]
    quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    log = (tmp_path / "worker.log").open("w")
    with (
        log,
        subprocess.Popen(
            [sys.executable, "-m", "celery", *arguments, *quiet], cwd=ROOT, stdout=log, stderr=log
        ) as running,
    ):
        yield running
        running.terminate()
        assert 0 == running.wait(20), (tmp_path / "worker.log").read_text()


def events(shop):
    return [(event.customer, event.transaction_id, event.amount) for event in shop.client.billing.usage_events()]


def test_worker(shop, worker):
    """
    The customer of the block from which a task is sent pays for it in the worker; so do chains and tasks that a task sends. A task that
    fails and is retried is billed once for each of its calls. A task of nobody is refused and lands on nobody's bill.
    """
    with bill_to("ada", properties={"order": 7}):
        plain = shop.ask.delay()
    with bill_to("bob", amount=2):
        other = shop.ask.delay()
    with bill_to("ada"):
        retried = shop.ask_twice_and_fail_first.delay()
        chained = shop.send_chain()
        sender = shop.ask_and_send.delay()
    nobody = shop.ask.delay()

    for result in (plain, other, retried, chained, sender):
        result.get(timeout=60)
    with pytest.raises(CustomerRequiredError):
        nobody.get(timeout=60)
    with connect(f"sqlite:///{shop.FOLDER / 'credits.db'}") as billing:
        sent_by_task = f"task_{sender.id}"
        for _ in range(300):
            # The task that a task has sent tells nobody when it is done.
            found = {(e.customer, e.transaction_id): e.amount for e in billing.usage_events()}
            if len(found) >= 8:
                break
            # Another process's ledger can only be looked at again.
            time.sleep(0.1)

        assert {
            ("ada", f"task_{plain.id}"): 1,
            ("bob", f"task_{other.id}"): 2,
            ("ada", f"task_{retried.id}"): 1,
            ("ada", f"task_{retried.id}.2"): 1,
            ("ada", f"task_{chained.id}"): 1,
            ("ada", f"task_{chained.parent.id}"): 1,
            ("ada", sent_by_task): 1,
        }.items() <= found.items()
        assert 8 == len(found)
        assert ["ada"] * 7 + ["bob"] == sorted(customer for customer, _ in found)
        assert [{"order": 7}] == [
            e.properties for e in billing.usage_events() if e.transaction_id == f"task_{plain.id}"
        ]
        assert () == billing.verify().broken


def run_eagerly(shop):
    shop.app.conf.task_always_eager = True
    shop.app.conf.task_eager_propagates = True


def test_eager(shop):
    """A task that is run at once is billed to the block around it, under its own id, and leaves the block as it was."""
    run_eagerly(shop)
    with bill_to("ada", transaction_id="mine") as bill:
        result = shop.ask.delay()
        shop.client.responses.create(**shop.ASK)

    assert [f"task_{result.id}", "mine"] == [event.transaction_id for event in bill.events]


def test_refused_repeat(shop, monkeypatch):
    """With the default `on_repeat` the same task again is refused before anything is sent; either way it is billed once."""
    run_eagerly(shop)
    with connect(f"sqlite:///{shop.FOLDER / 'credits.db'}") as billing:
        monkeypatch.setattr(shop, "client", shop.client.with_options(billing=billing))
        with bill_to("ada"):
            shop.ask.apply(task_id="7")
            with pytest.raises(AlreadyBilledError):
                shop.ask.apply(task_id="7", throw=True)

        assert [("ada", "task_7", 1)] == events(shop)


def test_free_repeat(shop, provider):
    """With `on_repeat="free"` it is answered again, and charged once."""
    run_eagerly(shop)
    with bill_to("ada"):
        texts = [shop.ask.apply(task_id="7").get() for _ in range(2)]

    assert texts[0] == texts[1]
    assert [("ada", "task_7", 1)] == events(shop)
    assert 2 == len(provider.requests)


def test_pricing_stays(shop, caplog):
    """A block whose pricing cannot travel sends its task without a customer, so that nothing is billed at another price."""
    with bill_to("ada", pricing=per_call(5)):
        shop.ask.delay()
    with bill_to("ada", amount=5):
        shop.ask.delay()
    messages = [path.read_text() for path in sorted((shop.FOLDER / "queue").iterdir())]

    assert [1, 1] == [sum('"customer": "ada"' in text for text in messages), len(messages) - 1]
    assert "cannot travel" in caplog.text
