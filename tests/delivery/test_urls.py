"""`flowglad://` URLs: what they mean, and what never belongs into one. The service behind them is replaced: only the URL is tried here."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from metered_ai import Billing, connect
from metered_ai.errors import ConfigurationError
from metered_ai.urls import billing_url, ledger_url
from tests.delivery.tab import Tab

GEN = "generations"


@pytest.fixture
def made(monkeypatch):
    """What the service was built with."""
    made = []

    class Flowglad(Tab):
        def __init__(self, secret_key=None, base_url=None, *, on_missing_meter="refuse", timeout=10.0):
            super().__init__("flowglad", credits=5)
            made.append((self, secret_key, base_url, on_missing_meter, timeout))

    module = ModuleType("metered_ai.services.flowglad")
    module.Flowglad = Flowglad
    monkeypatch.setitem(sys.modules, "metered_ai.services.flowglad", module)
    return made


def test_url(made, tmp_path, monkeypatch):
    """The ledger is the one that the URL names, other words are options of the service, and it is closed with the billing."""
    monkeypatch.chdir(tmp_path)
    url = "flowglad://?ledger=sqlite:///credits.db&base_url=http://127.0.0.1:9&timeout=2.5&on_missing_meter=allow"
    with connect(url) as billing:
        assert [] == made
        billing.record("ada", GEN, transaction_id="t1")
        assert tmp_path / "credits.db" in tmp_path.iterdir()
        assert "flowglad" == billing.ledger.service
    ((service, *options),) = made

    assert [None, "http://127.0.0.1:9", "allow", 2.5] == options
    assert service.is_closed
    assert [("ada", "t1")] == list(service.events)


def test_absolute(tmp_path, monkeypatch):
    """The ledger's path is made absolute, also the one that stands where none is named, and saying it twice changes nothing."""
    monkeypatch.chdir(tmp_path)

    for given, path in (("flowglad://?ledger=sqlite:///a%20b.db", "a b.db"), ("flowglad://", "metered_ai.db")):
        url = billing_url(given)
        assert f"sqlite:///{tmp_path}/{path}" == ledger_url(url)
        assert url == billing_url(url)
    assert "memory://" == ledger_url(billing_url("flowglad://?ledger=memory://"))


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("flowglad://?ledger=memory://&secret_key=sk_live_hush", "never part of a URL"),
        ("flowglad://sk_live_hush@app.flowglad.com", "never part of a URL"),
        ("flowglad://app.flowglad.com/sk_live_hush?ledger=memory://", "base_url"),
        ("flowglad://?ledger=flowglad://", "not another service"),
        ("flowglad://?ledger=mysql://x", "cannot bill"),
    ],
)
def test_refused(url, says):
    """What cannot be is refused at once, and no key that stood in the URL is repeated."""
    with pytest.raises(ConfigurationError, match=says) as refusal:
        connect(url)

    assert "hush" not in str(refusal.value)


@pytest.mark.parametrize("option", ["colour=red", "timeout=soon"])
def test_unknown_option(made, option):
    """An option that the service does not take is refused at the first use."""
    with (
        connect(f"flowglad://?ledger=memory://&{option}") as billing,
        pytest.raises(ConfigurationError, match="option"),
    ):
        billing.balance("ada", GEN)


def test_two_services():
    """A URL that names a service takes no other beside it."""
    with pytest.raises(ConfigurationError, match="names the service already"):
        Billing("flowglad://?ledger=memory://", service=Tab())
