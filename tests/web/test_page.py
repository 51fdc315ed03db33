"""The usage page over HTTP: who sees what, in which words, and what nobody gets to see."""

from __future__ import annotations

import json
import logging
import re
from datetime import UTC, datetime
from functools import partial
from html import unescape

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from metered_ai import Balance, ConfigurationError, InsufficientCreditsError, connect
from metered_ai.web import credits_headers, usage_page
from metered_ai.web.newest import newest_events
from tests.web.scenes import GEN, HOSTILE, LEVELS, away, fill, use

PATHS = ["/", "/fragment", "/widget", "/usage.json"]
SHOP = "https://example.com/credits"


def who_asks(request):
    """An application's own login; here a header stands for its session."""
    return request.headers.get("x-user")


def site(billing, **options):
    """An application with the usage page mounted."""
    app = Starlette()
    app.mount("/usage", usage_page(billing, **{"customer": who_asks, "upgrade_url": SHOP, **options}))
    return TestClient(app)


def text_of(html):
    """What a person reads."""
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())


def get(client, path, user=None):
    return client.get(f"/usage{path}", headers={} if user is None else {"x-user": user})


# ---- what is shown ----

SAID = {
    "ok": ("40 / 100 used, 60 left", None, False),
    "high": ("82 / 100 used, 18 left", "You have used 82 % of your credits. Get more credits on generations", True),
    "critical": ("95 / 100 used, 5 left", "You are approaching your limit: 5 credits left. Get more credits", True),
    "exhausted": (
        "100 / 100 used, 0 left",
        "You are out of credits. Requests are refused until you add some. Get more credits to go on",
        True,
    ),
    "in_debt": ("112 / 100 used, 0 left", "12 credits over your limit are taken from what you add next.", True),
    "all_held": (
        "70 / 100 used, 0 left, 30 set aside for running requests",
        "The rest of your credits is set aside for requests that are running.",
        True,
    ),
    "unlimited": ("Unlimited 1,234 used", None, False),
    "stranger": ("You have no credits and no usage yet.", None, False),
}


@pytest.mark.parametrize("path", ["/", "/fragment", "/widget"])
@pytest.mark.parametrize("user", SAID)
def test_states(user, path, levels):
    """Each state of an account is told in words, with the way to more credits from 80 % on; nothing just disappears."""
    numbers, notice, offers = SAID[user]
    answer = get(site(levels), path, user)
    said = text_of(answer.text)

    assert 200 == answer.status_code
    assert numbers in said
    assert (notice or "") in said
    assert offers == (SHOP in answer.text)
    assert ("You have used" in said or "approaching" in said or "out of credits" in said) == (
        user in ("high", "critical", "exhausted", "in_debt")
    )


@pytest.mark.parametrize(
    ("used", "level", "offers", "words"),
    [
        (75, "ok", False, None),
        (76, "high", False, None),
        (79, "high", False, None),
        (80, "high", True, "You have used 80 %"),
        (90, "high", True, "You have used 90 %"),
        (91, "critical", True, "approaching your limit"),
        (99, "critical", True, "approaching your limit: 1 credit left"),
        (100, "exhausted", True, "out of credits"),
    ],
)
def test_thresholds(used, level, offers, words, billing):
    """Over 75 % a meter is high, from 80 % more is offered, over 90 % it approaches its limit, from 100 % the words change."""
    fill(billing, "ada", used)
    client = site(billing)
    (meter,) = get(client, "/usage.json", "ada").json()["meters"]

    assert (level, used, offers) == (meter["level"], meter["percent_used"], meter["upgrade_url"] == SHOP)
    assert (words is None) == (meter["notice"] is None)
    assert (words or "") in (meter["notice"] or "")
    assert f'class="meter {level}"' in get(client, "/widget", "ada").text


def test_json(billing, past):
    """The JSON has the numbers of the balance, the days of use and the last events, without the application's own properties."""
    past.days_ago(1)
    fill(billing, "ada", 40)
    past.days_ago(0)
    billing.record("ada", GEN, transaction_id="export_1", amount=2, properties={"secret": "ours"})
    answer = get(site(billing, days=7), "/usage.json", "ada")
    told = answer.json()
    today = datetime.now(UTC).date().isoformat()

    assert "customer as_of meters usage events" == " ".join(told)
    assert {
        "meter": GEN,
        "title": GEN,
        "limit": 100,
        "used": 42,
        "held": 0,
        "available": 58,
        "debt": 0,
        "unlimited_used": 0,
        "percent_used": 42,
        "level": "ok",
        "show_upgrade": False,
        "is_exhausted": False,
        "notice": None,
        "upgrade_url": None,
    } == told["meters"][0]
    assert {"day": today, "amount": 2, "calls": 1} == told["usage"][0]["days"][-1]
    assert [40, 2] == [day["amount"] for day in told["usage"][0]["days"]][-2:]
    assert ["export_1", "gen_resp_ada_1"] == [event["transaction_id"] for event in told["events"]]
    assert "secret" not in answer.text


