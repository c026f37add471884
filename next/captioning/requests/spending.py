"""What a run may spend, and what it has spent."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

from pydantic import field_validator

from next.config import Section

Grant = Literal["granted", "wait", "spent"]
LEASE_S = 30.0
"""Seconds after which an owner of a reservation without a heartbeat is taken for dead."""


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


class Budget:
    """What a run may still spend; a request reserves the most that it may cost before it is sent.

    A reservation that does not fit while other requests are under way waits for what those leave;
    so the limit is kept without leaving much of it unused. A reservation has an owner. One
    that sends no heartbeat for a while is taken for dead: what it held counts as spent, since its
    requests may have been answered, and nobody waits for it any more.

    Args:
        limits: tokens and money at most.
        spent: of them, beforehand.
        lease_s: seconds after which an owner without a heartbeat is taken for dead.
        clock: seconds.
    """

    def __init__(
        self,
        limits: BudgetConfig,
        spent: Spending | None = None,
        lease_s: float = LEASE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self.spent = spent or Spending()
        self._lease_s = lease_s
        self._clock = clock
        self._held: dict[str, list[Spending]] = {}
        self._expired: dict[str, list[Spending]] = {}
        self._last_heartbeat: dict[str, float] = {}

    def reserve(self, tokens: int, money: float, owner: str = "") -> Grant:
        """Set aside what a call may cost; ``spent``: it fits no more, and nothing is under way."""
        self.heartbeat(owner)
        self._drop_dead()
        held = sum(itertools.chain(*self._held.values()), Spending(tokens, money))
        if _fits(self.spent.tokens + held.tokens, self.limits.tokens) and _fits(
            self.spent.money + held.money, self.limits.money
        ):
            self._held.setdefault(owner, []).append(Spending(tokens, money))
            return "granted"
        return "wait" if any(self._held.values()) else "spent"

    def settle(self, reserved: Spending, cost: Spending, owner: str = "") -> None:
        """Replace a reservation by what the call did cost."""
        self.heartbeat(owner)
        reserved = Spending(*reserved)
        if reserved in self._held.get(owner, ()):
            self._held[owner].remove(reserved)
            self.spent += Spending(*cost)
        elif reserved in self._expired.get(owner, ()):  # it was only slow, and has been counted
            self._expired[owner].remove(reserved)
            self.spent += Spending(cost[0] - reserved.tokens, cost[1] - reserved.money)

    def heartbeat(self, owner: str = "") -> None:
        """Note that an owner lives."""
        self._last_heartbeat[owner] = self._clock()

    def _drop_dead(self) -> None:
        now = self._clock()
        for owner in [one for one in self._held if now - self._last_heartbeat[one] > self._lease_s]:
            held = self._held.pop(owner)
            self._expired.setdefault(owner, []).extend(held)
            self.spent = sum(held, self.spent)


def _fits(amount: float, limit: float | None) -> bool:
    return limit is None or amount <= limit * (1 + 1e-9)
