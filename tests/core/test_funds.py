"""The arithmetic of grants, as tables of plain values and as properties."""

from __future__ import annotations

import copy
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metered_ai.core.funds import Funds, GrantFunds, OldHold, add, end_hold, expire, fold, next_expiry, revoke


def funds_of(*grants: GrantFunds, used: int = 0, held: int = 0) -> Funds:
    return Funds(
        limit=sum(grant.amount - grant.expired - grant.revoked for grant in grants),
        used=used,
        held=held,
        allocated=sum(grant.spent for grant in grants),
        kept=sum(grant.kept for grant in grants),
        grants=list(grants),
    )


def parts(funds: Funds) -> list[tuple[int, int, int, int]]:
    return [(grant.spent, grant.expired, grant.revoked, grant.kept) for grant in funds.grants]


def check(funds: Funds) -> None:
    """What holds after every operation."""
    assert funds.limit == sum(grant.amount - grant.expired - grant.revoked for grant in funds.grants)
    assert funds.allocated == sum(grant.spent for grant in funds.grants)
    assert funds.kept == sum(grant.kept for grant in funds.grants)
    assert 0 <= funds.allocated <= funds.used
    assert 0 <= funds.kept <= funds.held
    for grant in funds.grants:
        assert min(grant.spent, grant.expired, grant.revoked, grant.kept, grant.remainder) >= 0
        assert not grant.is_over or grant.kept == grant.remainder
        assert grant.is_over or not grant.kept


@pytest.mark.parametrize(
    ("used", "spent"),
    [(0, [0, 0, 0]), (3, [0, 3, 0]), (12, [2, 10, 0]), (20, [10, 10, 0]), (25, [10, 10, 5]), (99, [10, 10, 10])],
)
def test_fold(used, spent):
    """Soonest expiry is spent first, a grant without expiry last; what none can pay is debt."""
    funds = funds_of(GrantFunds(1, 10, 200), GrantFunds(2, 10, 100), GrantFunds(3, 10), used=used)

    fold(funds)
    assert spent == [grant.spent for grant in funds.grants]
    check(funds)


def test_fold_ties():
    """Of two grants that expire together the first one given is spent first."""
    funds = funds_of(GrantFunds(1, 10, 100), GrantFunds(2, 10, 100), used=4)

    fold(funds)
    assert [4, 0] == [grant.spent for grant in funds.grants]


@pytest.mark.parametrize(("now", "limit"), [(99, 15), (100, 5), (101, 5)])
def test_expire(now, limit):
    """At its expiry, to the microsecond, what is left of a grant leaves the limit."""
    funds = funds_of(GrantFunds(1, 10, 100), GrantFunds(2, 5), used=0)

    assert (limit < 15) == expire(funds, [], now)
    assert limit == funds.limit
    check(funds)


def test_expire_unspent_only():
    """What was spent before the expiry does not expire."""
    funds = funds_of(GrantFunds(1, 10, 100), used=7)

    expire(funds, [], 100)
    assert (7, [(7, 3, 0, 0)]) == (funds.limit, parts(funds))


def test_expire_keeps_for_old_holds():
    """A hold placed before the expiry keeps what it may need; one placed at the expiry or later keeps nothing."""
    funds = funds_of(GrantFunds(1, 10, 100), held=9)

    expire(funds, [OldHold(99, 4), OldHold(100, 5)], 150)
    assert (4, [(0, 6, 0, 4)]) == (funds.limit, parts(funds))
    check(funds)


def test_expire_several():
    """Two grants that expire one after the other together keep no more than the old holds may need."""
    funds = funds_of(GrantFunds(1, 10, 100), GrantFunds(2, 10, 200), held=15)

    expire(funds, [OldHold(50, 12), OldHold(150, 3)], 300)
    assert [(0, 0, 0, 10), (0, 5, 0, 5)] == parts(funds)
    check(funds)


@pytest.mark.parametrize(
    ("spent", "expected", "limit"),
    [
        (4, (4, 6, 0, 0), 4),
        (3, (3, 7, 0, 0), 3),
        (0, (0, 10, 0, 0), 0),
        (9, (4, 6, 0, 0), 4),
    ],
)
def test_end_hold(spent, expected, limit):
    """An old hold is paid by the expired grant up to what was kept; what it gives back is gone, what it overran is debt."""
    funds = funds_of(GrantFunds(1, 10, 100), held=4)
    expire(funds, [OldHold(50, 4)], 100)

    funds.held, funds.used = 0, spent
    end_hold(funds, [], OldHold(50, 4), spent)
    assert ([expected], limit) == (parts(funds), limit)
    check(funds)


def test_end_hold_new():
    """A hold placed after the expiry is not paid by the expired grant, and takes nothing from those it serves."""
    funds = funds_of(GrantFunds(1, 10, 100), GrantFunds(2, 10), held=8)
    expire(funds, [OldHold(50, 4)], 100)

    funds.held, funds.used = 4, 4
    end_hold(funds, [OldHold(50, 4)], OldHold(120, 4), 4)
    assert [(0, 6, 0, 4), (0, 0, 0, 0)] == parts(funds)
    fold(funds)
    assert [(0, 6, 0, 4), (4, 0, 0, 0)] == parts(funds)
    check(funds)


