"""What a customer is shown, and in which words. Decides; reads nothing and renders nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from ..records import Balance, UsageEvent, UsageSum

__all__ = ["UNAVAILABLE", "Bar", "MeterView", "Plot", "UsageView", "as_json", "meter_view", "plots", "view"]

UNAVAILABLE = "Your usage cannot be shown right now. Nothing is lost, and it will be back by itself."

_BADGES = {"high": "High", "critical": "Nearly used up", "exhausted": "Out of credits", "unlimited": "Unlimited"}


@dataclass(frozen=True, slots=True)
class MeterView:
    """One meter as a person reads it."""

    balance: Balance
    title: str
    numbers: str
    badge: str | None
    notice: str | None
    upgrade_url: str | None
    upgrade_text: str

    @property
    def filled(self) -> int:
        """Per cent of the bar that is used; a little use shows, and so does what little is left."""
        return self._share(self.balance.used)

    @property
    def taken(self) -> int:
        """Per cent of the bar that is used or held."""
        return self._share(self.balance.used + self.balance.held)

    def _share(self, part: int) -> int:
        limit = self.balance.limit
        if not limit or limit <= 0:
            return 100
        return min(99 if self.balance.available else 100, -(-part * 100 // limit))


@dataclass(frozen=True, slots=True)
class Bar:
    """One day's bar, in a drawing 100 high; and the day itself, for who reads the table."""

    x: int
    y: float
    height: float
    day: str
    amount: int
    calls: int


@dataclass(frozen=True, slots=True)
class Plot:
    """Credits of one meter by day."""

    title: str
    bars: Sequence[Bar]
    total: int
    most: int

    @property
    def summary(self) -> str:
        """What the drawing shows, for who does not see it."""
        busiest = max(self.bars, key=lambda bar: bar.amount)
        return (
            f"{self.title}: {_credits(self.total)} from {self.bars[0].day} to {self.bars[-1].day}, "
            f"at most {self.most:,} a day, on {busiest.day}."
        )


@dataclass(frozen=True, slots=True)
class UsageView:
    """All of the page."""

    customer: str
    as_of: datetime
    meters: Sequence[MeterView]
    plots: Sequence[Plot]
    events: Sequence[UsageEvent]
    titles: Mapping[str, str]

    @property
    def summary(self) -> str:
        """What is left, in one breath: what a screen reader is told when it has changed."""
        return " ".join(f"{meter.title}: {_left(meter.balance)}." for meter in self.meters)

    def title(self, meter: str) -> str:
        return self.titles.get(meter, meter)


def meter_view(balance: Balance, title: str, upgrade_url: str | None) -> MeterView:
    """
    A balance in words: over 90 % it approaches its limit, from 80 % more is offered, from 100 % it is needed.

    An account that can do nothing now because calls in flight hold the rest is not told that it is out of credits.
    """
    percent = balance.percent_used
    badge, notice, text = _BADGES.get(balance.level), None, "Get more credits"
    if percent is None:
        pass
    elif not balance.limit and not balance.used:
        badge, notice = "No credits", "You have no credits yet. Requests are refused until you have some."
    elif percent >= 100:
        over = f" {_credits(balance.debt)} over your limit are taken from what you add next." if balance.debt else ""
        notice = f"You are out of credits. Requests are refused until you add some.{over}"
        text = "Get more credits to go on"
    elif balance.is_exhausted:
        badge = "All in use"
        notice = "The rest of your credits is set aside for requests that are running."
    elif percent > 90:
        notice = f"You are approaching your limit: {_credits(balance.available or 0)} left."
    elif balance.show_upgrade:
        notice = f"You have used {percent} % of your credits."
    offers = balance.show_upgrade or balance.is_exhausted
    return MeterView(balance, title, _numbers(balance), badge, notice, upgrade_url if offers else None, text)


def _numbers(balance: Balance) -> str:
    if balance.limit is None:
        return f"{balance.unlimited_used + balance.used:,} used"
    held = f", {balance.held:,} set aside for running requests" if balance.held else ""
    return f"{balance.used:,} / {balance.limit:,} used, {balance.available:,} left{held}"


def _left(balance: Balance) -> str:
    return "unlimited" if balance.available is None else f"{_credits(balance.available)} left"


def _credits(number: int) -> str:
    return f"{number:,} {'credit' if number == 1 else 'credits'}"


def plots(sums: Iterable[UsageSum], titles: Mapping[str, str], today: date, days: int) -> list[Plot]:
    """A plot for each meter with use in the last `days` days (UTC), days without use included."""
    by_meter: dict[str, dict[str, UsageSum]] = {}
    for each in sums:
        by_meter.setdefault(each.meter, {})[each.day or ""] = each
    span = [(today - timedelta(days=back)).isoformat() for back in range(days - 1, -1, -1)]
    drawn: list[Plot] = []
    for meter, used in by_meter.items():
        found = [used.get(day) for day in span]
        most = max((each.amount for each in found if each is not None), default=0)
        if not most:
            continue
        bars: list[Bar] = []
        for at, (day, here) in enumerate(zip(span, found, strict=True)):
            amount = 0 if here is None else here.amount
            # Little use is not nothing.
            height = 0.0 if not amount else max(2.0, round(amount * 100 / most, 1))
            bars.append(
                Bar(at * 10 + 1, round(100 - height, 1), height, day, amount, 0 if here is None else here.calls)
            )
        drawn.append(Plot(titles.get(meter, meter), bars, sum(bar.amount for bar in bars), most))
    return drawn


def view(
    customer: str,
    meters: Sequence[MeterView],
    sums: Iterable[UsageSum],
    events: Sequence[UsageEvent],
    *,
    now: datetime,
    days: int,
) -> UsageView:
    """Everything on the page, as of `now`."""
    titles = {meter.balance.meter: meter.title for meter in meters}
    shown = [each for each in sums if each.meter in titles]
    return UsageView(customer, now, meters, plots(shown, titles, now.astimezone(UTC).date(), days), events, titles)


def as_json(shown: UsageView) -> dict[str, Any]:
    """The page for programs. Properties of events stay inside: they are the application's own."""
    return {
        "customer": shown.customer,
        "as_of": shown.as_of.astimezone(UTC).isoformat(),
        "meters": [_meter_json(meter) for meter in shown.meters],
        "usage": [
            {
                "title": plot.title,
                "days": [{"day": bar.day, "amount": bar.amount, "calls": bar.calls} for bar in plot.bars],
            }
            for plot in shown.plots
        ],
        "events": [
            {
                "meter": event.meter,
                "transaction_id": event.transaction_id,
                "amount": event.amount,
                "created_at": event.created_at.astimezone(UTC).isoformat(),
                "model": None if event.usage is None else event.usage.model,
            }
            for event in shown.events
        ],
    }


def _meter_json(meter: MeterView) -> dict[str, Any]:
    balance = meter.balance
    return {
        "meter": balance.meter,
        "title": meter.title,
        "limit": balance.limit,
        "used": balance.used,
        "held": balance.held,
        "available": balance.available,
        "debt": balance.debt,
        "unlimited_used": balance.unlimited_used,
        "percent_used": balance.percent_used,
        "level": balance.level,
        "show_upgrade": balance.show_upgrade,
        "is_exhausted": balance.is_exhausted,
        "notice": meter.notice,
        "upgrade_url": meter.upgrade_url,
    }
