"""Real servers, started once for each worker."""

from __future__ import annotations

import openai
import pytest

from metered_ai.testing.llama import LlamaServer


@pytest.fixture(scope="session")
def llama():
    """A real llama.cpp server that chats."""
    with LlamaServer() as server:
        yield server


@pytest.fixture(scope="session")
def llama_embedding():
    """A real llama.cpp server for embeddings."""
    with LlamaServer(embedding=True) as server:
        yield server


@pytest.fixture
def bare(llama):
    """The SDK's own client for `llama`."""
    with openai.OpenAI(base_url=llama.base_url, api_key="none", max_retries=0, timeout=60) as client:
        yield client
