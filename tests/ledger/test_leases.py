from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from metered_ai.ledger import leases
from metered_ai.ledger.leases import Heartbeat, new_hold_id, new_owner

LONG = 3600.0


@pytest.fixture
def heart() -> Iterator[Heartbeat]:
    heart = Heartbeat()
    keys: list[object] = []
    watch = heart.watch

    def remember(key: object, *args, **kwargs) -> None:
        keys.append(key)
        watch(key, *args, **kwargs)

    heart.watch = remember
    yield heart
    for key in keys:
        heart.forget(key)


def in_child(action: Callable[[], str]) -> str:
    """What `action` returns in a fork of this process."""
    ours, its = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(its, action().encode())
        finally:
            os._exit(0)
    os.close(its)
    with os.fdopen(ours) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return text


class Counter:
    """Counts its calls, and can be waited for."""

    def __init__(self) -> None:
        self.count = 0
        self.changed = threading.Condition()
        self.thread: threading.Thread | None = None

    def __call__(self) -> None:
        with self.changed:
            self.count += 1
            self.thread = threading.current_thread()
            self.changed.notify_all()

    def reaches(self, count: int) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: self.count >= count, 20)


def test_owner() -> None:
    """An owner's id is new each time and says nothing about the machine."""
    owners = {new_owner() for _ in range(100)}

    assert len(owners) == 100
    assert all(re.fullmatch("o[0-9a-f]{20}", owner) for owner in owners)


def test_hold_id_form() -> None:
    """A hold's id is an `h` and 29 hexadecimal digits, of which the first eleven are the time in milliseconds."""
    before = time.time_ns() // 1_000_000
    hold = new_hold_id()
    after = time.time_ns() // 1_000_000

    assert re.fullmatch("h[0-9a-f]{29}", hold)
    assert before <= int(hold[1:12], 16) <= after


def test_hold_ids_grow() -> None:
    """Ids made one after another are in order and never the same, within a millisecond and across."""
    holds = [new_hold_id() for _ in range(20_000)]

    assert sorted(set(holds)) == holds


def test_hold_ids_grow_when_the_clock_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is set back makes no id smaller than one before."""
    first = new_hold_id()
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now - 3600 * 10**9)
    second = new_hold_id()

    assert first < second


def test_hold_ids_of_threads() -> None:
    """Threads never get the same id."""
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: [new_hold_id() for _ in range(2_000)], range(8)))

    assert len({hold for holds in made for hold in holds}) == 16_000


def test_hold_ids_of_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork never makes its parent's ids, not even in the same millisecond."""
    now = time.time_ns() + 10**9
    monkeypatch.setattr(time, "time_ns", lambda: now)
    new_hold_id()
    theirs = in_child(lambda: " ".join(new_hold_id() for _ in range(100))).split()
    ours = [new_hold_id() for _ in range(100)]

    assert len({*theirs, *ours}) == 200


def test_it_beats(heart: Heartbeat) -> None:
    """What is watched is called again and again, in one daemon thread for all."""
    one, two = Counter(), Counter()
    heart.watch("one", one, 0.01)
    heart.watch("two", two, 0.01)

    assert one.reaches(3)
    assert two.reaches(3)
    assert one.thread is two.thread
    assert one.thread is not None
    assert one.thread.daemon


def test_the_first_beat_is_after_a_while(heart: Heartbeat) -> None:
    """The first beat comes one interval after `watch`, which itself calls nothing."""
    beat = Counter()
    since = time.monotonic()
    heart.watch("one", beat, 0.1)

    assert beat.count == 0
    assert beat.reaches(1)
    assert time.monotonic() - since >= 0.1


def test_watch_wakes(heart: Heartbeat) -> None:
    """A heartbeat that waits for an hour notices at once that another ledger wants one sooner."""
    beat = Counter()
    heart.watch("slow", Counter(), LONG)
    # The thread now waits for an hour.
    time.sleep(0.05)
    heart.watch("fast", beat, 0.01)

    assert beat.reaches(2)


def test_watch_again_replaces(heart: Heartbeat) -> None:
    """Watching a key again forgets what it had."""
    first, second = Counter(), Counter()
    heart.watch("one", first, 0.05)
    heart.watch("one", second, 0.01)

    assert second.reaches(10)
    assert first.count == 0


