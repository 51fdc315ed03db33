"""
Settles that the ledger could not take, kept on disk until it can.

A spool file is a sequence of lines, each a JSON object: `{"crc":"<crc32 of the line inside>","line":{...}}`. The line inside says
`do` (write, done, park) and `key`, and holds the `step`. The process that writes a file keeps it locked (flock) as long as it lives, so
a file that can be locked belongs to nobody.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import threading
import weakref
import zlib
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from ..core.encode import step_from_json, step_to_json
from ..core.steps import Record, Settle, Step

__all__ = ["Spool", "place_in", "state_folder"]

_log = logging.getLogger(__name__)

_HEAD, _MIDDLE, _TAIL = b'{"crc":"', b'","line":', b"}"
_BODY = len(_HEAD) + 8 + len(_MIDDLE)

_T = TypeVar("_T")


def state_folder() -> Path | None:
    """Where a user's programs keep state: `$XDG_STATE_HOME/metered_ai`, else `~/.local/state/metered_ai`; None without a home."""
    root = Path(os.environ.get("XDG_STATE_HOME", ""))
    # The XDG Base Directory Specification: a relative path there is to be ignored.
    if root.is_absolute():
        return root / "metered_ai"
    try:
        return Path.home() / ".local" / "state" / "metered_ai"
    except RuntimeError:
        return None


def place_in(folder: Path, place: Path) -> Path:
    """What stands for a ledger in a folder that several ledgers share: its name and a hash of its place, so that no two ever mix."""
    path = place.resolve()
    return folder.resolve() / f"{path.name[:40]}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}"


