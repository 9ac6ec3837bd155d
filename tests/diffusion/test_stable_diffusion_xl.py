"""What is peculiar to Stable Diffusion XL; what it has in common with all families is in `test_family_*.py`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from damages import INDEX, edit
from family import Shelf
from family import ours as ours_of
from family_sdxl import SDXL
from mixed_levels import GUIDANCE, sample
from sd_reference import inject, swapped
from tiny_sdxl import tiny_sdxl
from torch import Tensor

from tsdiff.diffusion.loading import load_model
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Condition

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STEPS = 4
CLOSE = {"rtol": 0.0, "atol": 1e-4}
PROMPTS = ["a red cube on a blue sphere", "two cats"]


@pytest.fixture(scope="module")
def pipe(shelf: Shelf) -> Any:
    """Tests must not change it."""
    return shelf.pipe(SDXL)


def noise_of(shape: tuple[int, ...] = (4, 8, 8)) -> Tensor:
    """(1 + STEPS, B, ...): initial noise, then one for each step."""
    return torch.randn((1 + STEPS, 2, *shape), generator=torch.Generator().manual_seed(5))


def run(model: Any, solver: str, conditions: list[Condition], noise: Tensor, guidance: str, *, stagger: int = 0, size: tuple[int, int] = (16, 16)) -> Tensor:
    """The latents of our sampler from `noise_of`; as many steps as there is noise for."""
    info = model.solver(solver)
    schedule = model.schedule(info, len(noise) - 1, size)
    encoded = model.encode(conditions, guided=GUIDANCE[guidance][0] > 1)
    start = model.sampler(schedule, info).draw(noise[0, : len(conditions)])
    return sample(model, schedule, info, start, encoded, noise[1:], guidance, stagger=stagger)


# Few steps: Turbo is euler-ancestral, Lightning is euler, both on trailing timesteps and without guidance.
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("solver", ["euler", "euler-ancestral"])
def test_models_distilled_to_few_steps(pipe: Any, monkeypatch: pytest.MonkeyPatch, solver: str, steps: int) -> None:
    few = swapped(pipe, solver)
    few.scheduler = type(few.scheduler).from_config(few.scheduler.config, timestep_spacing="trailing")
    model, noise = load_model(few), noise_of()[: 1 + steps]
    assert model.solvers[0] == solver
    assert model.schedule(model.solver(), steps, None).timesteps[0] == 999
    ours = run(model, solver, [Condition(prompt) for prompt in PROMPTS], noise, "off")
    inject(monkeypatch, list(noise[1:]))
    theirs = few(PROMPTS, latents=noise[0], num_inference_steps=steps, guidance_scale=0.0, output_type="latent").images
    torch.testing.assert_close(ours, theirs, **CLOSE)


SIZES: dict[str, dict[str, Any]] = {
    "usual": {},
    "all": {"original_size": (40, 30), "crops_coords_top_left": (3, 5), "target_size": (16, 18)},
    "crops alone": {"crops_coords_top_left": [0, 7]},
    "negative": {"original_size": (64, 64), "crops_coords_top_left": (1, 0), "negative_original_size": (8, 9), "negative_target_size": (16, 24)},
    "negative crops": {"negative_original_size": (8, 9), "negative_crops_coords_top_left": (2, 1), "negative_target_size": (16, 24)},
}


@pytest.mark.parametrize("case", SIZES)
def test_time_ids_are_the_pipelines_and_rows_with_others_share_a_batch(pipe: Any, case: str) -> None:
    size, extra = (16, 24), SIZES[case]
    model, noise = load_model(pipe), noise_of((4, 8, 12))
    conditions = [Condition(PROMPTS[0], extra=extra), Condition(PROMPTS[0], extra={"original_size": (99, 98)})]
    assert len({encoded.bucket for encoded in model.encode(conditions, guided=True)}) == 1
    ours = run(model, "euler", conditions, noise, "on", size=size)
    # One prompt a call: the pipeline hands its unconditional rows the ids of conditional ones when there are several.
    told = {name: tuple(pair) for name, pair in extra.items()}
    theirs = swapped(pipe, "euler")(PROMPTS[0], latents=noise[0, :1], height=16, width=24, num_inference_steps=STEPS, guidance_scale=5.0, output_type="latent", **told).images
    torch.testing.assert_close(ours[:1], theirs, **CLOSE)
    plain = run(model, "euler", [Condition(PROMPTS[0])], noise, "on", size=size)
    assert torch.equal(ours[:1].isclose(plain, rtol=0, atol=1e-4).all(), torch.tensor(not extra))


def test_starting_from_an_image_tells_its_own_size_too(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand((2, 3, 16, 16), generator=torch.Generator().manual_seed(1))
    call = SDXL.call(conditions=[Condition(prompt, negative_prompt="blurry", extra={"original_size": (30, 20)}) for prompt in PROMPTS], guidance="on", noise=True, image=images)
    SDXL.require_equal(ours_of(load_model(pipe), call), SDXL.reference(pipe, call, monkeypatch))


# What a negative prompt is ------------------------------------------------------------------------------------------


def test_a_negative_prompt_that_is_not_there_is_zeros_where_the_pipeline_says_so(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, noise = load_model(pipe), noise_of()
    calls = []
    original = type(pipe).encode_prompt
    monkeypatch.setattr(type(pipe), "encode_prompt", lambda self, prompt, *args, **kwargs: calls.append(prompt) or original(self, prompt, *args, **kwargs))
    encoded = model.encode([Condition(prompt) for prompt in PROMPTS], guided=True)
    assert calls == PROMPTS  # nothing is encoded for zeros
    for one in encoded:
        assert not one.rows[1]["prompt_embeds"].any()
        assert not one.rows[1]["pooled_prompt_embeds"].any()
        assert one.rows[1]["prompt_embeds"].data_ptr() == encoded[0].rows[1]["prompt_embeds"].data_ptr()
    theirs = swapped(pipe, "euler")(PROMPTS, latents=noise[0], num_inference_steps=STEPS, guidance_scale=5.0, output_type="latent").images
    torch.testing.assert_close(run(model, "euler", [Condition(prompt) for prompt in PROMPTS], noise, "on"), theirs, **CLOSE)


def test_without_zeros_an_empty_text_is_encoded(pipe: Any) -> None:
    other = tiny_sdxl(**{**pipe.components, "force_zeros_for_empty_prompt": False})
    model, noise = load_model(other), noise_of()
    assert model.fingerprint != load_model(pipe).fingerprint
    theirs = swapped(other, "euler")(PROMPTS, latents=noise[0], num_inference_steps=STEPS, guidance_scale=5.0, output_type="latent").images
    torch.testing.assert_close(run(model, "euler", [Condition(prompt) for prompt in PROMPTS], noise, "on"), theirs, **CLOSE)


@pytest.mark.parametrize("zeros", [False, True])
def test_a_folder_says_whether_zeros_stand_for_no_prompt(shelf: Shelf, tmp_path: Path, zeros: bool) -> None:
    folder = Path(shutil.copytree(shelf.folder(SDXL), tmp_path / "model"))
    edit(folder / INDEX, force_zeros_for_empty_prompt=zeros)
    assert load_model(folder, device="cpu").encode([Condition("a")], guided=True)[0].rows[1]["prompt_embeds"].any() == (not zeros)


def test_zeros_stand_for_negative_embeddings_of_any_length(pipe: Any) -> None:
    model = load_model(tiny_sdxl(**{name: None if "text_encoder" in name or "tokenizer" in name else part for name, part in pipe.components.items()}))
    half = Condition(tensors=SDXL.given(2, sides=("",)))
    model.check(half, guided=True)
    uncond = model.encode([half], guided=True)[0].rows[1]["prompt_embeds"]
    assert uncond.shape == (30, 40)
    assert not uncond.any()


@pytest.mark.parametrize("extra", [{"clip_skip": 1}, {"clip_skip": 0}, {"prompt_2": "x", "negative_prompt_2": "z"}], ids=str)
@pytest.mark.parametrize("negative", ["blurry", ""])
def test_options_reach_the_text_encoders_as_in_the_pipeline(pipe: Any, extra: dict[str, Any], negative: str) -> None:
    condition = Condition("a cat", negative_prompt=negative, extra=extra)
    model = load_model(pipe)
    (encoded,) = model.encode([condition], guided=True)
    second = extra.get("negative_prompt_2")
    with torch.no_grad():
        embeds, uncond, pooled, uncond_pooled = swapped(pipe, "euler").encode_prompt(
            "a cat", extra.get("prompt_2"), negative_prompt=negative if negative or second else None, negative_prompt_2=second, clip_skip=extra.get("clip_skip"),
        )  # fmt: skip
    for row, text, vector in ((encoded.rows[0], embeds, pooled), (encoded.rows[1], uncond, uncond_pooled)):
        torch.testing.assert_close(row["prompt_embeds"], text[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(row["pooled_prompt_embeds"], vector[0], rtol=0, atol=1e-6)
    plain = model.encode([Condition("a cat")], guided=True)[0]
    assert torch.equal(encoded.rows[0]["prompt_embeds"], plain.rows[0]["prompt_embeds"]) == (extra == {"clip_skip": 0})
    assert encoded.bucket == plain.bucket


# Other things that the UNet reads -----------------------------------------------------------------------------------


def test_a_unet_may_be_told_its_guidance_scale(pipe: Any) -> None:
    told = tiny_sdxl(unet_config={"time_cond_proj_dim": 16})
    model, noise = load_model(told), noise_of()
    assert (model.default_steps, model.default_guidance_scale, model.outline.told_scale) == (4, 1.0, 5.0)
    conditions = [Condition(PROMPTS[0], extra={"guidance_scale": 8.0}), Condition(PROMPTS[1])]
    ours = run(model, "euler", conditions, noise, "off")
    for row, scale in enumerate((8.0, 5.0)):
        theirs = swapped(told, "euler")(PROMPTS[row], latents=noise[0, row : row + 1], num_inference_steps=STEPS, guidance_scale=scale, output_type="latent").images
        torch.testing.assert_close(ours[row : row + 1], theirs, **CLOSE)
    assert not torch.allclose(ours[1:], run(model, "euler", [Condition(PROMPTS[1], extra={"guidance_scale": 1.0})], noise[:, 1:], "off"), atol=1e-3)
    with pytest.raises(UsageError, match=r"told a scale \(guidance_scale, usually 5\)"):
        model.check(Condition("a cat"), guided=True)
    with pytest.raises(UsageError, match="not told a guidance scale"):
        load_model(pipe).check(Condition("a cat", extra={"guidance_scale": 8.0}))


def with_ip_adapter() -> Any:
    """A tiny pipeline with a random IP adapter: 4 image tokens of width 40 from embeddings of width 24."""
    generator, pipe = torch.Generator().manual_seed(3), tiny_sdxl()
    weights: dict[str, Tensor] = {}
    number = 1
    for name in pipe.unet.attn_processors:
        if name.endswith("attn2.processor"):
            attention = pipe.unet.get_submodule(name.removesuffix(".processor"))
            for key in ("to_k_ip", "to_v_ip"):
                weights[f"{number}.{key}.weight"] = torch.randn(attention.to_k.weight.shape, generator=generator)
            number += 2
    projection = {"proj.weight": torch.randn((160, 24), generator=generator), "proj.bias": torch.zeros(160), "norm.weight": torch.ones(40), "norm.bias": torch.zeros(40)}
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}])
    pipe.unet.eval()
    return pipe


def test_ip_adapters_are_conditioned_on_images() -> None:
    pipe, noise = with_ip_adapter(), noise_of()
    model = load_model(pipe)
    with pytest.raises(UsageError, match="unload_ip_adapter"):
        model.check(Condition("a cat"))
    embeds = torch.randn((2, 1, 24), generator=torch.Generator().manual_seed(4))
    condition = Condition("a cat", negative_prompt="bad", extra={"ip_adapter_image_embeds": [embeds]})
    ours = run(model, "euler", [condition], noise, "on")
    theirs = pipe("a cat", negative_prompt="bad", ip_adapter_image_embeds=[embeds], latents=noise[0, :1], num_inference_steps=STEPS, guidance_scale=5.0, output_type="latent").images
    torch.testing.assert_close(ours, theirs, **CLOSE)
    assert model.encode([condition], guided=False)[0].rows[0]["image_embeds.0"].equal(embeds[1])
    with pytest.raises(UsageError, match=r"needs shape \(2, images"):
        model.encode([Condition(extra={"ip_adapter_image_embeds": [embeds[:1]]})], guided=True)


@pytest.mark.parametrize(("config", "copied"), [({}, True), ({"force_upcast": True}, True), ({"force_upcast": False}, False)], ids=str)
def test_an_autoencoder_that_overflows_in_float16_is_copied_to_float32(config: dict[str, Any], copied: bool) -> None:
    half = tiny_sdxl(vae_config=config).to(torch.float16)
    model = load_model(half)
    pixels = model.decode(torch.full((1, 4, 8, 8), 0.5)).pixels
    assert pixels.dtype == torch.float32
    assert pixels.isfinite().all()
    assert half.vae.dtype == torch.float16
    assert (model._vae is half.vae) == (not copied)
    assert model._vae.dtype == (torch.float32 if copied else torch.float16)
