"""The pages of docs/frameworks: what they show runs, and prints what they say, where their framework is installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import metered_ai
from metered_ai import connect
from metered_ai.testing.provider import Answer, FakeProvider

DOCS = Path(__file__).parents[2] / "docs" / "frameworks"

# Which module's presence tells that a page is to be run here. FastAPI is everywhere: its page is for the whole suite's environment.
NEEDS = {
    "celery": "celery",
    "django": "django",
    "fastapi": "django",
    "flask": "flask",
    "instructor": "instructor",
    "langchain": "langchain_openai",
    "litellm": "litellm",
    "llama-index": "llama_index",
    "openai-agents": "agents",
    "pydantic-ai": "pydantic_ai",
    "telemetry": "opentelemetry.sdk",
    "threads": "django",
}
SAYS = {"instructor": '{"name": "Ada"}'}


def is_here(module):
    return find_spec(module.partition(".")[0]) is not None and find_spec(module) is not None


HERE = [page for page, module in NEEDS.items() if is_here(module)]


def test_all_tried():
    """No page is left out."""
    assert set(NEEDS) == {page.stem for page in DOCS.glob("*.md")}


def match_up(line, said):
    """What was said of a line, if it may stand for it: "…" is any word."""
    return next((text for text in said if re.fullmatch(re.escape(text).replace("…", r"\w+"), line)), line)


@pytest.mark.parametrize("page", HERE)
def test_page(page, tmp_path):
    """The snippets of a page, one after the other, are a program that prints what the page says and leaves a sound ledger."""
    text = (DOCS / f"{page}.md").read_text("utf-8")
    program, said = "", []
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if language == "python":
            program += block
            said += re.findall(r"^\s*print\(.*\)  +# (.*)$", block, re.MULTILINE)
        else:
            assert "text" == language
            said += block.splitlines()
    (tmp_path / "page.py").write_text(program, "utf-8")
    url = f"sqlite:///{tmp_path / 'credits.db'}"

    with FakeProvider(default=Answer(text=SAYS.get(page, Answer().text))) as provider:
        ran = subprocess.run(
            [sys.executable, "-W", "ignore", "page.py"],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": str(Path(metered_ai.__file__).parents[1]),
                "METERED_AI_BILLING": url,
                "OPENAI_API_KEY": "test",
                "OPENAI_BASE_URL": provider.base_url,
            },
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    assert 0 == ran.returncode, ran.stderr
    printed = ran.stdout.splitlines()
    assert said == [match_up(line, said[at : at + 1]) for at, line in enumerate(printed)]
    with connect(url) as billing:
        assert [] == list(billing.holds(state="open"))
        assert () == billing.verify().broken
