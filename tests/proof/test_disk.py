"""The ledger's disk is full, or may only be read: nothing is sent that cannot be held, and no answer goes unbilled."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from metered_ai import AsyncMeteredOpenAI, Billing, BillingUnavailableError, MeteredOpenAI, connect
from metered_ai.testing.provider import FakeProvider
from tests.proof.children import HELLO, Child, warm_up

NEW_NAMES, NEW_USERS = 0x20000, 0x10000000
PRIVATE, READ_ONLY, AGAIN = 1 << 18 | 1 << 14, 1, 32


def mount(target: str, kind: bytes | None, flags: int, data: bytes | None = None) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", target.encode(), kind, flags, data):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), target)


def small_disk(folder: Path) -> None:
    """Put a disk of 1 MB of memory in place of a folder, for this process and its children only."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_NAMES):
        # Who is not root may be it among users of one's own.
        user, group = os.getuid(), os.getgid()
        if libc.unshare(NEW_NAMES | NEW_USERS):
            raise OSError(ctypes.get_errno(), "no mounts of one's own")
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path("/proc/self", name).write_text(text)
    mount("/", None, PRIVATE)
    mount(str(folder), b"tmpfs", 0, b"size=1m")


class SmallDisk:
    """A real file system of 1 MB, which a large file fills."""

    may_read = True

    def __init__(self, folder: Path) -> None:
        small_disk(folder)
        self._filler = folder / "filler"

    def fill(self) -> None:
        with self._filler.open("wb", buffering=0) as file:
            for size in (4096, 1):
                try:
                    while file.write(b"x" * size):
                        pass
                except OSError as error:
                    assert error.errno == errno.ENOSPC

    def free(self) -> None:
        self._filler.unlink()


class Limit:
    """
    No file of this process may grow beyond a size that the ledger has passed already; a spool stays below it.

    What SQLite shares between processes is a file, too: without it nobody can read.
    """

    may_read = False

    def __init__(self, folder: Path) -> None:
        self._hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def fill(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, self._hard))

    def free(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self._hard, self._hard))


def can_mount() -> bool:
    def attempt(tell: Any, folder: Path) -> None:
        small_disk(folder)

    child = Child(attempt, Path(tempfile.gettempdir()))
    child.wait()
    return child.status == 0


# A disk that is full or read-only needs a mount in a namespace of one's own, which containers often forbid. Without it the disk
# is full all the same, by the limit on a file's size, and read-only by the files' modes.
CAN_MOUNT = can_mount()
needs_mount = pytest.mark.skipif(not CAN_MOUNT, reason="this machine lets nobody mount a disk of their own")

DISKS = [pytest.param(SmallDisk, marks=needs_mount, id="small disk"), pytest.param(Limit, id="file size limit")]


def call(billing: Billing, base_url: str, how: str, at_sending: Callable[[], None] = lambda: None) -> str:
    """Make one call, sync or async, streamed or not; its id. `at_sending` runs when the hold has been placed."""

    async def hook(_: object) -> None:
        at_sending()

    options: Any = {"billing": billing, "customer": "ada", "base_url": base_url, "api_key": "k", "max_retries": 0}
    http = openai.DefaultHttpxClient(verify=False, event_hooks={"request": [lambda _: at_sending()]})
    async_http = openai.DefaultAsyncHttpxClient(verify=False, event_hooks={"request": [hook]})
    if "async" not in how:
        with MeteredOpenAI(http_client=http, **options) as client:
            if "stream" not in how:
                return client.chat.completions.create(model="m", messages=HELLO).id
            return {chunk.id for chunk in client.chat.completions.create(model="m", messages=HELLO, stream=True)}.pop()

    async def acall() -> str:
        async with AsyncMeteredOpenAI(http_client=async_http, **options) as client:
            if "stream" not in how:
                return (await client.chat.completions.create(model="m", messages=HELLO)).id
            stream = await client.chat.completions.create(model="m", messages=HELLO, stream=True)
            return {chunk.id async for chunk in stream}.pop()

    return asyncio.run(acall())


HOW = ["plain", "stream", "async plain", "async stream"]


def names(billing: Billing) -> list[str]:
    return sorted(event.transaction_id.removeprefix("gen_") for event in billing.usage_events())


def wait_until_ready(billing: Billing) -> float:
    began = time.monotonic()
    while billing.readiness():
        assert time.monotonic() - began < 60
        time.sleep(0.01)
    return time.monotonic() - began


def prepared(disk: Callable[[Path], Any], folder: Path) -> tuple[Any, Path, str]:
    place, elsewhere = folder / "disk", folder / "elsewhere"
    place.mkdir()
    elsewhere.mkdir()
    made = disk(place)
    url = f"sqlite:///{place}/credits.db"
    with connect(url) as billing:
        billing.grant("ada", "generations", 100, id="start")
    return made, elsewhere, url


def refuse(tell: Any, make: Any, folder: Path) -> None:
    disk, spool, url = prepared(make, folder)
    with FakeProvider() as provider, connect(url, spool=spool) as billing:
        # The log is longer than what the limit allows.
        answers = [call(billing, provider.base_url, "plain") for _ in range(4)]
        disk.fill()
        refused = []
        for how in HOW:
            try:
                call(billing, provider.base_url, how)
            except BillingUnavailableError as error:
                refused.append(str(error))
        # Neither may a process that has just started.
        with connect(url, spool=spool) as other:
            try:
                call(other, provider.base_url, "plain")
            except BillingUnavailableError as error:
                refused.append(str(error))
        requests = len(provider.requests)
        disk.free()
        answers.append(call(billing, provider.base_url, "plain"))

        assert (4, 5) == (requests, len(provider.requests))
        assert 5 == len(refused)
        assert sorted(answers) == names(billing)
        assert billing.verify().is_sound
        assert 0 == billing.balance("ada", "generations").held
    tell(refused[0])