def test_plot(billing, past):
    """Use over time is drawn for each meter by itself, and told in words and as a table."""
    for days in (3, 1):
        past.days_ago(days)
        billing.record("ada", GEN, transaction_id=f"export_{days}", amount=10 * days)
    past.days_ago(0)
    billing.record("ada", "images", transaction_id="image_1", amount=4)
    html = get(site(billing, days=7), "/", "ada").text

    assert 2 == html.count('role="img"')
    assert 3 == html.count('width="8"')
    assert "generations: 40 credits from" in html
    assert "at most 30 a day" in html
    assert 'height="100.0"' in html
    assert 'height="33.3"' in html
    assert re.search(r"<td>\d{4}-\d\d-\d\d</td><td class=\"number\">30</td>", html)


def test_last_events(billing):
    """The last events are listed, the newest first, with model and transaction; no more than asked for."""
    billing.grant("ada", GEN, 100, id="order_1")
    for number in range(5):
        use(billing, "ada", 1, number)
    said = text_of(get(site(billing, events=3), "/", "ada").text)

    assert ["4", "3", "2"] == re.findall(r"gen_resp_ada_(\d)", said)
    assert "gpt-5-mini" in said


def test_long_history(billing, monkeypatch):
    """However long a history is, finding its newest events reads a few pages, not all of it."""
    for number in range(3000):
        billing.record("ada", GEN, transaction_id=f"t{number}", amount=1)
    read = 0
    whole = billing.ledger.usage_events

    def counted(*arguments):
        nonlocal read
        for event in whole(*arguments):
            read += 1
            yield event

    monkeypatch.setattr(billing.ledger, "usage_events", counted)
    found = newest_events(billing, "ada", GEN, 20)

    assert [f"t{number}" for number in range(2999, 2979, -1)] == [event.transaction_id for event in found]
    assert read < 501 * 45


def test_meters(billing):
    """`meters` says what is shown, in which order and under which title, also where there is no account yet."""
    fill(billing, "ada", 10)
    billing.record("ada", "internal", transaction_id="t", amount=1)
    client = site(billing, meters={"images": "Pictures", GEN: "Answers"})
    told = get(client, "/usage.json", "ada").json()

    assert [("images", "Pictures", 0), (GEN, "Answers", 10)] == [
        (meter["meter"], meter["title"], meter["used"]) for meter in told["meters"]
    ]
    assert "internal" not in json.dumps(told)
    assert "You have no credits yet." in text_of(get(client, "/widget", "ada").text)


def test_one_meter(levels):
    """A widget may show one meter."""
    levels.record("high", "images", transaction_id="t", amount=1)
    client = site(levels)

    assert "images" in get(client, "/widget", "high").text
    assert "images" not in get(client, f"/widget?meter={GEN}", "high").text


def test_checkout(levels):
    """`upgrade_url` may be a function, plain or async, asked only where more is offered; without one there is no link."""
    asked = []

    async def checkout(customer, meter):
        asked.append(customer)
        return f"/checkout?meter={meter}"

    assert 'href="/checkout?meter=generations"' in get(site(levels, upgrade_url=checkout), "/", "high").text
    assert "/checkout" not in get(site(levels, upgrade_url=checkout), "/", "ok").text
    assert ["high"] == asked
    assert 'href="/plans"' in get(site(levels, upgrade_url=lambda _, __: "/plans"), "/", "high").text
    assert "upgrade" not in get(site(levels, upgrade_url=lambda _, __: None), "/", "high").text


def test_billing_url(file):
    """Where the page is given no `upgrade_url`, it is the billing's."""
    with connect(f"sqlite:///{file}", upgrade_url=SHOP) as billing:
        fill(billing, "ada", 85)

        assert SHOP in get(site(billing, upgrade_url=None), "/", "ada").text


def test_header(levels):
    """`X-Credits-Remaining` tells what is left, of a balance or a refusal."""
    refusal = InsufficientCreditsError(customer="ada", meter=GEN, available=3, required=5)

    assert {"X-Credits-Remaining": "18"} == credits_headers(levels.balance("high", GEN))
    assert {"X-Credits-Remaining": "unlimited"} == credits_headers(levels.balance("unlimited", GEN))
    assert {"X-Credits-Remaining": "3"} == credits_headers(refusal)
    assert {"X-Credits-Remaining": "0"} == credits_headers(Balance("a", GEN, 1, 2, 0, 0, 1))


