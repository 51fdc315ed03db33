"""A ledger, and the command line on it."""

from __future__ import annotations

import pytest

from metered_ai import connect
from metered_ai.cli import main


@pytest.fixture
def path(tmp_path, monkeypatch):
    """Where the ledger is: named by the environment, as in an application."""
    path = tmp_path / "credits.db"
    monkeypatch.setenv("METERED_AI_BILLING", f"sqlite:///{path}")
    monkeypatch.chdir(tmp_path)
    return path


@pytest.fixture
def billing(path):
    """The application's own billing, beside which the command line works."""
    with connect(f"sqlite:///{path}", durability="relaxed") as billing:
        yield billing


@pytest.fixture
def cli(path, capsys):
    """Runs a command; gives its exit code, what it printed, and what it complained of."""

    def run(*arguments):
        code = main(arguments)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run
