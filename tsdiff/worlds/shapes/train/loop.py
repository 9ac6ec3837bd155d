"""One training loop for every model of the world: seeded, resumable at any checkpoint, bit by bit.

Nothing is carried from step to step but what a checkpoint holds. The data of a step are drawn from the seed and the
step's number, and so is all other noise; so a run that was killed ends in the same bits as one that was not, on the
same machine with the same number of threads.
"""

from __future__ import annotations

import csv
import json
import math
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from tqdm import tqdm

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.noise import derive


@dataclass(frozen=True, kw_only=True)
class Training:
    """The numbers of a run.

    Attributes:
      steps: optimiser steps in all.
      batch: examples a step.
      rate: highest learning rate of AdamW.
      warmup: steps over which the rate rises from 0.
      cooldown: share of all steps, the last ones, over which it falls to 0; it is constant in between, so that a run
        can be lengthened without starting again (Hägele et al. 2024, arXiv 2405.18392).
      betas, decay: AdamW's.
      average: decay of the exponential moving average of the weights, which is what is exported; None exports the
        weights themselves.
      clip: largest norm of the gradient.
      seed: of data, noise and initial weights.
    """

    steps: int
    batch: int
    rate: float
    warmup: int = 200
    cooldown: float = 0.25
    betas: tuple[float, float] = (0.9, 0.99)
    decay: float = 0.01
    average: float | None = None
    clip: float = 1.0
    seed: int = 20260

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, 0 to `steps` - 1."""
        left = self.steps - step
        falling = self.cooldown * self.steps
        return self.rate * min(1.0, (step + 1) / (self.warmup + 1), left / (falling + 1))

    def average_at(self, step: int) -> float:
        """The moving average's decay at a step: smaller at the start, when the weights still move far."""
        assert self.average is not None
        return min(self.average, (1 + step) / (10 + step))


class Recipe(Protocol):
    """What is trained: a model, its data and its loss."""

    name: str
    training: Training

    def build(self) -> nn.Module:
        """The model with its initial weights. Global randomness is seeded before the call."""
        ...

    def loss(self, model: nn.Module, step: int, noise: torch.Generator) -> torch.Tensor:
        """The loss of a step's batch, a scalar. All randomness comes from `step` (through the seed) and `noise`."""
        ...

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write the trained model where a user loads it from."""
        ...


def train(recipe: Recipe, folder: Path, *, every: int = 250, until: int | None = None, quiet: bool = False) -> nn.Module:
    """Run a recipe to its end, going on from the folder's checkpoint if there is one.

    Args:
      recipe: what to train.
      folder: holds `checkpoint.pt`, `losses.csv`, and at the end `losses.png` where matplotlib is installed.
      every: steps between checkpoints.
      until: stop at this step, with a checkpoint; None goes to the end.
      quiet: whether to show no progress bar.

    Returns:
      The trained model (its moving average, if the recipe keeps one).

    Raises:
      UsageError: if the checkpoint belongs to a run with other numbers. Only `steps` may differ, as long as the rate
        of no step already taken does.
    """
    plan = recipe.training
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(derive(plan.seed, recipe.name, "weights") % 2**63)
    model = recipe.build()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.rate, betas=plan.betas, weight_decay=plan.decay, fused=True)
    average = {name: value.clone() for name, value in _floats(model)} if plan.average is not None else None
    start, spent = _restore(recipe, folder, model, optimizer, average)
    began = time.perf_counter()

    end = plan.steps if until is None else min(until, plan.steps)
    losses: list[tuple[int, float]] = []
    with tqdm(total=plan.steps, initial=start, desc=recipe.name, unit="step", disable=quiet, mininterval=1.0) as bar:
        for step in range(start, end):
            for group in optimizer.param_groups:
                group["lr"] = plan.rate_at(step)
            loss = recipe.loss(model, step, _generator(plan.seed, recipe.name, step))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append((step, loss.item()))
            if not math.isfinite(losses[-1][1]):
                raise FloatingPointError(f"the loss of {recipe.name} is {losses[-1][1]} at step {step}; lower its learning rate")
            if average is not None:
                _blend(average, _floats(model), plan.average_at(step))
            bar.update()
            bar.set_postfix(loss=f"{losses[-1][1]:.4f}", refresh=False)
            if (step + 1) % every == 0 or step + 1 == end:
                total = spent + time.perf_counter() - began
                _log(folder, losses, start=step + 1 - len(losses))
                _save(recipe, folder, model, optimizer, average, step + 1, total)
                losses.clear()

    if average is not None:
        model.load_state_dict(average, strict=False)
    model.eval()
    if end == plan.steps:
        plot(folder)
    return model


def finish(recipe: Recipe, folder: Path) -> nn.Module:
    """The model as a folder's checkpoint has it, without training on."""
    model = recipe.build()
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    model.load_state_dict(state["model"])
    if state["average"] is not None:
        model.load_state_dict(state["average"], strict=False)
    return model.eval()


