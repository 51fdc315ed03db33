"""An OpenAI client that bills every call exactly once against prepaid credits."""

from .billing import Billing, connect
from .client import AsyncMeteredAzureOpenAI, AsyncMeteredOpenAI, MeteredAzureOpenAI, MeteredOpenAI
from .context import Receipt, bill_to
from .core.payer import operation_id
from .core.pricing import per_call, per_token
from .errors import (
    AlreadyBilledError,
    BillingUnavailableError,
    ConfigurationError,
    CustomerRequiredError,
    FeatureRequiredError,
    GrantConflictError,
    InsufficientCreditsError,
    LedgerCorruptError,
    MeteringError,
    NoSubscriptionError,
    PriceUnknownError,
    SchemaTooNewError,
    UnmeteredCallError,
    UsageNotRecordedError,
)
from .records import Balance, Grant, Hold, Request, Usage, UsageEvent, UsageSum

__all__ = [
    "AlreadyBilledError",
    "AsyncMeteredAzureOpenAI",
    "AsyncMeteredOpenAI",
    "Balance",
    "Billing",
    "BillingUnavailableError",
    "ConfigurationError",
    "CustomerRequiredError",
    "FeatureRequiredError",
    "Grant",
    "GrantConflictError",
    "Hold",
    "InsufficientCreditsError",
    "LedgerCorruptError",
    "MeteredAzureOpenAI",
    "MeteredOpenAI",
    "MeteringError",
    "NoSubscriptionError",
    "PriceUnknownError",
    "Receipt",
    "Request",
    "SchemaTooNewError",
    "UnmeteredCallError",
    "Usage",
    "UsageEvent",
    "UsageNotRecordedError",
    "UsageSum",
    "bill_to",
    "connect",
    "operation_id",
    "per_call",
    "per_token",
]