def test_add_pays_debt():
    """A grant pays the debt first, and what paid it cannot expire any more."""
    funds = funds_of(used=6)

    add(funds, GrantFunds(1, 10, 100), [], 50)
    assert (10, [(6, 0, 0, 0)]) == (funds.limit, parts(funds))
    expire(funds, [], 100)
    assert (6, 0) == (funds.limit, funds.free)
    check(funds)


def test_add_past():
    """A grant that has expired already pays the debt, and the rest of it is gone at once."""
    funds = funds_of(used=6)

    add(funds, GrantFunds(1, 10, 40), [], 50)
    assert (6, [(6, 4, 0, 0)]) == (funds.limit, parts(funds))
    check(funds)


def test_add_past_serves_old_holds():
    """A grant added after its own expiry still serves holds that are older than that, and others keep the less for it."""
    funds = funds_of(GrantFunds(1, 10, 100), held=8)
    expire(funds, [OldHold(50, 8)], 100)

    add(funds, GrantFunds(2, 5, 60), [OldHold(50, 8)], 120)
    assert [(0, 7, 0, 3), (0, 0, 0, 5)] == parts(funds)
    check(funds)


def test_revoke():
    """Revoking takes the whole grant; what it had paid is paid by another grant, and what that cannot pay is debt."""
    funds = funds_of(GrantFunds(1, 10, 100), GrantFunds(2, 3), used=8)
    fold(funds)

    revoke(funds, funds.grants[0], [], 50)
    assert (3, [(0, 0, 10, 0), (3, 0, 0, 0)]) == (funds.limit, parts(funds))
    assert -5 == funds.free
    again = copy.deepcopy(funds)
    revoke(funds, funds.grants[0], [], 50)
    assert again == funds
    check(funds)


def test_revoke_expired():
    """What had expired already is not taken twice."""
    funds = funds_of(GrantFunds(1, 10, 100), used=4, held=3)
    expire(funds, [OldHold(50, 3)], 100)
    assert [(4, 3, 0, 3)] == parts(funds)

    revoke(funds, funds.grants[0], [OldHold(50, 3)], 120)
    assert (0, [(0, 3, 7, 0)]) == (funds.limit, parts(funds))
    check(funds)


def test_next_expiry():
    """The next expiry is that of the soonest grant with something left that has not been applied."""
    grants = [
        GrantFunds(1, 10, 100, is_over=True),
        GrantFunds(2, 10, 200, spent=10),
        GrantFunds(3, 5, 300),
        GrantFunds(4, 5),
    ]

    assert 300 == next_expiry(grants)
    assert next_expiry(grants[:2]) is None


grants_given = st.lists(st.tuples(st.integers(1, 20), st.none() | st.integers(1, 50)), max_size=5)
holds_open = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 15), st.integers(0, 18)), max_size=5)


@given(grants_given, st.integers(0, 40), holds_open, st.integers(0, 60))
def test_holds_end_in_any_order(given_grants, used, open_holds, now):
    """Whatever order old holds end in, and whatever they cost, what expires is the same: only what none of them could use."""
    holds = [OldHold(placed_at, amount) for placed_at, amount, _ in open_holds]
    start = funds_of(*(GrantFunds(key, *grant) for key, grant in enumerate(given_grants)), used=used)
    start.held = sum(hold.amount for hold in holds)
    expire(start, holds, now)
    check(start)

    ends = []
    for order in itertools.islice(itertools.permutations(range(len(holds))), 12):
        funds, left = copy.deepcopy(start), list(holds)
        for index in order:
            spent = open_holds[index][2]
            left.remove(holds[index])
            funds.held -= holds[index].amount
            funds.used += spent
            end_hold(funds, left, holds[index], spent)
            check(funds)
        ends.append((funds.limit, funds.used, funds.kept))
    assert 1 == len(set(ends))
    assert 0 == ends[0][2]


@given(grants_given, st.lists(st.tuples(st.sampled_from("guhsre"), st.integers(0, 12), st.integers(0, 4)), max_size=25))
def test_any_history(given_grants, acts):
    """After any history the sums hold, and nothing but a grant makes more available."""
    funds, holds, now = Funds(), [], 10
    left = [GrantFunds(key, *grant) for key, grant in enumerate(given_grants)]
    for act, amount, index in acts:
        now += 2
        expire(funds, holds, now)
        before = max(0, funds.free)
        match act:
            case "g" if left:
                add(funds, left.pop(), holds, now)
                before = max(before, funds.free)
            case "u":
                funds.used += amount
            case "h" if funds.free >= amount:
                holds.append(OldHold(now, amount))
                funds.held += amount
            case "s" | "e" if index < len(holds):
                hold = holds.pop(index)
                funds.held -= hold.amount
                spent = 0 if act == "e" else amount
                funds.used += spent
                end_hold(funds, holds, hold, spent)
                before += hold.amount
            case "r" if index < len(funds.grants):
                revoke(funds, funds.grants[index], holds, now)
        check(funds)
        assert max(0, funds.free) <= before
