"""Stable Diffusion XL: trajectories equal those of diffusers' own pipelines, whatever shares the batch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from mixed_levels import GUIDANCE, sample
from sd_reference import SCHEDULERS, inject, swapped
from tiny_sdxl import POOLED, TIME_WIDTH, tiny_sdxl
from torch import Tensor

import tsdiff
from tsdiff.diffusion.family import VP_SOLVERS
from tsdiff.diffusion.loading import load_model, outline
from tsdiff.policies.beam import Beam
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Condition, LoadOptions

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STEPS = 4
CLOSE = {"rtol": 0.0, "atol": 1e-4}
PROMPTS = ["a red cube on a blue sphere", "two cats"]
IMG2IMG = "StableDiffusionXLImg2ImgPipeline"


@pytest.fixture(scope="module")
def pipe() -> Any:
    """Tests must not change it."""
    return tiny_sdxl()


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


@pytest.mark.parametrize(("solver", "guidance"), [(solver, guidance) for solver in SCHEDULERS for guidance in ("off", "rescaled")] + [("euler", "on")])
def test_a_trajectory_equals_the_pipelines_in_one_batch_of_mixed_levels(pipe: Any, monkeypatch: pytest.MonkeyPatch, solver: str, guidance: str) -> None:
    model, noise = load_model(pipe), noise_of()
    scale, rescale = GUIDANCE[guidance]
    ours = run(model, solver, [Condition(prompt, negative_prompt="blurry") for prompt in PROMPTS], noise, guidance, stagger=2)
    inject(monkeypatch, list(noise[1:]))
    theirs = swapped(pipe, solver)(
        PROMPTS, negative_prompt=["blurry"] * 2, latents=noise[0], num_inference_steps=STEPS, guidance_scale=scale,
        guidance_rescale=rescale, eta=model.solver(solver).eta, output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(ours, theirs, **CLOSE)
    assert ours.std() > 0.1


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


@pytest.mark.parametrize("solver", ["euler", "ddim", "dpm++2m"])
def test_starting_from_an_image_equals_image_to_image(pipe: Any, monkeypatch: pytest.MonkeyPatch, solver: str) -> None:
    images, noise = torch.rand((2, 3, 16, 16), generator=torch.Generator().manual_seed(1)), noise_of()
    twin = swapped(pipe, solver, IMG2IMG)
    model = load_model(twin)
    info = model.solver()
    tail = model.schedule(info, STEPS, None).tail(STEPS - int(STEPS * 0.6))
    origin = model.encode_images(images, noise[1])
    start = model.sampler(tail, info).draw(noise[0], origin)
    extra = {"original_size": (30, 20)}
    ours = sample(model, tail, info, start, model.encode([Condition(prompt, extra=extra) for prompt in PROMPTS], guided=True), noise[1:], "on")
    inject(monkeypatch, [noise[1], noise[0]])
    theirs = twin(PROMPTS, image=images, strength=0.6, num_inference_steps=STEPS, guidance_scale=5.0, output_type="latent", **extra).images
    torch.testing.assert_close(ours, theirs, **CLOSE)
    assert model.fingerprint == load_model(swapped(pipe, solver)).fingerprint


def test_decoded_images_equal_the_pipelines(pipe: Any) -> None:
    latents = noise_of()[0]
    theirs = swapped(pipe, "euler")(PROMPTS, latents=latents, num_inference_steps=2, output_type="pt").images
    clean = swapped(pipe, "euler")(PROMPTS, latents=latents, num_inference_steps=2, output_type="latent").images
    torch.testing.assert_close(load_model(pipe).decode(clean).pixels, theirs, rtol=0, atol=1e-6)


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


def test_embeddings_replace_prompts_and_a_pipeline_needs_no_text_encoders(pipe: Any) -> None:
    bare = tiny_sdxl(**{name: None if "text_encoder" in name or "tokenizer" in name else part for name, part in pipe.components.items()}, force_zeros_for_empty_prompt=False)
    generator, noise = torch.Generator().manual_seed(2), noise_of()
    embeds = {f"{side}{name}": torch.randn(shape, generator=generator) for side in ("", "negative_") for name, shape in (("prompt_embeds", (1, 30, 40)), ("pooled_prompt_embeds", (1, POOLED)))}
    model = load_model(bare)
    ours = run(model, "euler", [Condition("for verifiers only", tensors={name: tensor[0] for name, tensor in embeds.items()})], noise, "on")
    theirs = swapped(bare, "euler")(latents=noise[0, :1], num_inference_steps=STEPS, guidance_scale=5.0, output_type="latent", **embeds).images
    torch.testing.assert_close(ours, theirs, **CLOSE)
    with pytest.raises(UsageError, match=r"no text_encoder, so a prompt cannot be encoded; give prompt_embeds and pooled_prompt_embeds"):
        model.check(Condition("a cat"))
    half = {name: tensor for name, tensor in embeds.items() if not name.startswith("negative_")}
    model.check(Condition(tensors=half))
    with pytest.raises(UsageError, match="give negative_prompt_embeds and negative_pooled_prompt_embeds"):
        model.check(Condition(tensors=half), guided=True)
    zeros = load_model(tiny_sdxl(**bare.components))
    zeros.check(Condition(tensors=half), guided=True)
    assert zeros.encode([Condition(tensors=half)], guided=True)[0].rows[1]["prompt_embeds"].shape == (30, 40)


def test_a_prompt_that_is_too_long_is_noted_for_each_reader(pipe: Any) -> None:
    model = load_model(pipe)
    model.encode([Condition("a" * 90, extra={"prompt_2": "b" * 80})], guided=False)
    assert [notice.partition(" is ")[2] for notice in model.notices] == [
        "15 tokens longer than the 77 that CLIP reads; its last 15 tokens are dropped there",
        "5 tokens longer than the 77 that the second CLIP reads; its last 5 tokens are dropped there",
    ]


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


# What is refused ----------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Condition, str]] = {
    "class": (Condition(class_label=3), "conditioned on text"),
    "unknown option": (Condition("a", extra={"clip_skp": 1}), "did you mean 'clip_skip'"),
    "aesthetic score": (Condition("a", extra={"aesthetic_score": 6.0}), "only a refiner reads it"),
    "negative aesthetic score": (Condition("a", extra={"negative_aesthetic_score": 2.5}), "only a refiner reads it"),
    "ensemble of experts": (Condition("a", extra={"denoising_end": 0.8}), "refiners are not supported"),
    "attention": (Condition("a", extra={"cross_attention_kwargs": {"scale": 0.5}}), "adapters have the scale"),
    "clip_skip": (Condition("a", extra={"clip_skip": 3}), "between 0 and 2"),
    "prompt_2": (Condition("a", extra={"prompt_2": ["a"]}), "must be a text"),
    "three sides": (Condition("a", extra={"original_size": (8, 8, 8)}), r"original_size is \(8, 8, 8\) but must be two whole numbers of pixels"),
    "negative side": (Condition("a", extra={"crops_coords_top_left": (-1, 0)}), "two whole numbers"),
    "half of a negative size": (Condition("a", extra={"negative_target_size": (8, 8)}), "given without negative_original_size"),
    "negative crops alone": (Condition("a", extra={"negative_crops_coords_top_left": (0, 0)}), "without negative_original_size and negative_target_size"),
    "unknown tensor": (Condition("a", tensors={"prompt_embed": torch.zeros(3, 40)}), "did you mean 'prompt_embeds'"),
    "width": (Condition(tensors={"prompt_embeds": torch.zeros(3, 41), "pooled_prompt_embeds": torch.zeros(POOLED)}), r"\(tokens, 40\)"),
    "not pooled": (Condition(tensors={"prompt_embeds": torch.zeros(3, 40)}), "without pooled_prompt_embeds"),
    "lengths": (Condition(negative_prompt="b", tensors={"prompt_embeds": torch.zeros(3, 40), "pooled_prompt_embeds": torch.zeros(POOLED)}), "3 tokens and the negative prompt's 77"),
    "image": (Condition(extra={"ip_adapter_image": torch.zeros(3, 8, 8)}), "load_ip_adapter"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_conditions_are_checked_before_weights_are_loaded(pipe: Any, case: str) -> None:
    condition, says = REFUSED[case]
    with pytest.raises(UsageError, match=says) as caught:
        outline(pipe, LoadOptions()).check(condition, guided=True)
    assert "\n" not in str(caught.value)


def test_sizes(pipe: Any) -> None:
    plan = outline(pipe, LoadOptions())
    assert plan.size(None, None) == (16, 16)
    assert plan.latent_shape(plan.size(24, None)) == (4, 12, 8)
    with pytest.raises(UsageError, match="height is 17 but must be a multiple of 2; the nearest are 16 or 18"):
        plan.size(17, None)


def test_a_search_is_counted_and_leaves_the_pipeline_as_it_was() -> None:
    own = tiny_sdxl()
    before = {name: (id(part), sorted(vars(part)), [len(child._forward_hooks) for child in part.modules()]) for name, part in own.components.items() if isinstance(part, torch.nn.Module)}
    scheduler = json.dumps({key: str(value) for key, value in vars(own.scheduler).items()})
    rows = 0

    def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal rows
        rows += args[0].shape[0]

    handle = own.unet.register_forward_pre_hook(count, with_kwargs=True)
    results = tsdiff.search(own, PROMPTS, policy=Beam(width=2, branch=2), verifier="luminance", steps=4, solver="euler-ancestral", guidance_scale=4.0)
    handle.remove()
    assert not results.failures
    assert rows == results.engine.network_rows
    assert results.engine.rows == sum(one.ledger.rows for result in results for one in (result, result.baseline))
    after = {name: (id(part), sorted(vars(part)), [len(child._forward_hooks) for child in part.modules()]) for name, part in own.components.items() if isinstance(part, torch.nn.Module)}
    assert after == before
    assert json.dumps({key: str(value) for key, value in vars(own.scheduler).items()}) == scheduler


def test_every_solver_is_on_offer(pipe: Any) -> None:
    plan = outline(pipe, LoadOptions())
    assert plan.solvers[0] == "euler"
    assert sorted(plan.solvers) == sorted(VP_SOLVERS)
    assert (plan.default_steps, plan.default_guidance_scale) == (30, 5.0)


# Folders ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdxl") / "saved"
    tiny_sdxl(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A saved pipeline that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("class_name", ["StableDiffusionXLPipeline", IMG2IMG])
def test_a_folder_and_the_object_it_was_saved_from_are_one_model(folder: Path, pipe: Any, capfd: pytest.CaptureFixture[str], class_name: str) -> None:
    edit(folder / "model_index.json", _class_name=class_name, requires_aesthetics_score=False)
    model = load_model(folder, device="cpu")
    assert capfd.readouterr() == ("", "")
    assert model.fingerprint == load_model(pipe).fingerprint
    rows = [one.encode([Condition("a cat")], guided=False)[0].rows for one in (model, load_model(pipe))]
    latents, time = noise_of()[0, :1], torch.tensor([500.0])
    # Weights that are read from a file lie elsewhere in memory, which the last digits of matrix kernels depend on.
    torch.testing.assert_close(model.forward(latents, time, rows[0]), load_model(pipe).forward(latents, time, rows[1]), rtol=0, atol=1e-5)


def test_a_folder_says_whether_zeros_stand_for_no_prompt(folder: Path) -> None:
    edit(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    assert load_model(folder, device="cpu").encode([Condition("a")], guided=True)[0].rows[1]["prompt_embeds"].any()


def test_half_precision_keeps_latents_in_float32(folder: Path) -> None:
    model = load_model(folder, device="cpu", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    ours = run(model, "euler", [Condition(prompt) for prompt in PROMPTS], noise_of(), "on")
    assert ours.dtype == torch.float32
    assert model.decode(ours).pixels.dtype == torch.float32


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no unet": (lambda f: edit(f / "model_index.json", unet=[None, None]), "has no unet"),
    "another unet": (lambda f: edit(f / "model_index.json", unet=["diffusers", "UNet2DModel"]), "UNet2DModel, which is not supported"),
    "no tokenizer": (lambda f: edit(f / "model_index.json", tokenizer_2=[None, None]), "has no tokenizer_2"),
    "another encoder": (lambda f: edit(f / "model_index.json", text_encoder_2=["transformers", "CLIPTextModel"]), "text_encoder_2 .* is a CLIPTextModel"),
    "no scheduler": (lambda f: edit(f / "model_index.json", scheduler=[None, None]), "has no scheduler"),
    "flow scheduler": (lambda f: edit(f / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"]), "is for flow models"),
    "EDM scheduler": (lambda f: edit(f / "model_index.json", scheduler=["diffusers", "EDMEulerScheduler"]), "EDMEulerScheduler, scales what the network reads"),
    "no config": (lambda f: (f / "unet/config.json").unlink(), "config.json' is missing"),
    "inpainting": (lambda f: edit(f / "unet/config.json", in_channels=9), "an inpainting UNet"),
    "plain unet": (lambda f: edit(f / "unet/config.json", addition_embed_type=None), "none of Stable Diffusion XL"),
    "class embedding": (lambda f: edit(f / "unet/config.json", class_embed_type="timestep"), "wants a class embedding"),
    "projected text": (lambda f: edit(f / "unet/config.json", encoder_hid_dim_type="text_proj"), "projects its text embeddings"),
    "refiner": (lambda f: edit(f / "unet/config.json", projection_class_embeddings_input_dim=5 * TIME_WIDTH + POOLED), "is a refiner"),
    "refiner by its settings": (lambda f: edit(f / "model_index.json", _class_name=IMG2IMG, requires_aesthetics_score=True), "is a refiner"),
    "other pooled width": (lambda f: edit(f / "text_encoder_2/config.json", projection_dim=24), "do not belong together"),
    "other text width": (lambda f: edit(f / "text_encoder/config.json", hidden_size=24), "make embeddings of width 48 but its UNet takes 40"),
    "shifted channels": (lambda f: edit(f / "vae/config.json", latents_mean=[0.0] * 4, latents_std=[1.0] * 4), "latents_mean"),
    "no weights": (lambda f: (f / "unet/diffusion_pytorch_model.safetensors").unlink(), "unet' holds no weights"),
    "no text weights": (lambda f: (f / "text_encoder_2/model.safetensors").unlink(), "text_encoder_2' holds no weights"),
    "damaged weights": (lambda f: (f / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"abc"), "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_one_clear_line_before_weights_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights were read"))
    spoil, says = DAMAGE[damage]
    spoil(folder)
    with pytest.raises(UsageError, match=says) as caught:
        outline(str(folder), LoadOptions())
    assert "\n" not in str(caught.value)


def test_modules_in_training_mode_are_refused() -> None:
    training = tiny_sdxl()
    training.unet.train()
    with pytest.raises(UsageError, match=r"call `pipe\.unet\.eval\(\)`"):
        load_model(training)
