"""What a ledger's file needs while it is used, on threads of its own so that no caller waits for it: checkpoints and syncs."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

from .files import WAL_KEPT, connect, settle_down

__all__ = ["Checkpoints", "Slot", "Syncs"]

_log = logging.getLogger("metered_ai.ledger")

# macOS has no fdatasync.
_sync_data = getattr(os, "fdatasync", os.fsync)

_SYNC_EVERY = 0.016
_IDLE_ROUNDS = 100


class Slot:
    """A connection and the lock that whoever uses it holds. Who has all slots' locks knows that no thread is inside SQLite."""

    __slots__ = ("connection", "lock")

    def __init__(self, lock: threading.Lock | None = None) -> None:
        self.lock = lock or threading.Lock()
        self.connection: sqlite3.Connection | None = None

    def close(self) -> None:
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.close()


class Checkpoints:
    """Moves what was committed from the write-ahead log into the file whenever `wake` is called, and keeps the log short."""

    def __init__(self, path: str, slot: Slot, may_open: Callable[[], bool]) -> None:
        self._path = path
        self._slot = slot
        self._may_open = may_open
        self._wakeup: SimpleQueue[bool] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="metered_ai checkpoints", daemon=True)
            self._thread.start()
        self._wakeup.put(True)

    def stop(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            self._wakeup.put(False)
            thread.join()

    def _serve(self) -> None:
        while self._wakeup.get():
            try:
                with self._slot.lock:
                    if self._may_open():
                        self._checkpoint()
            except (sqlite3.Error, OSError) as error:
                # Nothing is lost: what was committed stays in the log, and the next checkpoint tries again.
                _log.warning("the ledger %r was not checkpointed: %s", self._path, error)

    def _checkpoint(self) -> None:
        self._slot.connection = connect(self._path, patience=1.0)
        try:
            settle_down(self._slot.connection)
            (_, pages, _) = self._slot.connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            (page_size,) = self._slot.connection.execute("PRAGMA page_size").fetchone()
            if pages * page_size > WAL_KEPT:
                # Writers never left a gap: hold them up for a moment, so that the log starts again from its beginning.
                self._slot.connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
        finally:
            self._slot.close()


class Syncs:
    """Makes commits durable within 20 ms after `wake`, for durability "relaxed". Runs only while there is something to sync."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._wakeup: SimpleQueue[bool] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_dirty = False
        self._is_awake = False

    def wake(self) -> None:
        self._is_dirty = True
        if self._is_awake:
            return
        self._is_awake = True
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="metered_ai syncs", daemon=True)
            self._thread.start()
        self._wakeup.put(True)

    def stop(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            self._wakeup.put(False)
            thread.join()

    def _serve(self) -> None:
        while self._wakeup.get():
            idle = 0
            while idle < _IDLE_ROUNDS:
                try:
                    if not self._wakeup.get(timeout=_SYNC_EVERY):
                        self._sync()
                        return
                except Empty:
                    idle = 0 if self._sync() else idle + 1
            self._is_awake = False
            # A commit may have seen this thread awake a moment ago.
            self._sync()

    def _sync(self) -> bool:
        if not self._is_dirty:
            return False
        self._is_dirty = False
        try:
            # The log has no locks of its own, so that a second descriptor of it is harmless; of the file itself it would not be.
            descriptor = os.open(f"{self._path}-wal", os.O_RDWR)
        except FileNotFoundError:
            # Checkpointed and removed: everything is in the file, and synced.
            return True
        except OSError as error:
            self._is_dirty = True
            _log.error("the ledger %r was not synced: %s", self._path, error)
            return True
        try:
            _sync_data(descriptor)
        except OSError as error:
            self._is_dirty = True
            _log.error("the ledger %r was not synced: %s", self._path, error)
        finally:
            os.close(descriptor)
        return True
