"""What README.md and docs/ say is true: their snippets run and print what they say, and their tables are the code's."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

import metered_ai
from metered_ai import MeteredOpenAI, connect, per_call, per_token
from metered_ai.cli import main
from metered_ai.core import pricing
from metered_ai.core.endpoints import DOORS
from metered_ai.settings import Settings
from metered_ai.testing import FakeFlowglad

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# The tutorial is one program, followed in test_site; the pages of frameworks run where those are installed.
PAGES = [ROOT / "README.md", *sorted(page for page in DOCS.glob("*.md") if page.name != "tutorial.md")]
README = PAGES[0].read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

GO_ON = {"clients.md": None, "pricing.md": per_call(2), "ledger.md": None}
"""Pages whose snippets go on from their first one, with a client like that one's and its billing; and that client's pricing."""


class Snippet(NamedTuple):
    page: Path
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.name}:{self.line}"


def find_snippets():
    for page in PAGES:
        text = page.read_text("utf-8")
        for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            yield Snippet(page, text.count("\n", 0, found.start(2)) + 1, found[1], found[2])


SNIPPETS = list(find_snippets())
PYTHON = [snippet for snippet in SNIPPETS if snippet.language == "python"]
TESTS = [snippet for snippet in PYTHON if "\ndef test_" in snippet.text]
PROGRAMS = [snippet for snippet in PYTHON if snippet not in TESTS]
SHELL = [snippet for snippet in SNIPPETS if snippet.language == "sh"]


def first_of(page):
    return next(snippet for snippet in SNIPPETS if snippet.page == page)


def cells(text):
    """The rows of all tables in a text, as lists of cells."""
    rows = re.findall(r"^\| (.*) \|$", text, re.MULTILINE)
    return [[cell.strip() for cell in row.split(" | ")] for row in rows]


def match_up(line, said):
    """What was said of a line, if it may stand for it: "…" is any word."""
    return next((text for text in said if re.fullmatch(re.escape(text).replace("…", r"\w+"), line)), line)


@pytest.fixture
def here(tmp_path, monkeypatch, provider, flowglad):
    """A folder of its own, where the SDK finds the fake provider, and a ledger and a fake Flowglad on which ada has 100 credits."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "test")
    monkeypatch.setenv("OPENAI_BASE_URL", provider.base_url)
    monkeypatch.setenv("METERED_AI_BILLING", f"sqlite:///{tmp_path / 'metered_ai.db'}")
    monkeypatch.setenv("FLOWGLAD_SECRET_KEY", flowglad.key)
    monkeypatch.setenv("FLOWGLAD_BASE_URL", flowglad.url)
    flowglad.add_plan("free", credits={"generations": 100}, is_default=True)
    flowglad.add_plan("pro", unit_price=900)
    flowglad.add_customer("ada")
    return tmp_path


@pytest.fixture
def flowglad():
    """A Flowglad with the meter generations."""
    with FakeFlowglad() as flowglad:
        flowglad.add_meter("generations")
        yield flowglad


def test_found():
    """Snippets are found on every page but the list of promises, and in no language that nobody tries."""
    found = {page: [snippet.language for snippet in SNIPPETS if snippet.page == page] for page in PAGES}

    assert ["promises.md"] == [page.name for page in PAGES if not found[page]]
    # The SQL runs on a server, in tests/postgres.
    assert {"python", "sh", "sql", "text", "html", "js"} == {language for page in PAGES for language in found[page]}
    assert ["text", "python", "text"] == found[DOCS / "errors.md"]


@pytest.mark.parametrize("snippet", PROGRAMS, ids=[snippet.name for snippet in PROGRAMS])
def test_program(snippet, here, capsys):
    """A Python snippet runs as it stands, prints what the comments beside its prints say, and leaves no hold and a sound ledger."""
    code = compile("\n" * (snippet.line - 1) + snippet.text, snippet.page.name, "exec", dont_inherit=True)
    with connect(f"sqlite:///{here / 'page.db'}") as billing:
        billing.grant("ada", "generations", 100, id="page")
        names = {"__name__": snippet.name}
        if snippet.page.name in GO_ON and snippet != first_of(snippet.page):
            names |= {"client": MeteredOpenAI(billing=billing, pricing=GO_ON[snippet.page.name]), "billing": billing}
        exec(code, names)  # What is printed there goes through capsys.
        for made in [value for value in names.values() if isinstance(value, MeteredOpenAI)]:
            made.billing.close()

    said = re.findall(r"^\s*print\(.*\)  +# (.*)$", snippet.text, re.MULTILINE)
    after = [other for other in SNIPPETS if other.page == snippet.page and other.line > snippet.line]
    if after and after[0].language == "text":
        said += after[0].text.splitlines()
    printed = capsys.readouterr().out.splitlines()

    assert said == [match_up(line, said[at : at + 1]) for at, line in enumerate(printed)]
    for file in here.glob("*.db"):
        with connect(f"sqlite:///{file}") as billing:
            assert [] == list(billing.holds(state="open"))
            assert () == billing.verify().broken


