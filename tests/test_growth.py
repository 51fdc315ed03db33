"""That what a call costs does not grow with what is stored; `python -m benchmarks growth` measures the same with a million events."""

from __future__ import annotations

import pytest

from benchmarks.growth import filled, scans, steps


@pytest.fixture(scope="module")
def ledgers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("growth")
    few, many = filled(folder / "few.db", 2_000), filled(folder / "many.db", 60_000)
    yield few, many
    few.close()
    many.close()


def test_steps(ledgers):
    """A hold and its settle take SQLite as many steps with 60,000 events of random ids as with 2,000: at most twice as many."""
    few, many = map(steps, ledgers)
    print(f"VM steps of hold + settle: {few:.0f} with 2,000 events, {many:.0f} with 60,000")

    assert many <= 2 * few


def test_plans(ledgers):
    """Every statement of a step or a listing searches an index; none reads a table that grows from end to end."""
    assert [] == list(scans(ledgers[0]))


def test_filled(ledgers):
    """What these tests stand on is a ledger as calls would have left it."""
    assert () == ledgers[1].verify().broken
    assert 60_000 <= sum(row.calls for row in ledgers[1].usage())