@pytest.mark.parametrize("disk", DISKS)
def test_full_before(disk, tmp_path, provider, say, fork):
    """On a full disk no hold can be placed, so nothing is sent; with room again calls go on."""
    warm_up(provider.base_url, tmp_path / "warm")
    error = fork(refuse, disk, tmp_path).result()

    say(f"full before the hold: 5 of 5 calls refused, 0 requests sent ({error})")


def settle_later(tell: Any, make: Any, folder: Path) -> None:
    disk, spool, url = prepared(make, folder)
    waits = []
    with FakeProvider() as provider, connect(url, spool=spool) as billing:
        answers = [call(billing, provider.base_url, "plain") for _ in range(4)]
        for how in HOW:
            answers.append(call(billing, provider.base_url, how, disk.fill))
            waiting = [path.name for path in spool.iterdir()]
            reasons = billing.readiness()
            requests = len(provider.requests)
            try:
                call(billing, provider.base_url, how)
            except BillingUnavailableError:
                reasons.append("refused")
            assert requests == len(provider.requests)
            assert 1 == len(waiting)
            assert "refused" == reasons[-1]
            assert 2 <= len(reasons)
            if disk.may_read:
                assert sorted(answers[:-1]) == names(billing)
                assert 1 == billing.balance("ada", "generations").held

            disk.free()
            waits.append(wait_until_ready(billing))
            assert [] == list(spool.iterdir())
            assert sorted(answers) == names(billing)
        answers.append(call(billing, provider.base_url, "plain"))

        balance = billing.balance("ada", "generations")
        assert sorted(answers) == names(billing) == sorted(str(issued.id) for issued in provider.issued)
        assert (9, 91, 0) == (balance.used, balance.available, balance.held)
        assert billing.verify().is_sound
    tell(max(waits))


@pytest.mark.parametrize("disk", DISKS)
def test_full_between(disk, tmp_path, provider, say, fork):
    """
    When the disk fills between an answer and its settle, the answer is returned and kept in the spool, nothing more is sent,
    and with room again it is billed, once, without anybody doing anything.
    """
    warm_up(provider.base_url, tmp_path / "warm")
    longest = fork(settle_later, disk, tmp_path).result()

    say(
        f"full between answer and settle: 4 of 4 answers returned, spooled, and billed at most {longest:.2f} s after there was room"
    )


def settle_by_another(tell: Any, make: Any, folder: Path) -> None:
    disk, spool, url = prepared(make, folder)
    with FakeProvider() as provider:

        def die(tell: Any) -> None:
            billing = connect(url, spool=spool)
            tell([call(billing, provider.base_url, "plain") for _ in range(4)])
            tell([call(billing, provider.base_url, "plain", disk.fill)])

        first, last = Child(die).wait()
        spooled = [path.name for path in spool.iterdir()]
        disk.free()
        with connect(url, spool=spool) as billing:
            recovery = billing.recover()

            assert (1, 1) == (len(spooled), recovery.replayed)
            assert [] == list(spool.iterdir())
            assert sorted(first + last) == names(billing)
            assert 0 == billing.balance("ada", "generations").held
            assert billing.verify().is_sound
    tell(recovery.replayed)


@pytest.mark.parametrize("disk", DISKS)
def test_full_then_killed(disk, tmp_path, provider, say, fork):
    """What a process that died has left in the spool is billed by the next one."""
    warm_up(provider.base_url, tmp_path / "warm")
    replayed = fork(settle_by_another, disk, tmp_path).result()

    say(f"full, then killed: {replayed} of 1 spooled answers billed by the next process")


class ReadOnlyMount:
    """A disk that is mounted read-only while nobody has the ledger open."""

    def __init__(self, folder: Path) -> None:
        small_disk(folder)
        self._folder = str(folder)

    def shut(self) -> None:
        mount(self._folder, b"tmpfs", AGAIN | READ_ONLY)

    def open(self) -> None:
        mount(self._folder, b"tmpfs", AGAIN)


class ReadOnlyFiles:
    """A folder and files that this user may not write."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def shut(self) -> None:
        for path in [*self._folder.iterdir(), self._folder]:
            path.chmod(path.stat().st_mode & ~0o222)

    def open(self) -> None:
        for path in [self._folder, *self._folder.iterdir()]:
            path.chmod(path.stat().st_mode | 0o200)


def refuse_read_only(tell: Any, make: Any, folder: Path) -> None:
    disk, spool, url = prepared(make, folder)
    disk.shut()
    refused = []
    with FakeProvider() as provider, connect(url, spool=spool) as billing:
        for how in HOW:
            try:
                call(billing, provider.base_url, how)
            except BillingUnavailableError as error:
                refused.append(str(error))
        requests = len(provider.requests)
        disk.open()
        answer = call(billing, provider.base_url, "plain")

        assert (0, 4) == (requests, len(refused))
        assert [answer] == names(billing)
        assert billing.verify().is_sound
    tell(refused[0])


# Neither way is left there: modes do not bind root, and it may not mount.
@pytest.mark.skipif(not CAN_MOUNT and os.geteuid() == 0, reason="root may write files that are read-only")
def test_read_only(tmp_path, provider, say, fork):
    """On a read-only disk no hold can be placed, so nothing is sent; made writable again, the same client goes on."""
    warm_up(provider.base_url, tmp_path / "warm")
    error = fork(refuse_read_only, ReadOnlyMount if CAN_MOUNT else ReadOnlyFiles, tmp_path).result()

    say(f"read-only: 4 of 4 calls refused, 0 requests sent ({error})")
