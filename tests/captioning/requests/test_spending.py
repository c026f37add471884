import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from next.captioning.requests.spending import Budget, BudgetConfig, Spending


def test_what_is_reserved_counts_until_it_is_settled():
    budget = Budget(BudgetConfig(tokens=100))
    assert budget.reserve(60, 0) == "granted"
    assert budget.reserve(60, 0) == "wait"
    budget.settle(Spending(60), Spending(30))
    assert budget.spent == Spending(30)
    assert budget.reserve(60, 0) == "granted"
    budget.settle(Spending(60), Spending(60))
    assert budget.reserve(60, 0) == "spent"
    assert budget.reserve(10, 0) == "granted"


def test_money_is_held_to_its_own_limit():
    budget = Budget(BudgetConfig(money=1.0))
    assert budget.reserve(10**9, 0.6) == "granted"
    assert budget.reserve(1, 0.6) == "wait"
    budget.settle(Spending(10**9, 0.6), Spending(10**9, 0.6))
    assert budget.reserve(1, 0.6) == "spent"


@pytest.mark.parametrize("field", ["tokens", "money"])
@pytest.mark.parametrize("limit", [0, -5])
def test_a_budget_of_nothing_is_refused(field, limit):
    with pytest.raises(ValidationError, match=f"greater than 0, but got {limit}, with which noth"):
        BudgetConfig(**{field: limit})


@given(st.integers(1, 200), st.lists(st.tuples(st.integers(1, 50), st.booleans()), max_size=60))
def test_no_order_of_calls_overspends(limit, calls):
    budget = Budget(BudgetConfig(tokens=limit))
    under_way = []
    for cost, finish in calls:
        if budget.reserve(cost, 0) == "granted":
            under_way.append(cost)
        if finish and under_way:
            cost = under_way.pop()
            budget.settle(Spending(cost), Spending(cost))
        assert budget.spent.tokens + sum(under_way) <= limit


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
    budget = Budget(BudgetConfig(tokens=100), lease_s=30, clock=clock)
    assert budget.reserve(40, 0, "dead") == "granted"
    assert budget.reserve(70, 0, "alive") == "wait"
    clock.now = 29
    assert budget.reserve(70, 0, "alive") == "wait"
    clock.now = 31
    assert budget.reserve(70, 0, "alive") == "spent"
    assert budget.reserve(60, 0, "alive") == "granted"
    assert budget.spent == Spending(40)


def test_an_owner_that_sends_heartbeats_keeps_what_it_holds():
    clock = Hours()
    budget = Budget(BudgetConfig(tokens=100), lease_s=30, clock=clock)
    budget.reserve(40, 0, "busy")
    for clock.now in range(0, 200, 20):
        budget.heartbeat("busy")
        assert budget.reserve(70, 0, "other") == "wait"
    budget.settle(Spending(40), Spending(10), "busy")
    assert budget.spent == Spending(10)


def test_who_was_only_slow_settles_what_it_did_cost():
    clock = Hours()
    budget = Budget(BudgetConfig(tokens=100, money=1.0), lease_s=30, clock=clock)
    budget.reserve(40, 0.5, "slow")
    clock.now = 60
    budget.reserve(1, 0, "other")
    assert budget.spent == Spending(40, 0.5)
    budget.settle(Spending(40, 0.5), Spending(15, 0.125), "slow")
    assert budget.spent == Spending(15, 0.125)
    budget.settle(Spending(40, 0.5), Spending(15, 0.125), "slow")  # once is enough
    assert budget.spent == Spending(15, 0.125)
