"""What every test finds: a provider on loopback, no way out of this machine, and no settings of the person who runs it."""

from __future__ import annotations

import os
import signal
import sys
from ipaddress import ip_address

import pytest
from hypothesis import settings

from metered_ai.testing.provider import FakeProvider
from tests.postgres.server import drop_schemas, new_schema, server, with_schema

# A slow machine is no bug, and a failing example must be seen again by whoever repeats the run.
settings.register_profile("suite", deadline=None, print_blob=True)
settings.load_profile("suite")

for name in [name for name in os.environ if name.startswith(("OPENAI_", "AZURE_OPENAI_", "METERED_AI_", "FLOWGLAD_"))]:
    if name not in ("METERED_AI_LONG", "METERED_AI_TEST_POSTGRES"):
        del os.environ[name]
for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
    # pytest-xdist gives its workers a terminal's size; what is printed into a pipe must not depend on it.
    os.environ.pop(name, None)
# Nothing here speaks TLS, and reading a hundred certificates for each of thousands of clients would take half of the time.
os.environ.pop("SSL_CERT_FILE", None)
os.environ["SSL_CERT_DIR"] = os.path.dirname(__file__)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs in the background deaf to Ctrl-C, and so would every command be that a test starts from here.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def stay_home(event: str, arguments: tuple) -> None:
    """Refuse every connection that would leave this machine, whoever opens it."""
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
        if host != "localhost" and not ip_address(host).is_loopback:
            raise PermissionError(f"a test tried to reach {host}")


sys.addaudithook(stay_home)


@pytest.fixture
def provider():
    """A provider that answers well until a test scripts otherwise."""
    with FakeProvider() as provider:
        yield provider


@pytest.fixture(scope="session")
def postgres_server():
    """The URL of a real PostgreSQL server, started when the first test asks for it."""
    with server() as url:
        yield url


@pytest.fixture
def postgres(postgres_server):
    """The URL of a ledger in an empty schema of its own."""
    schema = new_schema()
    yield with_schema(postgres_server, schema)
    drop_schemas(postgres_server, [schema])
