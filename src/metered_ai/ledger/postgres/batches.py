"""
Many steps in one round trip and one commit: places, or settles and releases, of whatever accounts.

A batch is two or three statements in one pipeline and so one transaction, without a BEGIN: the first locks the accounts' rows in their
order, the next act on what is usual. Each statement sees what was committed before it began, so that the second sees everything that
the first has waited for. It says which steps it took. For those it did not take nothing has happened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import TYPE_CHECKING, Any

from ...core.steps import Place, Release, Released, Settle, Settled
from ...records import Hold, UsageEvent
from ..rows import Row, moment, packed, unpacked, usage_columns
from .driver import cursor_of

if TYPE_CHECKING:
    from .driver import Connection, Cursor

__all__ = ["ENDS", "Batch", "is_usual"]

ENDS = (Settle, Release)
_SECOND = 1_000_000


def is_usual(step: object) -> bool:
    """A step that a batch may take."""
    kind = type(step)
    return (kind is Place and step.operation is None) or kind is Settle or kind is Release  # type: ignore[attr-defined]


class Batch:
    """Usual steps, and what came of those that were taken."""

    def __init__(self, texts: Mapping[str, bytes], clock: Callable[[], int] | None, service: str | None) -> None:
        self._texts = texts
        self._clock = clock
        self._service = service
        self._places: list[tuple[int, Place, str | None]] = []
        self._settles: list[tuple[int, Settle, str | None]] = []
        self._releases: list[tuple[int, Release]] = []

    def add(self, index: int, step: Any) -> None:
        """Take a step up. ValueError if its properties cannot be stored."""
        if type(step) is Place:
            self._places.append((index, step, packed(step.properties)))
        elif type(step) is Settle:
            self._settles.append((index, step, packed(step.properties)))
        else:
            self._releases.append((index, step))

    def __len__(self) -> int:
        return len(self._places) + len(self._settles) + len(self._releases)

    def run(
        self,
        connection: Connection,
        settings: Sequence[str | None] | None,
        *,
        is_durable: bool,
        skips_locked: bool = False,
    ) -> dict[int, object]:
        """Do it; the results of those that were taken, by their index. `settings` are sent first where a session is not ours."""
        now = None if self._clock is None else self._clock()
        free = "_free" if skips_locked else ""
        placed = settled = released = None
        with connection.pipeline():
            if settings is not None:
                cursor_of(connection).execute(self._texts["batches.settings"], (is_durable, *settings))
            holding = list({step.customer for _, step, _ in self._places})
            if self._settles or self._releases:
                ends: list[Settle | Release] = [taken[1] for taken in self._settles]
                ends += [taken[1] for taken in self._releases]
                accounts = {(step.customer, step.meter) for step in ends}
                customers, meters = map(list, zip(*accounts, strict=True))
                if holding and not free:
                    # All at once, for the sake of their order.
                    self._lock(connection, "batches.all_locks", (customers, meters, is_durable, holding))
                else:
                    self._lock(connection, f"batches.end_locks{free}", (customers, meters, is_durable))
            if self._settles:
                settled = self._execute(connection, "batches.settle", now, map(_settle_row, self._settles))
            if self._releases:
                released = self._execute(connection, "batches.release", now, map(_release_row, self._releases))
            # Last, because the others make room for them.
            if self._places:
                if free or not (self._settles or self._releases):
                    self._lock(connection, f"batches.hold_locks{free}", (holding, is_durable))
                placed = self._execute(connection, "batches.place", now, map(_place_row, self._places), self._service)
        results: dict[int, object] = {}
        for cursor, steps, result_of in (
            (placed, self._places, _hold_of),
            (settled, self._settles, _settled_of),
            (released, self._releases, _released_of),
        ):
            if cursor is not None:
                for row in cursor.fetchall():
                    taken = steps[row[0] - 1]
                    results[taken[0]] = result_of(taken, row)
        return results

    def _lock(self, connection: Connection, name: str, parameters: Sequence[Any]) -> None:
        cursor_of(connection).execute(self._texts[name], parameters)

    def _execute(self, connection: Connection, name: str, now: int | None, rows: Any, *more: Any) -> Cursor:
        cursor = cursor_of(connection)
        cursor.execute(self._texts[name], (now, *map(_column, zip(*rows, strict=True)), *more))
        return cursor


def _column(values: Row) -> list[Any] | str | None:
    """
    One array for each column, as little work for the driver as can be: it looks at each element of a list.

    One without a value is left out, and `unnest` fills it with NULL; whole numbers and plain texts go as the text of an array.
    """
    kinds = set(map(type, values))
    if kinds == {NoneType}:
        return None
    if kinds == {int}:
        return f"{{{','.join(map(str, values))}}}"
    if kinds == {str}:
        text = '","'.join(values)
        # Each value is between quotes; one that has a quote or a backslash of its own is left to the driver.
        if "\\" not in text and text.count('"') == 2 * (len(values) - 1):
            return f'{{"{text}"}}'
    return list(values)


def _place_row(taken: tuple[int, Place, str | None]) -> Row:
    _, step, properties = taken
    return (
        step.customer,
        step.meter,
        step.hold_id,
        step.amount,
        step.owner,
        int(step.lease * _SECOND),
        int(step.max_call * _SECOND),
        step.on_unknown,
        step.parent,
        step.endpoint,
        step.model,
        step.price_slug,
        properties,
        step.max_holds,
    )


def _hold_of(taken: Any, row: Row) -> Hold:
    step: Place = taken[1]
    _, is_unlimited, now, lease_until = row
    ends_at = now + int(step.max_call * _SECOND)
    return Hold(
        step.hold_id,
        step.customer,
        step.meter,
        step.amount,
        "open",
        moment(now),
        moment(ends_at if lease_until is None else min(ends_at, lease_until)),
        endpoint=step.endpoint,
        model=step.model,
        parent=step.parent,
        is_unlimited=is_unlimited == 1,
    )


def _settle_row(taken: tuple[int, Settle, str | None]) -> Row:
    _, step, properties = taken
    return (
        step.customer,
        step.meter,
        step.hold_id,
        step.amount,
        step.transaction_id,
        step.basis,
        step.kind,
        step.fingerprint,
        step.request_id,
        step.attempts,
        step.price_slug,
        step.parent,
        properties,
        0 if step.usage is None else 1,
        *usage_columns(step.usage),
    )


def _settled_of(taken: Any, row: Row) -> Settled:
    step: Settle = taken[1]
    _, name, created_at, is_unlimited = row
    event = UsageEvent(
        step.customer,
        step.meter,
        name,
        step.amount,
        moment(created_at),
        step.basis,
        step.kind,
        step.hold_id,
        step.usage,
        step.request_id,
        step.attempts,
        unpacked(taken[2]),
        step.price_slug,
        step.parent,
        is_unlimited == 1,
    )
    return Settled(event, "settled")


def _release_row(taken: tuple[int, Release]) -> Row:
    step = taken[1]
    return step.customer, step.meter, step.hold_id, step.reason, step.sent


def _released_of(taken: Any, row: Row) -> Released:  # noqa: ARG001  As its neighbours.
    return Released("released")
