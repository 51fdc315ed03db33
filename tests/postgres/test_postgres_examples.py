"""The examples that need PostgreSQL run as they stand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import metered_ai
from tests.postgres.server import new_schema

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_payment_webhook(postgres: str, tmp_path: Path) -> None:
    """An order and its grant come together, once, and one that fails leaves neither."""
    plain, _, schema = postgres.rpartition("schema=")
    schema = schema or new_schema()
    # The application's own tables may stand anywhere in the database; here beside the ledger's, where nobody else's are.
    assert (
        0
        == subprocess.run(
            [sys.executable, "-m", "metered_ai.cli", "migrate", "--ledger", postgres],
            env=environment(),
            check=False,
            stdout=subprocess.DEVNULL,
        ).returncode
    )
    parts = urlsplit(plain.rstrip("?&"))
    query = f"{parts.query}&options=-csearch_path%3D{schema}" if parts.query else f"options=-csearch_path%3D{schema}"
    assert "schema" not in parse_qs(parts.query)
    ran = subprocess.run(
        [sys.executable, EXAMPLES / "payment_webhook.py"],
        env=environment(
            METERED_AI_BILLING=postgres, DATABASE_URL=parts._replace(scheme="postgresql+psycopg", query=query).geturl()
        ),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert ("", 0) == (ran.stderr, ran.returncode)
    assert ["order_2 is refused", "orders: 1", "credits: 100"] == ran.stdout.splitlines()


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(metered_ai.__file__).parents[1]), **more}
