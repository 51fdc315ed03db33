"""
What watches a call from its hold to its end: the answer, the response it came in, the stream it is read from.

`LiveCall` is one metered call. Its end is claimed once, whoever comes first: the terminal marker of a stream, the end of its bytes,
an error, a close, the garbage collector, or the end of the program.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from .core.bodies import BodyReader, read_body
from .core.call import Ended, Plan, ending, place_step, wants_drain
from .core.observe import Observation
from .core.steps import Place, Release, Settle
from .core.streams import StreamReader
from .errors import UsageNotRecordedError
from .ledger.leases import new_hold_id
from .settling import End, Settler, unrecorded

if TYPE_CHECKING:
    from .billing import Billing
    from .context import Receipt
    from .records import Hold, UsageEvent

__all__ = ["LiveCall"]

_log = logging.getLogger(__name__)

DRAIN_SECONDS = 30.0
"""How long an answer that nobody reads any more is read on for its usage, with on_abort="drain"."""

# By name and not by class: the SDK speaks httpx or httpx2, whichever is there. Before these no byte of the request went out.
_NEVER_SENT = frozenset(
    "ConnectError ConnectTimeout PoolTimeout ProxyError UnsupportedProtocol LocalProtocolError InvalidURL OpenAIError".split()
)


class LiveCall:
    """One metered call of a client, from before its hold to its one end."""

    __slots__ = (
        "__weakref__",
        "_claim",
        "_pid",
        "attempts",
        "billing",
        "failed",
        "hold",
        "hold_id",
        "lost",
        "plan",
        "reached",
        "reader",
        "receipts",
        "request_id",
        "response",
        "settler",
        "unread",
        "unrecorded",
    )

    def __init__(self, billing: Billing, plan: Plan, receipts: tuple[Receipt, ...]) -> None:
        self.billing = billing
        self.plan = plan
        self.receipts = receipts
        self.hold_id = new_hold_id()
        self.hold: Hold | None = None
        self.settler: Settler | None = None
        self.attempts = 0
        self.lost = 0
        self.reached = 0
        self.request_id: str | None = None
        self.response: Any = None
        """The response, while the call still has to read it; a stream's is never kept here, or it could not be dropped."""
        self.reader: StreamReader | BodyReader | None = None
        self.unread: list[Any] = []
        self.failed: Exception | None = None
        self.unrecorded: UsageEvent | None = None
        self._pid = os.getpid()
        # Popping is atomic without a lock, which a finalizer could find taken.
        self._claim = [None]

    def step(self, owner: str) -> Place:
        """The hold to place."""
        keeps = self.billing.settings
        return place_step(self.plan, self.hold_id, owner, keeps.lease, keeps.max_call, keeps.max_holds)

    # What the client sees on the way. It counts itself: the attempts that went out, and those that a response reached.

    def not_answered(self, error: BaseException) -> None:
        """An attempt brought no response. Unless it never connected, the provider may have worked for it."""
        if not any(kind.__name__ in _NEVER_SENT for kind in type(error).__mro__):
            self.lost += 1

    def answered(self, response: Any, *, is_stream: bool, is_async: bool) -> None:
        """A successful response is here: from now on the provider has worked, whatever is raised."""
        self.request_id = response.headers.get("x-request-id")
        self.response = response
        if response.is_closed:
            _share_json(self, response)
            return

        plan = self.plan
        if is_stream:
            self.reader = StreamReader(
                plan.door, plan.request, count_text=not plan.pricing.is_fixed, hide_usage=plan.hides_usage
            )
        else:
            self.reader = BodyReader(plan.door, plan.request)
        content_type = response.headers.get("content-type", "")
        (_AsyncTap if is_async else _SyncTap)(self, response, self.reader, content_type)
        self.billing._watch(self, partial(self.enqueue, "stopped", content_type))
        weakref.finalize(response, self.enqueue, "stopped", content_type).atexit = False
        self.response = None

    # How it ends.

    def claim(self) -> bool:
        """True for the first who asks, in the process that made the call. Safe in finalizers."""
        if self._pid != os.getpid():
            return False
        try:
            self._claim.pop()
        except IndexError:
            return False
        return True

    @property
    def has_ended(self) -> bool:
        return not self._claim

    def raised(self) -> Ended | None:
        """How a call that raised has ended; None when a stream of it is still open and will end by itself."""
        if self.response is not None:
            return "answered"
        if self.reader is not None:
            return "stopped"
        # The worst attempt decides: a refusal after a lost attempt does not tell what the lost one cost.
        if self.lost:
            return "unknown"
        return "refused" if self.reached else "not_sent"

    def end(self, ended: Ended, content_type: str = "") -> End:
        """What to bring into the ledger. Only after a claim."""
        if self.reader is not None:
            self.billing._unwatch(self)
        seen = self._seen(ended, content_type) if ended not in ("refused", "not_sent", "unknown") else None
        try:
            step = self._decide(ended, seen)
        except Exception as error:  # noqa: BLE001  a pricing of the user's may raise anything
            what = self.plan.door.name
            _log.error("what %s costs could not be worked out (%s); its hold is charged", what, type(error).__name__)
            step = self._decide("priceless", seen)
        return End(step, tuple([receipt._settled for receipt in self.receipts]))

    def _decide(self, ended: Ended, seen: Observation | None) -> Settle | Release:
        hold = self.hold
        return ending(
            self.plan,
            ended,
            seen,
            self.hold_id,
            operation=None if hold is None else hold.transaction_id,
            is_unlimited=hold is not None and hold.is_unlimited,
            request_id=self.request_id,
            attempts=self.attempts or 1,
        )

    def _seen(self, ended: Ended, content_type: str) -> Observation | None:
        plan = self.plan
        try:
            if self.reader is not None:
                return (
                    self.reader.observation()
                    if isinstance(self.reader, StreamReader)
                    else self.reader.observation(content_type, partial=ended != "answered")
                )
            response = self.response
            if response is None:
                return None
            data = _json_of(self, response)
            if isinstance(data, dict):
                # Asking for a header is not cheap, and the type says nothing that this does not.
                kind = ""
            else:
                kind = response.headers.get("content-type", "")
            return read_body(
                plan.door, plan.request, response.content, data, kind, count_text=not plan.pricing.is_fixed
            )
        except Exception as error:  # noqa: BLE001  reading must never cost the caller the answer
            # Charged as an answer without usage. No traceback: it could show what is in the answer.
            _log.error("the usage of %s could not be read (%s)", plan.door.name, type(error).__name__)
            return None

    def enqueue(self, ended: Ended, content_type: str = "") -> None:
        """End the call from a close or a finalizer: only the queue's thread touches the ledger."""
        settler = self.settler
        if settler is not None and self.claim():
            settler.enqueue(lambda: settler.finish(self.end(ended, content_type)))

    # Two shells, side by side.

    def place(self) -> None:
        """Hold the credits, or raise with nothing sent."""
        billing = self.billing
        ledger, settler, owner = billing._ready()
        # First, so that an interrupt right after the hold finds whom to hand its end to.
        self.settler = settler
        self.hold = billing._place(ledger, settler, self.step(owner))

    def finish(self, ended: Ended, content_type: str = "") -> None:
        """Bring the end in and wait for it."""
        settler = self.settler
        if settler is None or self.hold is None:
            return
        try:
            if self.claim():
                end = self.end(ended, content_type)
                failed = settler.finish(end)
                if failed is not None:
                    self._note(end, failed)
        except BaseException:
            # Interrupted: the queue's thread, which no signal reaches, does it. What was done already it changes no more.
            settler.start()
            settler.enqueue(lambda: settler.finish(self.end(ended, content_type)))
            raise

    async def aplace(self) -> None:
        """Hold the credits, or raise with nothing sent."""
        billing = self.billing
        _, settler, owner = billing._ready() if billing._is_open else await billing._aready()
        self.settler = settler
        self.hold = await billing._aplace(settler, self.step(owner))

    async def afinish(self, ended: Ended, content_type: str = "") -> None:
        """Bring the end in and wait for it. A cancellation ends the waiting only."""
        if self.settler is not None and self.hold is not None and self.claim():
            end = self.end(ended, content_type)
            failed = await self.settler.afinish(end)
            if failed is not None:
                self._note(end, failed)

    def submit(self, ended: Ended, content_type: str = "") -> None:
        """Bring the end in without waiting: for a task that is being cancelled."""
        if self.settler is not None and self.hold is not None and self.claim():
            self.settler.submit(self.end(ended, content_type))

    def _note(self, end: End, failed: Exception) -> None:
        if isinstance(end.step, Settle):
            self.failed, self.unrecorded = failed, unrecorded(end)

    @property
    def is_to_raise(self) -> bool:
        """The end is not recorded yet, and on_settle_failure="raise" wants the caller to know."""
        return self.failed is not None and self.billing.settings.on_settle_failure == "raise"

    def check_recorded(self, result: object) -> None:
        """Raise what on_settle_failure="raise" asks for."""
        if self.is_to_raise:
            raise UsageNotRecordedError(
                f"{self.plan.door.name} was answered, but its usage is not recorded yet (it is kept and will be tried again): {self.failed}",
                result=result,
                event=self.unrecorded,
            ) from self.failed


