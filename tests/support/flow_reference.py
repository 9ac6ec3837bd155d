"""Diffusers' own flow pipelines, with every flow solver and fed with noise of ours: what the tests compare with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import diffusers
import pytest
from family import Call
from torch import Tensor

from tsdiff.diffusion.solvers import SOLVERS, solver_info
from tsdiff.treesearch.schedule import SolverInfo

NAMES = ("flow-euler", "flow-ancestral", "flow-ancestral(eta=0.5)", "flow-sde", "flow-sde(eta=1.2)")
"""The solvers that flow families are compared with."""


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


def made(
    pipe: Any,
    call: Call,
    patch: pytest.MonkeyPatch,
    *,
    pack: Callable[[Tensor], Tensor] = lambda latents: latents,
    twin: tuple[str, ModuleType] | None = None,
    scale: str = "guidance_scale",
    frames: str = "frames",
    **options: Any,
) -> Any:
    """What a flow pipeline makes of a call: its output, with latents packed as they are in it.

    Args:
      pipe: whose modules are used.
      call: of it.
      patch: lets an image-to-image pipeline draw what the call says.
      pack: our latents as the pipeline takes them.
      twin: class that starts from images, and its module.
      scale, frames: what the pipeline calls the scale of classifier-free guidance, and the length of videos.
      options: further arguments.
    """
    info = solver_info(call.solver, None, tuple(SOLVERS))
    noises = None if call.noise is None else iter(pack(call.noise[1:]))
    name_of_class = None
    if call.image is not None:
        assert twin is not None
        name_of_class, module = twin
        inject(patch, module, call.drawn())
    sides = {frames if name == "frames" else name: side for name, side in call.sides.items()}
    other = swapped(pipe, info, noises, name_of_class)
    asked = {scale: call.scale} | options | call.texts()  # conditions may have options of their own
    return other(**asked, **call.start(pack), **sides, num_inference_steps=call.steps, output_type=call.output)
