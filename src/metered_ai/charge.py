"""A hold around anything: `billing.charge(...)`."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from .context import Cover, Receipt, bill_to, new_scope
from .core.checks import check_amount, check_name
from .core.steps import Enlarge, Place, Release, Settle, Settled
from .errors import ConfigurationError, InsufficientCreditsError, UsageNotRecordedError
from .ledger.leases import new_hold_id
from .settling import End, unrecorded

if TYPE_CHECKING:
    from typing import Self

    from .billing import Billing
    from .records import Hold, UsageEvent

__all__ = ["Charge"]


class Charge:
    """
    Credits held while the block runs; leaving settles `amount`, an exception releases.

    `transaction_id` may be set until it is settled; where that id was billed before, the hold is released and `event` is the earlier
    event. `amount` may be lowered freely; `raise_to` holds the difference first.
    """

    def __init__(
        self,
        billing: Billing,
        customer: str,
        meter: str,
        *,
        amount: int,
        transaction_id: str | None,
        covers_calls: bool,
        price_slug: str | None,
        properties: Mapping[str, Any] | None,
    ) -> None:
        self._billing = billing
        self.customer = check_name(customer, "customer")
        self.meter = check_name(meter, "meter")
        self._amount = self._held = check_amount(amount, "amount")
        self._operation = transaction_id
        self._transaction_id = None if transaction_id is None else check_name(transaction_id, "transaction_id", 255)
        self._price_slug = price_slug
        self._properties = properties
        self._block = bill_to(customer) if covers_calls else None
        self._hold: Hold | None = None
        self._hold_id = new_hold_id()
        self._is_over = False
        self.event: UsageEvent | None = None
        """The usage event, once settled."""
        self.receipt: Receipt | None = None
        """What the covered calls recorded, with `covers_calls`."""

    @property
    def amount(self) -> int:
        """What will be charged. Lower it by setting it; more than is held needs `raise_to`."""
        return self._amount

    @amount.setter
    def amount(self, amount: int) -> None:
        self._check_open()
        if check_amount(amount, "amount") > self._held:
            raise ValueError(
                f"amount {amount!r} is more than the {self._held} held; raise_to({amount!r}) holds the difference first"
            )
        self._amount = amount

    @property
    def transaction_id(self) -> str | None:
        """What the event will be called; None means `hold_` and the hold's id."""
        return self._transaction_id

    @transaction_id.setter
    def transaction_id(self, transaction_id: str) -> None:
        self._check_open()
        if self._operation is not None:
            raise ConfigurationError(f"the charge was placed as {self._operation!r}; its transaction id cannot change")
        self._transaction_id = check_name(transaction_id, "transaction_id", 255)

    # Two shells, side by side.

    def __enter__(self) -> Self:
        self._check_new()
        ledger, settler, owner = self._billing._ready()
        self._placed(self._billing._place(ledger, settler, self._place_step(owner)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        self._leave_block(kind, error, traceback)
        if self._is_over:
            return
        if error is not None:
            self._is_over = True
            self._billing._settler.finish(self._release())
        else:
            self.commit()

    def raise_to(self, amount: int) -> None:
        """Hold more, then charge `amount`. InsufficientCreditsError leaves everything as it was."""
        self._check_open()
        if check_amount(amount, "amount") > self._held:
            with self._refusals():
                self._billing._enlarge(self._enlarge(amount))
            self._held = amount
        self._amount = amount

    def commit(self) -> UsageEvent | None:
        """Settle now. Leaving the block then does nothing more. None when the ledger could not take it yet (it is kept and tried again)."""
        self._check_open()
        self._is_over = True
        end = self._settle()
        failed = self._billing._settler.finish(end)
        return self._committed(end, failed)

    async def __aenter__(self) -> Self:
        self._check_new()
        _, settler, owner = await self._billing._aready()
        self._placed(await self._billing._aplace(settler, self._place_step(owner)))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        self._leave_block(kind, error, traceback)
        if self._is_over:
            return
        if error is not None:
            self._is_over = True
            if isinstance(error, Exception):
                await self._billing._settler.afinish(self._release())
            else:
                # Cancelled: awaiting would be cancelled again, and the release needs no waiter.
                self._billing._settler.submit(self._release())
        else:
            await self.acommit()

    async def araise_to(self, amount: int) -> None:
        """`raise_to`, without blocking the loop."""
        self._check_open()
        if check_amount(amount, "amount") > self._held:
            with self._refusals():
                await self._billing._aenlarge(self._enlarge(amount))
            self._held = amount
        self._amount = amount

    async def acommit(self) -> UsageEvent | None:
        """`commit`, without blocking the loop."""
        self._check_open()
        self._is_over = True
        end = self._settle()
        failed = await self._billing._settler.afinish(end)
        return self._committed(end, failed)

    # What both do.

    def _place_step(self, owner: str) -> Place:
        keeps = self._billing.settings
        return Place(
            self._hold_id,
            self.customer,
            self.meter,
            self._held,
            owner,
            keeps.lease,
            keeps.max_call,
            keeps.on_unknown,
            self._operation,
            new_scope(),
            keeps.on_repeat,
            price_slug=self._price_slug,
            properties=self._properties,
            max_holds=keeps.max_holds,
        )

    def _placed(self, hold: Hold) -> None:
        self._hold = hold
        if self._block is not None:
            cover = Cover(self._hold_id, self.customer, lambda: not self._is_over)
            self._block = bill_to._covering(cover)
            self.receipt = self._block.__enter__()

    def _leave_block(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._block is not None:
            self._block.__exit__(kind, error, traceback)

    def _enlarge(self, amount: int) -> Enlarge:
        return Enlarge(self._hold_id, self.customer, self.meter, amount)

    @contextmanager
    def _refusals(self) -> Generator[None]:
        try:
            yield
        except InsufficientCreditsError as error:
            if self._billing._hooks is not None:
                self._billing._hooks.refused(error)
            raise

    def _release(self) -> End:
        return End(Release(self._hold_id, self.customer, self.meter, "error", "no"))

    def _settle(self) -> End:
        hold = cast("Hold", self._hold)
        step = Settle(
            self._hold_id,
            self.customer,
            self.meter,
            self._amount,
            hold.transaction_id or self._transaction_id or f"hold_{self._hold_id}",
            "reported",
            is_explicit=self._transaction_id is not None,
            kind="charge",
            properties=self._properties,
            price_slug=self._price_slug,
            is_unlimited=hold.is_unlimited,
        )
        return End(step, (self._settled,))

    def _settled(self, settled: Settled) -> None:
        self.event = settled.event

    def _committed(self, end: End, failed: Exception | None) -> UsageEvent | None:
        if failed is not None and self._billing.settings.on_settle_failure == "raise":
            step = cast("Settle", end.step)
            raise UsageNotRecordedError(
                f"charge {step.transaction_id!r} of customer {self.customer!r} is not recorded yet and will be tried again: {failed}",
                event=unrecorded(end),
            ) from failed
        return self.event

    def _check_new(self) -> None:
        if self._hold is not None or self._is_over:
            raise ConfigurationError("a charge can be entered once; make another one")

    def _check_open(self) -> None:
        if self._hold is None:
            raise ConfigurationError("the charge has not been entered yet")
        if self._is_over:
            raise ConfigurationError("the charge is over")
