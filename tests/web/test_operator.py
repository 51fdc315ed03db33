"""The operator's view: what it shows, and to nobody else."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from base64 import urlsafe_b64decode, urlsafe_b64encode
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

import metered_ai
from metered_ai import Billing
from metered_ai.cli import main
from metered_ai.core.steps import Place
from metered_ai.services import Delivery
from metered_ai.web.operator import OperatorView
from metered_ai.web.tokens import LONGEST, Tokens
from tests.delivery.tab import Tab
from tests.web.scenes import GEN, HOSTILE, LEVELS, away
from tests.web.test_page import text_of

HOST = "127.0.0.1:8123"


class Clock:
    def __init__(self):
        self.now = 1_000_000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def tokens(clock):
    return Tokens(clock)


@pytest.fixture
def view(levels, tokens):
    return OperatorView(levels, tokens, hosts=[HOST, "localhost:8123"])


def browser(view, host=HOST):
    """A browser that knows nothing yet."""
    return TestClient(view, base_url=f"http://{host}", follow_redirects=False)


def entered(view):
    """A browser that has opened a link."""
    client = browser(view)
    assert 303 == client.get(view.link()).status_code
    return client


def links(html):
    return re.findall(r'href="(/see/[^"]+)"', html)


def refused(answer):
    return (404, "Not found\n", False) == (answer.status_code, answer.text, "set-cookie" in answer.headers)


# ---- what is shown ----


def test_overview(levels, view):
    """Customers with what needs a look first, meters with their sums, holds in flight, calls in doubt, debt."""
    levels.ledger.run(Place("h_dead", "ok", GEN, 3, None, max_call=1e-6, model="gpt-5-mini"))
    levels.recover()
    html = entered(view).get("/").text
    said = text_of(html)

    assert "7 accounts 1 holds in flight 1 calls in doubt" in said
    assert "generations 7 600 1,733 30 12 3 1" in said
    assert ["in_debt", "exhausted", "critical"] == re.findall(r'<a href="/see/[^"]*"><bdi>(\w+)</bdi>', html)[:3]
    assert "in_debt generations 100 112 0 0 12 exhausted" in said
    assert said.index("Holds in flight") < said.index("h_open_generations") < said.index("Calls in doubt")
    assert "h_dead" in said.split("Calls in doubt")[1]
    assert "Outbox" not in said


def test_account(levels, view):
    """Behind each customer are grants, holds and the last usage."""
    client = entered(view)
    html = client.get("/").text
    link = re.search(r'href="(/see/[^"]+)"><bdi>all_held</bdi>', html)[1]
    said = text_of(client.get(link).text)

    assert "all_held on generations 100 limit 70 used 30 held 0 available" in said
    assert "order_1 100 70 0 0" in said
    assert "30 open" in said
    assert "gen_resp_all_held_1" in said


def test_verify(levels, view, file):
    """`verify` runs from the page, and says what is broken."""
    import sqlite3

    client = entered(view)
    sound = client.get(links(client.get("/").text)[0])
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE account SET used = 3, allocated = 0 WHERE customer = 'ok'")
    connection.close()
    broken = client.get(links(client.get("/").text)[0])

    assert "Sound: every sum adds up." in sound.text
    assert "Broken:" in broken.text
    assert "&#39;ok&#39;" in broken.text
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE account SET used = 40, allocated = 40 WHERE customer = 'ok'")
    connection.close()


def test_pages(billing, tokens):
    """Many customers come in pages."""
    for number in range(120):
        billing.grant(f"c{number:03}", GEN, 10, id="order_1")
    client = entered(OperatorView(billing, tokens, hosts=[HOST]))
    seen, at = [], "/"
    for _ in range(3):
        html = client.get(at).text
        seen += re.findall(r"<bdi>(c\d+)</bdi></a>", html)
        more = re.search(r'href="([^"]+)">After', html)
        at = more[1] if more else None

    assert [f"c{number:03}" for number in range(120)] == seen
    assert at is None


def test_one_customer(levels, tokens):
    """A view of one customer has nothing of another's."""
    client = entered(OperatorView(levels, tokens, hosts=[HOST], customer="high"))
    html = client.get("/").text

    assert "high" in html
    assert set() == {other for other in LEVELS if other != "high" and f"<bdi>{other}</bdi>" in html}


