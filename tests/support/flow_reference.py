"""Diffusers' own flow pipelines, with every flow solver and fed with noise of ours: what the tests compare with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from tsdiff.treesearch.protocols import Encoded, StepState
from tsdiff.treesearch.schedule import Schedule, SolverInfo

SOLVERS = ("flow-euler", "flow-ancestral", "flow-ancestral(eta=0.5)", "flow-sde", "flow-sde(eta=1.2)")


class NoisyFlow(diffusers.FlowMatchEulerDiscreteScheduler):
    """The scheduler of flow pipelines, with steps that add noise: diffusers has none whose marginals are the flow's."""

    solver: SolverInfo
    noises: Iterator[Tensor]

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, **kwargs: Any) -> tuple[Tensor]:
        """One step of flow-ancestral or flow-sde, in float64."""
        if self.step_index is None:
            self._init_step_index(timestep)
        t, s = (float(self.sigmas[self._step_index + i]) for i in range(2))
        self._step_index += 1
        x, u, z = sample.double(), model_output.double(), next(self.noises).double()
        x0, e, eta = x - t * u, x + (1 - t) * u, self.solver.eta
        if self.solver.name == "flow-ancestral":
            tau = eta * s * math.sqrt(1 - (s * (1 - t) / (t * (1 - s))) ** 2)
            return (((1 - s) * x0 + math.sqrt(s**2 - tau**2) * e + tau * z).float(),)
        at = s if t >= 1 else t
        g = eta * math.sqrt(at / (1 - at)) if s > 0 else 0.0
        return ((x - (t - s) * (u + g**2 / (2 * t) * e) + g * math.sqrt(t - s) * z).float(),)


def swapped(pipe: Any, solver: SolverInfo | None = None, noises: Iterator[Tensor] | None = None, name_of_class: str | None = None) -> Any:
    """Another pipeline around the same modules, stepping as a solver of ours should; None is the pipeline's own scheduler."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    if solver is not None and solver.stochastic:
        scheduler = NoisyFlow.from_config(pipe.scheduler.config)
        scheduler.solver, scheduler.noises = solver, noises
    other = getattr(diffusers, name_of_class or type(pipe).__name__)(**{**pipe.components, "scheduler": scheduler})
    other.set_progress_bar_config(disable=True)
    return other


def inject(monkeypatch: pytest.MonkeyPatch, pipeline_module: ModuleType, noises: list[Tensor]) -> None:
    """Let what an image-to-image pipeline draws come from a list: for the posterior first, then for the start."""
    from diffusers.models.autoencoders import vae

    supply = iter(noises)

    def draw(shape: Any, *args: Any, **kwargs: Any) -> Tensor:
        noise = next(supply)
        assert tuple(noise.shape) == tuple(shape)
        return noise

    for module in (vae, pipeline_module):
        monkeypatch.setattr(module, "randn_tensor", draw)


def sample(model: Any, schedule: Schedule, solver: SolverInfo, latents: Tensor, encoded: list[Encoded], noises: Tensor, scale: float, stagger: int = 0) -> Tensor:
    """Denoise latents (B, ...), all rows that are on their way in one batch; row i starts `i * stagger` ticks after row 0.

    Args:
      noises: (T, B, ...).
      scale: of classifier-free guidance; at or below 1 only the first row of each condition is evaluated.
    """
    sampler = model.sampler(schedule, solver)
    latents, levels, time = latents.clone(), [0] * len(latents), 0
    while min(levels) < schedule.last:
        on = [i for i, level in enumerate(levels) if time >= i * stagger and level < schedule.last]
        at = [levels[i] for i in on]
        output = sampler.evaluate(latents[on], at, [encoded[i].rows[0] for i in on])
        if scale > 1.0:
            uncond = sampler.evaluate(latents[on], at, [encoded[i].rows[1] for i in on])
            output = sampler.guide(output, uncond, [scale] * len(on), [0.0] * len(on))
        noise = torch.stack([noises[levels[i], i] for i in on])[None] if solver.stochastic else None
        latents[on] = sampler.advance(StepState(latents[on]), 0, at, [level + 1 for level in at], output, noise).latents
        for i in on:
            levels[i] += 1
        time += 1
    return latents
