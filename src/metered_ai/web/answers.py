"""How every page of ours answers: the headers that keep it private, one refusal for everything, templates and files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.responses import HTMLResponse, JSONResponse, Response

__all__ = ["PRIVATE", "STATIC", "file_answer", "html_answer", "json_answer", "refusal"]

PRIVATE = {
    "cache-control": "no-store",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "x-robots-tag": "noindex",
}

STATIC = {"usage.css": "text/css", "usage.js": "text/javascript"}
"""The files that pages load, and their types. They tell nothing about anybody."""


@lru_cache(maxsize=1)
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("metered_ai.web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def html_answer(
    template: str,
    /,
    *,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    **names: Any,
) -> Response:
    """A template's page. Everything put into it is escaped."""
    return HTMLResponse(
        _templates().get_template(template).render(names), status_code=status, headers={**PRIVATE, **(headers or {})}
    )


def json_answer(content: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse(content, status_code=status, headers={**PRIVATE, **(headers or {})})


def refusal() -> Response:
    """The one answer to whatever is not to be had: it does not tell a wrong address from somebody else's."""
    return Response("Not found\n", status_code=404, media_type="text/plain", headers=PRIVATE)


@lru_cache(maxsize=8)
def _file(name: str) -> bytes:
    return (files("metered_ai.web") / "static" / name).read_bytes()


def file_answer(name: str) -> Response:
    """One of the files in STATIC."""
    return Response(_file(name), media_type=STATIC[name], headers={**PRIVATE, "cache-control": "no-cache"})
