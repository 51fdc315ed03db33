from __future__ import annotations

import json
import logging
import os
import resource
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from metered_ai.core.encode import step_to_json
from metered_ai.core.steps import Release, Settle, Step
from metered_ai.ledger.spool import Spool, place_in, state_folder
from metered_ai.records import Usage


def settle(n: int = 1, **more: Any) -> Settle:
    return Settle(f"h{n}", "ada", "generations", n, f"gen_resp_{n}", "reported", **more)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def spools(place: Path) -> list[Path]:
    return sorted(place.parent.glob(f"{place.name}.spool-*"))


def leave(place: Path, *steps: Step) -> Path:
    """A spool file such as a dead process leaves."""
    before = set(spools(place))
    spool = Spool(place)
    for step in steps:
        spool.write(step)
    spool.close()
    (path,) = set(spools(place)) - before
    return path


def line(body: str) -> bytes:
    """A line as the module's docstring describes it."""
    return f'{{"crc":"{zlib.crc32(body.encode()):08x}","line":{body}}}\n'.encode()


def in_child(action: Callable[[], object]) -> str:
    """What `action` returns in a fork of this process."""
    ours, its = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(its, str(action()).encode())
        finally:
            os._exit(0)
    os.close(its)
    with os.fdopen(ours) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return text


