"""What a ledger's file needs while it is used, on threads of its own so that no caller waits for it: checkpoints and syncs."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

from .files import WAL_KEPT, connect, settle_down

__all__ = ["Checkpoints", "Slot", "Syncs"]

_log = logging.getLogger("metered_ai.ledger")

# macOS has no fdatasync.
_sync_data = getattr(os, "fdatasync", os.fsync)

_SYNC_AFTER = 0.016
_SYNC_LATEST = 0.02


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


class _Upkeep:
    """A thread that works once after each `wake`, however often it is woken meanwhile."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._wakeup: SimpleQueue[bool] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_over = threading.Event()

    def wake(self) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
            try:
                thread.start()
            except RuntimeError:
                # The interpreter shuts down, or the system has no thread left: what was committed must not fail for that.
                self._work()
                return
            self._thread = thread
        # No flag says that it is awake, because an interrupt could leave that in the wrong state.
        if self._wakeup.empty():
            self._wakeup.put(True)

    def stop(self) -> None:
        """Let it finish what it was woken for."""
        thread, self._thread = self._thread, None
        self._is_over.set()
        if thread is not None:
            self._wakeup.put(False)
            thread.join()

    def _serve(self) -> None:
        while self._wakeup.get():
            self._work()
        # For the next one: an interrupt at the start of this thread may have led to a second.
        self._wakeup.put(False)

    def _work(self) -> None:
        raise NotImplementedError


class Checkpoints(_Upkeep):
    """Moves what was committed from the write-ahead log into the file whenever it is woken, and keeps the log short."""

    def __init__(self, path: str, slot: Slot, may_open: Callable[[], bool]) -> None:
        super().__init__("metered_ai checkpoints")
        self._path = path
        self._slot = slot
        self._may_open = may_open

    def _work(self) -> None:
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


class Syncs(_Upkeep):
    """
    Makes commits durable within 20 ms, for durability "relaxed": in its thread, where that comes in time.

    On a machine so busy that the thread is late, whoever commits next syncs first what has waited for longer.
    """

    def __init__(self, path: str) -> None:
        super().__init__("metered_ai syncs")
        self._path = path
        self._waits_since: float | None = None

    def note(self) -> None:
        """There is a commit to sync. Not for several threads at once."""
        if self._waits_since is None:
            self._waits_since = time.monotonic()
            try:
                self.wake()
            except BaseException:
                # Nobody was woken, so the next commit has to.
                self._waits_since = None
                raise

    def catch_up(self) -> None:
        """Sync what has waited for too long, before anything more is acknowledged. With no lock held: a disk may take its time."""
        since = self._waits_since
        if since is not None and time.monotonic() - since > _SYNC_LATEST:
            self._sync_or_log()

    def _work(self) -> None:
        # More commits may come; one sync serves them all.
        self._is_over.wait(_SYNC_AFTER)
        if self._waits_since is not None:
            self._sync_or_log()

    def _sync_or_log(self) -> None:
        since = self._waits_since
        try:
            self.sync()
        except OSError as error:
            if self._waits_since == since:
                # Not at once again: a disk that is dead stays dead. The next commit asks for a sync of its own.
                self._waits_since = None
            _log.error("the ledger %r was not synced: %s", self._path, error)

    def sync(self) -> None:
        """Sync the log now. OSError if the disk refuses."""
        since = self._waits_since
        # Before, because what is committed meanwhile may come too late for this one.
        self._waits_since = None
        try:
            self._sync_log()
        except BaseException:
            self._waits_since = self._waits_since or since
            if self._waits_since is not None:
                self.wake()
            raise

    def _sync_log(self) -> None:
        try:
            # The log has no locks of its own, so that a second descriptor of it is harmless; of the file itself it would not be.
            descriptor = os.open(f"{self._path}-wal", os.O_RDWR)
            try:
                _sync_data(descriptor)
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            # Checkpointed and removed: everything is in the file, and synced.
            return
