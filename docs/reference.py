"""Writes reference/: every public name with its signature, in the words of its docstring. `make docs` runs it."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

DOCS = Path(__file__).parent
SOURCE = DOCS.parent / "src" / "metered_ai"

INTEGRATIONS = "asgi starlette fastapi django flask refusals celery threads otel logs observed".split()

PAGES = {
    "metered_ai.md": ("metered_ai", ["__init__"]),
    "prices.md": ("metered_ai.prices", ["prices"]),
    "integrations.md": ("metered_ai.integrations", [f"integrations/{name}" for name in INTEGRATIONS]),
    "ledger.md": ("metered_ai.ledger", ["ledger/__init__", "ledger/reports", "core/steps"]),
    "services.md": ("metered_ai.services", ["services/__init__"]),
    "testing.md": ("metered_ai.testing", ["testing/provider", "testing/plugin", "testing/llama", "testing/answers"]),
}
"""Each page with its title and the modules whose public names are on it."""

HEAD = """\
# {title}

<!-- Made by docs/reference.py from the docstrings: `make docs` writes it anew. -->
"""

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def pages() -> dict[str, str]:
    """The text of each page, by its name."""
    return {name: _page(*what) for name, what in PAGES.items()}


def _page(title: str, modules: list[str]) -> str:
    # Read, not imported: pages are built without what the library needs.
    text = HEAD.format(title=title)
    for module in modules:
        path = SOURCE / f"{module}.py"
        tree = ast.parse(path.read_text("utf-8"))
        text += _module(path, tree, _exported(tree), is_alone=len(modules) == 1)
    return text


def _module(path: Path, tree: ast.Module, names: list[str], *, is_alone: bool) -> str:
    parts = [part for part in path.relative_to(SOURCE).with_suffix("").parts if part != "__init__"]
    text = "" if is_alone else f"\n## {'.'.join(['metered_ai', *parts])}\n"
    text += _told(tree)
    for name in names:
        found = _find(path, tree, name)
        if found is not None:
            text += _definition(*found, "##" if is_alone else "###")
    return text


def _exported(tree: ast.Module) -> list[str]:
    """The names in `__all__`, in its order."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return [ast.literal_eval(name) for name in node.value.elts]
    return []


def _find(path: Path, tree: ast.Module, name: str) -> tuple[Definition, ast.Module] | None:
    """A name's definition and its module: here, or where this module has it from. None for what is neither a class nor a function."""
    for node in tree.body:
        if isinstance(node, Definition) and node.name == name:
            return node, tree
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and name in [alias.asname or alias.name for alias in node.names]:
            folder = path.parents[node.level - 1] if node.level else SOURCE.parent
            base = folder.joinpath(*(node.module or "").split("."))
            other = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
            original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
            return _find(other, ast.parse(other.read_text("utf-8")), original) if other.exists() else None
    return None


def _definition(node: Definition, tree: ast.Module, level: str) -> str:
    text = f"\n{level} {node.name}\n" + _code(_signature(node)) + _told(node)
    if isinstance(node, ast.ClassDef):
        for member in _members(node, tree):
            text += f"\n{level}# {node.name}.{member.name}\n" + _code(_signature(member)) + _told(member)
    return text


def _members(node: ast.ClassDef, tree: ast.Module) -> Iterator[Definition]:
    """Public methods and properties, those of private bases as well; of a property that can be set, what reads it."""
    for member in node.body:
        if isinstance(member, Definition) and not member.name.startswith("_"):
            decorators = [ast.unparse(decorator) for decorator in member.decorator_list]
            if not any(decorator.endswith(".setter") for decorator in decorators):
                yield member
    for base in [ast.unparse(base) for base in node.bases]:
        hidden = next((part for part in ast.walk(tree) if isinstance(part, ast.ClassDef) and part.name == base), None)
        if base.startswith("_") and hidden is not None:
            yield from _members(hidden, tree)


def _signature(node: Definition) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases if not ast.unparse(base).startswith("_"))
        lines = [f"class {node.name}({bases})" if bases else f"class {node.name}"]
        made = _constructor(node)
        if made is not None:
            lines.append(_wrapped(node.name, made.args, None))
        # A record's fields.
        lines += [
            f"    {ast.unparse(field)}"
            for field in node.body
            if isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and not field.target.id.startswith("_")
            and "ClassVar" not in ast.unparse(field.annotation)
        ]
        return "\n".join(lines)
    if any(ast.unparse(decorator) in ("property", "cached_property") for decorator in node.decorator_list):
        return f"{node.name}: {ast.unparse(node.returns) if node.returns else 'object'}"
    return ("async " if isinstance(node, ast.AsyncFunctionDef) else "") + _wrapped(node.name, node.args, node.returns)


def _constructor(node: ast.ClassDef) -> ast.FunctionDef | None:
    """`__init__`, also where only type checkers see it."""
    inside = [*node.body, *(inner for part in node.body if isinstance(part, ast.If) for inner in part.body)]
    return next((part for part in inside if isinstance(part, ast.FunctionDef) and part.name == "__init__"), None)


def _wrapped(name: str, arguments: ast.arguments, returns: ast.expr | None) -> str:
    """A signature without `self`, one argument a line where it is long."""
    own = ast.unparse(arguments).removeprefix("self").removeprefix("cls").removeprefix(", ").removeprefix("/, ")
    after = f" -> {ast.unparse(returns)}" if returns is not None else ""
    if len(name) + len(own) + len(after) <= 100:
        return f"{name}({own}){after}"
    return f"{name}(\n" + "".join(f"    {part},\n" for part in _split(own)) + f"){after}"


def _split(arguments: str) -> Iterator[str]:
    depth, part = 0, ""
    for character in arguments:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            yield part.strip()
            part = ""
        else:
            part += character
    yield part.strip()


def _code(text: str) -> str:
    return f"\n```text\n{text}\n```\n"


def _told(node: Definition | ast.Module) -> str:
    docstring = ast.get_docstring(node)
    return f"\n{inspect.cleandoc(docstring)}\n" if docstring else ""


if __name__ == "__main__":
    for name, text in pages().items():
        (DOCS / "reference" / name).write_text(text, "utf-8")
