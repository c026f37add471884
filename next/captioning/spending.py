"""What a run may spend, and what it has spent."""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import field_validator

from next.config import Section

Grant = Literal["granted", "wait", "spent"]


class Spending(NamedTuple):
    """Tokens and money."""

    tokens: int = 0
    """Of prompts and answers together."""
    money: float = 0.0
    """In the currency of the models' prices."""

    def __add__(self, other: object) -> Spending:
        if not isinstance(other, Spending):
            return NotImplemented
        return Spending(self.tokens + other.tokens, self.money + other.money)


class BudgetConfig(Section):
    """The most that a run may spend; it then stops asking, and writes what it has."""

    tokens: int | None = None
    """Tokens of prompts and answers together; None: no limit."""
    money: float | None = None
    """In the currency of the models' prices; None: no limit."""

    @field_validator("tokens", "money")
    @classmethod
    def _buys_something(cls, limit: float | None) -> float | None:
        if limit is not None and not limit > 0:
            raise ValueError(
                f"must be greater than 0, but got {limit:g}, with which nothing can be asked; "
                f"leave it out for no limit, or see the expected cost with --dry-run"
            )
        return limit


class Purse:
    """Holds the budget; every call reserves what it may cost before it is made.

    A reservation that does not fit while other calls are under way waits for what those leave; so
    the limit is kept without leaving much of it unused.
    """

    def __init__(self, budget: BudgetConfig, spent: Spending | None = None) -> None:
        self.budget = budget
        self.spent = spent or Spending()
        self._held = Spending()
        self._calls = 0

    def reserve(self, tokens: int, money: float) -> Grant:
        """Set aside what a call may cost; ``spent``: it fits no more, and nothing is under way."""
        sum_tokens = self.spent.tokens + self._held.tokens + tokens
        sum_money = self.spent.money + self._held.money + money
        if _fits(sum_tokens, self.budget.tokens) and _fits(sum_money, self.budget.money):
            self._held += Spending(tokens, money)
            self._calls += 1
            return "granted"
        return "wait" if self._calls else "spent"

    def settle(self, reserved: Spending, cost: Spending) -> None:
        """Replace a reservation by what the call did cost."""
        self._held += Spending(-reserved.tokens, -reserved.money)
        self._calls -= 1
        self.spent += cost


def _fits(amount: float, limit: float | None) -> bool:
    return limit is None or amount <= limit * (1 + 1e-9)
