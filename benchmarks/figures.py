"""A figure: what must be reached, and what was measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Figure(NamedTuple):
    """One line of the table. `is_ok` is None where nothing could be measured."""

    name: str
    must: str
    measured: str
    is_ok: bool | None


def at_most(name: str, limit: float, value: float, unit: str = "×", note: str = "") -> Figure:
    return Figure(name, f"≤ {limit:g}{_spaced(unit)}", _measured(value, unit, note), value <= limit)


def at_least(name: str, limit: float, value: float, unit: str = "", note: str = "") -> Figure:
    return Figure(name, f"≥ {limit:,g}{_spaced(unit)}", _measured(value, unit, note), value >= limit)


def _measured(value: float, unit: str, note: str) -> str:
    shown = f"{value:.3f}" if unit == "×" else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
    return f"{shown}{_spaced(unit)}" + (f"  ({note})" if note else "")


def _spaced(unit: str) -> str:
    return f" {unit}" if unit else ""


def table(figures: Iterable[Figure]) -> str:
    rows = [("figure", "must", "measured", "ok")]
    rows += [(f.name, f.must, f.measured, "–" if f.is_ok is None else "yes" if f.is_ok else "NO") for f in figures]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    rows.insert(1, tuple("─" * width for width in widths))
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
