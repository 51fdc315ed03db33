"""Servers in processes of their own: how a test starts one, and how it says that it is ready and ends with its starter."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, Self

__all__ = ["ServerProcess", "ready"]

_READY = "READY "


def ready(base_url: str) -> None:
    """Say in a server's process that it answers, then wait until the process that started it has ended."""
    parent = os.getppid()
    print(f"{_READY}{base_url}", flush=True)  # noqa: T201 - the line that `ServerProcess` waits for.
    while os.getppid() == parent:
        time.sleep(0.25)


class ServerProcess:
    """
    A server in a process of its own, started as `python -m module`; a context manager.

    It is ready when the constructor returns. If it does not start, RuntimeError carries what it said last. It never outlives
    this process for long, however that ends.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str] = (),
        *,
        environment: Mapping[str, str] | None = None,
        timeout: float = 60.0,
    ) -> None:
        self._last: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert self.process.stdout is not None
        self._is_told = threading.Event()
        self._url = ""
        self._reader = threading.Thread(
            target=self._read, args=(self.process.stdout,), name="server-output", daemon=True
        )
        self._reader.start()
        self._is_told.wait(timeout)
        if not self._url:
            self.close()
            raise RuntimeError(
                f"{module} did not start: {' | '.join(self._last) or f'nothing said within {timeout} s'}"
            )

    @property
    def base_url(self) -> str:
        return self._url

    @property
    def pid(self) -> int:
        return self.process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process. Closing twice is fine."""
        self.process.kill()
        self.process.wait()
        self._reader.join()

    def _read(self, output: IO[str]) -> None:
        # Read on to the end: a server that fills its pipe would stand still.
        with output:
            for line in output:
                if line.startswith(_READY):
                    self._url = line.removeprefix(_READY).strip()
                    self._is_told.set()
                else:
                    self._last = [*self._last, line.strip()][-5:]
        self._is_told.set()