def program(code: str, place: Path) -> subprocess.Popen[str]:
    """Another process with a spool for `place`, and steps to write into it."""
    head = (
        "import os, sys\nfrom pathlib import Path\nfrom metered_ai.core.steps import Settle\n"
        "from metered_ai.ledger.spool import Spool\nspool = Spool(Path(sys.argv[1]))\n"
        "def settle(n): return Settle(f'h{n}', 'ada', 'generations', n, f'gen_resp_{n}', 'reported')\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", head + code, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "shop"
    folder.mkdir()
    return folder / "credits.db"


def test_nothing_until_the_first_write(place: Path) -> None:
    """A spool that was not needed leaves no trace."""
    spool = Spool(place, place.parent / "state")

    assert spool.pending() == []
    assert spool.parked() == []
    assert spool.adopt() == []
    spool.close()
    assert files(place.parent) == []


def test_write_and_done(place: Path) -> None:
    """What was written is pending until it is done, in a file that only its owner can read and that is gone with the last step."""
    spool = Spool(place)
    steps: list[Step] = [settle(1), Release("h2", "ada", "generations", "cancelled", "unknown")]
    keys = [spool.write(step) for step in steps]
    (path,) = spools(place)

    assert spool.pending() == list(zip(keys, steps, strict=True))
    assert path.name.startswith(f"credits.db.spool-{os.getpid()}-")
    assert path.stat().st_mode & 0o777 == 0o600

    spool.done(keys[0])
    spool.done(keys[0])

    assert spool.pending() == [(keys[1], steps[1])]

    spool.done(keys[1])

    assert spool.pending() == []
    assert files(place.parent) == []


def test_form(place: Path) -> None:
    """Each line of a file is a JSON object with a checksum, as an operator would want to read it."""
    spool = Spool(place)
    first, second = spool.write(settle(1)), spool.write(settle(2))
    spool.done(first)
    expected = [
        f'{{"do":"write","key":"{first}","step":{step_to_json(settle(1))}}}',
        f'{{"do":"write","key":"{second}","step":{step_to_json(settle(2))}}}',
        f'{{"do":"done","key":"{first}"}}',
    ]

    assert b"".join(map(line, expected)) == spools(place)[0].read_bytes()


def test_synced(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write returns after the file was synced, and a new file's folder, too; `done` costs no sync."""
    synced: list[int] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    spool = Spool(place)
    first = spool.write(settle(1))
    folder, file = place.parent.stat().st_ino, spools(place)[0].stat().st_ino

    assert synced == [folder, file]

    spool.write(settle(2))
    spool.done(first)

    assert synced == [folder, file, file]


def test_synced_state(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state folder that has to be made survives power loss with all that is above it."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    state = tmp_path / "home" / "state" / "metered_ai"
    Spool(place.parent / "gone" / "credits.db", state).write(settle())
    made = [folder.stat().st_ino for folder in (tmp_path, tmp_path / "home", tmp_path / "home" / "state", state)]

    assert synced[:4] == made


def test_kill(place: Path) -> None:
    """What was written survives kill -9 of its writer, and another process takes it over, once."""
    code = "for n in range(10**9): print(spool.write(settle(n)), flush=True)"
    with program(code, place) as writer:
        assert writer.stdout is not None
        keys = [writer.stdout.readline().strip() for _ in range(5)]
        writer.kill()
        keys += [text.strip() for text in writer.stdout]

    spool = Spool(place)
    adopted = spool.adopt()

    assert [settle(n) for n in range(len(adopted))] == [step for _, step in adopted]
    # The last one may be written without its writer having lived to say so.
    assert keys == [key for key, _ in adopted][: len(keys)]
    assert len(adopted) - len(keys) in {0, 1}
    assert spool.pending() == adopted
    assert spool.adopt() == []
    assert [path.name.split("-")[1] for path in spools(place)] == [str(os.getpid())]

    spool.close()

    assert adopted == Spool(place).adopt()


def test_what_is_done_is_not_adopted(place: Path) -> None:
    """Of a dead process's steps only those are taken over that it had not done."""
    dead = Spool(place)
    keys = [dead.write(settle(n)) for n in range(4)]
    dead.done(keys[1])
    dead.done(keys[3])
    dead.close()

    assert [(keys[0], settle(0)), (keys[2], settle(2))] == Spool(place).adopt()


def test_what_is_pending_is_not_adopted_again(place: Path) -> None:
    """A file that was taken over but could not be removed is not taken over again while its steps are pending."""
    left = leave(place, settle(1))
    data = left.read_bytes()
    spool = Spool(place)
    adopted = spool.adopt()
    left.write_bytes(data)

    assert spool.adopt() == []
    assert adopted == spool.pending()
    assert len(spools(place)) == 1


def test_a_living_process_keeps_its_own(place: Path) -> None:
    """What a living process has written is left to it, whether it is another or this one."""
    with program("spool.write(settle(1)); print('written', flush=True); input()", place) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "written\n"
        here = Spool(place)
        here.write(settle(2))
        spool = Spool(place)

        assert spool.adopt() == []

        writer.kill()
        writer.wait()

        assert [settle(1)] == [step for _, step in spool.adopt()]
    assert len(here.pending()) == 1


def test_each_is_adopted_once(place: Path) -> None:
    """However many adopt at the same time, each step is taken over by exactly one of them."""
    for n in range(30):
        leave(place, settle(n))
    living = [Spool(place) for _ in range(4)]
    together = threading.Barrier(4)

    def adopt(spool: Spool) -> list[Step]:
        together.wait()
        return [step for _, step in spool.adopt()]

    with ThreadPoolExecutor(4) as pool:
        adopted = [step for steps in pool.map(adopt, living) for step in steps]

    assert sorted(f"h{n}" for n in range(30)) == sorted(step.hold_id for step in adopted if isinstance(step, Settle))
    assert len(spools(place)) == sum(bool(spool.pending()) for spool in living)


def test_new_files_beside_those_who_adopt(place: Path) -> None:
    """A file that was just made is never taken for a dead process's: what is written while others adopt is lost to nobody."""
    over = threading.Event()
    adopted: list[Step] = []

    def adopt() -> None:
        while not over.is_set():
            with_nothing = Spool(place)
            adopted.extend(step for _, step in with_nothing.adopt())
            with_nothing.close()

    thread = threading.Thread(target=adopt)
    thread.start()
    try:
        for n in range(100):
            spool = Spool(place)
            key = spool.write(settle(n))

            assert [key] == [json.loads(text)["line"]["key"] for path in spools(place) for text in path.open()]

            spool.done(key)
    finally:
        over.set()
        thread.join()

    assert adopted == []


def test_a_torn_line(place: Path) -> None:
    """A line that its writer did not live to finish is ignored, wherever it was cut; all before it are kept."""
    whole = leave(place, settle(1), settle(2))
    data = whole.read_bytes()
    whole.unlink()
    first = data.index(b"\n") + 1
    counts: list[int] = []
    for cut in range(first, len(data)):
        place.with_name("credits.db.spool-1-dead").write_bytes(data[:cut])
        spool = Spool(place)
        counts.append(len(spool.adopt()))
        for key, _ in spool.pending():
            spool.done(key)

    # Only the last cut leaves a line that lacks nothing but its end.
    assert [1] * (len(counts) - 1) + [2] == counts
    assert files(place.parent) == []


def test_zeros_after_power_loss(place: Path) -> None:
    """A file system may leave zeros where a line was not yet written; they are ignored."""
    path = leave(place, settle(1))
    path.write_bytes(path.read_bytes() + bytes(700))

    assert [settle(1)] == [step for _, step in Spool(place).adopt()]
    assert not path.exists()


def test_damage(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A line that was changed on the disk is not settled, but kept for the operator; its neighbours are taken over."""
    path = leave(place, settle(1), settle(2), settle(3))
    damaged = path.read_bytes().replace(b'"amount":2', b'"amount":9')
    path.write_bytes(damaged)
    adopted = Spool(place).adopt()
    aside = path.with_name(path.name.replace("spool", "damaged"))

    assert [settle(1), settle(3)] == [step for _, step in adopted]
    assert aside.read_bytes() == damaged
    assert str(aside) in caplog.text


@pytest.mark.parametrize(
    "body",
    [
        '{"do":"write","key":"s1","step":{"step":"settle","version":2}}',
        '{"do":"undo","key":"s1"}',
        '{"do":"write","step":{}}',
        "[]",
    ],
)
def test_a_newer_release(place: Path, caplog: pytest.LogCaptureFixture, body: str) -> None:
    """A file with a line that this release does not understand is left whole to one that does; the warning comes once."""
    path = leave(place, settle(1))
    path.write_bytes(path.read_bytes() + line(body))
    before = path.read_bytes()
    leave(place, settle(2))
    spool = Spool(place)

    assert [settle(2)] == [step for _, step in spool.adopt()]
    assert spool.adopt() == []
    assert path.read_bytes() == before
    assert [str(path) in record.getMessage() for record in caplog.records] == [True]


def test_no_room(place: Path) -> None:
    """Where the disk is full `write` says so and what was kept stays whole; when there is room again it goes on."""

    def fill() -> str:
        spool = Spool(place)
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        kept = 0
        try:
            while True:
                spool.write(settle(kept))
                kept += 1
        except OSError:
            torn = spools(place)[0].stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        spool.write(settle(kept))
        return f"{kept} {torn} {len(spool.pending())}"

    kept, torn, pending = map(int, in_child(fill).split())
    data = spools(place)[0].read_bytes()

    assert kept >= 2
    assert torn == 1000
    assert pending == kept + 1
    assert data.count(b"\n") == pending
    assert [settle(n) for n in range(pending)] == [step for _, step in Spool(place).adopt()]


def test_no_room_for_the_first(place: Path) -> None:
    """A file that could not take its first step does not stay."""

    def fill() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
        spool = Spool(place)
        with pytest.raises(OSError, match="the spool takes nothing"):
            spool.write(settle())
        return f"{spool.pending()} {files(place.parent)}"

    assert in_child(fill) == "[] []"


def test_no_room_to_adopt(place: Path) -> None:
    """What cannot be copied is not removed: it waits for the next who adopts, and nothing of it is pending here."""
    left = leave(place, *(settle(n) for n in range(5)))

    def fill() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
        spool = Spool(place)
        return f"{spool.adopt()} {spool.pending()} {files(place.parent)}"

    assert in_child(fill) == f"[] [] {[left.name]}"
    assert len(Spool(place).adopt()) == 5


def test_adopted_before_removed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old file is there until the steps are on the disk in the new one."""
    left = leave(place, settle(1))
    seen: list[tuple[bool, bool]] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        fsync(descriptor)
        synced = Path(f"/proc/self/fd/{descriptor}").resolve()
        if synced.is_file():
            seen.append((left.exists(), b"gen_resp_1" in synced.read_bytes()))

    monkeypatch.setattr(os, "fsync", watched)
    Spool(place).adopt()

    assert seen == [(True, True)]
    assert not left.exists()


def test_fallback(place: Path, tmp_path: Path) -> None:
    """Where the ledger's folder cannot be written, a folder of the user's takes it, and is looked into by those who adopt."""
    state = tmp_path / "home" / "state"
    place = place.parent / "gone" / "credits.db"
    spool = Spool(place, state)
    key = spool.write(settle(1))
    (name,) = files(state)

    assert state.stat().st_mode & 0o777 == 0o700
    assert name.startswith("credits.db-")
    assert Spool(place.with_name("other.db"), state).adopt() == []
    assert Spool(tmp_path / "credits.db", state).adopt() == []

    spool.park(key, "no such account")

    assert [name.endswith(".parked") for name in files(state)] == [True]
    assert Spool(tmp_path / "credits.db", state).parked() == []
    assert Spool(place, state).parked() == [(settle(1), "no such account")]

    key = spool.write(settle(2))
    spool.close()
    # The place may be there again by then.
    place.parent.mkdir()
    other = Spool(place, state)

    assert other.adopt() == [(key, settle(2))]
    assert len(spools(place)) == 1
    assert [name.endswith(".parked") for name in files(state)] == [True]


def test_a_shared_folder(place: Path, tmp_path: Path) -> None:
    """Two ledgers of the same name do not mix in a folder that both use, and one ledger has one place there by any path."""
    folder = tmp_path / "spools"
    folder.mkdir()
    leave(place_in(folder, place), settle(1))

    assert Spool(place_in(folder, tmp_path / place.name)).adopt() == []
    assert len(Spool(place_in(folder, place.parent / ".." / "shop" / place.name)).adopt()) == 1


def test_nowhere(place: Path, tmp_path: Path) -> None:
    """If no place can be written, the error names each and why."""
    (tmp_path / "file").write_text("")
    spool = Spool(place.parent / "gone" / "credits.db", tmp_path / "file" / "state")

    with pytest.raises(OSError, match=r"the spool takes nothing: .*gone.*; .*file/state") as caught:
        spool.write(settle())

    assert isinstance(caught.value, FileNotFoundError)
    assert spool.pending() == []
    assert spool.adopt() == []


def test_long_name(tmp_path: Path) -> None:
    """A ledger whose name leaves no room for a longer one beside it still has a fallback."""
    place = tmp_path / ("ü" * 120 + ".db")
    spool = Spool(place, tmp_path / "state")
    spool.write(settle())

    assert files(tmp_path) == ["state"]


def test_one_ledger_by_two_paths(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link or a relative path to a ledger leads to the same spool."""
    place.touch()
    leave(place, settle(1))
    link = tmp_path / "link.db"
    link.symlink_to(place)
    monkeypatch.chdir(place.parent)

    linked = Spool(link)
    adopted = linked.adopt()
    linked.close()

    assert [settle(1)] == [step for _, step in adopted]
    assert adopted == Spool(Path("credits.db")).adopt()


def test_fork(place: Path) -> None:
    """A child starts empty, writes to a file of its own, and leaves its parent's alone."""
    spool = Spool(place)
    key = spool.write(settle(1))
    (path,) = spools(place)
    before = path.read_bytes()

    def child() -> str:
        pending = spool.pending()
        spool.done(key)
        spool.park(key, "not mine")
        spool.write(settle(2))
        adopted = spool.adopt()
        return f"{pending} {adopted} {[step.amount for _, step in spool.pending()]} {len(spools(place))}"

    assert in_child(child) == "[] [] [2] 2"
    assert before == path.read_bytes()
    assert spool.pending() == [(key, settle(1))]
    # The child has ended, so what it left is to be had.
    assert [settle(2)] == [step for _, step in spool.adopt()]


def test_fork_in_the_middle(place: Path) -> None:
    """A child can write even if another thread was writing when it was born."""
    spool = Spool(place)
    with spool._lock:
        answer = in_child(lambda: spool.write(settle(1)))

    assert [(answer, settle(1))] == spool.adopt()


def test_fork_while_writing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that is born while a file is being made does not keep that file from others either."""
    reached, go = threading.Event(), threading.Event()
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        reached.set()
        go.wait(20)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    spool = Spool(place)
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(spool.write, settle(1))
        assert reached.wait(20)
        (its, ours), (answer, born) = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            os.close(ours)
            os.write(born, b".")
            os.read(its, 1)
            os._exit(0)
        os.read(answer, 1)
        go.set()
        key = written.result()
    spool.close()
    adopted = Spool(place).adopt()
    os.close(ours)
    os.waitpid(child, 0)
    for descriptor in (its, answer, born):
        os.close(descriptor)

    assert adopted == [(key, settle(1))]


def test_a_fork_behind_our_back(place: Path) -> None:
    """A child that was forked by C code without telling Python is a child all the same, as soon as it uses the spool."""
    code = """
import ctypes
spool.write(settle(1))
if ctypes.PyDLL(None).fork() == 0:
    spool.write(settle(2))
    print([step.amount for _, step in spool.pending()], flush=True)
sys.stdin.read()
os._exit(0)
"""
    with program(code, place) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "[2]\n"
        parent.kill()
        parent.wait()

        assert [settle(1)] == [step for _, step in Spool(place).adopt()]

        # Its end of the pipe closes, which ends the child.
        parent.communicate()


def test_a_child_outlives_its_parent(place: Path) -> None:
    """What a parent left can be adopted although a child of it is still alive."""
    code = """
spool.write(settle(1))
if os.fork() == 0:
    print('child', flush=True)
    sys.stdin.read()
    os._exit(0)
sys.stdin.read()
"""
    with program(code, place) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "child\n"
        parent.kill()
        parent.wait()

        assert [settle(1)] == [step for _, step in Spool(place).adopt()]

        # Its end of the pipe closes, which ends the child.
        parent.communicate()


def test_threads(place: Path) -> None:
    """Threads may use one spool: nothing gets lost between them, and nothing is left when all is done."""
    spool = Spool(place)

    def work(n: int) -> int:
        keys = [spool.write(settle(100 * n + i)) for i in range(10)]
        mine = sum(key in keys for key, _ in spool.pending())
        for key in keys:
            spool.done(key)
        return mine

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, range(8)))

    assert found == [10] * 8
    assert files(place.parent) == []


def test_close(place: Path) -> None:
    """Closing leaves what is pending for the next; writing again begins a new file."""
    spool = Spool(place)
    first = spool.write(settle(1))
    spool.close()
    spool.close()

    assert spool.pending() == []

    second = spool.write(settle(2))
    next_one = Spool(place)

    assert next_one.adopt() == [(first, settle(1))]
    assert spool.pending() == [(second, settle(2))]


def test_park(place: Path) -> None:
    """A step that can never succeed is no longer pending but stays to be seen, by every process, with the reason."""
    spool = Spool(place)
    keys = [spool.write(settle(n)) for n in range(3)]
    spool.park(keys[1], "total too large")
    spool.park(keys[1], "again")
    spool.park("never there", "unknown")

    assert [(keys[0], settle(0)), (keys[2], settle(2))] == spool.pending()

    other = Spool(place)
    other.park(other.write(settle(7)), "no such meter")
    for key in keys:
        spool.done(key)

    assert files(place.parent) == ["credits.db.parked"]
    assert (place.parent / "credits.db.parked").stat().st_mode & 0o777 == 0o600
    assert [(settle(1), "total too large"), (settle(7), "no such meter")] == Spool(place).parked()


def test_park_synced(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step leaves the spool only after the file of the parked was synced, with its folder."""
    spool = Spool(place)
    key = spool.write(settle(1))
    synced: list[tuple[str, int]] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        fsync(descriptor)
        synced.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, len(spools(place))))

    monkeypatch.setattr(os, "fsync", watched)
    spool.park(key, "too large")

    assert [("credits.db.parked", 1), ("shop", 1)] == synced
    assert spools(place) == []


def test_parked_twice(place: Path) -> None:
    """If the process dies between parking a step and forgetting it, the next parks it again, and it is shown once."""
    left = leave(place, settle(1))
    data = left.read_bytes()
    for why in ("first", "second"):
        left.write_bytes(data)
        spool = Spool(place)
        ((key, _),) = spool.adopt()
        spool.park(key, why)

    assert Spool(place).parked() == [(settle(1), "second")]


def test_parked_torn(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A torn line among the parked is left out with a warning, and takes none with it that was parked later."""
    spool = Spool(place)
    spool.park(spool.write(settle(1)), "first")
    parked = place.with_name("credits.db.parked")
    parked.write_bytes(parked.read_bytes()[:-9])

    assert spool.parked() == []

    spool.park(spool.write(settle(2)), "second")

    assert spool.parked() == [(settle(2), "second")]
    assert f"1 lines of {parked} are damaged" in caplog.text


def test_park_fails(place: Path) -> None:
    """A step that cannot be parked stays pending."""
    spool = Spool(place)
    key = spool.write(settle(1))
    place.with_name("credits.db.parked").mkdir()

    with pytest.raises(OSError, match="the spool takes nothing"):
        spool.park(key, "too large")

    assert spool.pending() == [(key, settle(1))]


def test_no_way_through_a_link(place: Path, tmp_path: Path) -> None:
    """A link that somebody put in the place of a file of ours is not followed."""
    target = tmp_path / "target"
    target.write_text("precious")
    place.with_name("credits.db.parked").symlink_to(target)
    place.with_name("credits.db.spool-1-x").symlink_to(target)
    spool = Spool(place)

    with pytest.raises(OSError, match=r"credits\.db\.parked"):
        spool.park(spool.write(settle(1)), "too large")

    assert spool.adopt() == []
    assert target.read_text() == "precious"


@pytest.mark.parametrize("cut", [False, True])
def test_somebody_removes_the_file(place: Path, cut: bool, caplog: pytest.LogCaptureFixture) -> None:
    """If somebody removes or cuts a file that is in use, the next write puts everything pending on the disk again."""
    spool = Spool(place)
    keys = [spool.write(settle(n)) for n in range(3)]
    spool.done(keys[0])
    (path,) = spools(place)
    if cut:
        os.truncate(path, 5)
    else:
        path.unlink()
    keys.append(spool.write(settle(3)))
    expected = [(keys[n], settle(n)) for n in (1, 2, 3)]

    assert expected == spool.pending()
    assert len(spools(place)) == 1
    assert str(path) in caplog.text

    spool.close()

    assert expected == Spool(place).adopt()


def test_properties_that_json_cannot_carry(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An amount is never lost for what goes with it: what cannot be written is left out, with a warning that shows no content."""
    usage = Usage(model="gpt-5-mini")
    spool = Spool(place)
    with caplog.at_level(logging.WARNING):
        spool.write(settle(1, properties={"secret": {"secret"}}, usage=usage))
        spool.write(settle(2, properties={"plan": "pro"}, usage=Usage(seconds=float("nan"))))
        spool.write(settle(3, properties={"secret": b"secret"}, usage=Usage(seconds=float("nan"))))
    expected = [settle(1, usage=usage), settle(2, properties={"plan": "pro"}), settle(3)]

    assert expected == [step for _, step in spool.pending()]
    assert "secret" not in caplog.text
    assert "settle.properties holds a set, which JSON cannot carry" in caplog.text


def test_a_step_that_is_none(place: Path) -> None:
    """A step with an amount that is none is a mistake of the caller's, and is not written."""
    with pytest.raises(ValueError, match=r"^settle\.amount must be int, not str$"):
        Spool(place).write(Settle("h1", "ada", "generations", "5", "gen_1", "reported"))  # type: ignore[arg-type]  # on purpose

    assert files(place.parent) == []


def test_state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state folder is where the XDG specification puts it; a relative path in the environment is ignored, as it asks."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    assert tmp_path / "state" / "metered_ai" == state_folder()

    for value in ("", "state"):
        monkeypatch.setenv("XDG_STATE_HOME", value)

        assert tmp_path / ".local" / "state" / "metered_ai" == state_folder()
