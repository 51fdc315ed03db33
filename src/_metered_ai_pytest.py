"""
The pytest plugin that comes with metered_ai: the `metered` fixture, with which an application proves its own billing, and `flowglad`.

```python
def test_a_summary_costs_one_credit(metered):
    metered.grant("ada", 5)
    summarize(metered.client(), customer="ada")

    assert [1] == [event.amount for event in metered.events("ada")]
```

pytest loads it in every run of every project, also where nothing is metered. It lies outside the package because importing that
imports the SDK, and because coverage counts only what is imported after it has started. `-p no:metered_ai` leaves it out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from metered_ai.testing.flowglad import FakeFlowglad
    from metered_ai.testing.plugin import Metered

__all__ = ["flowglad", "metered"]


@pytest.fixture
def metered(monkeypatch: pytest.MonkeyPatch) -> Iterator[Metered]:
    """
    An empty ledger in memory and a scripted provider: a `metered_ai.testing.plugin.Metered`.

    OPENAI_BASE_URL and OPENAI_API_KEY point to the provider, so clients that the application builds reach it too; give them
    `billing=metered.billing`.
    """
    from metered_ai.testing.plugin import start

    with start() as metered:
        monkeypatch.setenv("OPENAI_BASE_URL", metered.provider.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", "test")
        yield metered


@pytest.fixture
def flowglad(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeFlowglad]:
    """
    A Flowglad on loopback that answers as the real one was seen to: a `metered_ai.testing.FakeFlowglad`, with the meter "generations".

    FLOWGLAD_SECRET_KEY, FLOWGLAD_BASE_URL and FLOWGLAD_WEBHOOK_SECRET are those of this Flowglad, so whatever the application builds
    reaches it.
    """
    from metered_ai.testing.flowglad import FakeFlowglad

    with FakeFlowglad() as flowglad:
        flowglad.add_meter("generations")
        monkeypatch.setenv("FLOWGLAD_SECRET_KEY", flowglad.key)
        monkeypatch.setenv("FLOWGLAD_BASE_URL", flowglad.url)
        monkeypatch.setenv("FLOWGLAD_WEBHOOK_SECRET", flowglad.webhook_secret)
        yield flowglad