# A body that was read before we see it: share the one parse that the SDK makes.


def _share_json(call: LiveCall, response: Any) -> None:
    cls = type(response)
    parsed = call.unread

    def json(**options: Any) -> Any:
        if options:
            return cls.json(response, **options)
        if parsed and call.has_ended:
            _unshare(response)
            return parsed.pop()
        data = cls.json(response)
        if not call.has_ended:
            parsed[:] = [data]
        return data

    response.json = json


def _unshare(response: Any) -> None:
    # The SDK's own method from here on. Ours refers to its response: left there, both and all they hold would wait for the
    # garbage collector.
    response.__dict__.pop("json", None)


_NOT_JSON = object()


def _json_of(call: LiveCall, response: Any) -> Any:
    if call.unread:
        _unshare(response)
        return call.unread.pop()
    content = response.content
    if not content or content.lstrip()[:1] not in (b"{", b"["):
        return _NOT_JSON
    try:
        data = type(response).json(response)
    except (ValueError, RecursionError):
        return _NOT_JSON
    # The caller may still parse a raw response: hand this one over instead of parsing twice.
    call.unread.append(data)
    return data


# A body that is still to be read: watch the response that everybody reads from.


class _Tap:
    """
    Replaces the reading and closing of one response.

    httpx closes a response before it gives out the last bytes, so a close during a pull says nothing; and a close may run in a
    generator's cleanup, from the garbage collector, so it only enqueues.
    """

    def __init__(self, call: LiveCall, response: Any, reader: StreamReader | BodyReader, content_type: str) -> None:
        self.call = call
        self.response = response
        self.kind = type(response)
        self.reader = reader
        # Lets the reader see a chunk; gives what the caller may see.
        self.feed: Callable[[bytes], bytes] = reader.feed if isinstance(reader, StreamReader) else self.feed_body
        self.content_type = content_type
        self.puller: int | None = None
        self.was_closed_by_other = False
        self.is_drained = False
        self._to_drain = [None]
        self.is_unrecorded = False
        # Bytes that are compressed can be counted only after decoding, which iter_raw skips.
        self.is_opaque = "content-encoding" in response.headers
        self.install(response)

    def install(self, response: Any) -> None:
        raise NotImplementedError

    def exhausted(self, feed: Callable[[bytes], bytes]) -> Ended:
        """How a body that came to its end has ended."""
        if feed is _unseen:
            # Nothing can be said of it, so it counts as an answer without usage.
            self.call.reader = None
            return "answered"
        if isinstance(self.reader, BodyReader) or self.reader.is_complete:
            return "answered"
        if self.was_closed_by_other:
            return self.stopped()
        seen = self.reader.observation()
        return "broken" if seen.is_answer or seen.error else "answered"

    def broke(self, error: BaseException) -> Ended:
        """How a body that raised while it was pulled has ended."""
        if isinstance(self.reader, StreamReader) and self.reader.is_complete and isinstance(error, Exception):
            # Only what comes after the answer is missing.
            return "answered"
        if self.was_closed_by_other or not isinstance(error, Exception) or _is_misuse(error):
            return self.stopped()
        return "broken"

    def stopped(self) -> Ended:
        """How a body has ended whose reader left, and that nobody reads on."""
        return "held" if wants_drain(self.call.plan) else "stopped"

    def closes(self) -> bool:
        """Note a close. True when it ends the call: not while bytes are being pulled."""
        if self.puller is None:
            return not self.call.has_ended
        if self.puller != threading.get_ident():
            self.was_closed_by_other = True
        return False

    def takes_drain(self) -> bool:
        """
        Take the rest of an answer for the background, if the policy asks for it and there is room.

        The call is not claimed by that: should the program end meanwhile, that ends the call.
        """
        call = self.call
        if not wants_drain(call.plan) or call.has_ended or not call.billing._drains.acquire(blocking=False):
            return False
        try:
            self._to_drain.pop()
        except IndexError:
            call.billing._drains.release()
            return False
        self.is_drained = True
        return True

    def before_the_end(self, chunk: bytes) -> bytes:
        """The last bytes of a stream whose usage could not be recorded, where that is to be raised: the SDK must ask once more."""
        if self.call.is_to_raise:
            self.is_unrecorded = True
            return chunk.replace(b"data: [DONE]", b"").replace(b"data:[DONE]", b"")
        return chunk

    def feed_body(self, chunk: bytes) -> bytes:
        self.reader.feed(chunk)
        return chunk


