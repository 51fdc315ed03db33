"""A real PgBouncer between ledgers and their server, which lends a session for one transaction."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from metered_ai.core.steps import AddGrant, Place, Release, Renew, Settle, Step
from metered_ai.ledger.postgres import PostgresLedger

SESSIONS = 3
THREADS = 6
CALLS = 12

# Debian keeps it where only root looks. Whoever has none goes without: `TestPgBouncer` in test_postgres_connections.py has a stand-in.
PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")

pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="PgBouncer is not installed (on Debian: apt-get install pgbouncer)"
)

SETTINGS = """
SELECT
    current_setting('lock_timeout'), current_setting('statement_timeout'), current_setting('idle_in_transaction_session_timeout'),
    current_setting('synchronous_commit'), current_setting('search_path'), current_setting('client_encoding'),
    coalesce(current_setting('metered_ai_step.locked', true), ''), (SELECT count(*) FROM pg_prepared_statements)
"""


@pytest.fixture(scope="module")
def pooler(postgres_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of the server by way of a PgBouncer in transaction mode, which has a few sessions there for everybody."""
    server = conninfo_to_dict(postgres_server)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    named = {name: server.get(name) for name in ("host", "port", "user", "password")}
    there = " ".join(f"{name}={value}" for name, value in named.items() if value)
    folder = tmp_path_factory.mktemp("pgbouncer")
    config = folder / "pgbouncer.ini"
    config.write_text(
        f"[databases]\n* = {there}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
        f"auth_type = any\npool_mode = transaction\ndefault_pool_size = {SESSIONS}\n"
    )
    # It takes no orders from root; the server's user finds the socket, and needs to read this.
    user: int | str | None = None
    if os.getuid() == 0:
        place = Path(str(server.get("host") or "nowhere"))
        user = place.stat().st_uid if place.is_dir() else "nobody"
        # Pytest's own folders are closed to it.
        config = Path(shutil.copy(config, f"/tmp/metered-ai-pgbouncer-{os.getpid()}.ini"))
        config.chmod(0o600)
        shutil.chown(config, user)
    assert PROGRAM is not None
    with open(folder / "log", "wb") as log:
        running = subprocess.Popen(
            [PROGRAM, str(config)],
            stdout=log,
            stderr=log,
            user=user,
            extra_groups=None if user is None else [],
            cwd="/",
        )
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert running.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.02)
        yield f"postgresql://{server.get('user') or 'postgres'}@127.0.0.1:{port}/{server.get('dbname') or 'postgres'}"
    finally:
        running.kill()
        running.wait()
        config.unlink()


def in_each_session(pooler: str) -> list[tuple[Any, ...]]:
    """What each of the pooler's sessions is set to, as another client finds it."""
    with ExitStack() as stack:
        # Each in a transaction that stays open, so that the next one gets another session.
        clients = [stack.enter_context(psycopg.connect(pooler, prepare_threshold=None)) for _ in range(SESSIONS)]
        return [settings(client) for client in clients]


def settings(client: psycopg.Connection[Any]) -> tuple[Any, ...]:
    row = client.execute(SETTINGS).fetchone()
    assert row is not None
    return row


def test_shared(pooler: str, postgres: str) -> None:
    """
    Holds, settles and releases of two ledgers with their threads are all done, once, over three sessions. Nothing that is set for a step
    is found by the next who has its session: neither by the other ledger, which has another patience, nor by any other client.
    """
    schema = postgres.rpartition("schema=")[2]
    before = in_each_session(pooler)
    assert {before[0]} == set(before)
    url = f"{pooler}?schema={schema}&pgbouncer=true&connections=4"
    errors: list[Exception] = []
    found: set[tuple[Any, ...]] = set()
    is_over = threading.Event()

    def work(ledger: PostgresLedger, name: str) -> None:
        def call(number: int) -> list[Step]:
            hold = f"{name}.{number}"
            if number % 3 == 2:
                return [
                    Place(hold, "ada", "calls", 3, "p1"),
                    Release(hold, "ada", "calls", "provider_error", "yes"),
                ]
            return [Place(hold, "ada", "calls", 3, "p1"), Settle(hold, "ada", "calls", 2, f"gen_{hold}", "reported")]

        for number in range(CALLS):
            for step in call(number):
                guarded(lambda step=step: ledger.run(step))  # type: ignore[misc]

    def guarded(act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:
            errors.append(error)

    def watch() -> None:
        with psycopg.connect(pooler, prepare_threshold=None, autocommit=True) as other:
            while not is_over.is_set():
                found.add(settings(other))

    with (
        closing(PostgresLedger(url, hold_patience=20, settle_patience=20)) as one,
        closing(PostgresLedger(url, hold_patience=10, settle_patience=10)) as two,
    ):
        one.run(AddGrant("ada", "calls", 1_000, "g1"))
        one.run(Renew("p1", 120.0))
        threads = [
            threading.Thread(target=work, args=(ledger, f"{index}.{number}"))
            for index, ledger in enumerate((one, two))
            for number in range(THREADS)
        ]
        watcher = threading.Thread(target=guarded, args=(watch,))
        watcher.start()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        is_over.set()
        watcher.join()

        assert [] == errors
        settled = 2 * THREADS * (CALLS - CALLS // 3)
        balance = one.balance("ada", "calls")
        assert (2 * settled, 0, settled) == (balance.used, balance.held, sum(1 for _ in two.usage_events("ada")))
        assert () == one.verify().broken
    assert set(before) == found
    assert before == in_each_session(pooler)
