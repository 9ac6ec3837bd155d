"""Diffusers' own Stable Diffusion pipelines, fed with noise of ours: what the tests compare with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
from family import Call
from torch import Tensor

from tsdiff.diffusion.solvers import SOLVERS, solver_info

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddim(eta=0.8)": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++2m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
}


def swapped(pipe: Any, solver: str, name_of_class: str | None = None) -> Any:
    """Another pipeline around the same modules, with the scheduler of diffusers that a solver stands for."""
    name, options = SCHEDULERS[solver]
    if name in ("DDIMScheduler", "DDPMScheduler", "HeunDiscreteScheduler"):
        # Their own default, where the config says nothing, clips clean estimates to [-1, 1], which nobody wants of latents.
        options = {"clip_sample": False} | options
    parts = {**pipe.components, "scheduler": getattr(diffusers, name).from_config(pipe.scheduler.config, **options)}
    settings = {key: pipe.config[key] for key in ("requires_safety_checker", "force_zeros_for_empty_prompt") if key in pipe.config}
    other = getattr(diffusers, name_of_class or type(pipe).__name__)(**parts, **settings)
    other.set_progress_bar_config(disable=True)
    return other


def inject(monkeypatch: pytest.MonkeyPatch, noises: list[Tensor]) -> Iterator[Tensor]:
    """Let all that diffusers draws come from a list, in order."""
    from diffusers.models.autoencoders import vae
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as img2img
    from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl_img2img as xl_img2img
    from diffusers.schedulers import (
        scheduling_ddim,
        scheduling_ddpm,
        scheduling_dpmsolver_multistep,
        scheduling_euler_ancestral_discrete,
        scheduling_lcm,
    )

    supply = iter(noises)

    def draw(shape: Any, *args: Any, **kwargs: Any) -> Tensor:
        noise = next(supply)
        assert tuple(noise.shape) == tuple(shape)
        return noise

    for module in (vae, img2img, xl_img2img, scheduling_ddim, scheduling_ddpm, scheduling_dpmsolver_multistep, scheduling_euler_ancestral_discrete, scheduling_lcm):
        monkeypatch.setattr(module, "randn_tensor", draw)
    return supply


def made(pipe: Any, call: Call, patch: pytest.MonkeyPatch, *, twin: str | None = None, **options: Any) -> Any:
    """What a pipeline makes of a call.

    Args:
      pipe: whose modules are used.
      call: of it.
      patch: lets the pipeline draw what the call says.
      twin: class that starts from images.
      options: further arguments.
    """
    other = swapped(pipe, call.solver, None if call.image is None else twin)
    if call.noise is not None:
        inject(patch, call.drawn())
    sides = {} if call.image is not None else call.sides
    eta = solver_info(call.solver, None, tuple(SOLVERS)).eta
    return other(
        **call.texts(), **call.start(), **sides, **options, num_inference_steps=call.steps, guidance_scale=call.scale, eta=eta, output_type=call.output
    ).images
