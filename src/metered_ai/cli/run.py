"""Runs one command: every mistake becomes one line on stderr and an exit code."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from io import TextIOWrapper

import typer

from ..errors import GrantConflictError, InsufficientCreditsError, MeteringError
from .commands import app
from .copying import copy
from .show import shown

__all__ = ["run"]

REFUSED, USAGE = 1, 2

app.command()(copy)


def run(arguments: Sequence[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A terminal that knows fewer characters than a customer's name is no reason to fail.
            stream.reconfigure(errors="backslashreplace")
    logger, handler = logging.getLogger("metered_ai"), _OneLine()
    logger.addHandler(handler)
    try:
        return _run(arguments)
    finally:
        logger.removeHandler(handler)


def _run(arguments: Sequence[str]) -> int:
    try:
        code = app(list(arguments) or ["--help"], prog_name="metered-ai", standalone_mode=False)
    except typer.TyperException as error:
        return _complain(error.format_message(), USAGE)
    except (GrantConflictError, InsufficientCreditsError) as error:
        return _complain(str(error), REFUSED)
    except (MeteringError, ValueError, OSError) as error:
        return _complain(str(error), USAGE)
    return code if isinstance(code, int) else 0


def _complain(message: str, code: int) -> int:
    print(f"metered-ai: {shown(' '.join(message.split()))}", file=sys.stderr)
    return code


class _OneLine(logging.Handler):
    """What the library warns of, in one line each."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        print(f"metered-ai: {record.levelname.lower()}: {shown(record.getMessage())}", file=sys.stderr)
