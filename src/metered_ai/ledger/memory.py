"""A ledger in memory, for tests and for trying things out: gone when the process ends."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import cast

from ..errors import ConfigurationError
from . import files
from .reading import Fetch
from .sqlite import SqliteLedger
from .upkeep import Slot

__all__ = ["MemoryLedger"]


class MemoryLedger(SqliteLedger):
    """
    Keeps credits in memory: the same statements as the file, for one process.

    After a fork the child's copy is refused with a ConfigurationError: both processes would spend the same credits.
    """

    def __init__(self, *, clock: Callable[[], int] | None = None) -> None:
        super().__init__(":memory:", durability="relaxed", clock=clock)
        self.path = ":memory:"
        self._is_lost = False

    @property
    def name(self) -> str:
        """The ledger's address for messages."""
        return "memory://"

    def after_fork_in_child(self) -> None:
        """Leave the credits to the parent."""
        self._is_lost = self._is_lost or self._writer.connection is not None
        self._writer.connection = None
        super().after_fork_in_child()

    def _check_process(self) -> None:
        super()._check_process()
        if self._is_lost:
            raise ConfigurationError(
                "a memory ledger ends at a fork: a copy of its balances would be spent twice; use a SQLite file"
            )

    def _ready(self, *, must_exist: bool = True) -> None:  # noqa: ARG002  there is no file
        self._check_shut()
        if self._writer.connection is None:
            self._open()

    def _open(self) -> None:
        connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False, cached_statements=256)
        connection.execute("PRAGMA foreign_keys = ON")
        self._use(connection)
        files.migrate(connection, self.path, execute=self._execute)
        self._book.serve(self._service)

    def _upkeep(self, is_durable: bool, steps: int) -> None:
        """Nothing to sync, nothing to checkpoint."""

    def _reader(self) -> Slot:
        # The one connection there is; between transactions, because who has its lock is in none.
        return self._writer

    def _reading_connection(self, slot: Slot) -> sqlite3.Connection:
        self._ready()
        return cast("sqlite3.Connection", slot.connection)

    @contextmanager
    def _snapshot(self) -> Generator[Fetch]:
        with self._reading() as fetch:
            yield fetch

    def _leave(self, slot: Slot) -> None:
        """Closing would lose everything."""
