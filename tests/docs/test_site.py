"""The pages of frameworks, the tutorial and the reference: complete, linked, and true."""

from __future__ import annotations

import re
import runpy
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

import metered_ai
from metered_ai import prices
from metered_ai.cli import main
from metered_ai.testing.provider import FakeProvider

DOCS = Path(__file__).parents[2] / "docs"
FOLDERS = sorted(page for page in DOCS.glob("*/*.md"))
TUTORIAL = (DOCS / "tutorial.md").read_text("utf-8")
REFERENCE = runpy.run_path(str(DOCS / "reference.py"))


def test_reference_current():
    """The reference is the docstrings'; where it is not, `make docs` writes it anew."""
    assert REFERENCE["pages"]() == {page.name: page.read_text("utf-8") for page in (DOCS / "reference").glob("*.md")}


def test_reference_complete():
    """Every public name, and every method of it, is there with what it promises."""
    text = "".join(page.read_text("utf-8") for page in (DOCS / "reference").glob("*.md"))
    entries = re.findall(r"^#{2,4} ([\w.]+)\n\n```text\n.*?^```\n\n?(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    names = {name for name, _ in entries}
    promised = {
        *metered_ai.__all__,
        *prices.__all__,
        *(f"Billing.{name}" for name in vars(metered_ai.Billing) if not name.startswith("_")),
        *(f"{client}.with_billing" for client in ("MeteredOpenAI", "AsyncMeteredOpenAI", "MeteredAzureOpenAI")),
        "BillingMiddleware",
        "billed_client",
        "add_billing",
        "carry_billing",
        "instrument",
        "log_steps",
        "Ledger",
        "BillingService",
        "FakeProvider",
        "Metered.client",
    }

    assert set() == promised - names
    assert [] == [name for name, told in entries if not told.strip()]


@pytest.mark.parametrize("page", FOLDERS, ids=[str(page.relative_to(DOCS)) for page in FOLDERS])
def test_links(page):
    """Every link leads somewhere, to its heading as well."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        to = page.parent / path if path else page

        assert to.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", to.read_text("utf-8"), re.MULTILINE)

            assert heading in [re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in titles]


# The tutorial, as a person would follow it.

BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TUTORIAL, re.MULTILINE | re.DOTALL)


@pytest.fixture
def follower(tmp_path, monkeypatch, capsys):
    """A folder with the tutorial's application, served, and a way to do what its shell lines say."""
    shop, pricing, test = (block for language, block in BLOCKS if language == "python")
    (tmp_path / "shop.py").write_text(shop, "utf-8")
    (tmp_path / "test_shop.py").write_text(test, "utf-8")
    # So that the fixture is found whether or not the library is installed with its entry point.
    (tmp_path / "conftest.py").write_text("from _metered_ai_pytest import metered\n", "utf-8")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with FakeProvider() as provider:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(Path(metered_ai.__file__).parents[1]))
        monkeypatch.setenv("OPENAI_API_KEY", "test")
        monkeypatch.setenv("OPENAI_BASE_URL", provider.base_url)
        exec(pricing, {})
        yield Follower(tmp_path, port, provider, capsys)


class Follower:
    def __init__(self, folder, port, provider, capsys):
        self.folder = folder
        self.port = port
        self.provider = provider
        self.capsys = capsys
        self.servers = []

    def run(self, *arguments):
        done = subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert 0 == done.returncode, done.stdout + done.stderr

    def follow(self, line):
        """What the line prints, if it is a request."""
        match shlex.split(line, comments=True):
            case ["pip", "install", extra, *_]:
                assert ".[cli]" == extra
            case ["export", _]:
                pass
            case ["uvicorn", app]:
                self.serve(app)
            case ["metered-ai", *arguments]:
                assert (0, "") == (main(arguments), self.capsys.readouterr().err)
            case ["pytest", *arguments]:
                self.run("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)
            case ["curl", "-X", method, "-H", header, url]:
                name, _, value = header.partition(": ")
                answer = httpx.request(method, url.replace(":8000", f":{self.port}"), headers={name: value})
                return f"{answer.status_code} {answer.text}"
            case _:
                pytest.fail(f"nobody knows how to follow {line!r}")
        return None

    def serve(self, app):
        server = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", app, "--port", str(self.port), "--log-level", "warning"],
        )
        self.servers.append(server)
        until = time.monotonic() + 30
        while time.monotonic() < until:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except ConnectionRefusedError:
                # It says nowhere when it listens.
                time.sleep(0.05)
            else:
                return
        pytest.fail("the tutorial's server did not start")

    def stop(self):
        for server in self.servers:
            server.terminate()
            server.wait(20)


def test_tutorial(follower):
    """Whoever follows the tutorial from its first line to its last sees what it says."""
    said, seen = [], []
    try:
        for language, block in BLOCKS:
            if language == "sh":
                seen += [line for line in map(follower.follow, block.splitlines()) if line is not None]
            elif language == "text":
                said += block.splitlines()
            else:
                assert "python" == language
    finally:
        follower.stop()

    assert said == seen
    assert (follower.folder / "metered_ai.db").exists()
    assert 2 == len(follower.provider.requests)
