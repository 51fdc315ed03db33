"""What `recover` and `verify` found, as values that print well."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Recovery:
    """
    Holds whose owner died and how they were resolved: counts, and `charged_amount` in credits over all meters.

    `in_doubt` counts those released although the provider may have worked: calls that may have cost us.
    `replayed` counts settles that were brought in from a spool, `parked` those that no ledger will ever take.
    """

    released: int = 0
    charged: int = 0
    in_doubt: int = 0
    charged_amount: int = 0
    replayed: int = 0
    parked: int = 0

    def __add__(self, other: Recovery) -> Recovery:
        return Recovery(
            self.released + other.released,
            self.charged + other.charged,
            self.in_doubt + other.in_doubt,
            self.charged_amount + other.charged_amount,
            self.replayed + other.replayed,
            self.parked + other.parked,
        )

    @property
    def resolved(self) -> int:
        """Holds that are no longer open because of it."""
        return self.released + self.charged


@dataclass(frozen=True, slots=True)
class Verification:
    """What was checked and what did not hold. `broken` lists each violation as a sentence with its numbers."""

    accounts: int = 0
    events: int = 0
    grants: int = 0
    open_holds: int = 0
    in_doubt: int = 0
    in_doubt_amount: int = 0
    debt: int = 0
    broken: tuple[str, ...] = field(default=())

    @property
    def is_sound(self) -> bool:
        """True when nothing is broken."""
        return not self.broken
