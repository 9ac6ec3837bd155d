"""Searching Stable Diffusion, the whole way: faithful to diffusers' pipeline, counted, reproducible."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from sd_reference import SCHEDULERS, inject, swapped

import tsdiff
from tsdiff.policies import Beam, BestOfN
from tsdiff.treesearch.noise import derive, initial_noise, step_noise
from tsdiff.treesearch.results import Results

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STEPS = 6
SHAPE = (4, 8, 8)
PROMPTS = ["a red cube on a blue sphere", "two cats"]
CLOSE = {"rtol": 0.0, "atol": 1e-4}


def searched(pipe: Any, **options: Any) -> Results:
    """Plain samples of two prompts under two seeds, their rows mixed in batches of five."""
    results = tsdiff.search(pipe, PROMPTS, policy=BestOfN(n=1), verifier="luminance", steps=STEPS, seed=[3, 4], baseline=False, max_batch=5, **options)
    assert not results.failures
    return results


def reference(pipe: Any, monkeypatch: pytest.MonkeyPatch, result: Any, solver: str, **options: Any) -> torch.Tensor:
    """The pipeline's latent from the same noises."""
    stream = derive(result.seed, "draw", 0)
    noises = [torch.from_numpy(step_noise(stream, level, SHAPE)) for level in range(1, STEPS + 1)]
    inject(monkeypatch, noises)
    theirs = swapped(pipe, solver)
    latents = torch.from_numpy(initial_noise(stream, SHAPE))[None]
    eta = 0.8 if "eta" in solver else 0.0
    return theirs(result.prompt, latents=latents, num_inference_steps=STEPS, eta=eta, output_type="latent", **options).images[0]


@pytest.mark.parametrize("scale", [1.0, 5.0], ids=["unguided", "guided"])
@pytest.mark.parametrize("solver", SCHEDULERS)
def test_a_sample_equals_the_pipelines(tiny_pipe: Any, monkeypatch: pytest.MonkeyPatch, solver: str, scale: float) -> None:
    for result in searched(tiny_pipe, solver=solver, guidance_scale=scale):
        ours = result.latents[result.node.index]
        torch.testing.assert_close(ours, reference(tiny_pipe, monkeypatch, result, solver, guidance_scale=scale), **CLOSE)
        assert ours.std() > 0.1


@pytest.mark.parametrize("solver", ["ddim", "dpm++2m"])
def test_a_guidance_interval_is_the_pipeline_with_guidance_switched_off_on_the_way(tiny_pipe: Any, monkeypatch: pytest.MonkeyPatch, solver: str) -> None:
    model = tsdiff.load_model(tiny_pipe)
    schedule = model.schedule(model.solver(solver), STEPS, None)
    ratios = [sigma / alpha for alpha, sigma in zip(schedule.alpha, schedule.sigma, strict=True)]
    guided = 3  # levels 0, 1 and 2

    def switch_off(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step + 1 == guided:
            pipe._guidance_scale = 1.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    results = searched(tiny_pipe, solver=solver, guidance_scale=5.0, guidance_interval=((ratios[2] + ratios[3]) / 2, 1e9))
    for result in results:
        theirs = reference(
            tiny_pipe, monkeypatch, result, solver, guidance_scale=5.0,
            callback_on_step_end=switch_off, callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )  # fmt: skip
        torch.testing.assert_close(result.latents[result.node.index], theirs, **CLOSE)
        assert (result.ledger.nfe, result.ledger.rows) == (STEPS, STEPS + guided)


def test_users_meet_their_own_image_first(tiny_pipe: Any) -> None:
    result = tsdiff.search(tiny_pipe, PROMPTS[0], policy=BestOfN(n=1), verifier="luminance", steps=STEPS, seed=7, guidance_scale=5.0, initial_noise="torch")
    theirs = swapped(tiny_pipe, "ddim")(PROMPTS[0], num_inference_steps=STEPS, guidance_scale=5.0, generator=torch.Generator().manual_seed(7)).images[0]
    difference = np.abs(np.asarray(result.image, dtype=int) - np.asarray(theirs, dtype=int))
    assert difference.max() <= 1  # rounding to 8 bits


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("value", ["x0", "lookahead", "final"])
def test_a_hook_on_the_unet_sees_the_rows_of_the_ledger(tiny_pipe: Any, value: str, deterministic: bool) -> None:
    rows = 0

    def count(module: Any, args: tuple[Any, ...]) -> None:
        nonlocal rows
        rows += args[0].shape[0]

    handle = tiny_pipe.unet.register_forward_pre_hook(count)
    try:
        results = tsdiff.search(
            tiny_pipe, PROMPTS, policy=Beam(width=2, branch=2, value=value), verifier=["sharpness", "luminance"],
            steps=8, guidance_scale=4.0, guidance_interval=(0.5, 5.0), deterministic=deterministic,
        )  # fmt: skip
    finally:
        handle.remove()
    assert rows == results.engine.network_rows
    assert results.engine.rows == sum(one.ledger.rows for result in results for one in (result, result.baseline))
    assert (results.engine.padding > 0) == deterministic


def test_deterministic_trees_have_the_same_bytes_in_any_company(tiny_pipe: Any) -> None:
    def trees(prompts: list[str], **options: Any) -> dict[str, tuple[str, bytes]]:
        results = tsdiff.search(
            tiny_pipe, prompts, policy=Beam(width=2, branch=2), verifier="sharpness", steps=6, guidance_scale=4.0, deterministic=True, **options
        )
        return {result.prompt: (json.dumps(result.tree.to_json()), result.latents[result.node.index].numpy().tobytes()) for result in results}

    prompts = [f"{word} {thing}" for word in ("a red", "two blue") for thing in ("cube", "sphere", "cat", "star")]
    together = trees(prompts)
    assert trees(prompts[::-1], max_batch=64) == together
    assert trees(prompts[2:3], memory_limit=1) == {prompts[2]: together[prompts[2]]}
