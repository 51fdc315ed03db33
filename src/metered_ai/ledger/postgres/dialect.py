"""The statements of the ledger as PostgreSQL says them, found by the names that they have for SQLite."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

from ...errors import ConfigurationError
from ..statements import named_parts, read_text

__all__ = ["check_schema", "in_schema", "statements"]

_SCHEMA = re.compile(r"[a-z_][a-z0-9_]{0,62}")
_FILES = ("steps", "reads", "verify", "outbox", "batches")


def check_schema(name: object) -> str:
    """The name of a PostgreSQL schema as we take it: small letters, digits and underscores, so that it reads the same everywhere."""
    if not isinstance(name, str) or not _SCHEMA.fullmatch(name) or name.startswith("pg_"):
        raise ConfigurationError(
            f"schema must be 1 to 63 small letters, digits and underscores, and not begin with a digit or pg_; not {name!r}"
        )
    return name


def in_schema(text: str, schema: str) -> bytes:
    """Put a schema's name where the files say metered_ai. Named in each statement, because a pooled session's search_path is anybody's."""
    return text.replace("metered_ai.", f'"{schema}".').encode()


@cache
def statements(schema: str) -> Mapping[str, bytes]:
    """Every statement by file and name, such as `steps.account`."""
    return {
        f"{file}.{name}": in_schema(body, schema)
        for file in _FILES
        for name, body in named_parts(f"postgres/{file}.sql").items()
    }


@cache
def migration(file: str, schema: str) -> bytes:
    """The text of a migration."""
    return in_schema(read_text(f"postgres/migrations/{file}"), schema)