# ---- who sees it ----


@pytest.mark.parametrize("path", PATHS)
def test_nobody(path, levels):
    """Whoever is nobody gets a 404 without a word, the same as for an address that is not there."""
    client = site(levels)
    refused = get(client, path)
    wrong = get(client, "/nowhere", "ok")

    assert (404, "Not found\n") == (refused.status_code, refused.text)
    assert (refused.status_code, refused.content, refused.headers) == (wrong.status_code, wrong.content, wrong.headers)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_read_only(method, levels):
    """Anything but GET is the same 404, whoever asks; the resolver is not even asked."""
    asked = []
    client = site(levels, customer=asked.append)
    refused = client.request(method, "/usage/", headers={"x-user": "ok"})

    assert (404, "Not found\n", []) == (refused.status_code, refused.text, asked)


def test_address_chooses_nobody(levels):
    """Nothing in an address, a header or a cookie of ours chooses who is shown: only the resolver does."""
    client = site(levels, customer=lambda _: "ok")
    client.cookies.set("customer", "in_debt")
    told = [
        client.get(f"/usage/usage.json{query}", headers={"x-customer": "in_debt"}).json()
        for query in ("", "?customer=in_debt", "?user=in_debt", "?meter=images&customer=in_debt")
    ]

    assert {"ok"} == {each["customer"] for each in told}


def test_own_only(levels):
    """No page of a customer has anything of another's."""
    client = site(levels)
    for user in LEVELS:
        for path in PATHS:
            text = get(client, path, user).text

            assert {user} >= {other for other in LEVELS if f"gen_resp_{other}_" in text}


def test_resolvers(levels):
    """A resolver may be plain or async, a function or an object."""

    async def later(request):
        return who_asks(request)

    class Login:
        async def __call__(self, request):
            return who_asks(request)

    for resolver in (who_asks, later, Login(), partial(later)):
        assert "ok" == get(site(levels, customer=resolver), "/usage.json", "ok").json()["customer"]
        assert 404 == get(site(levels, customer=resolver), "/usage.json").status_code


def test_resolver_raises(levels):
    """What a resolver raises is the application's own: its handlers answer, as for its other pages."""

    def login_first(_):
        raise HTTPException(401, "log in first")

    app = Starlette(exception_handlers={HTTPException: lambda _, error: PlainTextResponse(error.detail, 401)})
    app.mount("/usage", usage_page(levels, customer=login_first))
    answer = TestClient(app).get("/usage/")

    assert (401, "log in first") == (answer.status_code, answer.text)


@pytest.mark.parametrize("found", [7, b"ada", True, object()])
def test_resolver_mistakes(found, levels):
    """A resolver that gives something else than a name is a mistake that is told aloud, without what it gave."""
    with pytest.raises(ConfigurationError, match="must give a str or None, not a ") as caught:
        get(site(levels, customer=lambda _: found), "/")

    assert "ada" not in str(caught.value)


@given(
    name=st.one_of(st.text(max_size=300), st.sampled_from([HOSTILE, "../../etc/passwd", "a\0b", " a", "", "\ud800"]))
)
def test_fuzz(name, tmp_path_factory):
    """Whatever a customer is called, the page is theirs or a 404: it never fails, and no name becomes markup."""
    with connect("memory://") as billing:
        known = True
        try:
            billing.grant(name, name, 10, id="order_1")
            billing.record(name, name, transaction_id="t", amount=9, properties={name: name})
        except ValueError:
            known = False
        client = site(billing, customer=lambda _: name)
        for path in PATHS:
            answer = get(client, path)

            assert (200 if known else 404) == answer.status_code
            if known and path != "/usage.json":
                inside = re.sub(r"(?s)<head>.*</head>", "", answer.text)
                assert "<script" not in inside
                assert (name in unescape(answer.text).replace("\r\n", "\n")) or any(c in name for c in "\r\x85")
            if known and path == "/usage.json":
                assert name == answer.json()["customer"]


@settings(max_examples=40)
@given(meter=st.text(max_size=300))
def test_fuzz_meter(meter):
    """Whatever meter a widget asks for, it is an empty one of the customer's own or a 404."""
    with connect("memory://") as billing:
        billing.grant("ada", GEN, 10, id="order_1")
        answer = site(billing, customer=lambda _: "ada").get("/usage/widget", params={"meter": meter})

        assert answer.status_code in (200, 404)
        assert "<script" not in answer.text


# ---- what goes with it ----


