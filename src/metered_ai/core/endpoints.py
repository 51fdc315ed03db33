"""
Every endpoint of the OpenAI SDK, in one table: metered, free, or refused.

Reading and deleting cost nothing: GET, HEAD, OPTIONS and DELETE are free by that rule and stand in no table, and sockets are
refused by their scheme. Everything that creates or changes is listed, and what is not listed is refused by `access`, so that an
endpoint nobody has thought of cannot spend money unseen. The table covers openai 2.54 to 3.54.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote

__all__ = ["DOORS", "SOCKET", "Access", "Door", "access", "find", "refusal"]

Access = Literal["metered", "free", "refused"]


class Door(NamedTuple):
    """
    One endpoint: its `name`, `method` and `path`, and what passing through it means.

    `reads` names the shape of its answer, `reports` the fields of `Usage` that an answer may carry or that follow from the request.
    `reason` tells a user why a refused door cannot be metered.
    """

    name: str
    method: str
    path: str
    access: Access
    reads: str = ""
    reports: frozenset[str] = frozenset()
    reason: str = ""


_TOKENS = frozenset({"input_tokens", "cached_input_tokens", "cache_write_tokens", "output_tokens", "reasoning_tokens"})

_METERED: tuple[tuple[str, str, str, frozenset[str]], ...] = (
    ("chat.completions", "/chat/completions", "chat", _TOKENS | {"audio_tokens"}),
    ("completions", "/completions", "completion", _TOKENS),
    ("responses", "/responses", "responses", _TOKENS),
    ("responses.compact", "/responses/compact", "compact", _TOKENS),
    ("decisions", "/decisions", "decision", _TOKENS),
    ("embeddings", "/embeddings", "embeddings", frozenset({"input_tokens"})),
    ("images.generations", "/images/generations", "images", _TOKENS | {"images"}),
    ("images.edits", "/images/edits", "images", _TOKENS | {"images"}),
    ("images.variations", "/images/variations", "images", frozenset({"images"})),
    ("audio.speech", "/audio/speech", "speech", frozenset({"characters"})),
    (
        "audio.transcriptions",
        "/audio/transcriptions",
        "transcription",
        frozenset({"input_tokens", "output_tokens", "audio_tokens", "seconds"}),
    ),
    ("audio.translations", "/audio/translations", "translation", frozenset({"seconds"})),
    ("moderations", "/moderations", "moderation", frozenset()),
    ("vector_stores.search", "/vector_stores/{}/search", "search", frozenset()),
    ("fine_tuning.graders.run", "/fine_tuning/alpha/graders/run", "grader", frozenset({"input_tokens"})),
    ("content_provenance_checks", "/content_provenance_checks", "provenance", frozenset()),
    ("threads.runs", "/threads/{}/runs", "thread_run", _TOKENS),
    ("threads.create_and_run", "/threads/runs", "thread_run", _TOKENS),
    ("threads.runs.submit_tool_outputs", "/threads/{}/runs/{}/submit_tool_outputs", "thread_run", _TOKENS),
)

_REFUSED = {
    "it opens a session whose cost arises later, outside this client": """
        /agents/sessions
        /agents/sessions/{}/events
        /chatkit/sessions
        /live/sessions
        /live/sessions/{}/accept
        /live/sessions/{}/fork
        /realtime/calls
        /realtime/calls/{}/accept
        /realtime/client_secrets
        /realtime/sessions
        /realtime/transcription_sessions
        /realtime/translations/client_secrets
    """,
    "it schedules or starts agent sessions whose cost arises later, outside this client": """
        /agents/automations
        /agents/automations/{}
        /agents/automations/{}/invocations
        /agents/automations/{}/resume
    """,
    "it starts a batch whose cost is known only when the batch has ended": "/batches",
    "it starts a training job whose cost is known only when the job has ended": "/fine_tuning/jobs",
    "it starts an eval run whose cost is known only when the run has ended": "/evals/{}/runs",
    "it starts a video job and the answer reports no usage": """
        /videos
        /videos/characters
        /videos/edits
        /videos/extensions
        /videos/{}/remix
    """,
}

_FREE = """
    /agents
    /agents/automations/{}/pause
    /agents/environments
    /agents/environments/templates
    /agents/environments/templates/{}
    /agents/environments/{}/files
    /agents/sessions/{}
    /agents/{}
    /assistants
    /assistants/{}
    /audio/voice_consents
    /audio/voice_consents/{}
    /audio/voices
    /batches/{}/cancel
    /chat/completions/{}
    /chatkit/sessions/{}/cancel
    /containers
    /containers/{}/files
    /conversations
    /conversations/{}
    /conversations/{}/items
    /evals
    /evals/{}
    /evals/{}/runs/{}
    /evals/{}/runs/{}/cancel
    /files
    /fine_tuning/alpha/graders/validate
    /fine_tuning/checkpoints/{}/permissions
    /fine_tuning/jobs/{}/cancel
    /fine_tuning/jobs/{}/pause
    /fine_tuning/jobs/{}/resume
    /live/sessions/{}/hangup
    /live/sessions/{}/refer
    /live/sessions/{}/reject
    /organization/admin_api_keys
    /organization/certificates
    /organization/certificates/activate
    /organization/certificates/deactivate
    /organization/certificates/{}
    /organization/data_retention
    /organization/external_keys
    /organization/external_keys/{}/validate
    /organization/external_storage
    /organization/external_storage/{}/validate
    /organization/groups
    /organization/groups/{}
    /organization/groups/{}/roles
    /organization/groups/{}/users
    /organization/invites
    /organization/projects
    /organization/projects/{}
    /organization/projects/{}/api_keys/{}
    /organization/projects/{}/archive
    /organization/projects/{}/certificates/activate
    /organization/projects/{}/certificates/deactivate
    /organization/projects/{}/data_retention
    /organization/projects/{}/groups
    /organization/projects/{}/hosted_tool_permissions
    /organization/projects/{}/model_permissions
    /organization/projects/{}/rate_limits/{}
    /organization/projects/{}/service_accounts
    /organization/projects/{}/service_accounts/{}
    /organization/projects/{}/service_accounts/{}/api_keys
    /organization/projects/{}/service_tier_settings
    /organization/projects/{}/spend_alerts
    /organization/projects/{}/spend_alerts/{}
    /organization/projects/{}/spend_limit
    /organization/projects/{}/users
    /organization/projects/{}/users/{}
    /organization/roles
    /organization/roles/{}
    /organization/spend_alerts
    /organization/spend_alerts/{}
    /organization/spend_limit
    /organization/users/{}
    /organization/users/{}/roles
    /organization/workload_identity_providers
    /organization/workload_identity_providers/{}
    /organization/workload_identity_providers/{}/federation_rules
    /organization/workload_identity_providers/{}/federation_rules/{}
    /projects/{}/groups/{}/roles
    /projects/{}/roles
    /projects/{}/roles/{}
    /projects/{}/users/{}/roles
    /realtime/calls/{}/hangup
    /realtime/calls/{}/refer
    /realtime/calls/{}/reject
    /responses/input_tokens
    /responses/{}/cancel
    /skills
    /skills/{}
    /skills/{}/versions
    /threads
    /threads/{}
    /threads/{}/messages
    /threads/{}/messages/{}
    /threads/{}/runs/{}
    /threads/{}/runs/{}/cancel
    /uploads
    /uploads/{}/cancel
    /uploads/{}/complete
    /uploads/{}/parts
    /vaults
    /vaults/{}
    /vaults/{}/credentials
    /vaults/{}/credentials/{}
    /vector_stores
    /vector_stores/{}
    /vector_stores/{}/file_batches
    /vector_stores/{}/file_batches/{}/cancel
    /vector_stores/{}/files
    /vector_stores/{}/files/{}
    /webhook_endpoints
    /webhook_endpoints/{}
    /webhook_endpoints/{}/rotate_secret
    /webhook_endpoints/{}/test