class Spool:
    """
    Keeps steps on disk for one ledger until they are done, whatever happens to this process or this machine.

    `place` is the ledger's file, or any path that stands for the ledger: `/x/credits.db` gives `/x/credits.db.spool-<pid>-<random>`,
    which exists only while something is pending. `fallback` is a folder for when that cannot be written, made when it is needed; names
    there hold a hash of the place. Only the files' owner can read them.

    - What `write` has returned survives kill -9 and power loss, until `done` or `park`.
    - What a dead process left is taken over by one `adopt`, never by two. A step that was done may come again; none is lost.
    - Threads and forks are allowed. A child starts empty; what is pending stays its parent's.

    Nothing is opened before the first write; with `makes_folder` the place's folder is made then.
    After `close` anybody may adopt what is pending; writing again opens a new file.
    """

    _pending: dict[str, _Kept]
    _files: dict[_Place, _File]
    _warned: set[Path]

    def __init__(self, place: Path, fallback: Path | None = None, *, makes_folder: bool = False) -> None:
        # Resolved, so that a ledger has the same spool by whatever link it was opened.
        path = place.resolve()
        self._places = [_Place(path.parent, path.name, is_made=makes_folder)]
        if fallback is not None:
            other = place_in(fallback, path)
            self._places.append(_Place(other.parent, other.name, is_made=True))
        self._reset()
        _spools.add(self)

    def write(self, step: Step) -> str:
        """
        Keep a step and return its key. When this returns the step is on the disk; it blocks for that long.

        OSError if no place takes it. Properties or usage that JSON cannot carry are left out with a warning, not the step with them.
        """
        step = _writable(step)
        key = "s" + os.urandom(10).hex()
        with self._entered():
            self._keep({key: step})
        return key

    def done(self, key: str) -> None:
        """The step is in the ledger: forget it. A key that is not pending changes nothing."""
        with self._entered():
            self._end(key)

    def park(self, key: str, why: str) -> None:
        """
        The step can never succeed: move it to `<place>.parked`, where it stays until the operator has dealt with it.

        OSError if no place takes it; then it stays pending. A key that is not pending changes nothing.
        """
        with self._entered():
            if key in self._pending:
                line = _line("park", key, self._pending[key].step, why=why)
                self._anywhere(lambda place: place.park(line))
                self._end(key)

    def pending(self) -> list[tuple[str, Step]]:
        """What this spool keeps, its own and adopted, oldest first."""
        with self._entered():
            return [(key, kept.step) for key, kept in self._pending.items()]

    def parked(self) -> list[tuple[Step, str]]:
        """Every step that any process parked for this ledger, and why. What cannot be read is left out, with a warning."""
        found: dict[str, tuple[Step, str]] = {}
        for place in self._places:
            try:
                lines, damaged = _read(place.parked.read_bytes())
            except (FileNotFoundError, NotADirectoryError):
                continue
            for line in lines:
                try:
                    found[line["key"]] = (_step(line), line["why"])
                except (KeyError, ValueError):
                    damaged += 1
            if damaged:
                _log.warning(
                    "%d lines of %s are damaged, or of another release, and were left out", damaged, place.parked
                )
        return list(found.values())

    def adopt(self) -> list[tuple[str, Step]]:
        """
        Take over what dead processes left for this ledger and return it: it is pending here from now on.

        A file is removed only when its steps are on the disk in ours. One that cannot be taken over now, or was written by a newer
        release, stays as it is, with a warning; one with damage in it is kept as `<place>.damaged-…`, its sound lines adopted.
        """
        adopted: dict[str, Step] = {}
        with self._entered():
            for place in self._places:
                try:
                    left = place.spools()
                except OSError as error:
                    self._warn(place.folder, "Settles may wait in %s, which cannot be read: %s", error)
                    continue
                for path in left:
                    try:
                        adopted |= self._take_over(place, path)
                    except (OSError, ValueError) as error:
                        self._warn(path, "Settles wait in %s, which cannot be taken over now: %s", error)
        return list(adopted.items())

    def close(self) -> None:
        """Let go of the files. What is pending stays on the disk for whoever adopts it; closing twice changes nothing."""
        with self._entered():
            for file in self._files.values():
                file.close()
            self._files = {}
            self._pending = {}

    @contextmanager
    def _entered(self) -> Generator[None]:
        # The hook below has done this, except after a fork that Python was not told of.
        if self._pid != os.getpid():
            self._drop()
        with self._lock:
            yield

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._pending = {}
        self._files = {}
        self._warned = set()

    def _drop(self) -> None:
        """In a child: leave the parent what is the parent's. An open descriptor here would keep the lock when the parent is dead."""
        inherited = self._files
        self._reset()
        for file in inherited.values():
            file.close()

    def _anywhere(self, attempt: Callable[[_Place], _T]) -> _T:
        failures: list[OSError] = []
        for place in self._places:
            try:
                return attempt(place)
            except OSError as error:
                failures.append(error)
        raise OSError(failures[0].errno, f"the spool takes nothing: {'; '.join(map(str, failures))}") from failures[0]

    def _keep(self, steps: Mapping[str, Step]) -> None:
        # Files that somebody has removed or cut. What they kept is written again, with the new.
        lost = [file for file in self._files.values() if not file.is_whole()]
        steps = {key: kept.step for key, kept in self._pending.items() if kept.file in lost} | dict(steps)
        lines = b"".join(_line("write", key, step) for key, step in steps.items())

        def keep(place: _Place) -> _File:
            file = self._files.get(place)
            if file is not None and file not in lost:
                file.append(lines, sync=True)
                return file
            file = _File(place)
            try:
                file.append(lines, sync=True)
            except OSError:
                file.remove()
                raise
            return file

        file = self._anywhere(keep)
        self._pending |= {key: _Kept(step, file) for key, step in steps.items()}
        for old in lost:
            _log.warning("%s was removed or cut by somebody; what it kept is in %s now", old.path, file.path)
            old.remove()
        self._files = {place: old for place, old in self._files.items() if old not in lost} | {file.place: file}

    def _end(self, key: str) -> None:
        kept = self._pending.pop(key, None)
        if kept is None:
            return
        try:
            if self._pending:
                # Not synced: what is forgotten here by a power loss is settled again, which changes nothing.
                kept.file.append(_line("done", key), sync=False)
            else:
                files, self._files = self._files, {}
                for file in files.values():
                    file.remove()
        except OSError as error:
            _log.warning(
                "Could not note in %s that a step is done; it will be done again, harmlessly: %s", kept.file.path, error
            )

    def _take_over(self, place: _Place, path: Path) -> dict[str, Step]:
        try:
            old = _open(path, os.O_RDONLY)
        except FileNotFoundError:
            return {}
        with old:
            # Its writer lives, or another process was faster and has removed it.
            if not _lock(old) or not _is_at(old, path):
                return {}
            lines, damaged = _read(old.readall())
            steps = {key: step for key, step in _replay(lines).items() if key not in self._pending}
            if steps:
                self._keep(steps)
            try:
                if damaged:
                    aside = place.damaged(path)
                    path.rename(aside)
                    _log.warning(
                        "%d lines of a spool are damaged: what they say is not settled, and kept in %s", damaged, aside
                    )
                else:
                    path.unlink()
            except OSError as error:
                self._warn(
                    path, "%s was taken over but cannot be removed, and will be settled again, harmlessly: %s", error
                )
            return steps

    def _warn(self, path: Path, message: str, error: Exception) -> None:
        if path not in self._warned:
            self._warned.add(path)
            _log.warning(message, path, error)


_spools: weakref.WeakSet[Spool] = weakref.WeakSet()
_opened: weakref.WeakSet[FileIO] = weakref.WeakSet()


def _after_fork() -> None:
    for spool in list(_spools):
        spool._drop()
    # Also those that another thread of the parent was about to write or to adopt.
    for file in list(_opened):
        file.close()


os.register_at_fork(after_in_child=_after_fork)


