"""Reads SQL files: statements by name, and migrations by number."""

from __future__ import annotations

import pkgutil
import re
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, Self

__all__ = [
    "Statement",
    "named_parts",
    "narrowed",
    "read_migration",
    "read_script",
    "read_statements",
    "read_text",
    "split",
]


class Statement(str):
    """
    A statement whose parameters are numbered (?1, ?2 …) in its file, for the reader, and plain where it is executed.

    `spread` puts parameters in the order of their use; None where that is the order they come in. From Python 3.14 on sqlite3 takes
    no sequence for numbered ones. `key` is what the same statement is found by in another dialect: its file and name.
    """

    __slots__ = ("key", "spread")

    key: str
    spread: Callable[[Sequence[Any]], tuple[Any, ...]] | None

    def __new__(cls, text: str, key: str = "") -> Self:
        order = [int(number) - 1 for number in re.findall(r"\?(\d+)", text)]
        self = super().__new__(cls, re.sub(r"\?\d+", "?", text))
        # itemgetter gives a bare value for a single index; a single use is always in order.
        self.spread = itemgetter(*order) if order != list(range(len(order))) else None
        self.key = key
        return self


def read_statements(file: str) -> Mapping[str, Statement]:
    """The statements of a .sql file beside this module, by the name that a `-- name:` line gives each."""
    stem = file.removesuffix(".sql")
    return {name: Statement(body, f"{stem}.{name}") for name, body in named_parts(file).items()}


def named_parts(file: str) -> dict[str, str]:
    """What stands under each `-- name:` line of a .sql file beside this module."""
    parts = re.split(r"^-- name: (\w+)$", read_text(file), flags=re.MULTILINE)
    return {name: body.strip() for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def read_migration(file: str) -> list[str]:
    """The statements of a migration, one by one, so that they run inside one transaction."""
    return split(read_text(f"migrations/{file}"))


def read_script(file: str) -> list[str]:
    """The statements of a .sql file beside this module, one by one."""
    return split(read_text(file))


def narrowed(insert: str, absent: Sequence[int]) -> str:
    """An `INSERT … (columns) VALUES (?, …)` without the columns of these positions."""
    match = re.fullmatch(r"(INSERT INTO \w+) \(([^)]+)\) VALUES \([?, ]+\)", insert)
    if match is None:
        raise ValueError(f"not an INSERT of plain values: {insert!r}")
    columns = [column.strip() for position, column in enumerate(match[2].split(",")) if position not in absent]
    return f"{match[1]} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"


def split(script: str) -> list[str]:
    """Cut a script at the ends of its statements; a trigger's body is part of its statement."""
    statements: list[str] = []
    pending = ""
    for line in script.splitlines(keepends=True):
        pending += line
        if line.rstrip().endswith(";") and sqlite3.complete_statement(pending):
            statements.append(pending.strip())
            pending = ""
    if re.sub(r"--.*", "", pending).strip():
        raise ValueError(f"a statement without an end: {pending.strip()!r}")
    return statements


def read_text(file: str) -> str:
    """A file beside this module, wherever the package is kept."""
    data = pkgutil.get_data("metered_ai.ledger", file)
    if data is None:
        raise FileNotFoundError(f"{file} is missing from the package metered_ai.ledger")
    return data.decode()
