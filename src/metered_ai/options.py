"""The SDK's constructor keywords, for type checkers only: at run time every keyword that the installed SDK takes is passed on."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TypedDict

import httpx2
from openai import Timeout
from openai._data_residency import DataResidency
from openai._provider import _Provider  # pyright: ignore[reportPrivateUsage]  # the SDK's own annotation; it has no public name
from openai._types import NotGiven
from openai.auth import WorkloadIdentity, X509WorkloadIdentity
from openai.lib.azure import AsyncAzureADTokenProvider, AzureADTokenProvider


class _Common(TypedDict, total=False):
    admin_api_key: str | None
    workload_identity: WorkloadIdentity | X509WorkloadIdentity | None
    organization: str | None
    project: str | None
    webhook_secret: str | None
    websocket_base_url: str | httpx2.URL | None
    timeout: float | Timeout | NotGiven | None
    max_retries: int
    default_headers: Mapping[str, str] | None
    default_query: Mapping[str, object] | None
    _strict_response_validation: bool
    _enforce_credentials: bool


class OpenAIOptions(_Common, total=False):
    api_key: str | Callable[[], str] | None
    provider: _Provider | None
    base_url: str | httpx2.URL | NotGiven | None
    data_residency: DataResidency | None
    http_client: httpx2.Client | None


class AsyncOpenAIOptions(_Common, total=False):
    api_key: str | Callable[[], Awaitable[str]] | None
    provider: _Provider | None
    base_url: str | httpx2.URL | NotGiven | None
    data_residency: DataResidency | None
    http_client: httpx2.AsyncClient | None


class _AzureCommon(_Common, total=False):
    api_version: str | None
    azure_endpoint: str | None
    azure_deployment: str | None
    azure_ad_token: str | None
    base_url: str | None


class AzureOpenAIOptions(_AzureCommon, total=False):
    api_key: str | Callable[[], str] | None
    azure_ad_token_provider: AzureADTokenProvider | None
    http_client: httpx2.Client | None


class AsyncAzureOpenAIOptions(_AzureCommon, total=False):
    api_key: str | Callable[[], Awaitable[str]] | None
    azure_ad_token_provider: AsyncAzureADTokenProvider | None
    http_client: httpx2.AsyncClient | None
