"""What may import what, and what importing the library does to a program."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import metered_ai

SOURCE = Path(metered_ai.__file__).parent

LAYERS = [
    ["errors", "records", "options"],
    ["core"],
    ["context", "hooks", "ledger", "prices", "services", "settings"],
    ["settling"],
    ["charge"],
    ["urls"],
    ["billing"],
    ["taps"],
    ["client"],
    ["metered_ai"],
    ["cli", "integrations", "web", "testing"],
]
"""A module imports from its own line or from those above it."""

HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}

# They would let the outside in where decisions are made.
OUTSIDE = set("asyncio io logging os pathlib random secrets socket sqlite3 subprocess threading time uuid".split())


def _is_type_checking(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _imports(path):
    """What a file imports at run time, wherever it does: (module, names). What only a type checker reads is no arrow."""
    nodes = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if _is_type_checking(node):
            nodes.extend(node.orelse)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ["metered_ai", *path.relative_to(SOURCE).parts[:-1]]
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            yield module, tuple(alias.name for alias in node.names)
        else:
            nodes.extend(ast.iter_child_nodes(node))


def _part(module, names):
    """The parts of the library that an import reaches: ("metered_ai.core.checks", …) is core."""
    parts = module.split(".")
    if parts[0] != "metered_ai":
        return set()
    if len(parts) > 1:
        return {parts[1]}
    return {name if name in HEIGHT else "metered_ai" for name in names} or {"metered_ai"}


def _own(path):
    first = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    return "metered_ai" if first == "__init__" else first


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_arrows(path):
    """Imports point one way: errors, records ← core ← context, ledger, services ← billing ← taps, client ← cli, web."""
    own = _own(path)
    reached = set().union(*(_part(module, names) for module, names in _imports(path)))

    assert set() == {part for part in reached if part not in HEIGHT or HEIGHT[part] > HEIGHT[own]}


@pytest.mark.parametrize("path", sorted((SOURCE / "core").glob("*.py")), ids=lambda path: path.name)
def test_core(path):
    """`core` decides: no third-party import, no clock, no files, no threads, no randomness."""
    tops = {module.split(".")[0] for module, _ in _imports(path)}

    assert set() == tops - sys.stdlib_module_names - {"metered_ai"}
    assert set() == tops & OUTSIDE


def test_neighbours():
    """Ledgers and services do not know each other, nor what is above a context."""
    files = [path for path in FILES if _own(path) in ("ledger", "services")]
    reached = {
        (_own(path), part) for path in files for module, names in _imports(path) for part in _part(module, names)
    }

    assert set() == {
        (own, part) for own, part in reached if part in {"ledger", "services", "context", "settings"} - {own}
    }


def _python(code):
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert "" == done.stderr
    return done.stdout.split()


def test_import_is_light():
    """`import metered_ai` loads no HTTP client, no database, no retry library and no terminal beyond what openai loads."""
    new = _python(
        "import openai, sys; before = set(sys.modules); import metered_ai; print(*sorted(set(sys.modules) - before))"
    )

    heavy = {
        "httpx",
        "httpx2",
        "tenacity",
        "psycopg",
        "rich",
        "typer",
        "sqlite3",
        "_sqlite3",
        "starlette",
        "genai_prices",
    }
    assert set() == {name.split(".")[0] for name in new} & heavy
    assert [] == [
        name
        for name in new
        if name.startswith(("metered_ai.ledger", "metered_ai.services", "metered_ai.testing", "metered_ai.taps"))
    ]
    assert [] == [name for name in new if name.split(".")[0] not in {*sys.stdlib_module_names, "metered_ai"}]


def test_fake_is_light():
    """The fake Flowglad needs neither pytest nor the contract of ledgers."""
    new = _python("import sys; from metered_ai.testing import FakeFlowglad; print(*sorted(sys.modules))")

    assert set() == {"pytest", "metered_ai.testing.contract", "metered_ai.services"} & set(new)


def test_import_does_nothing():
    """Importing opens no socket, writes no file and starts no thread, process or loop."""
    said = _python("""
import openai, sys, threading
seen = []
def listen(event, arguments):
    if event.startswith(("socket.", "subprocess.", "os.fork", "sqlite3.", "os.mkdir")):
        seen.append(event)
    elif event == "open" and set(str(arguments[1] or "")) & set("wax+"):
        seen.append(f"{event}:{arguments[0]}")
sys.addaudithook(listen)
import metered_ai
print(threading.active_count(), *seen)
""")

    assert ["1"] == said


def test_building_is_light(tmp_path):
    """Building a client loads no ledger either; nothing of it is there before the first metered call."""
    new = _python(
        "import openai, sys; openai.OpenAI(api_key='k'); before = set(sys.modules); import metered_ai; "
        f"metered_ai.MeteredOpenAI(api_key='k', billing='sqlite:///{tmp_path}/credits.db'); "
        "print(*sorted(set(sys.modules) - before))"
    )

    assert [] == [
        name for name in new if name.startswith(("metered_ai.ledger", "metered_ai.taps", "sqlite3", "tenacity"))
    ]
    assert [] == list(tmp_path.iterdir())
