"""`metered-ai deliver` and `metered-ai outbox`: what cron and a person do about usage that a service does not have yet."""

from __future__ import annotations

import csv
import json
import sys
from io import StringIO
from types import ModuleType

import pytest

from metered_ai import Billing
from metered_ai.cli import main
from metered_ai.services import Delivery
from metered_ai.services.delivery import Sender
from tests.delivery.tab import Tab

GEN = "generations"
HOSTILE = "[red]no[/red]\x1b[31m"


@pytest.fixture
def tab(monkeypatch):
    """The service that flowglad:// URLs reach."""
    tab = Tab(credits=100)
    module = ModuleType("metered_ai.services.flowglad")
    module.Flowglad = lambda **options: tab
    monkeypatch.setitem(sys.modules, "metered_ai.services.flowglad", module)
    return tab


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys, tab):
    """Runs a command on a ledger in which three events of ada's and one of bob's wait."""
    path = tmp_path / "credits.db"
    monkeypatch.setenv("METERED_AI_BILLING", f"flowglad://?ledger=sqlite:///{path}")
    with monkeypatch.context() as quiet:
        quiet.setattr(Sender, "wake", lambda self: None)
        with Billing(f"sqlite:///{path}", service=tab) as billing:
            for customer, count in (("ada", 3), ("bob", 1)):
                for number in range(count):
                    billing.record(customer, GEN, transaction_id=f"{customer}_{number}", amount=2)
    # Only `deliver` sends, and not what the command's own threads find.
    monkeypatch.setattr(Sender, "wake", lambda self: None)

    def run(*arguments):
        code = main(arguments)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_deliver(cli, tab):
    """It tells the service what it does not have, says how much that was, and a second time finds nothing."""
    assert (0, "4 usage events delivered.\n", "") == cli("deliver")
    assert 4 == len(tab.events)
    code, out, _ = cli("deliver", "--json")

    assert (0, {"delivered": 0, "waiting": 0, "parked": 0, "dead": 0, "alarm": None}) == (code, json.loads(out))
    assert (0, "Everything is delivered.\n", "") == cli("outbox")


def test_deliver_stuck(cli, tab):
    """What time will not mend is exit code 1: parked or dead usage, and a service that refuses us."""
    tab.fault = lambda event: "park" if event.customer == "ada" else "dead"
    code, out, err = cli("deliver")
    assert 1 == code
    assert "0 usage events delivered.\nLeft: 0 waiting, 3 parked, 1 dead.\n" == out
    assert "a scripted dead" in err
    cli("outbox", "--replay")
    tab.fault = lambda event: Delivery("stop", "401")
    code, out, _ = cli("deliver")

    assert 1 == code
    assert "Tab (test) refuses us: 401" in out


def test_deliver_down(cli, tab):
    """A service that is down for now is no failure of the command: everything waits."""
    tab.fault = lambda event: "again"
    code, out, _ = cli("deliver", "--timeout", "0.2")

    assert (0, "0 usage events delivered.\nLeft: 4 waiting, 0 parked, 0 dead.\n") == (code, out)


def test_outbox(cli, tab):
    """It lists what is stuck and why, whatever the service wrote there, by customer, meter and state; --replay lets it go."""
    tab.fault = lambda event: Delivery("park", HOSTILE) if event.customer == "ada" else Delivery("dead", "no price")
    cli("deliver")
    code, out, err = cli("outbox")
    assert (0, "") == (code, err)
    assert "[red]no[/red]\\x1b[31m" in out
    assert "\x1b" not in out
    assert "Left: 0 waiting, 3 parked, 1 dead. The oldest is" in out
    assert "bob_0" in cli("outbox", "--state", "dead")[1]
    assert "ada_0" not in cli("outbox", "--state", "dead")[1]
    assert "The newest 1 of 3 usage events" in cli("outbox", "--customer", "ada", "--limit", "1")[1]

    assert (0, "3 usage events will be sent again.\n", "") == cli("outbox", "--replay", "--customer", "ada")
    assert {"replayed": 1} == json.loads(cli("outbox", "--replay", "--id", "bob_0", "--json")[1])
    tab.fault = lambda event: None
    assert "4 usage events delivered.\n" == cli("deliver")[1]


def test_outbox_json(cli, tab):
    """JSON has the keys that --help names, of the newest or of all."""
    told = json.loads(cli("outbox", "--json")[1])
    assert "event state amount attempts reason age not_before".split() == list(told[0])
    documented = cli("outbox", "--help")[1].split("JSON", 1)[1].split("Options:")[0]
    assert [] == [key for key in told[0] if key not in documented]
    assert ["ada_0", "ada_1", "ada_2", "bob_0"] == [one["event"]["transaction_id"] for one in told]

    assert 2 == len(json.loads(cli("outbox", "--json", "--limit", "2")[1]))


def test_outbox_needs_no_service(cli, monkeypatch):
    """Looking and replaying need no service and no key."""
    monkeypatch.setitem(sys.modules, "metered_ai.services.flowglad", None)

    assert 0 == cli("outbox")[0]
    assert 0 == cli("outbox", "--replay")[0]


def test_wrongly(cli, monkeypatch, tmp_path):
    """An id without --replay, and a ledger without a service, are used wrongly."""
    assert (2, "metered-ai: --id goes with --replay\n") == cli("outbox", "--id", "x")[::2]
    monkeypatch.setenv("METERED_AI_BILLING", f"sqlite:///{tmp_path}/own.db")
    cli("grant", "ada", GEN, "5", "--id", "g1")
    code, _, err = cli("deliver")

    assert 2 == code
    assert "no service to deliver to" in err
    assert "Everything is delivered.\n" == cli("outbox")[1]


def test_csv(cli):
    """CSV has the rows of the JSON; the event has columns of its own, and so has what its call used."""
    rows = list(csv.DictReader(StringIO(cli("outbox", "--csv")[1])))
    told = json.loads(cli("outbox", "--json")[1])

    assert [(row["event"]["customer"], row["event"]["transaction_id"], str(row["amount"])) for row in told] == [
        (row["event_customer"], row["event_transaction_id"], row["amount"]) for row in rows
    ]
    assert {"event_usage_model", "state", "attempts", "reason", "age", "not_before"} <= set(rows[0])
    assert 2 == cli("outbox", "--csv", "--json")[0] == cli("outbox", "--csv", "--replay")[0]
