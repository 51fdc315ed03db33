"""How late an event loop with 64 callers gets while another process locks the ledger."""

from __future__ import annotations

import sqlite3
import sys
import time
from pathlib import Path
from statistics import median

from .figures import Figure, at_most
from .processes import provider, start, two_callers

LOCKED = 0.5
MILLISECONDS = 1000


def measure(folder: Path, rounds: int) -> list[Figure]:
    """Medians over rounds of a second each, in half of which the ledger is locked."""
    with provider() as port, two_callers(port, folder, "lag") as (bare, metered):
        for caller in (bare, metered):
            caller.run(MILLISECONDS)
        lags: list[tuple[float, float]] = []
        for _ in range(rounds):
            lag = bare.run(MILLISECONDS).result
            with start([sys.executable, "-m", "benchmarks.loop_lag", str(folder / "lag.db")]) as locker:
                assert locker.stdout is not None
                assert "locked\n" == locker.stdout.readline()
                lags.append((lag, metered.run(MILLISECONDS).result))
    bares, metereds = zip(*lags, strict=True)
    difference = median(metereds) - median(bares)
    note = f"bare {median(bares):.0f} ms, metered {median(metereds):.0f} ms"
    return [at_most("loop lag p99, ledger locked for 500 ms, beyond bare", 10, difference, "ms", note)]


def lock(path: str) -> None:
    connection = sqlite3.connect(path, timeout=30, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    print("locked", flush=True)
    time.sleep(LOCKED)
    connection.execute("ROLLBACK")


if __name__ == "__main__":
    lock(sys.argv[1])