@pytest.mark.parametrize("snippet", TESTS, ids=[snippet.name for snippet in TESTS])
def test_tests(snippet, pytester, monkeypatch):
    """A snippet of tests passes in a pytest of its own."""
    monkeypatch.setenv("PYTHONPATH", str(Path(metered_ai.__file__).parents[1]))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    # So that it is found whether or not the library is installed with its entry point.
    pytester.makeconftest(f"from {PROJECT['entry-points']['pytest11']['metered_ai']} import flowglad, metered")
    pytester.makepyfile(snippet.text)

    result = pytester.runpytest_subprocess("-W", "error", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=snippet.text.count("\ndef test_"))


@pytest.mark.parametrize("snippet", SHELL, ids=[snippet.name for snippet in SHELL])
def test_shell(snippet, here, monkeypatch, capsys):
    """In a shell snippet each target of make is there, each extra exists, and each command runs and succeeds, in the order given."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    for line in snippet.text.splitlines():
        match shlex.split(line, comments=True):
            case ["make", target]:
                assert target in targets
            case ["pip", "install", what]:
                assert what.removeprefix(".").strip("[]") in PROJECT["optional-dependencies"]
            case ["export", setting]:
                monkeypatch.setenv(*setting.split("=", 1))
            case ["metered-ai", *arguments]:
                code = main(arguments)

                assert (0, "") == (code, capsys.readouterr().err)
            case _:
                pytest.fail(f"nobody knows how to try {line!r}")


def test_policies():
    """README's table has every policy with its default, and no other."""
    table = cells(README.split("## Policies")[1].split("```")[0])

    assert {name: repr(field.default).replace("'", '"') for name, field in Settings.model_fields.items()} == {
        name.strip("`"): default.strip("`") for name, default, _ in table[2:]
    }


def test_endpoints():
    """The table of metered endpoints is the code's: which there are, which a token price can price, and what they report."""
    by_token = per_token(input=1, output=1)
    table = cells((DOCS / "pricing.md").read_text("utf-8").split("## What the endpoints report")[1])

    assert [
        [
            f"`{door.name}`",
            "yes" if by_token.can_price(door) else "no",
            ", ".join(f"`{name}`" for name in sorted(door.reports)) or "nothing",
        ]
        for door in DOORS.values()
        if door.access == "metered"
    ] == table[2:]


def test_constants():
    """The constants of holds are those in the code."""
    told = {
        name.strip("`"): what
        for what, name, _ in cells((DOCS / "pricing.md").read_text("utf-8").split("What the endpoints")[0])[2:]
    }
    held = {name: getattr(pricing, name) for name in pricing.__all__ if name.endswith("_TOKENS")}

    assert {
        name: f"{min(value.values())} to {max(value.values())}" if isinstance(value, dict) else str(value)
        for name, value in held.items()
    } == told


def test_errors():
    """The tree of errors is the one in the code."""
    tree = first_of(DOCS / "errors.md").text
    docstring = ast.get_docstring(ast.parse(Path(metered_ai.errors.__file__).read_text("utf-8")))

    assert docstring.split("```\n")[1] == tree


def test_promises():
    """The list of promises is the contract's; where it is not, `make docs` writes it anew."""
    page = runpy.run_path(str(DOCS / "promises.py"))["page"]

    assert page() == (DOCS / "promises.md").read_text("utf-8")


def test_commands():
    """The command line's page has every command."""
    from metered_ai.cli.commands import app

    table = cells((DOCS / "command-line.md").read_text("utf-8"))
    names = {command.name or command.callback.__name__ for command in app.registered_commands}

    assert names == {row[0].strip("`").split()[1] for row in table if row[0].startswith("`metered-ai ")}


def test_public_names():
    """Every public name is explained somewhere."""
    words = set(re.findall(r"\w+", "".join(page.read_text("utf-8") for page in PAGES)))

    assert set() == set(metered_ai.__all__) - words - {"Grant", "Hold", "Receipt", "UsageEvent", "UsageSum"}


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links(page):
    """Every link between pages leads somewhere, to its heading as well."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        path, _, heading = target.partition("#")
        to = page.parent / path if path else page

        assert to.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", to.read_text("utf-8"), re.MULTILINE)

            assert heading in [re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in titles]


def test_index():
    """Every page can be reached from the first one, and is in the site's menu."""
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    first = (DOCS / "index.md").read_text("utf-8")
    menu = tomllib.loads((ROOT / "zensical.toml").read_text("utf-8"))["project"]["nav"]
    entries = [
        inner for entry in menu for name in entry.values() for inner in (name if isinstance(name, list) else [entry])
    ]

    assert pages - {"index.md"} == {*re.findall(r"\]\((\S+\.md)\)", first)}
    assert pages == {name for entry in entries for name in entry.values()}
