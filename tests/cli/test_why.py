"""`metered-ai why`: the story of one charge, for a person who has to answer for it."""

from __future__ import annotations

import json
import re

import pytest

from metered_ai import Billing, Usage
from metered_ai.core.steps import Place, Release, Settle
from metered_ai.ledger.leases import new_hold_id
from metered_ai.services import Delivery
from tests.delivery.tab import Tab

ADA, GEN = "ada", "generations"


def told(out):
    """The story as a table: what, and the words."""
    return [(line[:12].strip(), line[12:]) for line in out.splitlines() if line]


@pytest.fixture
def story(billing):
    """A call that took three attempts."""
    billing.grant(ADA, GEN, 100, id="order_1")
    billing.grant(ADA, GEN, 50, id="order_2")
    hold_id = new_hold_id()
    billing.ledger.run(Place(hold_id, ADA, GEN, 9, None, endpoint="responses", model="gpt-5-mini"))
    usage = Usage("gpt-5-mini", "responses", "flex", 1200, 1000, None, 34, 7)
    step = Settle(
        hold_id,
        ADA,
        GEN,
        6,
        "gen_resp_1",
        "reported",
        usage=usage,
        request_id="req_7",
        attempts=3,
        properties={"team": "red"},
    )
    billing.ledger.run(step)
    return hold_id


def test_call(cli, story):
    """Grant, hold, call, retries, settle, basis and delivery, in the order in which they happened."""
    code, out, err = cli("why", "gen_resp_1")
    lines = told(out)

    assert (0, "") == (code, err)
    assert "who granted held called tried settled based on noted delivery" == " ".join(what for what, _ in lines)
    words = dict(lines)
    assert "ada on generations" == words["who"]
    assert re.match(r"150 credits before it in 2 grants, the last order_2 at 20\d\d-.* UTC;", words["granted"])
    assert re.match(rf"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC, hold {story}$", words["held"])
    assert "responses with gpt-5-mini (flex), request req_7" == words["called"]
    assert "3 times (2 retries); charged once" == words["tried"]
    assert re.match(r"20\d\d-.* UTC as gen_resp_1: 6 credits$", words["settled"])
    assert (
        "what the provider reported: 1,200 input tokens, 1,000 of them cached, 34 output tokens, 7 of them reasoning (basis reported)"
        == words["based on"]
    )
    assert "team=red" == words["noted"]
    assert "none: this ledger tells no remote service" == words["delivery"]


def test_by_hold(cli, story):
    """The hold's id tells the same story."""
    assert cli("why", "gen_resp_1") == cli("why", story)


def test_json(cli, story):
    """JSON has the records behind the story, with the keys that --help names, and the story itself."""
    (found,) = json.loads(cli("why", "gen_resp_1", "--json")[1])
    documented = cli("why", "--help")[1].split("JSON", 1)[1].split("Options:")[0].replace(",", " ").replace(".", " ")

    assert "customer meter event hold grants corrections parent covered service outbox story".split() == list(found)
    assert [] == [key for key in found if key not in documented.split()]
    assert ("gen_resp_1", None, 2) == (found["event"]["transaction_id"], found["hold"], len(found["grants"]))
    assert "who: ada on generations" == found["story"][0]


def test_late(cli, billing):
    """A settle that came after its hold had ended says so, and what had become of the hold."""
    billing.grant(ADA, GEN, 100, id="order_1")
    billing.ledger.run(Place("h_late", ADA, GEN, 9, None, max_call=1e-6))
    billing.recover()
    billing.ledger.run(Settle("h_late", ADA, GEN, 6, "gen_late", "observed", usage=Usage(output_tokens=3)))
    words = dict(told(cli("why", "gen_late")[1]))

    assert "late: the hold had already ended" in words["settled"]
    assert words["based on"].startswith("what was seen of an answer that was not read to its end: 3 output tokens")


def test_not_charged(cli, billing):
    """A hold that was given back tells why nothing was charged, and whether it is in doubt."""
    billing.grant(ADA, GEN, 100, id="order_1")
    for hold_id, reason, sent in (("h_err", "provider_error", "no"), ("h_lost", "unknown", "unknown")):
        billing.ledger.run(
            Place(hold_id, ADA, GEN, 3, None, operation=f"op_{hold_id}", scope="s", endpoint="responses")
        )
        billing.ledger.run(Release(hold_id, ADA, GEN, reason, sent))
    billing.ledger.run(Place("h_open", ADA, GEN, 3, None, model="gpt-5"))
    lost, by_id, flying = (dict(told(cli("why", wanted)[1])) for wanted in ("h_lost", "op_h_lost", "h_open"))

    assert "released: no answer came. In doubt: the provider may have worked for it, and billed you." in lost["ended"]
    assert "nothing" == lost["charged"]
    assert lost == by_id
    assert "in flight; its lease runs until" in flying["now"]


