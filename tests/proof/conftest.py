"""How a proof says its figure, and where a ledger lies that only has to survive processes."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.proof.children import Child, reap


@pytest.fixture
def say(capsys):
    """Print a figure where people see it, also from a worker of pytest-xdist, whose standard output goes nowhere."""

    def say(text: str) -> None:
        with capsys.disabled():
            print(f"\nproof: {text}", file=sys.stderr, flush=True)

    return say


@pytest.fixture
def memory_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: what a kill leaves does not depend on a disk, and a sync costs nothing there."""
    shared = Path("/dev/shm")
    if not shared.is_dir():
        yield tmp_path
        return

    folder = Path(tempfile.mkdtemp(prefix="metered-ai-", dir=shared))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def fork() -> Iterator[type[Child]]:
    """Run a function in a forked child; what is left of them when the test is over is killed."""
    yield Child
    reap()
