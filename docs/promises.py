"""Writes promises.md: what each test of the ledgers' contract promises, in the words of its docstring. `make docs` runs it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

DOCS = Path(__file__).parent
CONTRACT = DOCS.parent / "src" / "metered_ai" / "testing" / "contract"

HEAD = """\
# How we keep the promise

<!-- Made by docs/promises.py from metered_ai.testing.contract: `make docs` writes it anew. -->

Each sentence below is the docstring of a test in `metered_ai.testing.LedgerContract`, which runs on every ledger: {count} promises.
After each test the ledger's own `verify` must find nothing broken. A ledger of your own can be put to the same test.

The contract says what a ledger does when nothing goes wrong around it. That the promise holds when something does is proved by
`tests/proof`: processes killed at every step, a power loss that takes what was never synced, full and read-only disks, storms of
threads, tasks and processes on credits for ten. `tests/client` tries every ending of a call.
"""


def page() -> str:
    # Read, not imported: the contract needs pytest, and pages are built without it.
    classes = {
        node.name: node
        for chapter in CONTRACT.glob("*.py")
        for node in ast.parse(chapter.read_text("utf-8")).body
        if isinstance(node, ast.ClassDef)
    }
    parts = [classes[base.id] for base in classes["LedgerContract"].bases if isinstance(base, ast.Name)]
    parts += [classes["SharedLedgerContract"], classes["ServiceLedgerContract"]]
    sections = [(_sentence(part), list(_promises(part))) for part in parts]
    text = HEAD.format(count=sum(len(promises) for _, promises in sections))
    for title, promises in sections:
        text += f"\n## {title.rstrip('.')}\n\n" + "".join(f"- {promise}\n" for promise in promises)
    return text


def _promises(part: ast.ClassDef) -> Iterator[str]:
    for test in part.body:
        if isinstance(test, ast.FunctionDef) and test.name.startswith("test_"):
            yield " ".join((ast.get_docstring(test) or test.name).split())


def _sentence(part: ast.ClassDef) -> str:
    """The first paragraph of a class's docstring."""
    return " ".join((ast.get_docstring(part) or part.name).partition("\n\n")[0].split())


if __name__ == "__main__":
    (DOCS / "promises.md").write_text(page(), "utf-8")
