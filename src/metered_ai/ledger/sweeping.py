"""How a ledger resolves the holds of processes that died: looked up first, then one transaction for many of them."""

from __future__ import annotations

from abc import abstractmethod
from typing import cast

from .book import TOMBSTONE_KEPT, Sweep
from .reading import Reading
from .reports import Recovery
from .serving import ServiceStep

__all__ = ["Sweeping"]

_TOGETHER = 500


class Sweeping(Reading):
    """Sweeps, as `Ledger` promises them."""

    @abstractmethod
    def _carry_out(self, step: ServiceStep | Sweep) -> object:
        """Do one step in a transaction."""

    def sweep(self, limit: int = 500) -> Recovery:
        """Resolve up to `limit` holds whose owner's lease is out, by the policy each was placed with."""
        total = Recovery()
        key: tuple[int, str] | None = (0, "")
        # What is passed over, because somebody has its account locked, must not keep a sweep from what is behind it.
        while key is not None and total.resolved < limit:
            recovery, key = self._sweep_behind(key, limit - total.resolved)
            total += recovery
        return total

    def recover(self) -> Recovery:
        """Sweep until nothing is left to resolve."""
        total = Recovery()
        key: tuple[int, str] | None = (0, "")
        while key is not None:
            recovery, key = self._sweep_behind(key, _TOGETHER)
            total += recovery
        return total

    def _sweep_behind(self, key: tuple[int, str], limit: int) -> tuple[Recovery, tuple[int, str] | None]:
        # Looked up outside of the write transaction: a sweep that finds nothing locks nothing.
        holds = self._orphans(key, limit)
        if not holds and not self._has_old_tombstone(self.now() - TOMBSTONE_KEPT):
            return Recovery(), None
        recovery = cast("Recovery", self._carry_out(Sweep(tuple(holds))))
        return recovery, holds[-1] if len(holds) == limit else None
