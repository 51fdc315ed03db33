"""Opens a ledger's file: creates it, knows it again, refuses what is not ours, and says in our words what went wrong."""

from __future__ import annotations

import os
import re
import sqlite3
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import BillingUnavailableError, ConfigurationError, LedgerCorruptError, MeteringError, SchemaTooNewError
from .statements import read_migration

__all__ = [
    "APPLICATION_ID",
    "MIGRATIONS",
    "Identity",
    "check_identity",
    "connect",
    "create",
    "has_long_log",
    "is_broken",
    "is_locked",
    "migrate",
    "network_file_system",
    "prepare",
    "refuse_network",
    "settle_down",
    "sync_folder",
    "translate",
]

APPLICATION_ID = 0x4D654149
"""Says in the file's header that it is a ledger ("MeAI")."""

MIGRATIONS = ("0001_first.sql", "0002_outbox.sql")
"""In order; a file's user_version is how many of them it has had."""

OLDEST_SQLITE = (3, 35, 0)

PAGE_SIZE = 2048
"""Small pages: each page that a transaction touches is written whole."""

WAL_KEPT = 16 * 1024 * 1024
"""What the write-ahead log is cut back to after it has grown beyond."""

Identity = tuple[int, int]
"""Device and inode: which file a path means."""

_NETWORK = re.compile(
    r"nfs\d?|cifs|smb\w*|9p|afs|lustre|ceph|glusterfs|ocfs2|gfs2?|beegfs|davfs2?|ncpfs|coda|"
    r"fuse\.(sshfs|s3fs|gcsfuse|rclone|davfs2?|goofys|glusterfs|ceph|cephfs|smbnetfs|curlftpfs|juicefs|mount-s3)"
)


def network_file_system(folder: str, mounts: str) -> str | None:
    """
    The type of the network file system that holds a folder, by the text of /proc/self/mountinfo; None if it is local.

    SQLite's locks and its shared memory do not work over a network: two machines would both spend the last credit.
    """
    folder = os.path.realpath(folder)
    best, found = -1, None
    for line in mounts.splitlines():
        left, separator, right = line.partition(" - ")
        fields = left.split(" ")
        if not separator or len(fields) < 5:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
        if (folder == point or folder.startswith(point.rstrip("/") + "/")) and len(point) >= best:
            best, found = len(point), right.split(" ", 1)[0]
    return found if found is not None and _NETWORK.fullmatch(found) else None


def refuse_network(folder: str) -> None:
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            mounts = file.read()
    except OSError:
        # Not Linux, or no /proc: unknown is allowed.
        return
    found = network_file_system(folder, mounts)
    if found is not None:
        raise ConfigurationError(
            f"the ledger's folder {folder!r} is on a network file system ({found}), where SQLite cannot lock; "
            "use a local disk, or PostgreSQL for several machines"
        )


def create(path: str) -> bool:
    """Create an empty file for a ledger, readable by its owner only; tell whether it is new. Its folder must exist."""
    folder = os.path.dirname(path)
    try:
        # Exclusive, so that this never opens and closes a file that a connection of this process has locked.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return False
    except FileNotFoundError as error:
        raise BillingUnavailableError(
            f"the ledger {path!r} cannot be created: the folder {folder!r} does not exist"
        ) from error
    except OSError as error:
        raise BillingUnavailableError(
            f"the ledger {path!r} cannot be created in {folder!r}: {error.strerror}"
        ) from error
    return True


