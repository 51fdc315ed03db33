"""Settling: once, again, late, and the same answer twice."""

from __future__ import annotations

import pytest

from ...errors import BillingUnavailableError, InsufficientCreditsError
from ...ledger import Ledger
from ...records import Usage, UsageEvent
from .common import (
    Clock,
    Contract,
    Numbers,
    billed,
    digest,
    grant,
    hold_of,
    lose,
    numbers,
    place,
    record,
    release,
    set_unlimited,
    settle,
)

__all__ = ["Late", "SameAnswer", "Settling"]


class Settling(Contract):
    """How a hold becomes a usage event."""

    def test_settle_charges(self, ledger: Ledger) -> None:
        """A settle charges what was used and gives back the rest of the hold."""
        grant(ledger, 10)
        place(ledger, "h1", 6)
        settled = settle(ledger, "h1", 4, "gen_resp_1")

        assert "settled" == settled.outcome
        assert [("gen_resp_1", 4)] == billed(ledger)
        assert Numbers(10, used=4, available=6) == numbers(ledger)
        assert [] == list(ledger.holds())

    def test_settle_what_an_event_tells(self, ledger: Ledger, clock: Clock) -> None:
        """A usage event keeps all that was said about the call, and is listed as it was returned."""
        usage = Usage(
            model="gpt-5-mini",
            endpoint="responses",
            service_tier="default",
            input_tokens=12,
            cached_input_tokens=3,
            cache_write_tokens=0,
            output_tokens=5,
            reasoning_tokens=2,
            seconds=1.5,
        )
        grant(ledger, 10)
        place(ledger, "h0", 0)
        place(ledger, "h1", 6, parent="h0")
        clock.advance(1)
        event = settle(
            ledger,
            "h1",
            4,
            "gen_resp_1",
            basis="estimated",
            usage=usage,
            request_id="req_1",
            attempts=2,
            properties={"team": "blue", "deep": {"list": [1, "\u00e9", None]}},
            price_slug="images-hd",
            parent="h0",
        ).event

        assert (
            UsageEvent(
                customer="ada",
                meter="calls",
                transaction_id="gen_resp_1",
                amount=4,
                created_at=clock.at(),
                basis="estimated",
                kind="call",
                hold_id="h1",
                usage=usage,
                request_id="req_1",
                attempts=2,
                properties={"team": "blue", "deep": {"list": [1, "\u00e9", None]}},
                price_slug="images-hd",
                parent="h0",
            )
            == event
        )
        assert [event] == list(ledger.usage_events())
        assert event == ledger.usage_event("ada", "calls", "gen_resp_1")

    def test_settle_an_event_of_a_charge(self, ledger: Ledger) -> None:
        """What a settle calls itself becomes the event's kind."""
        place(ledger, "h1", 0)

        assert "charge" == settle(ledger, "h1", 0, kind="charge").event.kind

    def test_settle_nothing(self, ledger: Ledger) -> None:
        """A settle of 0 gives the whole hold back and leaves an event of 0."""
        grant(ledger, 10)
        place(ledger, "h1", 6)
        settle(ledger, "h1", 0)

        assert [("gen_h1", 0)] == billed(ledger)
        assert Numbers(10, available=10) == numbers(ledger)

    def test_settle_beyond_the_hold(self, ledger: Ledger) -> None:
        """A settle above its hold records the truth and takes the rest from what is available."""
        grant(ledger, 10)
        place(ledger, "h1", 2)
        settle(ledger, "h1", 5)

        assert Numbers(10, used=5, available=5) == numbers(ledger)

    def test_settle_beyond_the_balance(self, ledger: Ledger) -> None:
        """What is used beyond the balance is debt, and blocks the next hold."""
        grant(ledger, 10)
        place(ledger, "h1", 2)
        settle(ledger, "h1", 13)

        assert Numbers(10, used=13, debt=3) == numbers(ledger)
        with pytest.raises(InsufficientCreditsError):
            place(ledger, "h2", 1)

    def test_settle_debt_counts_holds(self, ledger: Ledger) -> None:
        """Credits that other calls hold are not there to pay an overrun: it is debt at once."""
        grant(ledger, 10)
        place(ledger, "h1", 2)
        place(ledger, "h2", 8)
        settle(ledger, "h1", 5)

        assert Numbers(10, used=5, held=8, debt=3) == numbers(ledger)
        release(ledger, "h2")
        assert Numbers(10, used=5, available=5) == numbers(ledger)

    def test_settle_again(self, ledger: Ledger) -> None:
        """Settling a settled hold again charges nothing and returns the first event, whatever the second settle says."""
        grant(ledger, 10)
        place(ledger, "h1", 6)
        first = settle(ledger, "h1", 4, "gen_resp_1")
        same = settle(ledger, "h1", 4, "gen_resp_1")
        other = settle(ledger, "h1", 6, "gen_resp_2", is_explicit=True, fingerprint="f", is_unlimited=True)

        assert ["settled", "again", "again"] == [first.outcome, same.outcome, other.outcome]
        assert first.event == same.event == other.event
        assert [("gen_resp_1", 4)] == billed(ledger)
        assert Numbers(10, used=4, available=6) == numbers(ledger)

    def test_settle_ids_belong_to_an_account(self, ledger: Ledger) -> None:
        """The same transaction id of another customer, or on another meter, is another event."""
        for number, (customer, meter) in enumerate([("ada", "calls"), ("ada", "images"), ("bob", "calls")]):
            grant(ledger, 10, customer=customer, meter=meter)
            place(ledger, f"h{number}", 1, customer=customer, meter=meter)
            settled = settle(ledger, f"h{number}", 1, "gen_1", customer=customer, meter=meter)

            assert "settled" == settled.outcome
            assert Numbers(10, used=1, available=9) == numbers(ledger, customer, meter)

    def test_settle_unknown_event(self, ledger: Ledger) -> None:
        """Asking for an event that is not there gives None."""
        grant(ledger, 10)

        assert ledger.usage_event("ada", "calls", "gen_1") is None


