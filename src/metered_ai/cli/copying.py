"""`metered-ai copy`: moves a ledger up."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import BillingUnavailableError, ConfigurationError
from ..urls import billing_url
from . import show
from .commands import Json, app, has_content

if TYPE_CHECKING:
    from ..ledger.copying import Progress

__all__ = ["copy"]


@app.command()
def copy(
    source: Annotated[str, typer.Argument(metavar="FROM", help="The ledger to copy, such as sqlite:///credits.db.")],
    target: Annotated[str, typer.Argument(metavar="TO", help="Where to: postgresql://host/database, a new schema.")],
    wait: Annotated[
        float | None,
        typer.Option(
            "--wait",
            min=0,
            metavar="SECONDS",
            help="Wait so long for calls in flight to end, instead of refusing at once.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """
    Copy a SQLite ledger into PostgreSQL, for an application that grows beyond one machine.

    Stop the application first. The source is locked while it is copied, and stays as it is; then both are verified and compared row by
    row. Nobody can bill on the copy before that. Killed, the same command goes on where it was; done, it changes nothing.

    JSON: source, target, rows (by table), accounts, events, grants, was_done.
    """
    from_url, to_url = billing_url(source), billing_url(target)
    if not from_url.startswith("sqlite:") or not to_url.startswith("postgresql:"):
        raise ConfigurationError(
            "a ledger is copied from sqlite:///file.db to postgresql://host/database, no other way"
        )
    from ..ledger.copying import copy_ledger
    from ..ledger.postgres import PostgresLedger
    from ..ledger.sqlite import SqliteLedger

    path = from_url.removeprefix("sqlite:///")
    if not has_content(path):
        raise BillingUnavailableError(f"there is no ledger at {path!r}")
    with (
        closing(SqliteLedger(path, auto_migrate=False)) as here,
        closing(PostgresLedger(to_url)) as there,
        _progress(is_shown=not json) as tell,
    ):
        copied = copy_ledger(here, there, wait=wait or 0.0, tell=tell)

    if json:
        show.print_json(show.plain(copied))
        return
    out = show.console()
    if copied.was_done:
        out.print(f"{copied.target} was copied from it before. Nothing was done.")
        return
    out.print(
        f"Copied {show.count(copied.accounts, 'account')}, {show.count(copied.events, 'usage event')} and "
        f"{show.count(copied.grants, 'grant')} to {copied.target}."
    )
    out.print("Both ledgers are sound, and equal row by row. Bill through the new one from now on.")


@contextmanager
def _progress(*, is_shown: bool) -> Generator[Callable[[Progress], None]]:
    if not is_shown:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    with Bars(console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def tell(progress: Progress) -> None:
            if progress.work not in tasks:
                tasks[progress.work] = bars.add_task(progress.work, total=progress.total)
            bars.update(tasks[progress.work], completed=progress.done)

        yield tell
