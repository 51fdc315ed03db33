"""Usage as bars in a terminal: credits by day and by model, each meter by itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import date, timedelta

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..records import UsageSum
from .show import count, shown, speaks_unicode

__all__ = ["usage_chart"]

_EIGHTHS = " ▏▎▍▌▋▊▉█"
DAYS = 62
"""More days than these are added up by month."""


def usage_chart(sums: Sequence[UsageSum], *, width: int, is_wide: bool = True) -> RenderableType:
    """For each meter its days, and its models where there are several; a day without use within is shown, too."""
    parts: list[RenderableType] = []
    for meter in dict.fromkeys(each.meter for each in sums):
        rows = [each for each in sums if each.meter == meter]
        total, calls = sum(each.amount for each in rows), sum(each.calls for each in rows)
        title = f"{shown(meter)}: {count(total, 'credit')} in {count(calls, 'usage event')}"
        if parts:
            parts.append(Text())
        parts.append(Text(title, style="bold"))
        parts.append(_bars(_by_time(rows), width, is_wide=is_wide))
        models = _by_model(rows)
        if len(models) > 1 or any(name for name in models):
            parts.append(Text("by model", style="bold"))
            named = {shown(name) or "(no model)": value for name, value in models.items()}
            parts.append(_bars(named, width, is_wide=is_wide))
    return Group(*parts)


def _by_time(rows: Iterable[UsageSum]) -> dict[str, tuple[int, int]]:
    days: dict[str, tuple[int, int]] = {}
    for each in rows:
        amount, calls = days.get(each.day or "", (0, 0))
        days[each.day or ""] = (amount + each.amount, calls + each.calls)
    first, last = (date.fromisoformat(day) for day in (min(days), max(days)))
    length = (last - first).days + 1
    if length <= DAYS:
        every = [(first + timedelta(days=at)).isoformat() for at in range(length)]
        return {day: days.get(day, (0, 0)) for day in every}

    months: dict[str, tuple[int, int]] = {}
    month = first
    while month <= last:
        months[month.isoformat()[:7]] = (0, 0)
        month = (month.replace(day=1) + timedelta(days=32)).replace(day=1)
    for day, (amount, calls) in days.items():
        before, already = months[day[:7]]
        months[day[:7]] = (before + amount, already + calls)
    return months


def _by_model(rows: Iterable[UsageSum]) -> dict[str, tuple[int, int]]:
    models: dict[str, tuple[int, int]] = {}
    for each in rows:
        amount, calls = models.get(each.model or "", (0, 0))
        models[each.model or ""] = (amount + each.amount, calls + each.calls)
    return dict(sorted(models.items(), key=lambda item: -item[1][0]))


def _bars(rows: dict[str, tuple[int, int]], width: int, *, is_wide: bool) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=not is_wide, overflow="fold")
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    table.add_column(no_wrap=True, justify="right", style="bright_black")
    most = max((amount for amount, _ in rows.values()), default=0)
    for name, (amount, calls) in rows.items():
        table.add_row(Text(name), Text(_bar(amount, most, width), style="cyan"), f"{amount:,}", f"{calls:,} ×")
    return table


def _bar(amount: int, most: int, width: int) -> str:
    if not most or not amount:
        return ""
    if not speaks_unicode():
        return "#" * max(1, amount * width // most)
    # Little use is not nothing.
    eighths = max(1, amount * width * 8 // most)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
