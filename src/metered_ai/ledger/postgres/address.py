"""What a PostgreSQL URL says: to libpq, and to us; and how it is shown without its secrets."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlencode

from ...errors import ConfigurationError

__all__ = ["Address"]

_OURS = ("schema", "connections", "pgbouncer")
_SECRET = ("password", "sslpassword", "oauth_client_secret")


@dataclass(frozen=True, slots=True)
class Address:
    """Where the database is (`conninfo`, for libpq), and what the URL says about the ledger in it."""

    conninfo: Mapping[str, Any] = field(repr=False)
    shown: str
    schema: str = "metered_ai"
    connections: int = 6
    pgbouncer: bool = False

    @classmethod
    def of(cls, url: str | None) -> Address:
        """Read a URL (or libpq's key=value words). Our own parameters are taken out of it; libpq knows the others."""
        if url is None:
            return cls({}, "postgresql://…")
        plain, ours = _split(url)
        conninfo = _read(plain)
        connections = ours.get("connections", "6")
        if not connections.isdecimal():
            raise ConfigurationError(f"connections must be a whole number, not {connections!r}")
        pgbouncer = ours.get("pgbouncer", "false")
        if pgbouncer not in ("true", "false"):
            raise ConfigurationError(f"pgbouncer must be true or false, not {pgbouncer!r}")
        return cls(conninfo, _shown(conninfo), ours.get("schema", "metered_ai"), int(connections), pgbouncer == "true")

    @property
    def secrets(self) -> tuple[str, ...]:
        """What no message may show."""
        named = [str(self.conninfo[name]) for name in _SECRET if self.conninfo.get(name)]
        return (*named, *filter(None, [os.environ.get("PGPASSWORD")]))


def _split(url: str) -> tuple[str, dict[str, str]]:
    """A URL without our own parameters, and those."""
    if "://" not in url:
        return url, {}
    head, question, query = url.partition("?")
    if not question:
        return url, {}
    pairs = parse_qsl(query, keep_blank_values=True)
    ours = {name: value for name, value in pairs if name in _OURS}
    theirs = urlencode([(name, value) for name, value in pairs if name not in _OURS])
    return f"{head}?{theirs}" if theirs else head, ours


def _read(url: str) -> Mapping[str, Any]:
    import psycopg
    from psycopg.conninfo import conninfo_to_dict

    try:
        return conninfo_to_dict(url)
    except (psycopg.Error, UnicodeError):
        # Not in libpq's words, which repeat what they stumble over: a misplaced password, as often as not.
        raise ConfigurationError(
            "the PostgreSQL URL cannot be read; it is postgresql://user:password@host:port/database?name=value, with %XX for "
            "special characters, and its names are libpq's or schema, connections, pgbouncer"
        ) from None


def _shown(conninfo: Mapping[str, Any]) -> str:
    if conninfo.get("service"):
        return f"postgresql://?service={conninfo['service']}"
    host = conninfo.get("host") or conninfo.get("hostaddr") or os.environ.get("PGHOST") or ""
    where = f"postgresql://{host}" if not str(host).startswith("/") else "postgresql://"
    if conninfo.get("port"):
        where += f":{conninfo['port']}"
    name = conninfo.get("dbname") or os.environ.get("PGDATABASE") or ""
    return f"{where}/{name}"
