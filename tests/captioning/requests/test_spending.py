import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from next.captioning.requests.spending import BudgetConfig, Purse, Spending


def test_what_is_reserved_counts_until_it_is_settled():
    purse = Purse(BudgetConfig(tokens=100))
    assert purse.reserve(60, 0) == "granted"
    assert purse.reserve(60, 0) == "wait"
    purse.settle(Spending(60), Spending(30))
    assert purse.spent == Spending(30)
    assert purse.reserve(60, 0) == "granted"
    purse.settle(Spending(60), Spending(60))
    assert purse.reserve(60, 0) == "spent"
    assert purse.reserve(10, 0) == "granted"


def test_money_is_held_to_its_own_limit():
    purse = Purse(BudgetConfig(money=1.0))
    assert purse.reserve(10**9, 0.6) == "granted"
    assert purse.reserve(1, 0.6) == "wait"
    purse.settle(Spending(10**9, 0.6), Spending(10**9, 0.6))
    assert purse.reserve(1, 0.6) == "spent"


@pytest.mark.parametrize("field", ["tokens", "money"])
@pytest.mark.parametrize("limit", [0, -5])
def test_a_budget_of_nothing_is_refused(field, limit):
    with pytest.raises(ValidationError, match=f"greater than 0, but got {limit}, with which noth"):
        BudgetConfig(**{field: limit})


@given(st.integers(1, 200), st.lists(st.tuples(st.integers(1, 50), st.booleans()), max_size=60))
def test_no_order_of_calls_overspends(limit, calls):
    purse = Purse(BudgetConfig(tokens=limit))
    under_way = []
    for cost, finish in calls:
        if purse.reserve(cost, 0) == "granted":
            under_way.append(cost)
        if finish and under_way:
            cost = under_way.pop()
            purse.settle(Spending(cost), Spending(cost))
        assert purse.spent.tokens + sum(under_way) <= limit


def test_spendings_add_up():
    assert Spending(1, 0.5) + Spending(2, 0.25) == Spending(3, 0.75)
    with pytest.raises(TypeError):
        Spending(1) + 3


class Hours:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_a_dead_owner_held_counts_as_spent_and_holds_up_nobody():
    clock = Hours()
    purse = Purse(BudgetConfig(tokens=100), lease_s=30, clock=clock)
    assert purse.reserve(40, 0, "dead") == "granted"
    assert purse.reserve(70, 0, "alive") == "wait"
    clock.now = 29
    assert purse.reserve(70, 0, "alive") == "wait"
    clock.now = 31
    assert purse.reserve(70, 0, "alive") == "spent"
    assert purse.reserve(60, 0, "alive") == "granted"
    assert purse.spent == Spending(40)


def test_an_owner_that_is_heard_of_keeps_what_it_holds():
    clock = Hours()
    purse = Purse(BudgetConfig(tokens=100), lease_s=30, clock=clock)
    purse.reserve(40, 0, "busy")
    for clock.now in range(0, 200, 20):
        purse.hear("busy")
        assert purse.reserve(70, 0, "other") == "wait"
    purse.settle(Spending(40), Spending(10), "busy")
    assert purse.spent == Spending(10)


def test_who_was_only_slow_settles_what_it_did_cost():
    clock = Hours()
    purse = Purse(BudgetConfig(tokens=100, money=1.0), lease_s=30, clock=clock)
    purse.reserve(40, 0.5, "slow")
    clock.now = 60
    purse.reserve(1, 0, "other")
    assert purse.spent == Spending(40, 0.5)
    purse.settle(Spending(40, 0.5), Spending(15, 0.125), "slow")
    assert purse.spent == Spending(15, 0.125)
    purse.settle(Spending(40, 0.5), Spending(15, 0.125), "slow")  # once is enough
    assert purse.spent == Spending(15, 0.125)
