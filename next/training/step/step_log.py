"""What a run logs of its steps: read from the device now and then, not lost by a resume."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from next.model.losses import Losses
from next.training.checkpointing.checkpoint import Progress, Row


class NonFiniteLossError(ArithmeticError):
    """The loss became NaN or infinite; the last good checkpoint is kept."""


class RouterCollapseError(RuntimeError):
    """One expert gets everything, so the others are trained no more; the checkpoints are kept."""


_EVERYTHING = 0.99


class StepLog:
    """What is logged: handed over at once, and kept until the next checkpoint takes it along."""

    def __init__(
        self,
        hand_over: Callable[[dict[str, float], int], None] | None,
        again: Iterable[Row],
        collapse_steps: int | None = None,
    ) -> None:
        """On ranks other than 0, ``hand_over`` is None and rows are dropped."""
        self._collapse_steps = collapse_steps
        self._collapsed: dict[str, int] = {}
        self.losses: list[float] = []
        """Total loss of every step so far."""
        self._hand_over = hand_over
        self._rows: list[Row] = []
        for step, values in again:
            self.row(values, step)

    def row(self, values: dict[str, float], step: int) -> None:
        """Log values of one step."""
        if self._hand_over is not None:
            self._hand_over(values, step)
            self._rows.append((step, values))

    def steps(self, losses: list[Losses], progress: Progress) -> Progress:
        """Log the losses of steps that follow ``progress``, and where the run stands after them.

        The one place where the device is waited for.

        Raises:
            NonFiniteLossError: naming the steps and the parts of the loss.
            RouterCollapseError: naming the branch and the steps.
        """
        if not losses:
            return progress
        curves = _curves(losses)
        _require_finite(curves, progress)
        loss_sum = progress.loss_sum
        for index, loss in enumerate(curves["loss"]):
            values = {f"train/{name}": curve[index] for name, curve in curves.items()}
            self.row(values, progress.step + index + 1)
            self.losses.append(loss)
            loss_sum += loss
        self._require_several_experts(curves, progress)
        return replace(
            progress,
            step=progress.step + len(losses),
            step_in_epoch=progress.step_in_epoch + len(losses),
            loss_sum=loss_sum,
        )

    def _require_several_experts(self, curves: dict[str, list[float]], before: Progress) -> None:
        if self._collapse_steps is None:
            return
        for name, curve in curves.items():
            if not name.startswith("dominance_"):
                continue
            for index, share in enumerate(curve, 1):
                self._collapsed[name] = self._collapsed.get(name, 0) + 1
                if share < _EVERYTHING:
                    self._collapsed[name] = 0
                if self._collapsed[name] >= self._collapse_steps:
                    branch = name.removeprefix("dominance_")
                    raise RouterCollapseError(
                        f"one {branch} expert got {100 * share:.1f} % of the attention for "
                        f"{self._collapse_steps} steps, up to step {before.step + index}; lower "
                        f"optim.lr, raise model.routing.temperature, or set optim.collapse_steps"
                    )

    def new_rows(self) -> tuple[Row, ...]:
        """The rows since the last call, for the checkpoint."""
        rows, self._rows = tuple(self._rows), []
        return rows


def _curves(losses: list[Losses]) -> dict[str, list[float]]:
    """The losses by part."""
    parts = {"loss": torch.stack([loss.total.detach() for loss in losses])}
    for name in losses[0].parts:
        parts[f"loss_{name}"] = torch.stack([loss.parts[name].detach() for loss in losses])
    for what in ("dominance", "entropy", "overlap"):
        for name in getattr(losses[0], what):
            parts[f"{what}_{name}"] = torch.stack([getattr(loss, what)[name] for loss in losses])
    return {name: values.float().cpu().tolist() for name, values in parts.items()}


def _require_finite(curves: dict[str, list[float]], before: Progress) -> None:
    first = before.step + 1
    bad = {
        name: [step for step, value in enumerate(curve, first) if not math.isfinite(value)]
        for name, curve in curves.items()
    }
    steps = sorted({step for wrong in bad.values() for step in wrong})
    if steps:
        names = [name for name, wrong in bad.items() if steps[0] in wrong]
        values = sorted({str(curves[name][steps[0] - first]) for name in names})
        raise NonFiniteLossError(
            f"{' and '.join(names)} is {' or '.join(values)} from step {steps[0]} on, to step "
            f"{steps[-1]} at least (epoch {before.epoch + 1}); the last good checkpoint is kept. "
            f"Lower optim.lr, set optim.clip_norm, or use optim.precision = float32"
        )
