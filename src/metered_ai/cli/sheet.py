"""Lists as CSV: stable columns, a row a line, written as the rows are read."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from io import StringIO
from typing import Any

from ..records import Balance, Hold, Undelivered, Usage, UsageEvent, UsageSum
from .show import plain

__all__ = ["BALANCES", "EVENTS", "HOLDS", "OUTBOX", "SUMS", "print_csv"]


def _columns(kind: type[Any]) -> list[str]:
    return [field.name for field in fields(kind)]


BALANCES = [*_columns(Balance), "percent_used", "level", "show_upgrade", "is_exhausted", "has_account"]
EVENTS = [
    column
    for name in _columns(UsageEvent)
    for column in ([f"usage_{each}" for each in _columns(Usage)] if name == "usage" else [name])
]
"""As in JSON, but what a call used is spread over columns of its own."""
HOLDS = [*_columns(Hold), "is_in_doubt"]
OUTBOX = [
    column
    for name in _columns(Undelivered)
    for column in ([f"event_{each}" for each in EVENTS] if name == "event" else [name])
]
SUMS = _columns(UsageSum)


def print_csv(columns: list[str], rows: Iterable[object]) -> None:
    """
    A line with the columns, then a line for each row (RFC 4180, but lines end as on this system).

    What is null is empty, true and false are words, and what has parts is JSON. Texts are as they are: a spreadsheet must be told that
    they are texts.
    """
    print(_line(columns))
    for row in rows:
        cells = _spread(plain(row))
        print(_line([_cell(cells.get(column)) for column in columns]))


def _line(cells: list[str]) -> str:
    # With this end the writer puts a carriage return within a cell into quotes, which it else leaves bare.
    line = StringIO()
    csv.writer(line, lineterminator="\r\n").writerow(cells)
    return line.getvalue()[:-2]


def _spread(row: Mapping[str, Any]) -> dict[str, Any]:
    spread = dict(row)
    for part in ("usage", "event"):
        whole = row.get(part)
        if isinstance(whole, dict):
            spread |= {f"{part}_{name}": value for name, value in _spread(whole).items()}
    return spread


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)