def test_it_ends(heart: Heartbeat) -> None:
    """The thread ends at once when nothing is watched, and another starts with the next watch."""
    beat = Counter()
    heart.watch("one", beat, 0.01)
    heart.watch("two", Counter(), LONG)

    assert beat.reaches(1)
    thread = beat.thread
    assert thread is not None

    heart.forget("one")
    heart.forget("one")
    # The thread now waits for an hour.
    time.sleep(0.05)

    assert thread.is_alive()

    heart.forget("two")
    thread.join(20)

    assert not thread.is_alive()

    heart.watch("one", beat, 0.01)

    assert beat.reaches(beat.count + 1)


def test_watch_while_the_thread_ends() -> None:
    """A ledger that is watched in the moment in which the thread ends is not overlooked."""
    over, go = threading.Event(), threading.Event()

    class Lingering(Heartbeat):
        def _run(self) -> None:
            super()._run()
            over.set()
            go.wait(20)

    heart, beat = Lingering(), Counter()
    heart.watch("one", beat, 0.01)
    assert beat.reaches(1)
    heart.forget("one")
    assert over.wait(20)
    heart.watch("one", beat, 0.01)

    assert beat.reaches(beat.count + 1)

    heart.forget("one")
    go.set()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_beat_that_ends_the_thread(heart: Heartbeat) -> None:
    """Should a beat end the thread, the next watch starts another, for all."""
    first, second = Counter(), Counter()

    def leave() -> None:
        first()
        if first.count == 1:
            raise SystemExit

    heart.watch("one", leave, 0.01)
    assert first.reaches(1)
    assert first.thread is not None
    first.thread.join(20)
    heart.watch("two", second, 0.01)

    assert second.reaches(1)
    assert first.reaches(2)


def test_forgotten_in_its_beat(heart: Heartbeat) -> None:
    """What was forgotten is not swept, even if that was due in the same moment."""
    sweep, after = Counter(), Counter()
    heart.watch("one", lambda: heart.forget("one"), 0.01, sweep=sweep, sweep_every=0.01)
    heart.watch("two", after, 0.05)

    assert after.reaches(2)
    assert sweep.count == 0


def test_times_must_be_positive(heart: Heartbeat) -> None:
    """An interval of 0 would keep a processor busy, so it is refused."""
    with pytest.raises(ValueError, match="every=0"):
        heart.watch("one", Counter(), 0)


def test_a_failing_beat_stops_nobody(heart: Heartbeat, caplog: pytest.LogCaptureFixture) -> None:
    """A beat that raises is tried again, the others go on, and each kind of failure is logged once until it goes well again."""
    raised = [OSError("full"), OSError("still full"), RuntimeError("odd"), OSError("full"), None, OSError("full again")]
    calls, other = Counter(), Counter()

    def fail() -> None:
        calls()
        error = raised[calls.count - 1] if calls.count <= len(raised) else None
        if error is not None:
            raise error

    with caplog.at_level(logging.WARNING):
        heart.watch("broken", fail, 0.01)
        heart.watch("sound", other, 0.01)

        assert calls.reaches(len(raised) + 1)
        assert other.reaches(3)

    expected = [
        f"The beat of a ledger failed and will be tried again: {text}" for text in ("full", "odd", "full again")
    ]

    assert expected == [record.getMessage() for record in caplog.records]


def test_no_log_after_forget(heart: Heartbeat, caplog: pytest.LogCaptureFixture) -> None:
    """A ledger that was closed while its beat ran leaves no warning, and no sweep."""
    sweep, after = Counter(), Counter()

    def beat() -> None:
        heart.forget("one")
        raise OSError("closed")

    with caplog.at_level(logging.WARNING):
        heart.watch("one", beat, 0.01, sweep=sweep, sweep_every=0.01)
        heart.watch("two", after, 0.05)

        assert after.reaches(2)

    assert caplog.records == []
    assert sweep.count == 0


