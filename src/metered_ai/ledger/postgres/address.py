"""What a PostgreSQL URL says: to libpq, and to us; and how it is shown without its secrets."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote

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
    def of(cls, url: str) -> Address:
        """Read a URL (or libpq's key=value words). Our own parameters are taken out of it; libpq knows the others."""
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
    head, _, query = url.partition("?")
    ours: dict[str, str] = {}
    theirs: list[str] = []
    # libpq's own rules, in which a plus is a plus.
    for pair in filter(None, query.split("&")):
        name, _, value = pair.partition("=")
        if name in _OURS:
            ours[name] = unquote(value)
        else:
            theirs.append(pair)
    return "?".join(filter(None, (head, "&".join(theirs)))), ours


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
    service = conninfo.get("service") or os.environ.get("PGSERVICE")
    if service and not conninfo.get("dbname"):
        return f"postgresql://?service={service}"
    host = conninfo.get("host") or conninfo.get("hostaddr") or os.environ.get("PGHOST") or ""
    port = conninfo.get("port") or os.environ.get("PGPORT") or ""
    name = (
        conninfo.get("dbname") or os.environ.get("PGDATABASE") or conninfo.get("user") or os.environ.get("PGUSER") or ""
    )
    # A folder of sockets is part of the address, as libpq writes it.
    where = quote(str(host), safe=",[]:.-_")
    return f"postgresql://{where}{f':{port}' if port else ''}/{quote(str(name), safe='')}"
