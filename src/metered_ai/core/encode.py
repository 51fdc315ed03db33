"""Steps as JSON, so that one process can write down what another one does later."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import datetime
from types import UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from ..records import Usage
from .steps import AddGrant, Enlarge, Place, Record, Release, Renew, Revoke, Settle, SetUnlimited, Step

__all__ = ["step_from_json", "step_to_json"]

_VERSION = 1
_STEPS: dict[str, type[Step]] = {
    "place": Place,
    "enlarge": Enlarge,
    "settle": Settle,
    "release": Release,
    "renew": Renew,
    "record": Record,
    "add_grant": AddGrant,
    "revoke": Revoke,
    "set_unlimited": SetUnlimited,
}
_NAMES = {kind: name for name, kind in _STEPS.items()}


def _field(hint: Any) -> tuple[Any, bool]:
    """What a field holds, and whether it may be None."""
    if get_origin(hint) in (Union, UnionType):
        (kind,) = (member for member in get_args(hint) if member is not type(None))
        return get_origin(kind) or kind, True
    return hint, False


_FIELDS = {kind: {name: _field(hint) for name, hint in get_type_hints(kind).items()} for kind in (Usage, *_NAMES)}


def step_to_json(step: Step) -> str:
    """
    A step as one line of JSON: its name, the version of this format, and every field that is not None.

    Properties come back as JSON has them: a tuple as a list. What could not be read back is a ValueError that names its type, never
    its content.
    """
    name = _NAMES[type(step)]
    try:
        values = _take_apart(name, type(step), step)
    except RecursionError:
        raise ValueError(f"the properties of a {name} are nested too deeply for JSON") from None
    return json.dumps({"step": name, "version": _VERSION, **values}, separators=(",", ":"))


def step_from_json(text: str) -> Step:
    """
    The step that `step_to_json` wrote.

    Anything else is a ValueError that tells what was seen, but no content: text that is no JSON, another version, an unknown step, a
    field that is missing, unknown or of another type.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"a step is a JSON object; these {len(text)} characters are no JSON") from None
    values = _checked("a step in JSON", dict, values)
    version, name = values.pop("version", None), values.pop("step", None)
    if type(version) is not int or version != _VERSION:
        raise ValueError(f"this release reads steps of version {_VERSION}, not {version!r:.40}")
    if not isinstance(name, str) or name not in _STEPS:
        raise ValueError(f"there is no step {name!r:.40}")
    return cast("Step", _put_together(name, _STEPS[name], values))


def _take_apart(where: str, kind: type, record: object) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, (field, is_optional) in _FIELDS[kind].items():
        value = getattr(record, name)
        if value is None and is_optional:
            continue
        what = f"{where}.{name}"
        if field is Usage and isinstance(value, Usage):
            value = _take_apart(what, Usage, value)
        elif field is Mapping:
            value = _plain(what, _checked(what, field, value))
        else:
            value = _checked(what, field, value)
        values[name] = value.isoformat() if isinstance(value, datetime) else value
    return values


def _put_together(where: str, kind: type, values: Mapping[str, Any]) -> object:
    fields = _FIELDS[kind]
    if unknown := values.keys() - fields.keys():
        raise ValueError(f"{where} has no field {min(unknown)!r:.40}")
    found: dict[str, Any] = {}
    for name, (field, is_optional) in fields.items():
        what, value = f"{where}.{name}", values.get(name)
        if value is None and is_optional:
            found[name] = None
        elif name not in values:
            raise ValueError(f"{what} is missing")
        elif field is Usage:
            found[name] = _put_together(what, Usage, _checked(what, Mapping, value))
        elif field is datetime:
            found[name] = _moment(what, _checked(what, str, value))
        else:
            found[name] = _checked(what, field, value)
    return kind(**found)


def _moment(what: str, text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{what} must be a moment in ISO 8601, not {text!r:.40}") from None


def _checked(what: str, field: Any, value: Any) -> Any:
    """The value, or a ValueError if it is not what the field holds. A bool is no number; an int will do for a float."""
    if get_origin(field) is Literal:
        if value in get_args(field):
            return value
        raise ValueError(f"{what} must be one of {', '.join(get_args(field))}, not {value!r:.40}")
    accepted = (int, float) if field is float else field
    if not isinstance(value, accepted) or (isinstance(value, bool) and field is not bool):
        raise ValueError(f"{what} must be {field.__name__}, not {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{what} must be a finite number")
    return value


def _plain(what: str, value: Any) -> Any:
    """The value in the types of JSON, so that nothing is changed on the way without a word."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return _checked(what, float, value)
    if isinstance(value, Mapping):
        return {_checked(f"a key in {what}", str, key): _plain(what, inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(what, inner) for inner in value]
    raise ValueError(f"{what} holds a {type(value).__name__}, which JSON cannot carry")
