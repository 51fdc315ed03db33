"""Takes the pictures of the usage page and the command line in docs/screenshots: `make screenshots`. Needs Chromium."""

from __future__ import annotations

import tempfile
from pathlib import Path
from threading import Event

from starlette.applications import Starlette
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from metered_ai.billing import Billing
from metered_ai.core.steps import Place
from metered_ai.ledger.leases import new_hold_id
from metered_ai.ledger.memory import MemoryLedger
from metered_ai.web import usage_page
from metered_ai.web.operator import OperatorView
from metered_ai.web.tokens import Tokens
from tests.web.scenes import LEVELS, Past, away, chromium, fill, fill_every_level, opened, serving, write_history

APPLICATION = """<!doctype html><html lang="en"><head><title>An application</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<link rel="stylesheet" href="/app.css"><script src="/usage/usage.js" defer></script></head>
<body><h1>Write a poem</h1><p><textarea rows="3">About the sea</textarea></p><p><button>Generate</button></p>
<metered-usage></metered-usage></body></html>"""
STYLE = "body { font: 16px system-ui, sans-serif; margin: 1rem } textarea { width: 100% } h1 { font-size: 1.25rem }"

PICTURES = Path(__file__).parent / "screenshots"
PHONE, DESK = {"width": 390, "height": 700}, {"width": 820, "height": 700}


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp())
    past, who, gate = Past(), {"user": "ada"}, Event()
    gate.set()

    def who_asks(_):
        gate.wait(30)
        return who["user"]

    with (
        opened(folder / "credits.db", past, upgrade_url="https://example.com/credits") as billing,
        chromium() as browser,
    ):
        write_history(billing, past)
        fill_every_level(billing)
        application = Starlette(
            routes=[
                Route("/", lambda _: HTMLResponse(APPLICATION)),
                Route("/app.css", lambda _: Response(STYLE, media_type="text/css")),
            ]
        )
        titles = {"generations": "Answers", "images": "Pictures", "reports": "Reports"}
        application.mount("/usage", usage_page(billing, customer=who_asks, meters=titles, refresh=0))
        application.mount("/levels", usage_page(billing, customer=who_asks, refresh=0))

        def take(name, url, *, scheme="light", size=DESK, until=None):
            with browser.new_context(viewport=size, color_scheme=scheme) as context:
                page = context.new_page()
                page.goto(url)
                if until:
                    page.get_by_text(until).first.wait_for()
                page.screenshot(path=PICTURES / f"{name}.png")

        with serving(application) as url:
            take("page-light", f"{url}/usage/", size={"width": 820, "height": 760})
            take("page-dark", f"{url}/usage/", scheme="dark", size={"width": 820, "height": 760})
            take("page-phone", f"{url}/usage/", size=PHONE)
            who["user"] = "every"
            take("levels-light", f"{url}/levels/", size={"width": 820, "height": 1010})
            take("levels-dark-phone", f"{url}/levels/", scheme="dark", size={"width": 390, "height": 1330})
            who["user"] = "ada"
            take("widget", url, size={"width": 390, "height": 740}, until="Pictures")
            gate.clear()
            take("widget-loading", url, size={"width": 390, "height": 340}, until="Loading your usage…")
            gate.set()
            with away(folder / "credits.db"):
                take("away", f"{url}/usage/", size={"width": 820, "height": 180})

    # In memory, so that the picture shows nobody's folder.
    ledger = MemoryLedger(clock=Past())
    with Billing(ledger, spool=folder / "spool") as billing, chromium() as browser:
        for number, (used, held) in enumerate(LEVELS.values()):
            fill(billing, f"customer_{number + 1}", used, held)
        billing.ledger.run(
            Place(new_hold_id(), "customer_1", "generations", 3, None, max_call=1e-6, model="gpt-5-mini")
        )
        billing.recover()
        view = OperatorView(billing, Tokens(), hosts=[])
        with serving(view) as url, browser.new_context(viewport={"width": 1000, "height": 840}) as context:
            view._hosts = frozenset([url.removeprefix("http://")])
            page = context.new_page()
            page.goto(f"{url}{view.link()}")
            page.screenshot(path=PICTURES / "operator.png")
    ledger.close()


if __name__ == "__main__":
    main()