class _SyncTap(_Tap):
    def install(self, response: Any) -> None:
        self.rest: Iterator[bytes] | None = None
        response.iter_bytes = self.iter_bytes
        response.iter_raw = self.iter_raw
        response.close = self.close

    def iter_bytes(self, chunk_size: int | None = None) -> Iterator[bytes]:
        return self.watch(self.kind.iter_bytes(self.response, chunk_size), self.feed)

    def iter_raw(self, chunk_size: int | None = None) -> Iterator[bytes]:
        inner = self.kind.iter_raw(self.response, chunk_size)
        if self.puller is not None:
            # iter_bytes reads through this one.
            return inner  # type: ignore[no-any-return]  # the response's class is not known here
        return self.watch(inner, _unseen if self.is_opaque else self.feed)

    def watch(self, inner: Iterator[bytes], feed: Callable[[bytes], bytes]) -> Iterator[bytes]:
        call = self.call
        stream = self.reader if isinstance(self.reader, StreamReader) else None
        self.rest = inner
        try:
            while not self.is_drained:
                self.puller = threading.get_ident()
                try:
                    chunk = next(inner)
                except StopIteration:
                    break
                except BaseException as error:
                    if self.is_drained and isinstance(error, ValueError):
                        # Closed while its reader goes on: somebody else pulls now.
                        return
                    self.puller = None
                    call.finish(self.broke(error), self.content_type)
                    raise
                self.puller = None
                shown = feed(chunk)
                if stream is not None and stream.is_done and not call.has_ended:
                    call.finish("answered", self.content_type)
                    shown = self.before_the_end(shown)
                if shown:
                    yield shown
                if self.is_unrecorded:
                    call.check_recorded(self.response)
            if self.is_drained:
                return
            self.puller = None
            if stream is not None and (withheld := stream.flush()):
                yield withheld
            call.finish(self.exhausted(feed), self.content_type)
            call.check_recorded(self.response)
        except GeneratorExit:
            # Its reader was dropped, which is a close; and before the bytes are closed, or nobody could read on.
            if not call.has_ended:
                self.close()
            raise
        finally:
            if not self.is_drained:
                self.puller = None
                inner.close()  # type: ignore[attr-defined]  # it is a generator

    def close(self) -> None:
        if self.is_drained:
            # Whoever reads on closes the response.
            return
        if self.closes():
            if self.takes_drain():
                threading.Thread(target=self.drain, name="metered-ai-drain", daemon=True).start()
                return
            self.call.enqueue(self.stopped(), self.content_type)
        self.kind.close(self.response)

    def drain(self) -> None:
        """Read on for the usage, for at most DRAIN_SECONDS."""
        call = self.call
        ended: Ended = "held"
        timer = threading.Timer(DRAIN_SECONDS, self.cut_off)
        timer.daemon = True
        timer.start()
        try:
            rest = self.rest if self.rest is not None else self.kind.iter_bytes(self.response)
            # iter_bytes reads through our own iter_raw and closes through our own close.
            self.puller = threading.get_ident()
            for chunk in rest:
                self.feed(chunk)
                if isinstance(self.reader, StreamReader) and self.reader.is_done:
                    break
            if self.exhausted(self.feed) == "answered":
                ended = "answered"
        except Exception as error:  # noqa: BLE001  nobody waits for it; the hold is charged
            _log.info("an answer that nobody reads could not be read to its usage: %s", type(error).__name__)
        finally:
            timer.cancel()
            self.puller = None
            call.billing._drains.release()
            call.finish(ended, self.content_type)
            self.kind.close(self.response)

    def cut_off(self) -> None:
        """End a pull in another thread. A thread that waits for bytes does not notice that its socket is closed, but that it is shut down."""
        response = self.response
        stream = response.extensions.get("network_stream")
        sock = stream.get_extra_info("socket") if stream is not None and response.http_version < "HTTP/2" else None
        if sock is None:
            self.kind.close(response)
            return
        with suppress(OSError):
            # Not the method of an SSL socket, which would forget its keys while the other thread reads.
            socket.socket.shutdown(sock, socket.SHUT_RDWR)


