"""What an error of PostgreSQL or its driver means: try again, wait for a lock, or this one row; and its words without secrets."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ...errors import BillingUnavailableError, ConfigurationError, LedgerCorruptError, MeteringError

__all__ = ["cleaned", "is_locked", "is_lost", "is_mistaken", "is_passing", "is_race", "state_of", "translate"]

_LOCKED = frozenset({"55P03"})
# Two transactions made the same account at once, or met in a deadlock: the loser finds things settled when it comes again.
_RACES = frozenset({"23505", "40001", "40P01"})
# Beside class 08 (connection) and 57 (intervention, which a shutdown and a cancelled statement are), where the server is not what it
# was a moment ago: too many connections, an idle transaction that was ended, a standby after a fail-over.
_PASSING = frozenset({"53300", "25P03", "25P04", "25006", "55000", "40003"})
# A refused connection has no SQLSTATE in libpq. These are the server's and libpq's own words; a server that speaks another language is
# taken for one that is away, and tried again.
_MISTAKEN = re.compile(
    r"authentication failed|pg_hba\.conf|(?:role|database) \".*\" does not exist|is not permitted to log in"
    r"|permission denied for database|no such user|no such database"
)
_URL_PASSWORD = re.compile(r"(?<=://)([^/?#\s@]*):[^/?#\s]*@")
_KEYWORD_PASSWORD = re.compile(
    r"(?i)\b(pass(?:word)?|sslpassword|oauth_client_secret)\s*=\s*('(?:[^'\\]|\\.)*'|[^\s&]+)"
)


def cleaned(text: str, secrets: Iterable[str] = ()) -> str:
    """An error's words in one line, with everything blotted out that is a password or looks like one."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, "…")
    text = _URL_PASSWORD.sub(r"\1:…@", text)
    text = _KEYWORD_PASSWORD.sub(r"\1=…", text)
    return " ".join(text.split())[:500]


def state_of(error: BaseException) -> str | None:
    """The SQLSTATE that the server gave, if it was the server."""
    state: str | None = getattr(error, "sqlstate", None)
    return state


def is_locked(error: BaseException) -> bool:
    """Somebody else has the row; nothing was done."""
    return state_of(error) in _LOCKED


def is_race(error: BaseException) -> bool:
    """Nothing was done, and the same again at once will go well."""
    return state_of(error) in _RACES


def is_mistaken(error: BaseException) -> bool:
    """The server refused the connection for who asks or for what: trying again changes nothing."""
    state = state_of(error)
    if state is not None:
        return state[:2] == "28" or state == "3D000"
    # libpq's own: the server asks for a password, and there is none.
    if getattr(getattr(error, "pgconn", None), "needs_password", False):
        return True
    return _MISTAKEN.search(str(error)) is not None


def is_passing(error: BaseException) -> bool:
    """The server, or the way there, is not available now; the same may go well later."""
    import psycopg

    state = state_of(error)
    if state is None:
        # The driver's own: no connection, or one that was lost. A wrong use of it is another kind of error.
        return isinstance(error, psycopg.OperationalError | OSError)
    return state[:2] in ("08", "57") or state in _PASSING or (state[:2] == "53" and state != "53100")


def is_lost(error: BaseException) -> bool:
    """The driver's or the server's word that an answer was lost, so that nobody knows whether the step was done."""
    import psycopg

    state = state_of(error)
    return isinstance(error, psycopg.Error) and (state is None or state[:2] in ("08", "57") or state == "40003")


def translate(error: Exception, name: str, secrets: Iterable[str] = ()) -> Exception:
    """What an error means for a caller; to be raised `from` it if it says nothing secret."""
    import psycopg

    if isinstance(error, MeteringError) or (isinstance(error, ValueError) and not isinstance(error, UnicodeError)):
        return error
    if isinstance(error, UnicodeError | psycopg.DataError | OverflowError):
        return ValueError(f"a value of the step cannot be stored: {cleaned(str(error), secrets)}")
    if not isinstance(error, psycopg.Error | OSError):
        return error
    primary = error.diag.message_primary if isinstance(error, psycopg.Error) else None
    words = cleaned(primary or str(error), secrets)
    state = state_of(error)
    if state is None or is_passing(error):
        return BillingUnavailableError(f"the ledger {name} cannot be used now: {words}")
    if state == "42501":
        return ConfigurationError(
            f"the ledger {name} refuses this role something that it needs: {words}; its owner can run what "
            "`metered-ai migrate --sql --role` prints"
        )
    if state[:2] == "28" or state == "3D000":
        return ConfigurationError(f"the ledger {name} refuses the connection: {words}")
    if state[:2] == "23":
        return LedgerCorruptError(f"the ledger {name} contradicts itself: {words}; run verify")
    if state[:2] == "42" or state == "3F000":
        return LedgerCorruptError(f"the ledger {name} is not as its schema says: {words}")
    return BillingUnavailableError(f"the ledger {name} cannot be used: {words}")
