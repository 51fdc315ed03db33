"""`metered-ai why`: the story of one charge, from the grant to the delivery."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.text import Text

from ..billing import Billing
from ..core.checks import check_name
from ..records import Grant, Hold, Undelivered, UsageEvent
from . import show
from .commands import ForCustomer, ForMeter, Json, Ledger, NotFoundError, app, check_filters, opened

__all__ = ["why"]

_BASES = {
    "reported": "what the provider reported",
    "observed": "what was seen of an answer that was not read to its end",
    "estimated": "an estimate, because the provider reported nothing to go by",
    "held": "the whole hold",
}
_REASONS = {
    "provider_error": "the provider answered with an error",
    "not_sent": "nothing was sent",
    "cancelled": "it was cancelled",
    "stream_failed": "the provider broke off in mid-answer",
    "repeat": "the operation was billed before",
    "unknown": "no answer came",
    "error": "the code inside raised an exception",
}
_SENT = {
    "yes": "The provider had worked for it.",
    "no": "The provider had not worked for it.",
    "unknown": "In doubt: the provider may have worked for it, and billed you.",
}


@dataclass(frozen=True, slots=True)
class Story:
    """One account's part in what an id names."""

    customer: str
    meter: str
    event: UsageEvent | None
    hold: Hold | None
    grants: list[Grant]
    corrections: list[UsageEvent]
    parent: UsageEvent | None
    covered: list[UsageEvent]
    service: str | None = None
    outbox: Undelivered | None = None


@app.command()
def why(
    transaction_id: Annotated[str, typer.Argument(help="A transaction id, or a hold's id.")],
    customer: ForCustomer = None,
    meter: ForMeter = None,
    ledger: Ledger = None,
    json: Json = False,
) -> int:
    """
    Tell the story of one charge: grants, hold, call, retries, settle, what the amount is based on, delivery.

    A hold's id tells why a call was not charged. An id that several customers or meters have gives a story for each. Exits with 1 if
    nothing has this id.

    JSON, a list: customer, meter, event, hold, grants, corrections, parent, covered, service (who is told), outbox, story (sentences).
    event, hold and outbox may be null; they and the rest have the keys that `events`, `holds`, `outbox` and `grant` name.
    """
    check_name(transaction_id, "TRANSACTION_ID", 255)
    check_filters(customer, meter)
    with opened(ledger, is_read=True) as billing, show.busy("Looking through the accounts…"):
        stories = list(_stories(billing, transaction_id, customer, meter))

    if json:
        show.print_json_list(
            {**show.plain(story), "story": [": ".join(line) for line in _told(story)]} for story in stories
        )
    else:
        out = show.console()
        for number, story in enumerate(stories):
            if number:
                out.print()
            for what, words in _told(story):
                out.print(Text.assemble((f"{what:<12}", "bold"), words))
    if not stories:
        raise NotFoundError(f"no usage event and no hold has the id {transaction_id!r}{_within(customer, meter)}")
    return 0


def _within(customer: str | None, meter: str | None) -> str:
    named = (("customer", customer), ("meter", meter))
    return "".join(f", {what} {name!r}" for what, name in named if name is not None)


def _stories(billing: Billing, wanted: str, customer: str | None, meter: str | None) -> Iterator[Story]:
    ledger = billing.ledger
    accounts = billing.accounts(meter) if customer is None else iter(billing.balances(customer))
    for account in accounts:
        if meter not in (None, account.meter):
            continue
        who = (account.customer, account.meter)
        event = ledger.usage_event(*who, wanted) or _event_of_hold(billing, *who, wanted)
        if event is not None:
            # A hold that was settled in time has no record of its own any more.
            had_ended = event.is_late or event.kind == "expired"
            ended = (hold for hold in ledger.holds(*who) if hold.id == event.hold_id) if had_ended else iter(())
            yield _story(billing, *who, event, next(ended, None))
            continue
        for hold in ledger.holds(*who):
            if wanted in (hold.id, hold.transaction_id, f"hold_{hold.id}"):
                yield _story(billing, *who, None, hold)


def _event_of_hold(billing: Billing, customer: str, meter: str, hold_id: str) -> UsageEvent | None:
    placed = _placed_at(hold_id)
    if placed is None:
        return None
    found = billing.ledger.usage_events(customer, meter, placed)
    return next((each for each in found if each.hold_id == hold_id and each.kind != "correction"), None)


