"""Measures what the library has to reach, prints a table of it, and says nothing about machines other than this one."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from . import calls, fleet, growth, imports, instructions, ledger, loop_lag
from .figures import Figure, table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "parts", nargs="*", metavar="part", help="instructions, calls, ledger, import, lag, growth, fleet (all)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds and events: a first look")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a figure is not reached")
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure on (else the temporary one)")
    arguments = parser.parse_args()
    is_quick = arguments.quick

    with tempfile.TemporaryDirectory(prefix="metered-ai-bench-", dir=arguments.folder) as name:
        folder = Path(name)
        parts: dict[str, Callable[[], list[Figure]]] = {
            "import": lambda: imports.measure(folder, 5 if is_quick else 25),
            "growth": lambda: growth.measure(folder, 100_000 if is_quick else 1_000_000, 3 if is_quick else 11),
            "ledger": lambda: ledger.measure(folder, 2 if is_quick else 7),
            "instructions": lambda: instructions.measure(folder),
            "calls": lambda: calls.measure(folder, 7 if is_quick else 41),
            "fleet": lambda: fleet.measure(folder, 2 if is_quick else 7, 100_000 if is_quick else 1_000_000),
            "lag": lambda: loop_lag.measure(folder, 3 if is_quick else 21),
        }
        unknown = set(arguments.parts) - parts.keys()
        if unknown:
            parser.error(f"there is no part {min(unknown)!r}; there are {', '.join(parts)}")

        print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; ratios are metered / bare", file=sys.stderr)
        figures: list[Figure] = []
        for part, measure in parts.items():
            if not arguments.parts or part in arguments.parts:
                print(f"{part} …", file=sys.stderr, flush=True)
                figures += measure()

    print(table(figures))
    return int(arguments.check and any(figure.is_ok is False for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
