"""What `import metered_ai` costs beyond `import openai`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from statistics import median

from .figures import Figure, at_most
from .processes import ROOT, environment

CODE = """
import sys, time
import openai
modules, began = len(sys.modules), time.process_time()
import metered_ai
print((time.process_time() - began) * 1000, len(sys.modules) - modules)
"""


def measure(folder: Path, rounds: int) -> list[Figure]:
    """The median of processes that find everything compiled, as an installed library is."""
    compiled = {**environment(), "PYTHONPYCACHEPREFIX": str(folder / "compiled")}
    compiled.pop("PYTHONDONTWRITEBYTECODE", None)
    costs: list[float] = []
    modules = "0"
    for _ in range(rounds + 1):
        done = subprocess.run(
            [sys.executable, "-c", CODE], capture_output=True, text=True, check=True, cwd=ROOT, env=compiled
        )
        cost, modules = done.stdout.split()
        costs.append(float(cost))
    # The first one has compiled.
    return [at_most("import metered_ai beyond openai", 15, median(costs[1:]), "ms CPU", f"{modules} modules")]
