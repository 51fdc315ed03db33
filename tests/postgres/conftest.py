"""What the proofs on a fleet's ledger need: a server that may be stopped, a spool apart from everybody's, children that may be killed."""

from __future__ import annotations

import pytest

from tests.postgres.own_server import OwnServer
from tests.postgres.server import drop_schemas, new_schema, with_schema
from tests.proof.conftest import fork, say

__all__ = ["fork", "say"]


@pytest.fixture(scope="session")
def own_postgres_server():
    """A server that tests may stop and start."""
    server = OwnServer()
    yield server
    server.close()


@pytest.fixture
def own_server(own_postgres_server):
    """The server, which runs again, with all its backends, when the test is over."""
    yield own_postgres_server
    own_postgres_server.restore()


@pytest.fixture
def own_url(own_server):
    """The URL of a ledger on it, in an empty schema."""
    schema = new_schema()
    yield with_schema(own_server.url, schema)
    own_server.restore()
    drop_schemas(own_server.url, [schema])


@pytest.fixture
def spool(tmp_path):
    """A folder for what waits for the ledger, for every process of the test."""
    return str(tmp_path / "spool")
