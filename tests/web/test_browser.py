"""The usage page and its widget in a real browser: every state, light and dark, on a phone, by keyboard, and to a screen reader."""

from __future__ import annotations

import re
from pathlib import Path
from threading import Event

import pytest
from starlette.applications import Starlette
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from metered_ai.core.steps import Place
from metered_ai.web import usage_page
from metered_ai.web.operator import OperatorView
from metered_ai.web.tokens import Tokens
from tests.web.scenes import GEN, HOSTILE, away, chromium, fill_every_level, find_chromium, serving, use, write_history

# What a page looks like only a browser can tell. No Python package brings one whole, so it is a package of the system's; CI installs it.
pytestmark = pytest.mark.skipif(
    find_chromium() is None,
    reason="needs Chromium, such as Debian's package: apt-get install chromium fonts-dejavu-core",
)

PHONE, DESK = {"width": 360, "height": 740}, {"width": 1000, "height": 800}
LOOKS = [(scheme, size) for scheme in ("light", "dark") for size in (DESK, PHONE)]

HOST = """<!doctype html><html lang="en"><head><title>An application</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="{style}">
<link rel="stylesheet" href="/app.css"><script src="/usage/usage.js" defer></script></head>
<body><main><h1>Write a poem</h1><button id="go">Generate</button>{widget}</main></body></html>"""
STRICT = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'"


class Site:
    """An application with the usage page and one of its own, in which the widget stands."""

    def __init__(self, billing):
        self.user = "ok"
        self.billing = billing
        self.gate = Event()
        self.gate.set()
        self.asked = []
        page = usage_page(
            billing, customer=self.who_asks, upgrade_url="https://example.com/credits", refresh=0, days=30
        )
        self.app = Starlette(routes=[Route("/", self.home), Route("/app.css", self.look)])
        self.app.mount("/usage", page)
        self.widget = '<metered-usage refresh="0"></metered-usage>'
        self.style = "light dark"
        self.page = None

    def who_asks(self, request):
        self.asked.append(request.url.path)
        # What is slow in a test is slow only for as long as the test says.
        assert self.gate.wait(30)
        return self.user

    async def look(self, request):
        return Response("body { color: CanvasText; background: Canvas }", media_type="text/css")

    async def home(self, request):
        return HTMLResponse(
            HOST.format(widget=self.widget, style=self.style), headers={"content-security-policy": STRICT}
        )


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def site(levels):
    site = Site(levels)
    with serving(site.app) as site.url:
        yield site
        site.gate.set()


@pytest.fixture
def tab(browser, site):
    """Opens a page as somebody sees it; whatever the browser complains of fails the test."""
    complaints, contexts = [], []

    def open_tab(path="/usage/", *, scheme="light", size=DESK, wait="load"):
        context = browser.new_context(viewport=size, color_scheme=scheme, base_url=site.url)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.complaints = complaints
        page.goto(path, wait_until=wait)
        return page

    yield open_tab
    for context in contexts:
        context.close()
    # A page or a part of it that is not there just now is told by the browser, too.
    assert [] == [text for text in complaints if "status of 503" not in text and "status of 404" not in text]