def test_orphan(cli, billing):
    """An orphan that was charged, and corrected by a late settle: both are told, with what was given back."""
    billing.grant(ADA, GEN, 100, id="order_1")
    for hold_id, late in (("h_more", 9), ("h_less", 2)):
        billing.ledger.run(Place(hold_id, ADA, GEN, 5, None, on_unknown="charge", max_call=1e-6))
        billing.recover()
        billing.ledger.run(Settle(hold_id, ADA, GEN, late, f"gen_{hold_id}", "reported"))
    more, less = (told(cli("why", f"hold_{hold_id}")[1]) for hold_id in ("h_more", "h_less"))

    assert "a call whose process died; it was charged by policy (on_unknown)" == dict(more)["for"]
    assert [True] == ["4 credits more" in words for what, words in more if what == "corrected"]
    assert ["3 credits by grant correction_h_less"] == [words for what, words in less if what == "given back"]


def test_covered(cli, billing):
    """A charge that covers calls names them, and they name it."""
    billing.grant(ADA, GEN, 100, id="order_1")
    with billing.charge(ADA, GEN, amount=10, transaction_id="run_1", covers_calls=True) as charge:
        parent = charge._hold_id
        billing.ledger.run(Place("h_in", ADA, "images", 0, None, parent=parent))
        billing.ledger.run(Settle("h_in", ADA, "images", 0, "gen_in", "reported", parent=parent))

    assert "run_1, which cost 10 credits" == dict(told(cli("why", "gen_in")[1]))["covered by"]
    assert "gen_in on images" == dict(told(cli("why", "run_1")[1]))["covers"]
    assert "a charge of the application" == dict(told(cli("why", "run_1")[1]))["for"]


def test_record(cli, billing):
    """Usage after the fact had no hold."""
    billing.record(ADA, GEN, transaction_id="export_1", amount=1)
    words = dict(told(cli("why", "export_1")[1]))

    assert ("nothing before it", "nothing: it was recorded after the fact") == (words["granted"], words["held"])
    assert "what the application said" == words["based on"]


def test_several(cli, billing):
    """An id that several accounts have gives a story for each; filters choose."""
    for customer, meter in ((ADA, GEN), (ADA, "images"), ("bob", GEN)):
        billing.record(customer, meter, transaction_id="export_1", amount=1)

    assert ["ada on generations", "ada on images", "bob on generations"] == [
        words for what, words in told(cli("why", "export_1")[1]) if what == "who"
    ]
    assert 1 == cli("why", "export_1", "--customer", "bob")[1].count("who ")
    assert 2 == cli("why", "export_1", "--meter", GEN)[1].count("who ")


def test_nothing(cli, billing):
    """An id that nothing has is exit 1 and one line."""
    billing.grant(ADA, GEN, 1, id="order_1")

    assert (1, "", "metered-ai: no usage event and no hold has the id 'nope'\n") == cli("why", "nope")
    assert (1, "[]\n") == cli("why", "nope", "--json")[:2]
    assert "customer 'bob', meter 'images'" in cli("why", "nope", "--customer", "bob", "--meter", "images")[2]


def test_delivery(cli, path):
    """Where there is a service the story says whether it has been told, what it answered, and why not."""
    tab = Tab(credits=9)
    with Billing(f"sqlite:///{path}", service=tab) as billing:
        for name, fault in (("told", None), ("free", None), ("stuck", Delivery("dead", "no such price\x1b"))):
            tab.fault = lambda _, fault=fault: fault
            billing.record(ADA, GEN, transaction_id=name, amount=0 if name == "free" else 1)
            billing.deliver()

    assert [
        "delivered: line 1",
        "none: tab (test) is not told of 0 credits",
        "dead in the outbox, tried 1 time: no such price\\x1b",
    ] == [dict(told(cli("why", name)[1]))["delivery"] for name in ("told", "free", "stuck")]