class _Place(NamedTuple):
    """A folder that spools of one ledger may be in, and how their names begin."""

    folder: Path
    stem: str
    is_made: bool = False

    @property
    def parked(self) -> Path:
        return self.folder / f"{self.stem}.parked"

    def damaged(self, path: Path) -> Path:
        return self.folder / f"{self.stem}.damaged-{path.name.removeprefix(f'{self.stem}.spool-')}"

    def spools(self) -> list[Path]:
        try:
            return sorted(path for path in self.folder.iterdir() if path.name.startswith(f"{self.stem}.spool-"))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def park(self, line: bytes) -> None:
        """Append a line to the file that all processes share. One write is one append: nobody's line lands inside another's."""
        self.prepare()
        with _open(self.parked, os.O_RDWR | os.O_CREAT | os.O_APPEND) as file:
            size = os.fstat(file.fileno()).st_size
            if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
                line = b"\n" + line
            _write(file, line)
            os.fsync(file.fileno())
        _sync_folder(self.folder)

    def prepare(self) -> None:
        """Make the folder if it is ours to make, with what is missing above it, so that it survives power loss."""
        if self.is_made:
            missing = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
            for folder in reversed(missing):
                folder.mkdir(mode=0o700, exist_ok=True)
                _sync_folder(folder.parent)


class _File:
    """A spool file of this process, locked for as long as it is open."""

    def __init__(self, place: _Place) -> None:
        place.prepare()
        while True:
            path = place.folder / f"{place.stem}.spool-{os.getpid()}-{os.urandom(8).hex()}"
            file = _open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND)
            try:
                is_ours = _lock(file) and _is_at(file, path)
                _sync_folder(place.folder)
            except OSError:
                path.unlink(missing_ok=True)
                file.close()
                raise
            if is_ours:
                break
            # Somebody who adopts took the empty file between its creation and its lock. It removes it.
            file.close()
        self.place = place
        self.path = path
        self._file = file
        self._size = 0

    def is_whole(self) -> bool:
        """Nobody has removed or cut it."""
        state = os.fstat(self._file.fileno())
        return state.st_nlink > 0 and state.st_size >= self._size

    def append(self, data: bytes, *, sync: bool) -> None:
        """Add lines, all or none: what an attempt that failed has left is cut off first."""
        if os.fstat(self._file.fileno()).st_size > self._size:
            os.ftruncate(self._file.fileno(), self._size)
        _write(self._file, data)
        if sync:
            os.fsync(self._file.fileno())
        self._size += len(data)

    def remove(self) -> None:
        try:
            self.path.unlink(missing_ok=True)
        finally:
            self.close()

    def close(self) -> None:
        self._file.close()


class _Kept(NamedTuple):
    step: Step
    file: _File


def _open(path: Path, flags: int) -> FileIO:
    """A file of ours, which nobody else may read; never through a link that somebody put there."""
    mode = "r" if flags & os.O_ACCMODE == os.O_RDONLY else "r+"
    file = FileIO(os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600), mode)
    _opened.add(file)
    return file


def _lock(file: FileIO) -> bool:
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(file: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except FileNotFoundError:
        return False


def _write(file: FileIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _sync_folder(folder: Path) -> None:
    """A new file survives power loss only when its folder was synced, too."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _writable(step: Step) -> Step:
    """The step as it can be written. The amount is what matters: what goes with it is dropped if it must be."""
    try:
        step_to_json(step)
    except ValueError as error:
        if not isinstance(step, Settle | Record):
            raise
        for bare in (
            replace(step, properties=None),
            replace(step, usage=None),
            replace(step, properties=None, usage=None),
        ):
            with suppress(ValueError):
                step_to_json(bare)
                _log.warning("A settle was spooled without its properties or usage: %s", error)
                return bare
        raise
    return step


def _line(do: str, key: str, step: Step | None = None, **more: str) -> bytes:
    body = json.dumps({"do": do, "key": key, **more}, separators=(",", ":"))
    if step is not None:
        body = f'{body[:-1]},"step":{step_to_json(step)}}}'
    text = body.encode()
    return b"%b%08x%b%b%b\n" % (_HEAD, zlib.crc32(text), _MIDDLE, text, _TAIL)


def _read(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """The sound lines, and how many are damaged. A last line without its end is not one: nobody was told that it is kept."""
    *texts, last = data.split(b"\n")
    lines = [_checked(text) for text in texts if text]
    if last:
        lines += filter(None, [_checked(last)])
    sound = [line for line in lines if line is not None]
    return sound, len(lines) - len(sound)


def _checked(text: bytes) -> dict[str, Any] | None:
    body = text[_BODY : -len(_TAIL)]
    if text != b"%b%08x%b%b%b" % (_HEAD, zlib.crc32(body), _MIDDLE, body, _TAIL):
        return None
    line = json.loads(body)
    return cast("dict[str, Any]", line) if isinstance(line, dict) else {}


def _replay(lines: list[dict[str, Any]]) -> dict[str, Step]:
    """What a file still keeps. A line that this release does not understand is a ValueError: then all of it is left to one that does."""
    steps: dict[str, Step] = {}
    for line in lines:
        match line:
            case {"do": "write", "key": str(key)}:
                steps[key] = _step(line)
            case {"do": "done", "key": str(key)}:
                steps.pop(key, None)
            case _:
                raise ValueError(f"this release does not know what to do with {line.get('do')!r:.40}")
    return steps


def _step(line: dict[str, Any]) -> Step:
    return step_from_json(json.dumps(line.get("step")))