@pytest.mark.parametrize("path", [*PATHS, "/nowhere"])
def test_headers(path, levels):
    """Nothing is stored or framed, no script or style of anybody else runs, and none inside the page."""
    answer = get(site(levels), path, "ok")
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))

    assert "no-store" == answer.headers["cache-control"]
    assert "'none'" == policy["default-src"]
    assert {"'self'"} == {policy[name] for name in ("script-src", "style-src", "connect-src")}
    assert {"'none'"} == {policy[name] for name in ("base-uri", "form-action", "frame-ancestors")}
    assert ("nosniff", "no-referrer") == (answer.headers["x-content-type-options"], answer.headers["referrer-policy"])
    assert [] == re.findall(r"style=|onclick=|<style|javascript:", answer.text)


def test_files(levels):
    """Style and script are served beside the page, need nobody's name, and load nothing from elsewhere."""
    client = site(levels)
    page = get(client, "/", "ok").text

    assert ["usage.css", "usage.js"] == re.findall(r'(?:href|src)="(usage\.\w+)"', page)
    for name, kind in (("usage.css", "text/css"), ("usage.js", "text/javascript")):
        answer = get(client, f"/{name}")

        assert (200, kind) == (answer.status_code, answer.headers["content-type"].split(";")[0])
        assert [] == re.findall(r"https?://|@import|url\(|eval\(|innerHTML", answer.text)


def test_mounts(levels):
    """It works mounted in an application, under a prefix that a proxy takes away, and alone; without its slash, too."""
    alone = TestClient(usage_page(levels, customer=who_asks))
    proxied = TestClient(usage_page(levels, customer=who_asks), root_path="/app/usage")
    inside = Starlette(routes=[Route("/", lambda _: PlainTextResponse("home"))])
    inside.mount("/account/usage", usage_page(levels, customer=who_asks))
    headers = {"x-user": "ok"}

    assert [200, 200, 200] == [
        alone.get("/", headers=headers).status_code,
        proxied.get("/app/usage/", headers=headers).status_code,
        TestClient(inside).get("/account/usage", headers=headers).status_code,
    ]
    assert "home" == TestClient(inside).get("/").text


# ---- when the ledger is away ----


def test_away(levels, file, caplog):
    """Without its ledger the page is a 503 in polite words, which tell nothing of the ledger; then it is there again."""
    client = site(levels)
    with away(file), caplog.at_level(logging.WARNING):
        answers = {each: get(client, each, "ok") for each in PATHS}
        nobody = get(client, "/")

    assert {503} == {answer.status_code for answer in answers.values()}
    assert {"5"} == {answer.headers["retry-after"] for answer in answers.values()}
    assert {"no-store"} == {answer.headers["cache-control"] for answer in answers.values()}
    assert all("Your usage cannot be shown right now." in answer.text for answer in answers.values())
    assert [] == [each for each, answer in answers.items() if "credits.db" in answer.text or "ledger" in answer.text]
    assert "usage_unavailable" == answers["/usage.json"].json()["error"]
    assert 404 == nobody.status_code
    assert "vanished" in caplog.text
    assert 200 == get(client, "/", "ok").status_code


# ---- mistakes of who mounts it ----


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"customer": None}, "customer="),
        ({"customer": "ada"}, "customer="),
        ({"meters": GEN}, "meters="),
        ({"meters": [""]}, "meters="),
        ({"days": 0}, "days="),
        ({"days": 7.5}, "days="),
        ({"events": 1000}, "events="),
        ({"refresh": -1}, "refresh="),
        ({"refresh": float("nan")}, "refresh="),
        ({"upgrade_url": "javascript:alert(1)"}, "upgrade_url"),
        ({"upgrade_url": "//evil.example"}, "upgrade_url"),
        ({"upgrade_url": ""}, "upgrade_url"),
    ],
)
def test_mistakes(options, said, levels):
    """A value that cannot be is refused when the page is made, by its name."""
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        site(levels, **options)


def test_no_billing():
    """The first argument is a billing, and the resolver has no default: nobody mounts everybody's usage by mistake."""
    with pytest.raises(ConfigurationError, match="needs a Billing"):
        usage_page("sqlite:///credits.db", customer=who_asks)
    with pytest.raises(TypeError, match="customer"):
        usage_page(connect("memory://"))


def test_bad_checkout(levels):
    """A link that a function gives is checked as well."""
    with pytest.raises(ConfigurationError, match="upgrade_url"):
        get(site(levels, upgrade_url=lambda _, __: "javascript:alert(1)"), "/", "high")


def test_no_extra(levels, monkeypatch):
    """Without the extra's packages it says what to install."""
    import sys

    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ConfigurationError, match=re.escape("jinja2 is not installed: pip install 'metered-ai[web]'")):
        usage_page(levels, customer=who_asks)