class SameAnswer(Contract):
    """Two holds, one transaction id."""

    def test_same_id_explicit(self, ledger: Ledger) -> None:
        """An explicit id that was billed before is not charged again: the hold is released and the earlier event returned."""
        grant(ledger, 10)
        place(ledger, "h1", 3)
        place(ledger, "h2", 3)
        first = settle(ledger, "h1", 3, "report_9", is_explicit=True)
        second = settle(ledger, "h2", 2, "report_9", is_explicit=True)

        assert ("repeat", first.event) == (second.outcome, second.event)
        assert Numbers(10, used=3, available=7) == numbers(ledger)
        hold = hold_of(ledger, "h2")
        assert ("released", "repeat", "yes") == (hold.state, hold.reason, hold.sent)

    def test_same_id_replay(self, ledger: Ledger) -> None:
        """An answer that a cache gives twice (same id, same fingerprint) is billed once, and the second hold released."""
        grant(ledger, 10)
        place(ledger, "h1", 3)
        place(ledger, "h2", 3)
        first = settle(ledger, "h1", 3, "gen_1", fingerprint="f1")
        second = settle(ledger, "h2", 3, "gen_1", fingerprint="f1")

        assert ("replay", first.event) == (second.outcome, second.event)
        assert Numbers(10, used=3, available=7) == numbers(ledger)
        hold = hold_of(ledger, "h2")
        assert ("released", "repeat", "yes") == (hold.state, hold.reason, hold.sent)

    @pytest.mark.parametrize("is_explicit", [True, False])
    def test_same_id_repeat_again(self, ledger: Ledger, is_explicit: bool) -> None:
        """Settling a hold again that ended as a repeat returns the earlier event and charges nothing."""
        grant(ledger, 10)
        place(ledger, "h1", 3)
        place(ledger, "h2", 3)
        first = settle(ledger, "h1", 3, "gen_1", fingerprint="f1", is_explicit=is_explicit)
        settle(ledger, "h2", 3, "gen_1", fingerprint="f1", is_explicit=is_explicit)
        third = settle(ledger, "h2", 3, "gen_1", fingerprint="f1", is_explicit=is_explicit)

        assert ("repeat", first.event) == (third.outcome, third.event)
        assert Numbers(10, used=3, available=7) == numbers(ledger)

    def test_same_id_another_answer(self, ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
        """
        A server that gives two answers the same id is billed for both: the second id gets a suffix made of its fingerprint.

        A warning names the ids.
        """
        grant(ledger, 10)
        for hold_id, amount, fingerprint in [("h1", 3, "f1"), ("h2", 2, "f2")]:
            place(ledger, hold_id, 3)
            settled = settle(ledger, hold_id, amount, "chatcmpl-424", fingerprint=fingerprint)

            assert "settled" == settled.outcome
        assert [("chatcmpl-424", 3), (f"chatcmpl-424.{digest('f2')}", 2)] == billed(ledger)
        assert Numbers(10, used=5, available=5) == numbers(ledger)
        assert any("chatcmpl-424" in entry.getMessage() for entry in caplog.records if entry.levelname == "WARNING")

    def test_same_id_another_answer_replayed(self, ledger: Ledger) -> None:
        """The second answer of such a server, replayed, is billed once as well."""
        grant(ledger, 10)
        outcomes: list[str] = []
        for hold_id, fingerprint in [("h1", "f1"), ("h2", "f2"), ("h3", "f2"), ("h4", "f1"), ("h5", "f3")]:
            place(ledger, hold_id, 1)
            outcomes.append(settle(ledger, hold_id, 1, "chatcmpl-424", fingerprint=fingerprint).outcome)

        assert ["settled", "settled", "replay", "replay", "settled"] == outcomes
        assert Numbers(10, used=3, available=7) == numbers(ledger)

    @pytest.mark.parametrize(("first", "second"), [(None, None), ("f1", None), (None, "f2")])
    def test_same_id_nothing_to_compare(self, ledger: Ledger, first: str | None, second: str | None) -> None:
        """Answers without a fingerprint are never taken for the same: both are billed."""
        grant(ledger, 10)
        place(ledger, "h1", 3)
        place(ledger, "h2", 3)
        settle(ledger, "h1", 3, "gen_1", fingerprint=first)
        settle(ledger, "h2", 2, "gen_1", fingerprint=second)

        assert [("gen_1", 3), (f"gen_1.{digest(second or 'h2')}", 2)] == billed(ledger)

    def test_same_id_suffix_is_taken(self, ledger: Ledger) -> None:
        """Where the suffixed id is taken, too, the hold's own id makes the suffix."""
        grant(ledger, 10)
        record(ledger, "gen_1", 1)
        record(ledger, f"gen_1.{digest('f1')}", 1)
        place(ledger, "h1", 3)
        settled = settle(ledger, "h1", 2, "gen_1", fingerprint="f1")

        assert (f"gen_1.{digest('h1')}", 2) == (settled.event.transaction_id, settled.event.amount)
        assert Numbers(10, used=4, available=6) == numbers(ledger)

    def test_same_id_against_a_record(self, ledger: Ledger) -> None:
        """What was recorded by hand under a provider's id is another answer; under an explicit id it is the same."""
        grant(ledger, 10)
        recorded = record(ledger, "gen_1", 1)
        place(ledger, "h1", 3)
        place(ledger, "h2", 3)
        call = settle(ledger, "h1", 3, "gen_1", fingerprint="f1")
        explicit = settle(ledger, "h2", 3, "gen_1", is_explicit=True)

        assert ("settled", f"gen_1.{digest('f1')}") == (call.outcome, call.event.transaction_id)
        assert ("repeat", recorded) == (explicit.outcome, explicit.event)
        assert Numbers(10, used=4, available=6) == numbers(ledger)

    def test_same_id_long_ids(self, ledger: Ledger) -> None:
        """A suffix never makes an id longer than 255 characters, and two long ids stay two."""
        grant(ledger, 10)
        ids = ["x" * 255, "x" * 254 + "y", "y" + "x" * 254]
        for number, transaction_id in enumerate(ids):
            for fingerprint in ["f1", "f2"]:
                hold = place(ledger, f"h{number}{fingerprint}", 1)
                settle(ledger, hold.id, 1, transaction_id, fingerprint=fingerprint)

        events = billed(ledger)
        assert 6 == len(events) == len({transaction_id for transaction_id, _ in events})
        assert 255 == max(len(transaction_id) for transaction_id, _ in events)
        place(ledger, "again", 1)
        assert "replay" == settle(ledger, "again", 1, ids[1], fingerprint="f2").outcome


class Late(Contract):
    """A settle that comes when the hold has ended or is gone: the truth is recorded all the same."""

    @pytest.mark.parametrize("how", ["released", "expired", "tombstone", "unknown"])
    def test_late_is_recorded(self, ledger: Ledger, clock: Clock, how: str) -> None:
        """A settle after the hold was released, expired or lost is recorded as late, in full."""
        grant(ledger, 10)
        lose(ledger, clock, how)
        settled = settle(ledger, "h1", 3, "gen_1")

        assert "late" == settled.outcome
        assert settled.event.is_late
        assert ("h1", 3) == (settled.event.hold_id, settled.event.amount)
        assert Numbers(10, used=3, available=7) == numbers(ledger)
        assert [] == list(ledger.holds())

    @pytest.mark.parametrize("how", ["released", "expired", "tombstone", "unknown"])
    def test_late_again(self, ledger: Ledger, clock: Clock, how: str) -> None:
        """A second late settle of the same hold charges nothing."""
        grant(ledger, 10)
        lose(ledger, clock, how)
        first = settle(ledger, "h1", 3, "gen_1")
        again = settle(ledger, "h1", 3, "gen_1")

        assert ("again", first.event) == (again.outcome, again.event)
        assert Numbers(10, used=3, available=7) == numbers(ledger)
        with pytest.raises(BillingUnavailableError, match="has ended"):
            place(ledger, "h1", 3)

    @pytest.mark.parametrize("how", ["released", "expired", "tombstone", "unknown"])
    def test_late_may_make_debt(self, ledger: Ledger, clock: Clock, how: str) -> None:
        """Where the credits went to another call meanwhile, a late settle makes debt."""
        grant(ledger, 10)
        lose(ledger, clock, how)
        place(ledger, "h2", 9, owner="p2")
        settle(ledger, "h1", 3, "gen_1")

        assert Numbers(10, used=3, held=9, debt=2) == numbers(ledger)

    @pytest.mark.parametrize("how", ["released", "expired"])
    def test_late_keeps_the_mode(self, ledger: Ledger, clock: Clock, how: str) -> None:
        """A late settle is counted in the mode its hold was placed under."""
        set_unlimited(ledger)
        lose(ledger, clock, how)
        set_unlimited(ledger, is_unlimited=False)
        settle(ledger, "h1", 3)

        assert Numbers(0) == numbers(ledger)
        assert 3 == ledger.balance("ada", "calls").unlimited_used

    @pytest.mark.parametrize("is_unlimited", [True, False])
    def test_late_mode_of_a_lost_hold(self, ledger: Ledger, is_unlimited: bool) -> None:
        """Where the hold is gone, the settle says which mode it was placed under."""
        set_unlimited(ledger, is_unlimited=not is_unlimited)
        event = settle(ledger, "h1", 3, is_unlimited=is_unlimited).event
        set_unlimited(ledger, is_unlimited=False)

        assert is_unlimited == event.is_unlimited
        assert (Numbers(0) if is_unlimited else Numbers(0, used=3, debt=3)) == numbers(ledger)

    def test_late_first_ever(self, ledger: Ledger) -> None:
        """A lost hold is recorded even where the ledger has never heard of the customer."""
        settle(ledger, "h1", 3)

        assert Numbers(0, used=3, debt=3) == numbers(ledger)

    def test_late_two_truths(self, ledger: Ledger, clock: Clock) -> None:
        """A late settle whose explicit id was billed meanwhile is a repeat: one charge."""
        grant(ledger, 10)
        lose(ledger, clock, "expired")
        place(ledger, "h2", 4)
        first = settle(ledger, "h2", 4, "report_9", is_explicit=True)
        late = settle(ledger, "h1", 4, "report_9", is_explicit=True)

        assert ("repeat", first.event) == (late.outcome, late.event)
        assert Numbers(10, used=4, available=6) == numbers(ledger)

    @pytest.mark.parametrize(("truth", "amount", "limit"), [(7, 3, 10), (4, 0, 10), (1, 0, 13), (0, 0, 14)])
    def test_late_after_a_charge(self, ledger: Ledger, clock: Clock, truth: int, amount: int, limit: int) -> None:
        """
        A settle after the orphan was charged puts the truth beside the charge, and changes no event.

        More is a second event with the difference; less is an event of 0 with the usage, and a grant of the difference.
        """
        usage = Usage(model="gpt-5-mini", output_tokens=7)
        grant(ledger, 10)
        place(ledger, "h1", 4, on_unknown="charge")
        clock.advance(121)
        ledger.recover()
        settled = settle(ledger, "h1", truth, usage=usage)

        event = settled.event
        assert "corrected" == settled.outcome
        assert ("hold_h1.c1", amount, "correction", usage) == (
            event.transaction_id,
            event.amount,
            event.kind,
            event.usage,
        )
        assert [("hold_h1", 4), ("hold_h1.c1", amount)] == billed(ledger)
        assert limit - 4 - amount == 10 - truth
        assert Numbers(limit, used=4 + amount, available=10 - truth) == numbers(ledger)
        assert limit - 10 == sum(given.amount for given in ledger.grants() if given.id == "correction_h1")

    @pytest.mark.parametrize("truth", [7, 4, 1])
    def test_late_after_a_charge_again(self, ledger: Ledger, clock: Clock, truth: int) -> None:
        """A charged orphan is corrected once."""
        grant(ledger, 10)
        place(ledger, "h1", 4, on_unknown="charge")
        clock.advance(121)
        ledger.recover()
        first = settle(ledger, "h1", truth)
        before = numbers(ledger)
        again = settle(ledger, "h1", truth)

        assert ("again", first.event) == (again.outcome, again.event)
        assert before == numbers(ledger)
        assert 2 == len(billed(ledger))
