"""
For tests, ours and yours. Nothing here is imported by the library itself.

`LedgerContract` and `SharedLedgerContract` are what a ledger promises, as pytest classes to subclass, `ServiceLedgerContract`
what it promises where a remote billing service owns the balances; `Clock` is the clock they move.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .contract import Clock, LedgerContract, ServiceLedgerContract, SharedLedgerContract

__all__ = ["Clock", "LedgerContract", "ServiceLedgerContract", "SharedLedgerContract"]


def __getattr__(name: str) -> Any:
    """Import the contract when it is asked for: it needs pytest, and the rest of this package does not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    import sys

    import pytest

    if f"{__name__}.contract" not in sys.modules:
        # So that a failed assertion shows its values, as it does in a test module.
        pytest.register_assert_rewrite(f"{__name__}.contract")
    from . import contract

    return getattr(contract, name)
