"""Jupyter: in a real kernel nothing hangs, and a receipt shows itself."""

from __future__ import annotations

import html
import re

import nbformat
import pytest
from nbclient import NotebookClient

from metered_ai import bill_to

CELLS = [
    """
from metered_ai import AsyncMeteredOpenAI, InsufficientCreditsError, MeteredOpenAI, bill_to, connect
billing = connect()
billing.grant("ada", "generations", 5, id="order_1")
client, aclient = MeteredOpenAI(billing=billing), AsyncMeteredOpenAI(billing=billing)
""",
    """
with bill_to("ada") as bill:
    client.responses.create(model="gpt-5-mini", input="Hi")
    (await aclient.responses.create(model="gpt-5-mini", input="Hi")).output_text
    async for event in await aclient.responses.create(model="gpt-5-mini", input="Hi", stream=True):
        pass
bill
""",
    """
import asyncio
async def ask():
    with bill_to("ada"):
        try:
            await aclient.responses.create(model="gpt-5-mini", input="Hi")
        except InsufficientCreditsError:
            return "refused"
sorted(await asyncio.gather(*(ask() for _ in range(4))), key=str)
""",
    "await billing.abalance('ada', 'generations')",
]


def test_kernel(provider, tmp_path, monkeypatch):
    """Sync, async and streamed calls run in a notebook's cells; the receipt displays as a table; the kernel ends by itself."""
    monkeypatch.setenv("OPENAI_API_KEY", "test")
    monkeypatch.setenv("OPENAI_BASE_URL", provider.base_url)
    monkeypatch.setenv("METERED_AI_BILLING", f"sqlite:///{tmp_path / 'credits.db'}")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])

    NotebookClient(notebook, timeout=60, kernel_name="python3", shutdown_kernel="graceful").execute()
    receipt, answers, balance = (cell.outputs[-1].data for cell in notebook.cells[1:])

    assert "<Receipt {'generations': 3}>" == receipt["text/plain"]
    assert 3 == receipt["text/html"].count("gen_resp_")
    assert "[None, None, 'refused', 'refused']" == answers["text/plain"]
    assert "available=0" in balance["text/plain"]
    assert [] == [path.name for path in tmp_path.glob("credits.db.spool-*")]


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", 'a"b&c'])
def test_escaped(name, shop):
    """What a receipt shows is escaped, whatever customers, meters and operations are called."""
    shop.grant("ada", 5, meter=name)
    with bill_to("ada", meter=name, transaction_id=name) as bill:
        shop.client().responses.create(model="gpt-5-mini", input="Hi")
    shown = bill._repr_html_()

    assert name not in shown
    assert 3 == shown.count(html.escape(name))
    assert {"table", "thead", "tbody", "tfoot", "tr", "th", "td"} == set(re.findall(r"<(\w+)", shown))


def test_empty():
    """A receipt of nothing says so."""
    with bill_to("ada") as bill:
        assert "nothing" in bill._repr_html_()
