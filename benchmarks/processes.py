"""Starts the provider and the callers, and talks to them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent


def environment() -> dict[str, str]:
    """So that a run does not depend on how strings happen to hash, and imports what is measured from this tree."""
    return {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}


def start(arguments: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment()
    )


@contextmanager
def provider() -> Iterator[str]:
    """A provider; gives its port."""
    with start([sys.executable, "-m", "benchmarks.provider"]) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()


class Block(NamedTuple):
    cpu: float
    wall: float
    result: Any


class Caller:
    """A caller that waits for its turns."""

    def __init__(self, *arguments: str, under: Sequence[str] = ()) -> None:
        self.process = start([*under, sys.executable, "-m", "benchmarks.caller", *arguments])
        self.read()

    def read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a caller ended with {self.process.wait()}")
        return json.loads(line)

    def begin(self, count: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()

    def run(self, count: int) -> Block:
        self.begin(count)
        return Block(**self.read())

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        if code := self.process.wait():
            raise RuntimeError(f"a caller ended with {code}")


@contextmanager
def two_callers(port: str, folder: Path, way: str, *options: str) -> Iterator[tuple[Caller, Caller]]:
    """A bare and a metered caller."""
    ledger = folder / f"{'-'.join((way, *options))}.db"
    bare = Caller("bare", way, "--port", port)
    try:
        metered = Caller("metered", way, "--port", port, "--ledger", str(ledger), *options)
        try:
            yield bare, metered
        finally:
            metered.close()
    finally:
        bare.close()
