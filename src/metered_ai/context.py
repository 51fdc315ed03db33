"""Who pays, and how: `bill_to`, the receipt it gives, and the order in which the sources are asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar, Token
from os import urandom
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from .core.payer import Payer, Terms, resolve, terms

if TYPE_CHECKING:
    from .core.pricing import Pricing
    from .core.steps import Settled
    from .records import Request, Usage, UsageEvent

__all__ = ["Cover", "Receipt", "bill_to", "new_scope", "who_pays"]


def new_scope() -> str:
    """The scope of an explicit transaction id: one `bill_to` block, or one derived client with its copies."""
    return urandom(8).hex()


class Receipt:
    """
    What the calls of one `bill_to` block were charged, as they settle.

    Streams and calls whose record is still being written are added when they settle, also after the block.
    """

    def __init__(self) -> None:
        self._events: list[UsageEvent] = []

    @property
    def events(self) -> list[UsageEvent]:
        """The usage events of this block and of the blocks inside it, in the order in which they settled."""
        return list(self._events)

    @property
    def amounts(self) -> dict[str, int]:
        """Credits charged, by meter."""
        amounts: dict[str, int] = {}
        for event in self.events:
            amounts[event.meter] = amounts.get(event.meter, 0) + event.amount
        return amounts

    @property
    def amount(self) -> int:
        """Credits charged; ValueError when the block used several meters, whose credits cannot be added."""
        amounts = self.amounts
        if len(amounts) > 1:
            raise ValueError(f"several meters were billed ({', '.join(sorted(amounts))}); ask for amounts")
        return sum(amounts.values())

    def __repr__(self) -> str:
        return f"<Receipt {self.amounts}>"

    def _repr_html_(self) -> str:
        """The receipt as notebooks show it."""
        from html import escape

        if not self._events:
            return "<p>Charged: nothing</p>"
        rows = "".join(
            f"<tr><td>{escape(event.transaction_id)}</td><td>{escape(event.meter)}</td><td>{event.amount}</td></tr>"
            for event in self.events
        )
        sums = "".join(
            f"<tr><th>sum</th><th>{escape(meter)}</th><th>{amount}</th></tr>" for meter, amount in self.amounts.items()
        )
        return (
            "<table><thead><tr><th>transaction</th><th>meter</th><th>credits</th></tr></thead>"
            f"<tbody>{rows}</tbody><tfoot>{sums}</tfoot></table>"
        )

    def _settled(self, settled: Settled) -> None:
        if settled.outcome in ("settled", "late", "corrected"):
            self._events.append(settled.event)


class Cover(NamedTuple):
    """A charge that pays for the calls inside it."""

    hold_id: str
    customer: str
    is_open: Callable[[], bool]


class _Frame:
    __slots__ = ("block", "cover", "is_over", "parent", "receipt", "terms", "token")

    def __init__(self, block: bill_to, parent: _Frame | None, terms: Terms, cover: Cover | None) -> None:
        self.block = block
        self.parent = parent
        self.terms = terms
        self.cover = cover
        self.receipt = Receipt()
        self.is_over = False
        self.token: Token[_Frame | None] | None = None


_frame: ContextVar[_Frame | None] = ContextVar("metered_ai_bill_to", default=None)


class bill_to:  # noqa: N801  it reads as a verb where it is used, like a function
    """
    Bill the calls inside the block to a customer, however deep in other people's code they are made.

    Works as `with` and `async with`; gives the block's `Receipt`. It is read once, when a call starts. Tasks started inside keep
    billing after the block was left. A generator that a framework drives from several contexts loses it: use
    `client.with_billing` there, and in thread pools. Leaving never raises.
    """

    def __init__(
        self,
        customer: str,
        /,
        *,
        meter: str | None = None,
        amount: int | None = None,
        pricing: Pricing | Callable[[Usage], int] | None = None,
        estimate: Callable[[Request], int] | None = None,
        price_slug: str | None = None,
        transaction_id: str | None = None,
        properties: Mapping[str, Any] | None = None,
    ) -> None:
        self._terms = terms(
            customer=customer,
            meter=meter,
            amount=amount,
            pricing=pricing,
            estimate=estimate,
            price_slug=price_slug,
            transaction_id=transaction_id,
            properties=properties,
        )
        self._cover: Cover | None = None
        self._entered: list[_Frame] = []

    def __enter__(self) -> Receipt:
        # Each entry is a block of its own, so an explicit transaction id starts from its first number again.
        own = self._terms if self._terms.transaction_id is None else self._terms._replace(scope=new_scope())
        frame = _Frame(self, _frame.get(), own, self._cover)
        self._entered.append(frame)
        frame.token = _frame.set(frame)
        return frame.receipt

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        # One object may be entered by several threads and tasks at once: what is left is the entry of this context.
        current = frame = _frame.get()
        while frame is not None and (frame.block is not self or frame.is_over):
            frame = frame.parent
        if frame is None:
            # A framework drives our generator from several contexts, and this is not the one that entered.
            entered = tuple(self._entered)
            if len(entered) == 1:
                entered[0].is_over = True
                self._entered.remove(entered[0])
            return

        self._entered.remove(frame)
        if frame is not current:
            # Blocks were left out of order: resetting would bring back a block that may be over.
            frame.is_over = True
            return

        assert frame.token is not None
        try:
            _frame.reset(frame.token)
        except ValueError:
            # A copy of the context that entered: the token belongs to that one.
            frame.is_over = True

    async def __aenter__(self) -> Receipt:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        self.__exit__(kind, error, traceback)

    @classmethod
    def _covering(cls, cover: Cover) -> bill_to:
        block = cls(cover.customer)
        block._cover = cover
        return block


def who_pays(derived: Iterable[Terms], base: Terms) -> tuple[Payer, tuple[Receipt, ...]]:
    """
    Ask derived clients (newest first), the blocks around this moment (innermost first), then the constructor.

    Gives the answer and the receipts of all blocks. A covering charge of the same customer makes the call cost 0.
    """
    blocks: list[_Frame] = []
    frame = _frame.get()
    while frame is not None:
        if not frame.is_over:
            blocks.append(frame)
        frame = frame.parent

    payer = resolve((*derived, *[block.terms for block in blocks], base))
    for block in blocks:
        cover = block.cover
        if cover is not None and cover.customer == payer.customer and cover.is_open():
            payer = payer._replace(amount=0, pricing=None, estimate=None, parent=cover.hold_id)
            break

    return payer, tuple([block.receipt for block in blocks])
