"""Every method of the installed SDK's resources that makes a request, with arguments that will do for a call."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

# They poll, which sleeps; open a socket; read a file; or ask nothing. What they request is requested by their neighbours.
_OTHER = re.compile(
    r"connect|unwrap|verify_signature|wait_for_processing|.*poll|upload_file_chunked|for_result|prepare|prepare_directory"
)

_FILE = ("x.txt", b"x")
# Where a signature alone does not tell what will do.
_GIVEN: dict[str, dict[str, Any]] = {
    "beta.agents.environments.files.upload": {"path": "/workspace/x1"},
    "responses.stream": {"model": "x1", "input": "x1"},
    "videos.edit": {"video": _FILE},
    "videos.extend": {"video": _FILE},
}


def walk(client: object) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """
    The dotted name, the bound method and its arguments, for each request that the client's resources can make.

    Views of the same methods (`with_raw_response`, `with_streaming_response`) are left out. Methods with several shapes
    are given the arguments of the first. Some helpers give back a context manager, which asks when it is entered.
    """
    for name, resource in _resources(client):
        for method_name in sorted(dir(type(resource))):
            method = inspect.getattr_static(type(resource), method_name)
            if method_name.startswith("_") or _OTHER.fullmatch(method_name) or not inspect.isfunction(method):
                continue
            bound = getattr(resource, method_name)
            dotted = f"{name}.{method_name}"
            yield dotted, bound, _arguments(bound) | _GIVEN.get(dotted, {})


def _resources(owner: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name in sorted(dir(type(owner))):
        if name.startswith(("_", "with_")):
            continue
        part = inspect.getattr_static(type(owner), name)
        if inspect.isfunction(part) or not hasattr(type(part), "__get__"):
            continue
        resource = getattr(owner, name)
        if any(base.__name__ in ("SyncAPIResource", "AsyncAPIResource") for base in type(resource).__mro__):
            yield f"{prefix}{name}", resource
            yield from _resources(resource, f"{prefix}{name}.")


def _arguments(method: Any) -> dict[str, Any]:
    parameters = inspect.signature(method).parameters
    wanted = [
        name for name, parameter in parameters.items() if parameter.default is parameter.empty and parameter.kind < 2
    ]
    wanted += [
        name for name, parameter in parameters.items() if parameter.default is parameter.empty and parameter.kind == 3
    ]
    wanted += _variants(method)[0]
    return {name: _argument(str(parameters[name].annotation)) for name in dict.fromkeys(wanted) if name in parameters}


def _variants(method: Any) -> tuple[list[str], ...]:
    """What the SDK's decorator for overloaded methods requires: it keeps the lists in its closure."""
    function = getattr(method, "__func__", method)
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is not None and "variants" in code.co_freevars:
            return tuple(function.__closure__[code.co_freevars.index("variants")].cell_contents)
        function = getattr(function, "__wrapped__", None)
    return ([],)


def _argument(annotation: str) -> Any:
    if literal := re.match(r"(?:Required\[|Optional\[|Union\[)*Literal\[(['\"])(.*?)\1", annotation):
        return literal[2]
    if "Literal[True]" in annotation:
        return True
    if re.match(r"(Union\[)?(str|Optional\[str)", annotation):
        return "x1"
    if annotation.startswith("bool"):
        return True
    if re.match(r"int|float", annotation):
        return 1
    if "FileTypes" in annotation:
        return _FILE
    if re.match(r"(Union\[)?(Iterable|List|Sequence|SequenceNotStr)", annotation):
        return []
    if re.match(r"(Mapping|Dict|.*[Pp]aram|.*Config|.*DataSource)", annotation) and "Model" not in annotation:
        return {}
    return "x1"
