"""FLUX.1: trajectories equal those of diffusers' own pipelines, whatever shares the batch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux import pipeline_flux_img2img as img2img
from flow_reference import SOLVERS, inject, sample, swapped
from tiny_flux import tiny_flux
from torch import Tensor
from torch.nn.functional import pixel_unshuffle

import tsdiff
from tsdiff.diffusion.loading import load_model, outline
from tsdiff.policies import Beam, BestOfN
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Condition, LoadOptions

STEPS = 5
CLOSE = {"rtol": 0.0, "atol": 1e-4}
PROMPTS = ["a red cube on a blue sphere", "two cats"]
SHORT = {"max_sequence_length": 24}
SIZE = (16, 24)


@pytest.fixture(scope="module")
def dev() -> Any:
    """Told a guidance scale; tests must not change it."""
    return tiny_flux()


@pytest.fixture(scope="module")
def schnell() -> Any:
    """Not told a guidance scale; tests must not change it."""
    return tiny_flux(told=False)


def noise_of(shape: tuple[int, ...] = (4, 8, 12)) -> Tensor:
    """(1 + STEPS, B, ...): initial noise, then one for each step."""
    return torch.randn((1 + STEPS, 2, *shape), generator=torch.Generator().manual_seed(5))


def packed(latents: Tensor) -> Tensor:
    """(..., C, h, w) as the sequence of patches that pipelines take and give."""
    return pixel_unshuffle(latents, 2).flatten(-2).transpose(-1, -2)


def conditions(**extra: Any) -> list[Condition]:
    return [Condition(prompt, negative_prompt="blurry", extra=SHORT | extra) for prompt in PROMPTS]


@pytest.mark.parametrize("scale", [1.0, 4.0], ids=["unguided", "guided"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_trajectory_equals_the_pipelines_in_one_batch_of_mixed_levels(dev: Any, solver: str, scale: float) -> None:
    model, noise = load_model(dev), noise_of()
    info = model.solver(solver)
    schedule = model.schedule(info, STEPS, SIZE)
    encoded = model.encode(conditions(), guided=scale > 1)
    ours = sample(model, schedule, info, model.sampler(schedule, info).draw(noise[0]), encoded, noise[1:], scale, stagger=2)
    theirs = swapped(dev, info, iter(packed(noise[1:])))(
        PROMPTS, negative_prompt=["blurry"] * 2, true_cfg_scale=scale, latents=packed(noise[0]), height=16, width=24,
        num_inference_steps=STEPS, output_type="latent", **SHORT,
    ).images  # fmt: skip
    torch.testing.assert_close(packed(ours), theirs, **CLOSE)
    assert ours.std() > 0.1


def test_the_scale_that_the_network_is_told_costs_no_row_and_may_differ_in_a_batch(dev: Any) -> None:
    model, noise = load_model(dev), noise_of()
    info = model.solver()
    schedule = model.schedule(info, STEPS, SIZE)
    encoded = model.encode([conditions(guidance_scale=scale)[0] for scale in (1.5, 9.0)], guided=False)
    assert {len(one.rows) for one in encoded} == {1}
    assert encoded[0].bucket == encoded[1].bucket
    same = noise[:, :1].expand(-1, 2, -1, -1, -1)
    ours = sample(model, schedule, info, same[0], encoded, same[1:], 1.0)
    for row, scale in zip(ours, (1.5, 9.0), strict=True):
        theirs = swapped(dev)(PROMPTS[0], guidance_scale=scale, latents=packed(same[0, :1]), height=16, width=24, num_inference_steps=STEPS, output_type="latent", **SHORT).images
        torch.testing.assert_close(packed(row)[None], theirs, **CLOSE)
    assert (ours[0] - ours[1]).abs().max() > 1e-3


@pytest.mark.parametrize("size", [(16, 16), (32, 24)])
def test_dynamic_shifting_follows_the_size(dev: Any, size: tuple[int, int]) -> None:
    model = load_model(dev)
    info, noise = model.solver(), noise_of(model.latent_shape(size))
    schedule = model.schedule(info, STEPS, size)
    assert schedule.sigma != model.schedule(info, STEPS, SIZE).sigma
    ours = sample(model, schedule, info, noise[0], model.encode(conditions(), guided=False), noise[1:], 1.0)
    theirs = swapped(dev)(PROMPTS, latents=packed(noise[0]), height=size[0], width=size[1], num_inference_steps=STEPS, output_type="latent", **SHORT).images
    torch.testing.assert_close(packed(ours), theirs, **CLOSE)


def test_schnell_takes_few_even_steps(schnell: Any) -> None:
    model, noise = load_model(schnell), noise_of()
    assert model.default_steps == 4
    info = model.solver()
    schedule = model.schedule(info, 4, SIZE)
    assert schedule.sigma == (1.0, 0.75, 0.5, 0.25, 0.0)
    ours = sample(model, schedule, info, noise[0], model.encode(conditions(), guided=False), noise[1:], 1.0)
    theirs = swapped(schnell)(PROMPTS, latents=packed(noise[0]), height=16, width=24, num_inference_steps=4, output_type="latent", **SHORT).images
    torch.testing.assert_close(packed(ours), theirs, **CLOSE)
    with pytest.raises(UsageError, match="not told a guidance scale"):
        model.check(Condition("a", extra={"guidance_scale": 3.5}))


def test_starting_from_an_image_equals_image_to_image(dev: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    images, noise = torch.rand((2, 3, 16, 24), generator=torch.Generator().manual_seed(1)), noise_of()
    model = load_model(swapped(dev, name_of_class="FluxImg2ImgPipeline"))
    info = model.solver()
    tail = model.schedule(info, STEPS, SIZE).tail(STEPS - int(STEPS * 0.6))
    start = model.sampler(tail, info).draw(noise[0], model.encode_images(images, noise[1]))
    ours = sample(model, tail, info, start, model.encode(conditions(), guided=False), noise[1:], 1.0)
    inject(monkeypatch, img2img, [noise[1], noise[0]])
    theirs = swapped(dev, name_of_class="FluxImg2ImgPipeline")(
        PROMPTS, image=images, height=16, width=24, strength=0.6, guidance_scale=3.5, num_inference_steps=STEPS, output_type="latent", **SHORT
    ).images
    torch.testing.assert_close(packed(ours), theirs, **CLOSE)


def test_decoded_images_equal_the_pipelines(dev: Any) -> None:
    latents, options = noise_of()[0], {"height": 16, "width": 24, "num_inference_steps": 1} | SHORT
    theirs = swapped(dev)(PROMPTS, latents=packed(latents), output_type="pt", **options).images
    clean = swapped(dev)(PROMPTS, latents=packed(latents), output_type="latent", **options).images
    unpacked = clean.unflatten(1, (4, 6)).unflatten(3, (4, 2, 2)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    torch.testing.assert_close(packed(unpacked), clean)
    torch.testing.assert_close(load_model(dev).decode(unpacked).pixels, theirs, rtol=0, atol=1e-6)


def test_users_meet_their_own_image_first(dev: Any) -> None:
    options = {"height": 16, "width": 24}
    result = tsdiff.search(dev, PROMPTS[0], policy=BestOfN(n=1), verifier="luminance", steps=3, seed=7, initial_noise="torch", baseline=False, condition_extra=SHORT, **options)
    theirs = swapped(dev)(PROMPTS[0], num_inference_steps=3, generator=torch.Generator().manual_seed(7), **options, **SHORT).images[0]
    assert np.abs(np.asarray(result.image, dtype=int) - np.asarray(theirs, dtype=int)).max() <= 1  # rounding to 8 bits


def test_embeddings_replace_prompts_and_options_reach_the_text_encoders(dev: Any) -> None:
    model = load_model(dev)
    extra = SHORT | {"prompt_2": "x", "negative_prompt_2": "z"}
    (encoded,) = model.encode([Condition("a cat", negative_prompt="blurry", extra=extra)], guided=True)
    tensors = {}
    for side, prompts, row in zip(("", "negative_"), (("a cat", "x"), ("blurry", "z")), encoded.rows, strict=True):
        with torch.no_grad():
            embeds, pooled, _ = dev.encode_prompt(*prompts, max_sequence_length=24)
        torch.testing.assert_close(row["prompt_embeds"], embeds[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(row["pooled_prompt_embeds"], pooled[0], rtol=0, atol=1e-6)
        tensors |= {f"{side}prompt_embeds": embeds, f"{side}pooled_prompt_embeds": pooled[0]}
    assert not torch.equal(encoded.rows[0]["prompt_embeds"], encoded.rows[1]["prompt_embeds"])
    bare = outline(tiny_flux(**{**dev.components, "text_encoder": None, "tokenizer": None}), LoadOptions())
    bare.check(Condition(tensors=tensors), guided=True)
    (given,) = bare.load().encode([Condition(tensors=tensors)], guided=True)
    assert given.bucket == encoded.bucket
    for ours, theirs in zip(given.rows, encoded.rows, strict=True):
        torch.testing.assert_close(ours["prompt_embeds"], theirs["prompt_embeds"], rtol=0, atol=1e-6)
        assert ours["guidance"] == theirs["guidance"] == 3.5
    with pytest.raises(UsageError, match="no text_encoder, so a prompt cannot be encoded"):
        bare.check(Condition("a cat"))


def test_texts_of_other_lengths_go_into_other_batches(dev: Any) -> None:
    model = load_model(dev)
    buckets = [model.encode([Condition("a cat", extra={"max_sequence_length": length})], guided=False)[0].bucket for length in (24, 24, 30)]
    assert buckets[0] == buckets[1] != buckets[2]
    assert model.encode([Condition("a cat")], guided=False)[0].rows[0]["prompt_embeds"].shape == (512, 48)


REFUSED: dict[str, tuple[Condition, bool, str]] = {
    "guidance without a negative prompt": (Condition("a"), True, "leads away from a negative prompt, and there is none; .* usually 3.5"),
    "told scale": (Condition("a", extra={"guidance_scale": "3"}), False, "must be a number of at least 0"),
    "class": (Condition(class_label=3), False, "conditioned on text"),
    "length": (Condition("a", extra={"max_sequence_length": 600}), False, "between 1 and 512"),
    "clip_skip": (Condition("a", extra={"clip_skip": 1}), False, "unknown option of a FLUX.1 condition 'clip_skip'"),
    "not pooled": (Condition(tensors={"prompt_embeds": torch.zeros(3, 48)}), False, "without pooled_prompt_embeds"),
    "lengths": (Condition("a", "b", tensors={"prompt_embeds": torch.zeros(3, 48), "pooled_prompt_embeds": torch.zeros(16)}), True, "3 tokens and the negative prompt's 512"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_conditions_are_checked_before_weights_are_loaded(dev: Any, case: str) -> None:
    condition, guided, says = REFUSED[case]
    with pytest.raises(UsageError, match=says) as caught:
        outline(dev, LoadOptions()).check(condition, guided=guided)
    assert "\n" not in str(caught.value)


def test_sizes(dev: Any) -> None:
    plan = outline(dev, LoadOptions())
    assert plan.size(None, None) == (256, 256)  # 128 latent pixels
    assert plan.latent_shape(plan.size(16, 24)) == (4, 8, 12)
    with pytest.raises(UsageError, match="height is 18 but must be a multiple of 4; the nearest are 16 or 20"):
        plan.size(18, None)


@pytest.mark.parametrize("scale", [1.0, 3.0], ids=["one row", "two rows"])
def test_a_hook_on_the_network_sees_the_rows_of_the_ledger(dev: Any, scale: float) -> None:
    rows = 0

    def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal rows
        rows += kwargs["hidden_states"].shape[0]

    handle = dev.transformer.register_forward_pre_hook(count, with_kwargs=True)
    try:
        results = tsdiff.search(
            dev, PROMPTS, policy=Beam(width=2, branch=2), verifier="luminance", steps=4, solver="flow-ancestral", height=16, width=16,
            guidance_scale=scale, negative_prompt="blurry", condition_extra=SHORT,
        )  # fmt: skip
    finally:
        handle.remove()
    assert not results.failures
    assert rows == results.engine.network_rows
    ledgers = [one.ledger for result in results for one in (result, result.baseline)]
    assert results.engine.rows == sum(ledger.rows for ledger in ledgers)
    assert all(ledger.rows == ledger.nfe * (1 + (scale > 1)) for ledger in ledgers)


# Folders -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux") / "saved"
    tiny_flux(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A saved pipeline that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(data))


def test_a_folder_and_the_object_it_was_saved_from_are_one_model(folder: Path, dev: Any, capfd: pytest.CaptureFixture[str]) -> None:
    model = load_model(folder, device="cpu")
    assert capfd.readouterr() == ("", "")
    assert model.fingerprint == load_model(dev).fingerprint
    latents, time = noise_of()[0, :1], torch.tensor([500.0])
    velocities = [one.forward(latents, time, one.encode(conditions()[:1], guided=False)[0].rows) for one in (model, load_model(dev))]
    # Weights that are read from a file lie elsewhere in memory, which the last digits of matrix kernels depend on.
    torch.testing.assert_close(*velocities, rtol=0, atol=1e-5)


def test_in_half_precision_timesteps_are_rounded_as_the_pipeline_rounds_them(folder: Path) -> None:
    model = load_model(folder, device="cpu", dtype="bfloat16")
    told: list[Tensor] = []
    handle = model.pipeline.transformer.register_forward_pre_hook(lambda module, args, kwargs: told.append(kwargs["timestep"]), with_kwargs=True)
    info, noise = model.solver(), noise_of()
    schedule = model.schedule(info, STEPS, SIZE)
    ours = sample(model, schedule, info, noise[0], model.encode(conditions(), guided=False), noise[1:], 1.0)
    assert ours.dtype == torch.float32
    mine = told.copy()
    told.clear()
    swapped(model.pipeline)(PROMPTS, latents=packed(noise[0]), height=16, width=24, num_inference_steps=STEPS, output_type="latent", **SHORT)
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(mine, told, strict=True))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no transformer": (lambda f: edit(f / "model_index.json", transformer=[None, None]), "has no transformer"),
    "another transformer": (lambda f: edit(f / "model_index.json", transformer=["diffusers", "SD3Transformer2DModel"]), "SD3Transformer2DModel, which is not supported"),
    "no tokenizer": (lambda f: edit(f / "model_index.json", tokenizer_2=[None, None]), "has no tokenizer_2"),
    "no scheduler": (lambda f: edit(f / "model_index.json", scheduler=[None, None]), "has no scheduler"),
    "diffusion scheduler": (lambda f: edit(f / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"]), "EulerDiscreteScheduler, is not for flow models"),
    "a fill model": (lambda f: edit(f / "transformer/config.json", in_channels=96), "takes 96 channels but patches .* have 16"),
    "other text width": (lambda f: edit(f / "text_encoder_2/config.json", d_model=32), "do not belong together"),
    "no weights": (lambda f: (f / "transformer/diffusion_pytorch_model.safetensors").unlink(), "transformer' holds no weights"),
    "own code": (lambda f: edit(f / "model_index.json", transformer=["my_flux", "FluxTransformer2DModel"]), "only classes of diffusers and transformers"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_one_clear_line_before_weights_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights were read"))
    spoil, says = DAMAGE[damage]
    spoil(folder)
    with pytest.raises(UsageError, match=says) as caught:
        outline(str(folder), LoadOptions())
    assert "\n" not in str(caught.value)


def test_other_pipelines_of_the_family_are_refused(dev: Any) -> None:
    with pytest.raises(UsageError, match="FluxInpaintPipeline"):
        load_model(diffusers.FluxInpaintPipeline(**dev.components))