"""


def _name(path: str) -> str:
    return ".".join(part for part in path.split("/") if part not in ("", "{}"))


def _table() -> dict[str, Door]:
    doors = {path: Door(name, "POST", path, "metered", reads, reports) for name, path, reads, reports in _METERED}
    for reason, paths in _REFUSED.items():
        doors.update((path, Door(_name(path), "POST", path, "refused", reason=reason)) for path in paths.split())
    doors.update((path, Door(_name(path), "POST", path, "free")) for path in _FREE.split())
    return doors


DOORS = _table()
"""Every door of the table by its path template. All of them are POST: the SDK changes things by no other method."""

SOCKET = Door(
    "socket", "GET", "", "refused", reason="one WebSocket carries many generations that pass this client unseen"
)
"""What a `ws://` or `wss://` URL leads to, whatever its path."""

_SIZES: dict[int, list[tuple[tuple[str, ...], Door]]] = {}
for _path, _door in DOORS.items():
    _parts = tuple(_path.split("/")[1:])
    _SIZES.setdefault(len(_parts), []).append((_parts, _door))
for _entries in _SIZES.values():
    # Literal segments go before placeholders from the left, so that "/threads/runs" is never read as a thread called "runs".
    _entries.sort(key=lambda entry: [part == "{}" for part in entry[0]])

# A server may read what is not plainly an id in its own way ("x;y", "x?y"), so only plain ids fill a placeholder.
_ID = re.compile(r"(?=.*[A-Za-z0-9])[\w.:~@+=, -]+\Z")
_PREFIX = re.compile(r"/(?:openai/)?(?:v1/|deployments/[^/]+/)?")


def _match(path: str) -> Door | None:
    parts = path.split("/")[1:]
    for template, door in _SIZES.get(len(parts), ()):
        if all(
            want == part or (want == "{}" and _ID.match(unquote(part)))
            for want, part in zip(template, parts, strict=True)
        ):
            return door
    return None


def _normal(path: str) -> str:
    """The path with dot segments resolved and repeated or trailing slashes removed, as a server would read it."""
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    return "/" + "/".join(parts)


@lru_cache(maxsize=2048)
def find(method: str, url: str, base_url: str | None = None) -> Door | None:
    """
    The door that a request would pass, or None if the table has none; `access` says what None means.

    `url` is a path as the SDK gives it, or absolute; query and fragment do not matter, nor do the prefixes that hand-written
    paths carry ("/v1", "/openai/deployments/x"). A path that a server may read in its own way (an encoded slash or dot) matches
    nothing, so that no spelling smuggles a metered call past the table.
    """
    scheme, colon, rest = url.partition("://")
    is_absolute = bool(colon) and scheme.isalpha()
    if is_absolute and scheme.lower() in ("ws", "wss"):
        return SOCKET
    if method.upper() != "POST":
        return None

    path = re.split("[?#]", url, maxsplit=1)[0]
    base = "/"
    if is_absolute:
        path = "/" + re.split("[?#]", rest, maxsplit=1)[0].partition("/")[2]
    elif not path.startswith("/"):
        path = "/" + path
    if base_url:
        base = _normal("/" + base_url.partition("://")[2].partition("/")[2])

    if path.startswith("//"):
        # An HTTP client takes what follows two slashes for a host name and requests only the rest; others merge the slashes.
        found, other = _match(_normal("/" + path[2:].partition("/")[2])), _match(_normal(path))
        return found if found == other or (found and found.access != "free") else None

    path = _normal(path)
    if base != "/" and path.startswith(base + "/"):
        path = path[len(base) :]
    return _match(path) or _match("/" + _PREFIX.sub("", path, count=1))


def access(door: Door | None, method: str) -> Access:
    """Whether a request is metered, free or refused. Not in the table: reading and deleting are free, all else is refused."""
    if door is not None:
        return door.access
    return "free" if method.upper() in ("GET", "HEAD", "OPTIONS", "DELETE") else "refused"


def refusal(door: Door, body: Mapping[str, Any], stream: bool) -> str | None:
    """Why this request cannot be metered although its door can be, as a clause; None if it can."""
    if door.reads == "responses" and body.get("background"):
        return "a background response is answered before its cost is known"
    if door.reads == "thread_run" and not stream:
        return "a run that is not streamed is answered before its cost is known"
    return None