def axe():
    import axe_playwright_python

    return (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text("utf-8")


def faults(page):
    """What axe-core finds: rule, impact and where."""
    before = len(page.complaints)
    page.evaluate(axe())
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    # Its own tricks with styles are against a strict policy.
    del page.complaints[before:]
    assert len(found["passes"]) > 5
    return [(rule["id"], rule["impact"], [node["target"] for node in rule["nodes"]]) for rule in found["violations"]]


def widget_text(page):
    return page.evaluate("document.querySelector('metered-usage').shadowRoot.textContent.replace(/\\s+/g, ' ').trim()")


def is_wide(page):
    """Whether the page must be scrolled sideways."""
    return page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")


# ---- every state ----


@pytest.mark.parametrize("path", ["/usage/", "/"])
def test_states(path, site, tab, billing):
    """
    In every state, light and dark, on a desk and on a phone, on the page and in the widget under an application's strict policy:
    nothing that axe-core objects to, nothing cut off, no complaint of the browser.
    """
    fill_every_level(billing)
    site.user = "every"
    for scheme, size in LOOKS:
        page = tab(path, scheme=scheme, size=size)
        page.get_by_text("1,234 used").wait_for()

        assert [] == faults(page)
        assert not is_wide(page)
    links = page.get_by_role("link", name=re.compile("Get more credits"))
    assert [6, 5, 7] == [page.get_by_role("meter").count(), links.count(), page.get_by_role("article").count()]
    assert ["all_held", "critical", "exhausted", "high", "in_debt", "ok", "unlimited"] == [
        article.get_attribute("aria-labelledby") and article.locator("bdi").first.inner_text()
        for article in page.get_by_role("article").all()
    ]


def test_nothing_yet(site, tab):
    """Who has no account is told so, on the page and in the widget."""
    site.user = "stranger"
    for path, scheme in (("/usage/", "light"), ("/", "dark")):
        page = tab(path, scheme=scheme)
        page.get_by_text("You have no credits and no usage yet.").wait_for()

        assert [] == faults(page)


def test_history(site, tab, billing, past):
    """A page full of history has no fault either, and its bars are as long as the numbers say."""
    write_history(billing, past)
    site.user = "ada"
    for scheme, size in (("light", PHONE), ("dark", DESK)):
        page = tab(scheme=scheme, size=size)

        assert [] == faults(page)
        assert not is_wide(page)
    meter = page.get_by_role("meter", name="generations")
    bar, used = meter.bounding_box(), meter.locator(".used").bounding_box()

    assert ("86", "1,035 / 1,200 used, 165 left") == (
        meter.get_attribute("aria-valuenow"),
        meter.get_attribute("aria-valuetext"),
    )
    assert 0.85 < used["width"] / bar["width"] < 0.89
    assert 30 == page.locator("figure").first.locator("rect").count()
    assert page.get_by_role("img", name=re.compile("generations: 1,035 credits from .* at most 48 a day")).is_visible()


def test_colours(site, tab, billing):
    """The bar is yellow over 75 % and red over 90 %, in both schemes, and other words stand beside it."""
    fill_every_level(billing)
    site.user = "every"
    looks = {}
    for scheme in ("light", "dark"):
        page = tab(scheme=scheme)
        for level in ("ok", "high", "critical", "exhausted"):
            meter = page.locator(f"article:has(bdi:text-is('{level}'))")
            colour = meter.locator(".used").evaluate("bar => getComputedStyle(bar).fill")
            looks[scheme, level] = (colour, meter.locator(".badge").all_inner_texts())

    for scheme in ("light", "dark"):
        colours = [looks[scheme, user][0] for user in ("ok", "high", "critical", "exhausted")]

        assert 3 == len(set(colours))
        assert colours[2] == colours[3]
    assert [[], ["High"], ["Nearly used up"], ["Out of credits"]] == [
        looks["light", user][1] for user in ("ok", "high", "critical", "exhausted")
    ]


def test_hostile(site, tab, billing):
    """Names that are markup are text."""
    billing.grant(HOSTILE, HOSTILE, 10, id="order_1")
    billing.record(HOSTILE, HOSTILE, transaction_id=HOSTILE, amount=9)
    site.user = HOSTILE
    page = tab()

    assert page.locator("script").count() == 1
    assert HOSTILE == page.get_by_role("heading", level=2).first.text_content()
    assert [] == faults(page)


def test_operator(browser, billing, levels):
    """The operator's pages have no fault either, light and dark, on a desk and on a phone, and need no script."""
    levels.ledger.run(Place("h_dead", "ok", GEN, 3, None, max_call=1e-6))
    levels.recover()
    view = OperatorView(levels, Tokens(), hosts=[])
    with serving(view) as url:
        view._hosts = frozenset([url.removeprefix("http://")])
        for scheme, size in (("light", DESK), ("dark", PHONE)):
            with browser.new_context(viewport=size, color_scheme=scheme) as context:
                page = context.new_page()
                page.complaints = []
                page.goto(f"{url}{view.link()}")
                found = [faults(page), is_wide(page)]
                page.get_by_role("link", name="in_debt").click()
                page.get_by_text("used without a limit").wait_for()
                found += [faults(page), is_wide(page)]
                page.get_by_role("link", name="Ledger").click()
                page.get_by_role("link", name="Verify").click()
                page.get_by_text("Sound: every sum adds up.").wait_for()

                assert [[], False, [], False, []] == [*found, faults(page)]


# ---- kept up to date ----


def test_refresh(site, tab, billing):
    """After a generation the page shows it without a reload; open tables and the keyboard's place stay, and it is said aloud once."""
    page = tab()
    page.evaluate("window.stays = true")
    page.get_by_text("As a table").click()
    page.locator("#days-summary-1").focus()
    use(billing, "ok", 45, 2)
    page.evaluate("window.dispatchEvent(new Event('metered:changed'))")
    page.get_by_text("85 / 100 used, 15 left").wait_for()

    assert page.evaluate("window.stays")
    assert page.get_by_text("You have used 85 % of your credits.").is_visible()
    assert page.get_by_text("gen_resp_ok_2").is_visible()
    assert page.locator("details[open]").count() == 1
    assert "days-summary-1" == page.evaluate("document.activeElement.id")
    assert "generations: 15 credits left." == page.get_by_role("status").text_content()
    assert [] == faults(page)


def test_other_tab(site, tab, billing):
    """What one tab of the application has used shows in the others."""
    page = tab()
    other = page.context.new_page()
    other.goto("/")
    other.get_by_text("40 / 100 used").wait_for()
    use(billing, "ok", 1, 2)
    other.evaluate("window.dispatchEvent(new Event('metered:changed'))")
    page.get_by_text("41 / 100 used, 59 left").wait_for()

    assert "41 / 100 used, 59 left" in widget_text(other)


def test_by_itself(site, tab, billing):
    """A page that is looked at asks again by itself."""
    site.widget = '<metered-usage refresh="0.2"></metered-usage>'
    page = tab("/")
    page.get_by_text("40 / 100 used").wait_for()
    use(billing, "ok", 2, 2)
    page.get_by_text("42 / 100 used").wait_for()


def test_button(site, tab, billing):
    """By keyboard: the first stop is the button that refreshes, and Enter does."""
    site.user = "high"
    page = tab()
    use(billing, "high", 1, 2)
    page.keyboard.press("Tab")

    assert "Refresh" == page.evaluate("document.activeElement.textContent")
    page.keyboard.press("Enter")
    page.get_by_text("83 / 100 used").wait_for()
    stops = []
    for _ in range(4):
        page.keyboard.press("Tab")
        stops.append(page.evaluate("document.activeElement.textContent.replace(/\\s+/g, ' ').trim().slice(0, 30)"))
    assert ["Get more credits on generation", "As a table: generations by day"] == stops[:2]
    assert stops[2].startswith("Time (UTC)")


def test_busy(site, tab, billing):
    """While it asks, the page says so and keeps what it shows; what is used meanwhile is asked for once more."""
    page = tab()
    site.gate.clear()
    page.evaluate("window.dispatchEvent(new Event('metered:changed'))")
    page.locator("main[aria-busy=true]").wait_for()
    before = page.get_by_text("40 / 100 used").is_visible()
    for _ in range(3):
        page.evaluate("window.dispatchEvent(new Event('metered:changed'))")
    use(billing, "ok", 1, 2)
    site.gate.set()
    page.get_by_text("41 / 100 used").wait_for()
    page.locator("main[aria-busy=false]").wait_for()

    assert before
    assert 1 + 2 == len(site.asked)


# ---- the widget in an application's own page ----


def test_widget(site, tab):
    """In an application's own page the widget is as light or dark as that page, whatever its reader prefers."""
    looks = {}
    for scheme in ("light", "dark"):
        for own in ("light", "light dark"):
            site.style = own
            page = tab("/", scheme=scheme)
            page.get_by_text("40 / 100 used, 60 left").wait_for()
            looks[scheme, own] = page.locator(".meter").evaluate("card => getComputedStyle(card).backgroundColor")

    assert looks["light", "light"] == looks["dark", "light"] == looks["light", "light dark"]
    assert looks["dark", "light dark"] != looks["light", "light dark"]


def test_loading(site, tab):
    """Until the numbers are there the widget says that they are on the way."""
    site.gate.clear()
    page = tab("/")
    page.get_by_text("Loading your usage…").wait_for()

    assert [] == faults(page)
    assert "true" == page.locator("metered-usage").get_attribute("aria-busy")
    site.gate.set()
    page.get_by_text("40 / 100 used").wait_for()
    assert page.get_by_text("Loading").count() == 0


def test_widget_meter(site, tab, billing):
    """A widget may show one meter; it can be asked for directly, moved, and taken away."""
    billing.record("ok", "images", transaction_id="t", amount=1)
    site.widget = f'<metered-usage meter="{GEN}" refresh="0"></metered-usage>'
    page = tab("/")
    page.get_by_text("40 / 100 used").wait_for()
    use(billing, "ok", 3, 2)
    page.evaluate("document.querySelector('metered-usage').refresh()")
    page.get_by_text("43 / 100 used").wait_for()

    assert "images" not in widget_text(page)
    page.evaluate("document.body.append(document.querySelector('metered-usage'))")
    page.get_by_text("43 / 100 used").wait_for()
    asked = len(site.asked)
    page.evaluate("document.querySelector('metered-usage').remove()")
    page.evaluate("window.dispatchEvent(new Event('metered:changed'))")
    page.wait_for_load_state("networkidle")
    assert asked == len(site.asked)


def test_documented(site, tab, billing):
    """What docs/usage-page.md says to put into a page works as it stands there."""
    page_of_docs = Path(__file__).parents[2].joinpath("docs", "usage-page.md").read_text("utf-8")
    (html,), (script,) = (
        re.findall(rf"```{language}\n(.*?)```", page_of_docs, re.DOTALL) for language in ("html", "js")
    )
    site.page = f"<!doctype html><html lang=en><title>An application</title><main>{html}</main>"
    page = tab("/")
    page.get_by_text("40 / 100 used").wait_for()
    use(billing, "ok", 2, 2)
    page.evaluate(script)
    page.get_by_text("42 / 100 used").wait_for()


# ---- when it cannot be shown ----


def test_away(site, tab, file):
    """Without its ledger the page says so politely, alone or beside what it showed, and goes on when the ledger is back."""
    page, host = tab(), tab("/")
    host.get_by_text("40 / 100 used").wait_for()
    with away(file):
        fresh, fresh_host = tab(scheme="dark", size=PHONE), tab("/")
        fresh_host.get_by_role("alert").wait_for()
        for each in (page, host):
            each.evaluate("window.dispatchEvent(new Event('metered:changed'))")
            each.get_by_role("alert").wait_for()

        assert ["Your usage cannot be shown right now. Nothing is lost, and it will be back by itself."] * 2 == [
            each.get_by_role("alert").inner_text() for each in (fresh, fresh_host)
        ]
        assert page.get_by_role("alert").inner_text().startswith("Your usage cannot be refreshed right now.")
        assert page.get_by_text("40 / 100 used").is_visible()
        assert fresh_host.get_by_text("Loading").count() == 0
        assert [[]] * 4 == [faults(each) for each in (page, host, fresh, fresh_host)]
    for each in (page, host, fresh, fresh_host):
        each.evaluate("window.dispatchEvent(new Event('metered:changed'))")
        each.get_by_text("40 / 100 used").wait_for()
        each.get_by_role("alert").wait_for(state="hidden")


def test_signed_out(site, tab):
    """Who is signed out meanwhile is told, and asked about no more."""
    page = tab()
    site.user = None
    page.evaluate("window.dispatchEvent(new Event('metered:changed'))")
    page.get_by_text("You are not signed in any more.").wait_for()
    asked = len(site.asked)
    page.evaluate("window.dispatchEvent(new Event('metered:changed'))")
    page.wait_for_load_state("networkidle")

    assert asked == len(site.asked)


def test_without_script(browser, site):
    """Without JavaScript the page shows everything all the same."""
    site.user = "high"
    with browser.new_context(java_script_enabled=False, base_url=site.url) as context:
        page = context.new_page()
        page.goto("/usage/")

        assert page.get_by_text("You have used 82 % of your credits.").is_visible()
        assert not page.get_by_role("button", name="Refresh").is_visible()
