"""psycopg, imported when it is first needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import ConfigurationError

if TYPE_CHECKING:
    import psycopg

    Connection = psycopg.Connection[Any]
    Cursor = psycopg.RawCursor[Any]

__all__ = ["cursor_of", "load"]


def load() -> None:
    """Import the driver, or say how it is installed."""
    try:
        import psycopg
    except ImportError as error:
        raise ConfigurationError(
            f"a PostgreSQL ledger needs psycopg 3 ({error}); pip install 'metered-ai[postgres]'"
        ) from error
    if tuple(map(int, psycopg.__version__.split(".")[:2])) < (3, 3):
        raise ConfigurationError(
            f"psycopg {psycopg.__version__} is too old for a PostgreSQL ledger; pip install 'metered-ai[postgres]'"
        )


def cursor_of(connection: Connection) -> Cursor:
    """A cursor for statements with $1, $2 …, that gives tuples, whatever the connection's own are like."""
    import psycopg
    from psycopg.rows import tuple_row

    return psycopg.RawCursor(connection, row_factory=tuple_row)
