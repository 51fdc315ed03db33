"""Every ledger keeps `LedgerContract`."""

from __future__ import annotations

import ast
import inspect
from collections import Counter
from pathlib import Path

import pytest

from metered_ai.ledger import Ledger
from metered_ai.ledger.memory import MemoryLedger
from metered_ai.ledger.sqlite import SqliteLedger
from metered_ai.testing import Clock, LedgerContract, ServiceLedgerContract, SharedLedgerContract


class TestSqliteFull(SharedLedgerContract):
    def make_ledger(self, tmp_path: Path, clock: Clock) -> Ledger:
        return SqliteLedger(tmp_path / "credits.db", clock=clock)


class TestSqliteRelaxed(SharedLedgerContract):
    def make_ledger(self, tmp_path: Path, clock: Clock) -> Ledger:
        return SqliteLedger(tmp_path / "credits.db", durability="relaxed", clock=clock)


class TestMemory(LedgerContract):
    def make_ledger(self, tmp_path: Path, clock: Clock) -> Ledger:
        return MemoryLedger(clock=clock)


class TestSqliteServing(ServiceLedgerContract):
    def make_ledger(self, tmp_path: Path, clock: Clock) -> Ledger:
        return SqliteLedger(tmp_path / "credits.db", clock=clock)


class TestMemoryServing(ServiceLedgerContract):
    def make_ledger(self, tmp_path: Path, clock: Clock) -> Ledger:
        return MemoryLedger(clock=clock)


def test_every_promise_is_said() -> None:
    """Each test of the contract says its promise in words, and none hides another of the same name."""
    source = Path(inspect.getfile(LedgerContract))
    tests = [
        node
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]

    assert [] == [node.name for node in tests if not ast.get_docstring(node)]
    assert [] == [name for name, count in Counter(node.name for node in tests).items() if count > 1]


def test_a_ledger_must_be_made(tmp_path: Path) -> None:
    """Forgetting to say how the ledger is made fails, and says what to do."""
    with pytest.raises(NotImplementedError, match="how the ledger is made"):
        LedgerContract().make_ledger(tmp_path, Clock())


def test_without_pytest() -> None:
    """`metered_ai.testing` can be imported where pytest is not installed."""
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['pytest'] = None; import metered_ai.testing as t; print('LedgerContract' in t.__all__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "True\n" == done.stdout
