"""
Instructions, counted by valgrind's callgrind: what timing cannot resolve on a busy machine. User space only, hardly any noise.

A process runs N calls, another one 2 N: the difference has no start-up in it.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .figures import Figure, at_most
from .processes import Caller, provider

# Python rewrites code that has run a few times, and is still at it after ten calls.
WARM = 40
CALLS = 100
CHUNKS = 1000


def measure(folder: Path) -> list[Figure]:
    names = ["instructions per chat call, SQLite", "instructions per streamed chunk", "the same, price by token"]
    limits = [1.06, 1.02, 1.02]
    if shutil.which("valgrind") is None:
        return [
            Figure(name, f"≤ {limit:g} ×", "valgrind is not installed", None)
            for name, limit in zip(names, limits, strict=True)
        ]

    cases = [
        ("bare", "sequential", CALLS, "per_call"),
        ("metered", "sequential", CALLS, "per_call"),
        ("bare", "stream", CHUNKS, "per_call"),
        ("metered", "stream", CHUNKS, "per_call"),
        ("metered", "stream", CHUNKS, "per_token"),
    ]
    with provider() as port, ThreadPoolExecutor(2) as pool:
        runs = [
            (pool.submit(_run, port, folder, *case, times=1), pool.submit(_run, port, folder, *case, times=2))
            for case in cases
        ]
        bare, metered, bare_chunk, *chunks = (
            (two.result() - one.result()) / case[2] for (one, two), case in zip(runs, cases, strict=True)
        )
    pairs = [(bare, metered), *((bare_chunk, chunk) for chunk in chunks)]
    return [
        at_most(name, limit, ours / theirs, note=f"{theirs / 1000:,.0f} k + {(ours - theirs) / 1000:,.1f} k")
        for name, limit, (theirs, ours) in zip(names, limits, pairs, strict=True)
    ]


def _run(port: str, folder: Path, side: str, way: str, count: int, pricing: str, *, times: int) -> int:
    """Instructions of a whole run."""
    place = Path(tempfile.mkdtemp(dir=folder))
    out = place / "callgrind.out"
    caller = Caller(
        side,
        way,
        *("--port", port, "--ledger", str(place / "ledger.db"), "--pricing", pricing),
        under=["valgrind", "-q", "--tool=callgrind", f"--callgrind-out-file={out}"],
    )
    for block in (WARM, count * times):
        caller.run(block)
    caller.close()
    found = re.search(r"^(?:totals|summary): (\d+)", out.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])