def begin_from(model: nn.Module, folder: Path) -> None:
    """Give a model the weights (their moving average, if there is one) that another run has come to.

    Parts that only one of the two has, such as heads of a loss, or that differ in size, are passed over.

    Raises:
      UsageError: if there is no such run, or nothing of it fits.
    """
    path = folder / "checkpoint.pt"
    if not path.exists():
        raise UsageError(f"the run begins from the weights in {str(path)!r}, which is not there; train {folder.name} first")
    state = torch.load(path, weights_only=True)
    weights = state["model"] | (state["average"] or {})
    own = model.state_dict()
    fitting = {name: weights[name] for name, value in own.items() if name in weights and weights[name].shape == value.shape}
    if not fitting:
        raise UsageError(f"{str(path)!r} holds none of the weights that {type(model).__name__} has")
    model.load_state_dict(fitting, strict=False)


def account(folder: Path, last: int = 500) -> dict[str, Any]:
    """What a run's checkpoint says of it: numbers, steps taken, seconds they took, and the mean of the last losses."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True, mmap=True)
    losses = [loss for step, loss in read_losses(folder) if step < state["step"]][-last:]
    return {
        "name": folder.name,
        "training": json.loads(state["numbers"]),
        "steps": state["step"],
        "seconds": round(state["seconds"]),
        "last_loss": round(sum(losses) / len(losses), 5),
        "torch": torch.__version__,
    }


# The checkpoint ------------------------------------------------------------------------------------------------------


def _save(
    recipe: Recipe,
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, torch.Tensor] | None,
    step: int,
    seconds: float,
) -> None:
    state = {
        "numbers": json.dumps(asdict(recipe.training)),
        "step": step,
        "seconds": seconds,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": average,
    }
    partial = folder / "checkpoint.part"
    torch.save(state, partial)
    os.replace(partial, folder / "checkpoint.pt")  # a kill leaves the old one or the new one


def _restore(
    recipe: Recipe, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, torch.Tensor] | None
) -> tuple[int, float]:
    path = folder / "checkpoint.pt"
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    _same_run(recipe, Training(**_tuples(json.loads(state["numbers"]))), state["step"], path)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if average is not None:
        average.update(state["average"])
    return state["step"], state["seconds"]


def _same_run(recipe: Recipe, then: Training, step: int, path: Path) -> None:
    now = recipe.training
    changed = [
        f"{name} was {value!r} and is {asdict(now)[name]!r}"
        for name, value in asdict(then).items()
        if name != "steps" and asdict(now)[name] != value
    ]
    if not changed and any(now.rate_at(past) != then.rate_at(past) for past in range(min(step, now.steps))):
        changed = [f"steps was {then.steps} and is {now.steps}, although the learning rate had begun to fall at step {step}"]
    if step > now.steps:
        changed = [f"steps is {now.steps} but step {step} was already taken"]
    if changed:
        raise UsageError(f"{path} belongs to another run of {recipe.name}: {'; '.join(changed)}; give the same numbers or another folder")


def _tuples(numbers: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in numbers.items()}


def _generator(seed: int, name: str, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive(seed, name, "noise", step) % 2**63)


def _floats(model: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    return ((name, value) for name, value in model.state_dict().items() if value.is_floating_point())


def _blend(average: dict[str, torch.Tensor], values: Iterable[tuple[str, torch.Tensor]], decay: float) -> None:
    for name, value in values:
        average[name].lerp_(value, 1 - decay)


# The record of losses ------------------------------------------------------------------------------------------------


def _log(folder: Path, losses: list[tuple[int, float]], *, start: int) -> None:
    """Append losses; what a killed run wrote beyond its checkpoint is dropped."""
    path = folder / "losses.csv"
    kept = [row for row in read_losses(folder) if row[0] < start]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "loss"))
        writer.writerows([*kept, *losses])


def read_losses(folder: Path) -> list[tuple[int, float]]:
    """The losses so far, in steps' order."""
    path = folder / "losses.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]


def plot(folder: Path) -> Path | None:
    """Draw the losses, each and smoothed, into `losses.png`; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    rows = read_losses(folder)
    steps, losses = [row[0] for row in rows], [row[1] for row in rows]
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="0.8", linewidth=0.5)
    axes.plot(steps, _smoothed(losses), color="tab:blue")
    axes.set(xlabel="step", ylabel="loss", yscale="log", title=folder.name)
    path = folder / "losses.png"
    figure.savefig(path, dpi=120)
    return path


def _smoothed(values: list[float], weight: float = 0.98) -> list[float]:
    smooth, total, norm = [], 0.0, 0.0
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        smooth.append(total / norm)
    return smooth


