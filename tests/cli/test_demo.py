"""The demonstration runs whole against a real server and against a scripted one, and fails when something does not hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import metered_ai
from metered_ai.cli import demo

# It starts a process that must die, waits for a lease, and may share the machine with others.
pytestmark = pytest.mark.timeout(120)


def run(*arguments, **environment):
    """`metered-ai demo` as `make demo` runs it."""
    return subprocess.run(
        [sys.executable, "-m", "metered_ai.cli", "demo", *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(metered_ai.__file__).parents[1]), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def as_openai(provider):
    return {"OPENAI_API_KEY": "test", "OPENAI_BASE_URL": provider.base_url}


def test_real(tmp_path):
    """On a real server every step holds, tokens are compared with the server's own count, and nothing is left behind."""
    ran = run(TMPDIR=str(tmp_path))
    lines = ran.stdout.splitlines()

    assert ("", 0) == (ran.stderr, ran.returncode)
    assert [f"{n}." for n in range(1, 10)] == [line.split()[0] for line in lines if line[:1].isdigit()]
    assert 11 == sum(line.startswith("  ok ") for line in lines)
    assert "  ok the ledger and the server agree, token by token" in lines
    assert "  ok 5 were answered, 5 were refused before anything was sent" in lines
    assert "  ok every invariant of the ledger holds" in lines
    assert demo.NEXT == lines[-1]
    assert "\x1b" not in ran.stdout
    assert [] == [name for name in os.listdir(tmp_path) if name.startswith("metered-ai-demo-")]


def test_openai(provider):
    """With a key it is OpenAI that is called: ten calls, five refused ones never leave, and the figures come as JSON."""
    ran = run("--json", **as_openai(provider))
    told = json.loads(ran.stdout)

    assert ("", 0) == (ran.stderr, ran.returncode)
    assert 10 == len(provider.requests)
    assert {"gpt-5-mini"} == {request.body["model"] for request in provider.requests}
    assert "is_sound server at_once refusal tokens recovery verify balances".split() == list(told)
    assert (True, "openai") == (told["is_sound"], told["server"])
    assert {"answered": 5, "refused": 5} == told["at_once"]
    assert (0, 1) == (told["refusal"]["availableBalance"], told["refusal"]["required"])
    assert {"input": 10, "output": 9, "credits": 46} == told["tokens"]
    assert (1, 1) == (told["recovery"]["released"], told["recovery"]["in_doubt"])
    assert [] == told["verify"]["broken"]


def test_no_stream(provider):
    """A call that fails ends it: exit 1 and one line that says why."""
    provider.answer(status=400, path="/responses")
    ran = run(**as_openai(provider))

    assert 1 == ran.returncode
    assert ran.stderr.startswith("metered-ai: the demonstration failed: BadRequestError:")
    assert 1 == ran.stderr.count("\n")
    assert demo.NEXT not in ran.stdout


def test_broken_promise(provider):
    """A figure that is not what was promised ends it: exit 1, and the promise is named."""
    # The call priced by tokens comes after a call, a response and five at once; its usage is missing.
    provider.answer(times=2, path="/chat/completions")
    provider.answer(times=5, path="/chat/completions")
    provider.answer(usage="never", path="/chat/completions")
    ran = run(**as_openai(provider))

    assert 1 == ran.returncode
    assert "metered-ai: the demonstration failed: this did not hold: charged for what was used, once\n" == ran.stderr


def test_no_server(monkeypatch, capsys):
    """Without a key and without the packages of the server it says what to install: exit 2."""
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    code = demo.run_demo(as_json=False)
    err = capsys.readouterr().err

    assert (2, 1) == (code, err.count("\n"))
    assert "pip install 'metered-ai[demo]'" in err


def test_shown_is_run():
    """What is shown of a step are its own lines, without what it only returns to be checked."""

    def step(client):
        answer = client.ask()
        return answer

    def lone(client):
        return client.ask()

    assert "answer = client.ask()" == demo._body(step)
    assert "client.ask()" == demo._body(lone)
