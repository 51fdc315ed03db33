"""CPU per call: bare and metered callers take turns, and only the ratio of two blocks that ran side by side counts."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from .figures import Figure, at_most
from .processes import provider, two_callers

CASES = [
    ("CPU per call, relaxed, sequential", "sequential", "relaxed", 1.18, 60),
    ("CPU per call, relaxed, 16 threads", "threads", "relaxed", 1.18, 96),
    ("CPU per call, relaxed, 64 async", "tasks", "relaxed", 1.12, 192),
    ("CPU per call, full, 64 async", "tasks", "full", 1.20, 192),
]


def measure(folder: Path, rounds: int) -> list[Figure]:
    """The median of the rounds' ratios."""
    figures: list[Figure] = []
    with provider() as port:
        for name, way, durability, limit, block in CASES:
            with two_callers(port, folder, way, "--durability", durability) as callers:
                for caller in callers:
                    caller.run(block)
                ratios: list[float] = []
                differences: list[float] = []
                for number in range(rounds):
                    # Whoever goes first finds the caches colder, so they change places.
                    order = callers if number % 2 else callers[::-1]
                    took = {id(caller): caller.run(block).cpu for caller in order}
                    bare, metered = (took[id(caller)] for caller in callers)
                    ratios.append(metered / bare)
                    differences.append((metered - bare) / block)
            ratios.sort()
            note = f"+{median(differences) * 1e6:.0f} us; quartiles {ratios[rounds // 4]:.2f} to {ratios[rounds * 3 // 4]:.2f}"
            figures.append(at_most(name, limit, median(ratios), note=note))
    return figures
