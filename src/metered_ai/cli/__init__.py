"""The command line. It needs the extra `cli`; without it, it says so."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run `metered-ai` with these arguments, else the program's own, and return its exit code.

    0: done. 1: refused, not found, or a broken invariant was found. 2: used wrongly, or the ledger is not available.
    """
    missing = [name for name in ("typer", "rich") if find_spec(name) is None]
    if missing:
        print(f"metered-ai: {', '.join(missing)} is not installed: pip install 'metered-ai[cli]'", file=sys.stderr)
        return 2

    from .run import run

    return run(sys.argv[1:] if arguments is None else arguments)