class _AsyncTap(_Tap):
    def install(self, response: Any) -> None:
        self.rest: AsyncIterator[bytes] | None = None
        response.aiter_bytes = self.aiter_bytes
        response.aiter_raw = self.aiter_raw
        response.aclose = self.aclose

    def aiter_bytes(self, chunk_size: int | None = None) -> AsyncIterator[bytes]:
        return self.watch(self.kind.aiter_bytes(self.response, chunk_size), self.feed)

    def aiter_raw(self, chunk_size: int | None = None) -> AsyncIterator[bytes]:
        inner = self.kind.aiter_raw(self.response, chunk_size)
        if self.puller is not None:
            # aiter_bytes reads through this one.
            return inner  # type: ignore[no-any-return]  # the response's class is not known here
        return self.watch(inner, _unseen if self.is_opaque else self.feed)

    async def watch(self, inner: AsyncIterator[bytes], feed: Callable[[bytes], bytes]) -> AsyncIterator[bytes]:
        call = self.call
        stream = self.reader if isinstance(self.reader, StreamReader) else None
        self.rest = inner
        try:
            while not self.is_drained:
                self.puller = id(asyncio.current_task())
                try:
                    chunk = await anext(inner)
                except StopAsyncIteration:
                    break
                except BaseException as error:
                    if self.is_drained and isinstance(error, RuntimeError):
                        # Closed while its reader goes on: somebody else pulls now.
                        return
                    self.puller = None
                    if isinstance(error, Exception):
                        await call.afinish(self.broke(error), self.content_type)
                    else:
                        # Cancelled in mid-read: awaiting would be cancelled again.
                        call.submit(self.broke(error), self.content_type)
                    raise
                self.puller = None
                shown = feed(chunk)
                if stream is not None and stream.is_done and not call.has_ended:
                    await call.afinish("answered", self.content_type)
                    shown = self.before_the_end(shown)
                if shown:
                    yield shown
                if self.is_unrecorded:
                    call.check_recorded(self.response)
            if self.is_drained:
                return
            self.puller = None
            if stream is not None and (withheld := stream.flush()):
                yield withheld
            await call.afinish(self.exhausted(feed), self.content_type)
            call.check_recorded(self.response)
        except GeneratorExit:
            # Its reader was dropped, which is a close; and before the bytes are closed, or nobody could read on.
            if not call.has_ended:
                await self.aclose()
            raise
        finally:
            if not self.is_drained:
                self.puller = None
                await inner.aclose()  # type: ignore[attr-defined]  # it is an async generator

    async def aclose(self) -> None:
        if self.is_drained:
            return
        if self.closes():
            if self.takes_drain():
                task = asyncio.ensure_future(self.drain())
                _drains.add(task)
                task.add_done_callback(_drains.discard)
                return
            self.call.enqueue(self.stopped(), self.content_type)
        await self.kind.aclose(self.response)

    def closes(self) -> bool:
        if self.puller is None:
            return not self.call.has_ended
        task = asyncio.current_task()
        if task is not None and self.puller != id(task):
            self.was_closed_by_other = True
        return False

    async def drain(self) -> None:
        """Read on for the usage, for at most DRAIN_SECONDS."""
        call = self.call
        ended: Ended = "held"
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                rest = self.rest if self.rest is not None else self.kind.aiter_bytes(self.response)
                # aiter_bytes reads through our own aiter_raw and closes through our own aclose.
                self.puller = id(asyncio.current_task())
                async for chunk in rest:
                    self.feed(chunk)
                    if isinstance(self.reader, StreamReader) and self.reader.is_done:
                        break
            if self.exhausted(self.feed) == "answered":
                ended = "answered"
        except Exception as error:  # noqa: BLE001  nobody waits for it; the hold is charged
            _log.info("an answer that nobody reads could not be read to its usage: %s", type(error).__name__)
        finally:
            self.puller = None
            call.billing._drains.release()
            # Also when the loop is being torn down, and this task cancelled: the end is handed over before anything is awaited.
            call.submit(ended, self.content_type)
            with suppress(RuntimeError):
                await self.kind.aclose(self.response)


_drains: set[asyncio.Task[None]] = set()
"""Keeps running drains from being collected."""


def _is_misuse(error: Exception) -> bool:
    """The reader's own mistake: it read twice, after a close, or from two places at once. The provider did not break off."""
    return any(kind.__name__ == "StreamError" for kind in type(error).__mro__) or (
        isinstance(error, ValueError | RuntimeError) and "generator" in str(error)
    )


def _unseen(chunk: bytes) -> bytes:
    return chunk
