"""
Shows people their usage in a browser: the usage page with its JSON and its widget, and the header `X-Credits-Remaining`.

The pages need the extra `web`; the header does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ..errors import ConfigurationError
from .headers import CREDITS_REMAINING, credits_headers

if TYPE_CHECKING:
    from ..billing import Billing
    from .page import CustomerResolver, UpgradeUrl, UsagePage

__all__ = ["CREDITS_REMAINING", "credits_headers", "usage_page"]


def usage_page(
    billing: Billing,
    *,
    customer: CustomerResolver,
    meters: Mapping[str, str] | Sequence[str] | None = None,
    upgrade_url: UpgradeUrl | None = None,
    title: str = "Usage",
    days: int = 30,
    events: int = 20,
    refresh: float = 15.0,
) -> UsagePage:
    """
    An ASGI application that shows customers their own usage: `app.mount("/usage", …)` puts it under an address of yours.

    `customer` is asked at every request who is looking, and gives the customer or None; plain or async. It decides alone: nothing in the
    address chooses a customer. `meters` names what is shown, with a title for each if it is a mapping; else every meter on which the
    customer has an account. `upgrade_url` is where credits are sold: a URL, or a function (plain or async) of customer and meter that
    gives one; default the `upgrade_url` of the billing. `days` of usage are drawn, the last `events` are listed, and a page that is being
    looked at asks again each `refresh` seconds (0: only when told to).

    Raises ConfigurationError when the extra `web` is not installed, or naming a value that cannot be.
    """
    missing = [name for name in ("starlette", "jinja2") if find_spec(name) is None]
    if missing:
        raise ConfigurationError(f"{', '.join(missing)} is not installed: pip install 'metered-ai[web]'")

    from .page import UsagePage

    return UsagePage(
        billing,
        customer=customer,
        meters=meters,
        upgrade_url=upgrade_url,
        title=title,
        days=days,
        events=events,
        refresh=refresh,
    )