def test_outbox(tmp_path, tokens):
    """Where there is a service, what it has not been told stands there, with the reason; also without the service at hand."""
    tab = Tab(credits=9)
    tab.fault = lambda _: Delivery("park", "no subscription")
    url = f"sqlite:///{tmp_path}/credits.db"
    with Billing(url, service=tab) as billing:
        billing.record("ada", "generations", transaction_id="export_7", amount=2)
        billing.deliver()
    with Billing(url) as billing:
        said = text_of(entered(OperatorView(billing, tokens, hosts=[HOST])).get("/").text)

    assert "1 in the outbox" in said
    assert "ada generations 2 parked 1 no subscription export_7" in said


def test_hostile(billing, tokens):
    """Names that are markup are text."""
    billing.grant(HOSTILE, HOSTILE, 10, id=HOSTILE)
    billing.ledger.run(Place("h", HOSTILE, HOSTILE, 1, None, model=HOSTILE))
    client = entered(OperatorView(billing, tokens, hosts=[HOST]))
    html = client.get("/").text
    account = client.get(links(html)[1]).text

    assert "<script" not in html + account
    assert "{{7*7}}" in text_of(account)


def test_away(levels, view, file):
    """A ledger that is away is a 503 with the reason, which is the operator's to know."""
    client = entered(view)
    with away(file):
        answer = client.get("/")

    assert 503 == answer.status_code
    assert "vanished" in answer.text
    assert 200 == client.get("/").status_code


# ---- who may see it ----


def test_without(view):
    """Without a token there is nothing: not for a path, a guess, or a cookie that somebody made up."""
    client = browser(view)
    for path in ("/", "/see/", "/see/x.y", "/enter/", "/enter/x", "/enter/x.y", "/verify", "/nowhere", "/usage.js"):
        assert refused(client.get(path)), path
    client.cookies.set(view._cookie, "x.y")
    assert refused(client.get("/"))


def test_replayed(view):
    """A link is good once: whoever finds it in a history or a log gets the 404 of everybody else."""
    link = view.link()
    first, second = browser(view), browser(view)

    assert 303 == first.get(link).status_code
    assert refused(second.get(link))
    assert refused(first.get(link))
    assert 200 == first.get("/").status_code


def test_expired(view, clock):
    """A link is over after minutes, and so is the session that it opened, however busy it was."""
    link = view.link()
    client = entered(view)
    see = links(client.get("/").text)[0]
    clock.now += LONGEST - 1
    assert [200, 200] == [client.get("/").status_code, client.get(see).status_code]
    clock.now += 1

    assert refused(client.get("/"))
    assert refused(client.get(see))
    assert refused(browser(view).get(link))


def test_longest(tokens, clock):
    """No token is good for longer than 15 minutes, whatever was asked for."""
    token = tokens.sign("see", 10**9)
    clock.now += 15 * 60

    assert tokens.read(token, "see") is None


def test_swapped(levels, view, tokens):
    """A token serves what it was made for and nothing else: no other purpose, no other session, no other server."""
    ours, theirs = entered(view), entered(view)
    see = links(ours.get("/").text)[1].removeprefix("/see/")
    session = ours.cookies[view._cookie]

    assert 200 == ours.get(f"/see/{see}").status_code
    assert refused(theirs.get(f"/see/{see}"))
    assert refused(ours.get(f"/see/{session}"))
    assert refused(browser(view).get(f"/enter/{see}"))
    assert refused(browser(view).get(f"/enter/{session}"))
    for wrong in (see, view.link().removeprefix("/enter/")):
        client = browser(view)
        client.cookies.set(view._cookie, wrong)
        assert refused(client.get("/"))
    other = OperatorView(levels, Tokens(), hosts=[HOST])
    assert refused(browser(other).get(view.link()))


