"""Takes the ledgers of a process through a fork."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol

__all__ = ["FORK_PATIENCE", "inherited", "ledgers"]

FORK_PATIENCE = 5.0
"""How long a fork waits for a thread to come out of SQLite, in seconds."""


class _Forked(Protocol):
    def before_fork(self) -> None: ...
    def after_fork_in_parent(self) -> None: ...
    def after_fork_in_child(self) -> None: ...


ledgers: weakref.WeakSet[_Forked] = weakref.WeakSet()
"""Told of each fork."""

inherited: list[object] = []
"""What a child must neither use nor close, kept so that the garbage collector does not close it."""


class _Forks:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_mine = False
        self._told: list[_Forked] = []

    def before(self) -> None:
        # Two threads that fork at once take the ledgers' locks one after the other.
        self._is_mine = self._lock.acquire(timeout=2 * FORK_PATIENCE)
        self._told = list(ledgers)
        for ledger in self._told:
            ledger.before_fork()

    def after_in_parent(self) -> None:
        for ledger in self._told:
            ledger.after_fork_in_parent()
        self._told = []
        if self._is_mine:
            self._lock.release()

    def after_in_child(self) -> None:
        self._lock = threading.Lock()
        for ledger in self._told:
            ledger.after_fork_in_child()
        self._told = []


_forks = _Forks()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_forks.before, after_in_parent=_forks.after_in_parent, after_in_child=_forks.after_in_child
    )
