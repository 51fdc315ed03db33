"""The policies of a `Billing`, checked where they are given."""

from __future__ import annotations

from collections.abc import Callable
from inspect import iscoroutinefunction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import ConfigurationError
from .records import MAX_AMOUNT

if TYPE_CHECKING:
    from .hooks import LowBalance, Refusal
    from .services import BillingService

__all__ = ["PolicyOptions", "Settings", "settings"]

_OF_A_SERVICE = ("name", "check", "read_balance", "write_usage_event", "close")

Seconds = Annotated[float, Field(ge=0, le=30 * 86400, allow_inf_nan=False)]


class PolicyOptions(TypedDict, total=False):
    """The keywords of `connect` and `Billing`; the README's table says what each does."""

    service: BillingService | None
    max_balance_age: float
    on_unknown: Literal["release", "charge"]
    on_failure: Literal["release", "observed"]
    on_abort: Literal["observed", "hold", "drain"]
    on_repeat: Literal["refuse", "free"]
    on_settle_failure: Literal["return", "raise"]
    lease: float
    heartbeat: float
    max_call: float
    hold_patience: float
    settle_patience: float
    max_holds: int
    durability: Literal["full", "relaxed"]
    auto_migrate: bool
    spool: str | Path | None
    default_max_output_tokens: int
    wait_for_credits: float
    upgrade_url: str | None
    on_low_balance: Callable[[LowBalance], object] | None
    on_refused: Callable[[Refusal], object] | None


class Settings(BaseModel):
    """Seconds are floats, counts are ints; nothing is coerced from text."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    service: Any = None
    max_balance_age: Seconds = 300.0
    on_unknown: Literal["release", "charge"] = "release"
    on_failure: Literal["release", "observed"] = "release"
    on_abort: Literal["observed", "hold", "drain"] = "observed"
    on_repeat: Literal["refuse", "free"] = "refuse"
    on_settle_failure: Literal["return", "raise"] = "return"
    lease: Seconds = 120.0
    heartbeat: Seconds = 30.0
    max_call: Seconds = 7200.0
    hold_patience: Seconds = 5.0
    settle_patience: Seconds = 30.0
    max_holds: Annotated[int, Field(ge=1, le=MAX_AMOUNT)] = 1000
    durability: Literal["full", "relaxed"] = "full"
    auto_migrate: bool = True
    spool: str | Path | None = None
    default_max_output_tokens: Annotated[int, Field(ge=1, le=MAX_AMOUNT)] = 4096
    wait_for_credits: Seconds = 0.0
    upgrade_url: str | None = None
    on_low_balance: Callable[..., object] | None = None
    on_refused: Callable[..., object] | None = None

    @field_validator("on_low_balance", "on_refused")
    @classmethod
    def _hook_is_plain(cls, hook: Callable[..., object] | None) -> Callable[..., object] | None:
        if iscoroutinefunction(hook):
            raise ValueError("a hook is called on a thread without an event loop and must be a plain function")
        return hook

    @field_validator("service")
    @classmethod
    def _is_service(cls, service: object) -> object:
        missing = [name for name in _OF_A_SERVICE if service is not None and not hasattr(service, name)]
        if missing:
            raise ValueError(f"no BillingService: it has no {', '.join(missing)}")
        return service

    @model_validator(mode="after")
    def _lease_outlasts_beats(self) -> Settings:
        if self.heartbeat <= 0 or self.lease < 3 * self.heartbeat:
            raise ValueError(
                f"lease={self.lease!r} must be at least three heartbeats (heartbeat={self.heartbeat!r}), "
                "so that one late beat does not free a living call's hold"
            )
        return self


def settings(given: dict[str, Any]) -> Settings:
    """Check keywords. TypeError for a misspelled one, ConfigurationError naming a value that cannot be."""
    for name in given:
        if name not in Settings.model_fields:
            raise TypeError(f"unknown keyword {name!r}; known are {', '.join(Settings.model_fields)}")
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        what = f"{field}={given.get(field)!r}: " if field else ""
        raise ConfigurationError(f"{what}{first['msg']}") from error