def test_it_sweeps_after_a_beat(heart: Heartbeat) -> None:
    """Each sweep comes after a beat of its own, even if sweeps are due more often."""
    calls: list[str] = []
    sweep = Counter()

    def count() -> None:
        calls.append("sweep")
        sweep()

    heart.watch("one", lambda: calls.append("beat"), LONG, sweep=count, sweep_every=0.01)

    assert sweep.reaches(3)
    heart.forget("one")

    assert ["beat", "sweep"] * sweep.count == calls[: 2 * sweep.count]


def test_no_sweep_without_a_lease(heart: Heartbeat) -> None:
    """While its own lease cannot be renewed a ledger does not sweep, or it would give up its own holds; nor does it try any harder."""
    beat, sweep = Counter(), Counter()
    since = time.monotonic()

    def fail() -> None:
        beat()
        raise OSError("full")

    heart.watch("one", fail, 0.05, sweep=sweep, sweep_every=0.01)

    assert beat.reaches(4)
    assert time.monotonic() - since >= 0.15
    assert sweep.count == 0


def test_a_failing_sweep_is_tried_again(heart: Heartbeat, caplog: pytest.LogCaptureFixture) -> None:
    """A sweep that raises is logged once and does not keep the lease from being renewed."""
    beat, sweep = Counter(), Counter()

    def fail() -> None:
        sweep()
        raise OSError("full")

    with caplog.at_level(logging.WARNING):
        heart.watch("one", beat, 0.01, sweep=fail, sweep_every=0.01)

        assert sweep.reaches(3)
        assert beat.reaches(3)

    assert [r.getMessage() for r in caplog.records] == ["The sweep of a ledger failed and will be tried again: full"]


def test_a_beat_that_blocks(heart: Heartbeat) -> None:
    """If another ledger's beat took so long that a lease may be out, it is renewed again before its sweep."""
    calls: list[str] = []
    started, go, sweep = threading.Event(), threading.Event(), Counter()

    def first() -> None:
        started.set()
        go.wait(20)

    def slow() -> None:
        calls.append("slow")
        time.sleep(0.1)

    def count() -> None:
        calls.append("sweep")
        sweep()

    heart.watch("first", first, 0.01)
    assert started.wait(20)
    # The thread is busy until both are due, so that it finds them in one round.
    heart.watch("one", lambda: calls.append("beat"), 0.05, sweep=count, sweep_every=0.05)
    heart.watch("two", slow, 0.05)
    time.sleep(0.06)
    go.set()

    assert sweep.reaches(1)
    assert ["beat", "slow", "beat", "sweep"] == calls[:4]


STOPPED = """
import threading, time
from metered_ai.ledger.leases import heartbeat
last = 0.0
def beat():
    global last
    last = time.monotonic()
    print("beat", flush=True)
def sweep():
    print("sweep", time.monotonic() - last, flush=True)
heartbeat.watch("one", beat, 0.1, sweep=sweep, sweep_every=0.15)
input()
"""


def test_a_process_that_was_stopped() -> None:
    """A process that was stopped for longer than its lease renews it before it sweeps."""
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        lines = [process.stdout.readline().split() for _ in range(4)]
        process.send_signal(signal.SIGSTOP)
        # Time has to pass; there is nothing to wait for.
        time.sleep(0.5)
        process.send_signal(signal.SIGCONT)
        lines += [process.stdout.readline().split() for _ in range(6)]
        process.communicate("\n")

    sweeps = [float(line[1]) for line in lines if line[0] == "sweep"]

    assert len(sweeps) >= 3
    assert max(sweeps) < 0.1


def test_fork() -> None:
    """A child watches nothing of its parent's, and can watch its own; the parent goes on."""
    heart, ours, its = leases.heartbeat, Counter(), Counter()

    def child() -> str:
        inherited = ours.count
        heart.watch("its", its, 0.01)
        return f"{its.reaches(3)} {ours.count - inherited}"

    heart.watch("ours", ours, 0.01)
    try:
        assert ours.reaches(1)
        assert in_child(child) == "True 0"
        assert ours.reaches(ours.count + 1)
    finally:
        heart.forget("ours")


def test_fork_in_the_middle() -> None:
    """A child can watch even if another thread was in the middle of doing so when it was born."""
    heart, its = leases.heartbeat, Counter()

    def child() -> str:
        heart.watch("its", its, 0.01)
        return str(its.reaches(1))

    with heart._changed:
        answer = in_child(child)

    assert answer == "True"
