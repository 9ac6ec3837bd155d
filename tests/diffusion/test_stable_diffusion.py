"""What is peculiar to Stable Diffusion 1.x and 2.x; what it has in common with all families is in `test_family_*.py`."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from mixed_levels import sample
from sd_reference import SCHEDULERS, inject, swapped
from tiny_sd import SCHEDULER, tiny_stable_diffusion
from torch import Tensor

from tsdiff.diffusion.family import VP_SOLVERS
from tsdiff.diffusion.loading import load_model
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Condition

# Of numpy, about how diffusers itself computes sigmas.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STEPS = 6
SHAPE = (4, 8, 8)
# The pipeline's batches hold other row counts than ours, and kernels differ by the last bits.
CLOSE = {"rtol": 0.0, "atol": 1e-4}


@pytest.fixture(scope="module")
def noise() -> Tensor:
    """(1 + STEPS, B, ...): initial noise, then one for each step."""
    return torch.randn((1 + STEPS, 3, *SHAPE), generator=torch.Generator().manual_seed(5))


PROMPTS = ["a red cube on a blue sphere", "two cats", ""]


@pytest.mark.parametrize(
    "options",
    [
        {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
        {"timestep_spacing": "linspace"},
        {"prediction_type": "sample", "set_alpha_to_one": True},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_odd_scheduler_conventions_are_kept(tiny_pipe: Any, noise: Tensor, options: dict[str, Any]) -> None:
    pipe = swapped(tiny_pipe, "ddim")
    pipe.scheduler = diffusers.DDIMScheduler(**(SCHEDULER | options))
    model = load_model(pipe)
    info = model.solver()
    schedule = model.schedule(info, STEPS, None)
    encoded = model.encode([Condition(prompt) for prompt in PROMPTS], guided=True)
    ours = sample(model, schedule, info, noise[0], encoded, noise[1:], "on")
    theirs = pipe(PROMPTS, latents=noise[0], num_inference_steps=STEPS, guidance_scale=5.0, output_type="latent").images
    torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("name_of_class", ["StableDiffusionPipeline", "LatentConsistencyModelPipeline"])
def test_a_latent_consistency_model_is_told_its_guidance_scale(noise: Tensor, monkeypatch: pytest.MonkeyPatch, name_of_class: str) -> None:
    told = swapped(tiny_stable_diffusion(unet_config={"time_cond_proj_dim": 16}), "lcm", name_of_class)
    model = load_model(told)
    assert (model.solvers[0], model.default_steps, model.default_guidance_scale, model.told_scale) == ("lcm", 4, 1.0, 8.5)
    info = model.solver()
    schedule = model.schedule(info, 4, None)
    encoded = model.encode([Condition(PROMPTS[0], extra={"guidance_scale": 3.0}), Condition(PROMPTS[1])], guided=False)
    ours = sample(model, schedule, info, noise[0, :2], encoded, noise[1:5, :2], "off", stagger=1)
    for row, scale in enumerate((3.0, 8.5)):
        inject(monkeypatch, list(noise[1:, row : row + 1]))
        theirs = told(PROMPTS[row], latents=noise[0, row : row + 1], num_inference_steps=4, guidance_scale=scale, output_type="latent").images
        torch.testing.assert_close(ours[row : row + 1], theirs, **CLOSE)
    with pytest.raises(UsageError, match=r"told a scale \(guidance_scale, usually 8.5\)"):
        model.check(Condition("a cat"), guided=True)
    with pytest.raises(UsageError, match="at least 0"):
        model.check(Condition("a cat", extra={"guidance_scale": -1.0}))
    with pytest.raises(UsageError, match="has the 50 timesteps of a model's distillation; ask for at most 50"):
        model.schedule(info, 51, None)


def test_the_schedule_is_made_once_and_shared_by_outline_and_model(tiny_pipe: Any) -> None:
    model = load_model(tiny_pipe)
    info = model.solver("ddpm")
    schedule = model.outline.schedule(info, STEPS, (16, 16))
    assert model.schedule(info, STEPS, (16, 16)) is schedule
    twice = schedule.tail(1).tail(2)
    assert model.sampler(twice, info).schedule == twice
    other = load_model(tiny_stable_diffusion(scheduler=diffusers.DDIMScheduler(**SCHEDULER | {"beta_end": 0.02})))
    with pytest.raises(ValueError, match="not made by this model"):
        model.sampler(other.schedule(info, STEPS, None), info)


def test_the_solver_of_the_pipelines_own_scheduler_comes_first(tiny_pipe: Any) -> None:
    for text in SCHEDULERS:
        name = text.partition("(")[0]
        model = load_model(swapped(tiny_pipe, text))
        assert model.solvers[0] == name
        assert sorted(model.solvers) == sorted(VP_SOLVERS)
        assert model.notices == ()