def _story(billing: Billing, customer: str, meter: str, event: UsageEvent | None, hold: Hold | None) -> Story:
    hold_id = event.hold_id if event is not None else None if hold is None else hold.id
    grants = [
        grant
        for grant in billing.grants(customer, meter)
        if event is None or grant.created_at <= event.created_at or grant.id == f"correction_{hold_id}"
    ]
    corrections: list[UsageEvent] = []
    covered: list[UsageEvent] = []
    parent = None
    if hold_id is not None and event is not None:
        since = _placed_at(hold_id) or event.created_at
        for each in billing.ledger.usage_events(customer, None, since):
            if each.parent == hold_id:
                covered.append(each)
            elif each.kind == "correction" and each.hold_id == hold_id and each.meter == meter:
                corrections.append(each)
    cover = event.parent if event is not None else None if hold is None else hold.parent
    if cover is not None:
        found = billing.ledger.usage_events(customer, None, _placed_at(cover))
        parent = next((each for each in found if each.hold_id == cover and each.kind != "correction"), None)
    service = getattr(billing.ledger, "service", None)
    outbox = None
    if service is not None and event is not None and event.delivered is None:
        waiting = billing.outbox(customer, meter)
        outbox = next((row for row in waiting if row.event.transaction_id == event.transaction_id), None)
    return Story(customer, meter, event, hold, grants, corrections, parent, covered, service, outbox)


def _placed_at(hold_id: str) -> datetime | None:
    """A hold's id begins with the time of the process that placed it, in milliseconds."""
    try:
        moment = datetime.fromtimestamp(int(hold_id[1:12], 16) / 1000, UTC)
    except (ValueError, OverflowError, OSError):
        return None
    return moment if len(hold_id) == 30 and hold_id.startswith("h") and 2020 <= moment.year < 2100 else None


# ---- in words ----


def _told(story: Story) -> Iterator[tuple[str, str]]:
    event, hold = story.event, story.hold
    yield "who", f"{show.shown(story.customer)} on {show.shown(story.meter)}"
    yield from _grants(story)
    if event is None:
        assert hold is not None
        yield from _unsettled(hold)
        return

    yield from _placed(event, hold)
    yield from _call(event)
    amount = show.count(event.amount, "credit")
    late = ", late: the hold had already ended" if event.is_late else ""
    limitless = ", while the account was unlimited" if event.is_unlimited else ""
    yield (
        "settled",
        f"{show.moment(event.created_at)} UTC as {show.shown(event.transaction_id)}: {amount}{limitless}{late}",
    )
    yield "based on", _basis(event)
    if story.parent is not None:
        yield (
            "covered by",
            f"{show.shown(story.parent.transaction_id)}, which cost {show.count(story.parent.amount, 'credit')}",
        )
    elif event.parent is not None:
        yield "covered by", f"the charge of hold {show.shown(event.parent)}, which has no usage event yet"
    for each in story.covered:
        yield "covers", f"{show.shown(each.transaction_id)} on {show.shown(each.meter)}{_model(each)}"
    for each in story.corrections:
        yield (
            "corrected",
            f"{show.moment(each.created_at)} UTC by {show.shown(each.transaction_id)}: {show.count(each.amount, 'credit')} more",
        )
    if event.properties:
        yield (
            "noted",
            ", ".join(f"{show.shown(str(name))}={show.shown(str(value))}" for name, value in event.properties.items()),
        )
    yield "delivery", _delivery(event, story)


def _grants(story: Story) -> Iterator[tuple[str, str]]:
    hold_id = story.hold.id if story.event is None and story.hold is not None else story.event and story.event.hold_id
    given = [grant for grant in story.grants if grant.id != f"correction_{hold_id}"]
    for grant in story.grants:
        if grant.id == f"correction_{hold_id}":
            yield "given back", f"{show.count(grant.amount, 'credit')} by grant {show.shown(grant.id)}"
    total = sum(grant.amount for grant in given)
    if not given:
        yield "granted", "nothing before it"
        return
    latest = max(given, key=lambda grant: grant.created_at)
    last = f"the last {show.shown(latest.id)} at {show.moment(latest.created_at)} UTC"
    grants = show.count(len(given), "grant")
    yield "granted", f"{show.count(total, 'credit')} before it in {grants}, {last}; what expires soonest is spent first"