def sync_folder(path: str) -> None:
    """Make a new file's name survive a power loss."""
    descriptor = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_identity(path: str, identity: Identity | None) -> Identity:
    """
    Return which file the path means now; raise if it is missing, or not the one of before.

    A ledger that vanished is never made anew: its customers would all stand at 0, and what is in memory would be lost silently.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        raise BillingUnavailableError(
            f"the ledger {path!r} has vanished; put it back, it is not created anew"
        ) from error
    except OSError as error:
        raise BillingUnavailableError(f"the ledger {path!r} cannot be reached: {error.strerror}") from error
    found = (status.st_dev, status.st_ino)
    if identity is not None and found != identity:
        raise BillingUnavailableError(
            f"the ledger {path!r} was replaced by another file while it was open; restart to use that one"
        )
    return found


class _Connection(sqlite3.Connection):
    """
    A connection that is closed when `close` returns, whatever still refers to one of its cursors.

    SQLite keeps the file open for a statement that nobody has finished, and a cursor keeps the one that failed last. A child that
    is forked meanwhile believes to have the locks of that file.
    """

    _cursors: weakref.WeakSet[sqlite3.Cursor] | None = None

    def cursor(self, factory: Any = sqlite3.Cursor) -> Any:
        if self._cursors is None:
            self._cursors = weakref.WeakSet()
        cursor = super().cursor(factory)
        self._cursors.add(cursor)
        return cursor

    def close(self) -> None:
        for cursor in list(self._cursors or ()):
            cursor.close()
        super().close()


def connect(path: str, *, patience: float = 0.0) -> sqlite3.Connection:
    """A connection with our settings and explicit transactions, usable from any thread. Reads nothing yet."""
    # mode=rw: SQLite must not create a file where one has vanished.
    return sqlite3.connect(
        f"file:{_quoted(path)}?mode=rw",
        uri=True,
        timeout=patience,
        isolation_level=None,
        check_same_thread=False,
        cached_statements=256,
        factory=_Connection,
    )


def prepare(connection: sqlite3.Connection, path: str, *, is_first: bool) -> None:
    """Refuse what is no ledger, then set the connection up. `is_first`: this process has not used the file before."""
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        raise ConfigurationError(f"SQLite {sqlite3.sqlite_version} is too old; a ledger needs 3.35 or newer")
    # At one moment: another process may be making the schema right now.
    connection.execute("BEGIN")
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    connection.execute("ROLLBACK")
    is_new = (application_id, version, tables) == (0, 0, 0)
    if application_id != APPLICATION_ID and not (is_new and is_first):
        raise LedgerCorruptError(
            f"the file {path!r} is not a ledger of metered_ai (application_id {application_id}); it is left alone"
        )
    if version > len(MIGRATIONS):
        raise SchemaTooNewError(
            f"the ledger {path!r} has schema version {version}; this release of metered_ai knows {len(MIGRATIONS)}: upgrade it"
        )
    if is_new:
        connection.execute(f"PRAGMA page_size = {PAGE_SIZE}")
    (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise ConfigurationError(
            f"the ledger {path!r} cannot have a write-ahead log here (journal_mode {mode}); use a local disk"
        )
    settle_down(connection)


def settle_down(connection: sqlite3.Connection) -> None:
    """Settings that live as long as a connection."""
    # What was deleted (ended holds) is not zeroed; it costs a write and hides nothing that events do not show.
    connection.execute("PRAGMA secure_delete = OFF").fetchall()
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = NORMAL")
    # Checkpoints have a thread of their own, so that no caller waits for one.
    connection.execute("PRAGMA wal_autocheckpoint = 0").fetchall()
    connection.execute(f"PRAGMA journal_size_limit = {WAL_KEPT}").fetchall()


def migrate(
    connection: sqlite3.Connection,
    path: str,
    *,
    auto_migrate: bool = True,
    migrations: Sequence[str] = MIGRATIONS,
    read: Callable[[str], list[str]] = read_migration,
    execute: Callable[[str], object] | None = None,
) -> bool:
    """
    Bring a file to the newest schema in one transaction; tell whether anything was to be done.

    A new file gets its schema even with auto_migrate=False: there is nothing in it that a migration could change.
    """
    execute = execute or connection.execute
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == len(migrations):
        return False
    if version and not auto_migrate:
        raise ConfigurationError(
            f"the ledger {path!r} has schema version {version}, this release needs {len(migrations)}; "
            "migrate it, or open it with auto_migrate=True"
        )
    connection.executescript("PRAGMA synchronous = FULL")
    execute("BEGIN EXCLUSIVE")
    is_done = False
    try:
        # Another process may have been faster.
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > len(migrations):
            raise SchemaTooNewError(
                f"the ledger {path!r} was migrated to version {version} by a newer release; upgrade this one"
            )
        for file in migrations[version:]:
            for statement in read(file):
                execute(statement)
        execute(f"PRAGMA application_id = {APPLICATION_ID}")
        execute(f"PRAGMA user_version = {len(migrations)}")
        execute("COMMIT")
        is_done = True
    finally:
        if not is_done and connection.in_transaction:
            connection.execute("ROLLBACK")
    connection.executescript("PRAGMA synchronous = NORMAL")
    return True


def has_long_log(path: str) -> bool:
    """A process that died has left much behind in the write-ahead log."""
    try:
        return os.stat(f"{path}-wal").st_size > WAL_KEPT // 4
    except OSError:
        return False


def is_broken(error: sqlite3.Error) -> bool:
    """After this error a connection is not to be used any more."""
    return _code(error) in (
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_CANTOPEN,
    )


def is_locked(error: BaseException) -> bool:
    """Somebody else holds the lock that was wanted; waiting may help."""
    return isinstance(error, sqlite3.OperationalError) and _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def translate(error: Exception, path: str) -> MeteringError:
    """What an error of SQLite or the operating system means for a caller; to be raised `from` it."""
    if isinstance(error, MeteringError):
        return error
    if isinstance(error, OSError):
        return BillingUnavailableError(f"the ledger {path!r} cannot be used: {error.strerror or error}")
    code = _code(error)
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return BillingUnavailableError(f"the ledger {path!r} is locked by another process")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return LedgerCorruptError(f"the ledger {path!r} is damaged or not a database: {error}; it is left as it is")
    if code == sqlite3.SQLITE_CONSTRAINT:
        return LedgerCorruptError(f"the ledger {path!r} contradicts itself: {error}; run verify")
    if code == sqlite3.SQLITE_ERROR:
        return LedgerCorruptError(f"the ledger {path!r} is not as its schema says: {error}")
    if code == sqlite3.SQLITE_FULL:
        return BillingUnavailableError(f"the ledger {path!r} cannot be written: the disk is full")
    if code == sqlite3.SQLITE_READONLY:
        return BillingUnavailableError(f"the ledger {path!r} cannot be written: it is read-only")
    return BillingUnavailableError(f"the ledger {path!r} cannot be used: {error}")


def _code(error: Exception) -> int | None:
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _quoted(path: str) -> str:
    return "".join(
        f"%{byte:02x}" if byte in b"%?#" or byte < 33 or byte > 126 else chr(byte) for byte in os.fsencode(path)
    )