def test_forged(view):
    """A token that was changed in one place, or that lacks its signature, is none."""
    client = entered(view)
    see = links(client.get("/").text)[1].removeprefix("/see/")
    body, signature = see.split(".")
    content = json.loads(urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    assert "in_debt" == content["content"]["customer"]
    content["content"]["customer"] = "ok"
    other = urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip("=")
    flipped = [see[:at] + ("A" if see[at] != "A" else "B") + see[at + 1 :] for at in range(0, len(see) - 1, 17)]

    for forged in (
        f"{other}.{signature}",
        body,
        f"{body}.",
        f".{signature}",
        f"{see}A",
        f"{see}.{signature}",
        *flipped,
    ):
        assert refused(client.get(f"/see/{forged}")), forged


@given(token=st.text(max_size=200))
def test_fuzz(token):
    """Whatever is given as a token is no token, and no error."""
    tokens = Tokens()

    assert tokens.read(token, "see") is None
    assert tokens.spend(token, "see") is None
    assert tokens.read(f"{tokens.sign('see', 60)}{token}", "see") in (None, {})


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8123", "127.0.0.1", "127.0.0.1:80", "localhost:8124", "[::1]:8123", ""]
)
def test_rebound(view, host):
    """Under a host name that is not this machine's there is nothing, token or not: a web page elsewhere cannot reach it."""
    link = view.link()
    client = entered(view)

    assert refused(client.get("/", headers={"host": host}))
    assert refused(browser(view).get(link, headers={"host": host}))
    assert 303 == browser(view).get(link, headers={"host": "localhost:8123"}).status_code


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "HEAD"])
def test_read_only(view, method):
    """Anything but GET is refused, and takes no link away."""
    link = view.link()
    assert 404 == entered(view).request(method, "/").status_code
    assert 404 == browser(view).request(method, link).status_code
    assert 303 == browser(view).get(link).status_code


def test_headers(view):
    """Nothing is stored, framed, sent on or run; the cookie is for this server's pages alone."""
    client = browser(view)
    entering = client.get(view.link())
    for answer in (entering, client.get("/"), client.get("/nowhere")):
        policy = answer.headers["content-security-policy"]

        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert ("no-store", "no-referrer") == (answer.headers["cache-control"], answer.headers["referrer-policy"])
    cookie = entering.headers["set-cookie"].lower()
    assert [] == [word for word in ("httponly", "samesite=strict", "max-age=900", "path=/") if word not in cookie]
    assert "<script" not in client.get("/").text


# ---- the command ----


@pytest.fixture
def served(levels, file):
    """`metered-ai serve` as a person starts it, and the link that it prints."""
    environment = {
        **os.environ,
        "METERED_AI_BILLING": f"sqlite:///{file}",
        "PYTHONPATH": str(Path(metered_ai.__file__).parents[1]),
    }
    ours, its = pty.openpty()
    command = [sys.executable, "-m", "metered_ai.cli", "serve"]
    with subprocess.Popen(
        command, stdin=its, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    ) as process:
        os.close(its)
        process.press_enter = lambda: os.write(ours, b"\n")
        yield process
        process.kill()
        os.close(ours)


def test_serve(served):
    """It prints a link that is good once, Enter prints another, Ctrl-C ends it with 0; its log shows no token."""
    import httpx

    link = served.stdout.readline().strip()
    origin = re.match(r"(http://127\.0\.0\.1:\d+)/enter/", link)[1]
    with httpx.Client(follow_redirects=True) as first, httpx.Client(follow_redirects=True) as second:
        shown, again = first.get(link), second.get(link)
        served.press_enter()
        fresh = second.get(served.stdout.readline().strip())
        bare = httpx.get(origin)
        rebound = first.get(origin, headers={"host": "evil.example"})
    served.send_signal(signal.SIGINT)
    _, complaint = served.communicate(timeout=30)

    assert (200, 404, 200, 404, 404) == (
        shown.status_code,
        again.status_code,
        fresh.status_code,
        bare.status_code,
        rebound.status_code,
    )
    assert "7 accounts" in text_of(shown.text)
    assert "server" not in shown.headers
    assert 0 == served.returncode
    assert "enter/" not in complaint
    assert 1 == complaint.count("\n")


def test_serve_mistakes(tmp_path, monkeypatch, capsys, levels, file):
    """No ledger, a port that is taken, a package that is not there: one line, exit 2, and nothing listens."""
    import socket

    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, said in (
            (["--ledger", f"sqlite:///{file.with_name('none.db')}"], "there is no ledger"),
            (["--ledger", f"sqlite:///{file}", "--port", port], f"port {port} cannot be had"),
            (["--ledger", f"sqlite:///{file}", "--minutes", "16"], "--minutes"),
            (["--ledger", f"sqlite:///{file}", "--customer", ""], "--customer"),
        ):
            code = main(["serve", *arguments])
            printed = capsys.readouterr()

            assert (2, "", 1) == (code, printed.out, printed.err.count("\n"))
            assert said in printed.err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert 2 == main(["serve", "--ledger", f"sqlite:///{file}"])
    assert "pip install 'metered-ai[web]'" in capsys.readouterr().err