def _placed(event: UsageEvent, hold: Hold | None) -> Iterator[tuple[str, str]]:
    if event.hold_id is None:
        yield "held", "nothing: it was recorded after the fact"
        return
    placed = hold.placed_at if hold is not None else _placed_at(event.hold_id)
    when = "" if placed is None else f"{show.moment(placed)} UTC, "
    amount = "" if hold is None else f"{show.count(hold.amount, 'credit')}, "
    yield "held", f"{when}{amount}hold {show.shown(event.hold_id)}"
    if hold is not None and hold.state != "settled":
        yield "then", f"the hold ended first: {show.hold_state(hold)}, {show.moment(hold.ended_at)} UTC"


def _call(event: UsageEvent) -> Iterator[tuple[str, str]]:
    usage = event.usage
    if event.kind == "charge":
        yield "for", "a charge of the application"
    elif event.kind == "expired":
        yield "for", "a call whose process died; it was charged by policy (on_unknown)"
    if usage is not None or event.request_id is not None:
        door = "" if usage is None else show.shown(usage.endpoint or "")
        asked = "" if event.request_id is None else f"request {show.shown(event.request_id)}"
        yield "called", ", ".join(part for part in (f"{door}{_model(event)}".strip(), asked) if part) or "the provider"
    if event.attempts is not None:
        retries = event.attempts - 1
        yield (
            "tried",
            "once"
            if not retries
            else f"{event.attempts} times ({show.count(retries, 'retry', 'retries')}); charged once",
        )


def _model(event: UsageEvent) -> str:
    usage = event.usage
    if usage is None or not usage.model:
        return ""
    return f" with {show.shown(usage.model)}" + (f" ({show.shown(usage.service_tier)})" if usage.service_tier else "")


def _basis(event: UsageEvent) -> str:
    if event.kind in ("record", "charge"):
        return "what the application said"
    usage = event.usage
    used: list[str] = []
    if usage is not None:
        told: Mapping[str, int | float | None] = {
            "input tokens": usage.input_tokens,
            "of them cached": usage.cached_input_tokens,
            "output tokens": usage.output_tokens,
            "of them reasoning": usage.reasoning_tokens,
            "audio tokens": usage.audio_tokens,
            "seconds": usage.seconds,
            "images": usage.images,
            "characters": usage.characters,
        }
        used = [f"{value:,} {name}" for name, value in told.items() if value]
    return f"{_BASES[event.basis]}{': ' if used else ''}{', '.join(used)} (basis {event.basis})"


def _unsettled(hold: Hold) -> Iterator[tuple[str, str]]:
    yield "held", f"{show.moment(hold.placed_at)} UTC, {show.count(hold.amount, 'credit')}, hold {show.shown(hold.id)}"
    what = show.shown(hold.endpoint or "")
    if what or hold.model:
        yield "called", f"{what}{f' with {show.shown(hold.model)}' if hold.model else ''}".strip()
    if hold.state == "open":
        yield "now", f"in flight; its lease runs until {show.moment(hold.expires_at)} UTC"
        return
    reason = _REASONS.get(hold.reason or "", show.shown(hold.reason or "its lease ran out"))
    yield "ended", f"{show.moment(hold.ended_at)} UTC, {hold.state}: {reason}. {_SENT.get(hold.sent or '', '')}".strip()
    yield "charged", "nothing" if hold.state != "charged" else "by policy: see the usage event of this hold"


def _delivery(event: UsageEvent, story: Story) -> str:
    if event.delivered is not None:
        details = ", ".join(f"{show.shown(name)} {show.shown(value)}" for name, value in event.delivered.items())
        return f"delivered{f': {details}' if details else ''}"
    if story.service is None:
        return "none: this ledger tells no remote service"
    if story.outbox is None:
        return f"none: {show.shown(story.service)} is not told of 0 credits"
    reason = f": {show.shown(story.outbox.reason)}" if story.outbox.reason else ""
    return f"{story.outbox.state} in the outbox, tried {show.count(story.outbox.attempts, 'time')}{reason}"
