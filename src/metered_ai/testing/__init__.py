"""
For tests, ours and yours. Nothing here is imported by the library itself.

`LedgerContract` and `SharedLedgerContract` are what a ledger promises, as pytest classes to subclass, `ServiceLedgerContract`
what it promises where a remote billing service owns the balances; `Clock` is the clock they move. `FakeFlowglad` is a Flowglad on
loopback.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .contract import Clock, LedgerContract, ServiceLedgerContract, SharedLedgerContract
    from .flowglad import FakeFlowglad

__all__ = ["Clock", "FakeFlowglad", "LedgerContract", "ServiceLedgerContract", "SharedLedgerContract"]


def __getattr__(name: str) -> Any:
    """Import what is asked for: the contract needs pytest, and the rest of this package does not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    if name == "FakeFlowglad":
        from .flowglad import FakeFlowglad

        return FakeFlowglad

    import sys

    import pytest

    if f"{__name__}.contract" not in sys.modules:
        # So that a failed assertion shows its values, as it does in a test module.
        pytest.register_assert_rewrite(f"{__name__}.contract")
    from . import contract

    return getattr(contract, name)
