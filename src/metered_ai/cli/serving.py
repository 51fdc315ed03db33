"""`metered-ai serve`: the operator's view in a browser of this machine."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable
from importlib.util import find_spec
from typing import Annotated

import typer

from ..core.checks import check_name
from ..errors import ConfigurationError
from .commands import ForCustomer, Ledger, app, opened

__all__ = ["serve"]


@app.command()
def serve(
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")] = 0,
    minutes: Annotated[
        float, typer.Option("--minutes", min=0.1, max=15, help="How long a link, and then its session, is good.")
    ] = 15.0,
    customer: ForCustomer = None,
    ledger: Ledger = None,
) -> int:
    """
    Show the ledger in a browser: customers, meters, holds in flight, calls in doubt, debt, outbox, verify.

    Listens on 127.0.0.1 only and prints a link that is good once, for 15 minutes; in a terminal, Enter prints a new one. It reads and
    changes nothing. Ctrl-C ends it. Needs the extra `web`.
    """
    missing = [name for name in ("starlette", "jinja2", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ConfigurationError(f"{', '.join(missing)} is not installed: pip install 'metered-ai[web]'")
    if customer is not None:
        check_name(customer, "--customer")

    from uvicorn import Config, Server

    from ..web.operator import OperatorView
    from ..web.tokens import Tokens

    with opened(ledger, is_read=True) as billing:
        # Before anything listens: a ledger that cannot be read is a mistake to tell here.
        billing.balance("serve", "serve")
        sock = _listen(port)
        bound = sock.getsockname()[1]
        hosts = [f"{name}:{bound}" for name in ("127.0.0.1", "localhost")]
        view = OperatorView(billing, Tokens(), hosts=hosts, seconds=minutes * 60, customer=customer)
        # Its log would show the links.
        config = Config(view, log_level="error", access_log=False, server_header=False, lifespan="off", ws="none")
        server = Server(config)

        def tell() -> None:
            print(f"http://127.0.0.1:{bound}{view.link()}", flush=True)

        tell()
        if sys.stdin.isatty():
            print(f"Good once, for {minutes:g} minutes; Enter prints a new one. Ctrl-C ends.", file=sys.stderr)
            threading.Thread(target=_on_enter, args=(tell,), name="metered-ai-links", daemon=True).start()
        try:
            server.run(sockets=[sock])
        except KeyboardInterrupt:
            # How it is meant to end.
            return 0
        finally:
            sock.close()
    return 0


def _listen(port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        # Never any other address: who can reach this sees every customer.
        sock.bind(("127.0.0.1", port))
        # Now, so that whoever is quick to follow the link waits for the server instead of being turned away.
        sock.listen()
    except OSError as error:
        sock.close()
        raise ConfigurationError(f"port {port} cannot be had on 127.0.0.1: {error.strerror}") from error
    return sock


def _on_enter(tell: Callable[[], None]) -> None:
    for _ in sys.stdin:
        tell()
