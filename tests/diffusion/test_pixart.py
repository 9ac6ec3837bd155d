"""PixArt-Sigma and PixArt-alpha: trajectories equal those of diffusers' own pipelines, whatever shares the batch."""

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
from sd_reference import SCHEDULERS, inject
from tiny_dit import assert_latents_equal, tiny_pixart
from torch import Tensor

import tsdiff
from tsdiff.diffusion import pixart
from tsdiff.diffusion.loading import load_model, outline
from tsdiff.policies import Beam
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Condition, LoadOptions

# Of numpy, about how diffusers itself computes sigmas.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STEPS = 5
PROMPTS = ["A Red cube on a blue sphere", "two cats"]


@pytest.fixture(scope="module")
def pipe() -> Any:
    """Tests must not change it."""
    return tiny_pixart()


def noise_of(shape: tuple[int, ...] = (4, 8, 8)) -> Tensor:
    """(1 + STEPS, B, ...): initial noise, then one for each step."""
    return torch.randn((1 + STEPS, 2, *shape), generator=torch.Generator().manual_seed(5))


def swapped(pipe: Any, solver: str = "dpm++2m") -> Any:
    """Another pipeline around the same modules, with the scheduler of diffusers that a solver stands for."""
    name, options = SCHEDULERS[solver]
    clips = name in ("DDIMScheduler", "DDPMScheduler", "HeunDiscreteScheduler")
    # Their own default clips clean estimates to [-1, 1], which nobody wants of latents.
    scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options, **({"clip_sample": False} if clips else {}))
    other = type(pipe)(**{**pipe.components, "scheduler": scheduler})
    other.set_progress_bar_config(disable=True)
    return other


def run(pipe: Any, **options: Any) -> Tensor:
    """Latents of diffusers' pipeline."""
    usual = {"num_inference_steps": STEPS, "height": 16, "width": 16, "use_resolution_binning": False, "output_type": "latent"}
    latents: Tensor = pipe(**usual | options).images
    return latents


@pytest.mark.parametrize("guidance", ["off", "on"])
@pytest.mark.parametrize("solver", SCHEDULERS)
def test_a_trajectory_equals_the_pipelines_in_one_batch_of_mixed_levels(pipe: Any, monkeypatch: pytest.MonkeyPatch, solver: str, guidance: str) -> None:
    model, noise, scale = load_model(pipe), noise_of(), GUIDANCE[guidance][0]
    info = model.solver(solver)
    schedule = model.schedule(info, STEPS, None)
    encoded = model.encode([Condition(prompt, negative_prompt="blurry") for prompt in PROMPTS], guided=scale > 1)
    assert len(encoded[0].rows) == 1 + (scale > 1)
    ours = sample(model, schedule, info, model.sampler(schedule, info).draw(noise[0]), encoded, noise[1:], guidance, stagger=2)
    inject(monkeypatch, list(noise[1:]))
    theirs = run(swapped(pipe, solver), prompt=PROMPTS, negative_prompt=["blurry"] * 2, latents=noise[0], guidance_scale=scale, eta=info.eta)
    assert_latents_equal(ours, theirs)


def test_the_pipelines_scheduler_is_the_default(pipe: Any) -> None:
    plan = outline(pipe, LoadOptions())
    assert (plan.solvers[0], plan.default_steps, plan.default_guidance_scale) == ("dpm++2m", 20, 4.5)


@pytest.mark.parametrize("size", [(16, 16), (24, 32)])
@pytest.mark.parametrize("alpha", [False, True], ids=["sigma", "alpha, which is told the size"])
def test_sizes_other_than_the_models_own(pipe: Any, alpha: bool, size: tuple[int, int]) -> None:
    own = tiny_pixart(alpha=True, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer, vae=pipe.vae) if alpha else pipe
    model = load_model(own)
    assert model.told_size is alpha
    info, noise = model.solver(), noise_of(model.latent_shape(size))
    ours = sample(model, model.schedule(info, STEPS, size), info, noise[0], model.encode([Condition(prompt) for prompt in PROMPTS], guided=True), noise[1:], "on")
    theirs = run(swapped(own), prompt=PROMPTS, latents=noise[0], guidance_scale=GUIDANCE["on"][0], height=size[0], width=size[1])
    assert_latents_equal(ours, theirs)


def test_the_size_matters_to_a_network_that_is_told_it(pipe: Any) -> None:
    own = tiny_pixart(alpha=True, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer, vae=pipe.vae)
    assert outline(own, LoadOptions()).size(None, None) == (256, 256)
    model = load_model(own)
    (encoded,) = model.encode([Condition("a cat")], guided=False)
    assert encoded.rows[0]["prompt_embeds"].shape == (120, 24)
    latents, time = noise_of()[0, :1], torch.tensor([500.0])
    told = model.forward(latents, time, encoded.rows)
    model.scale_factor *= 64
    assert (model.forward(latents, time, encoded.rows) - told).abs().max() > 1e-4


def test_decoded_images_equal_the_pipelines(pipe: Any) -> None:
    latents = noise_of()[0]
    theirs = run(swapped(pipe), prompt=PROMPTS, latents=latents, num_inference_steps=2, output_type="pt")
    clean = run(swapped(pipe), prompt=PROMPTS, latents=latents, num_inference_steps=2)
    torch.testing.assert_close(load_model(pipe).decode(clean).pixels, theirs, rtol=0, atol=1e-6)


# Texts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [{}, {"max_sequence_length": 12}, {"clean_caption": False}], ids=str)
def test_options_reach_the_text_encoder_as_in_the_pipeline(pipe: Any, extra: dict[str, Any]) -> None:
    model = load_model(pipe)
    (encoded,) = model.encode([Condition("A cat", negative_prompt="blurry", extra=extra)], guided=True)
    length = extra.get("max_sequence_length", 300)
    with torch.no_grad():
        theirs = swapped(pipe).encode_prompt("A cat", negative_prompt="blurry", clean_caption=extra.get("clean_caption", True), max_sequence_length=length)
    for row, embeds, mask in zip(encoded.rows, theirs[::2], theirs[1::2], strict=True):
        torch.testing.assert_close(row["prompt_embeds"], embeds[0], rtol=0, atol=1e-6)
        assert torch.equal(row["prompt_attention_mask"], mask[0])
        assert 0 < row["prompt_attention_mask"].sum() < length


def test_captions_are_cleaned_where_the_pipeline_can(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixart, "can_clean", lambda: False)
    model = load_model(pipe)
    model.encode([Condition("A cat"), Condition("b")], guided=True)
    assert [notice.partition(";")[0] for notice in model.notices] == ["captions are made lower-case but not freed of links and markup"]
    plain = load_model(pipe)
    plain.encode([Condition("A cat", extra={"clean_caption": False})], guided=True)
    assert plain.notices == ()
    with pytest.raises(UsageError, match="clean_caption needs beautifulsoup4 and ftfy"):
        model.check(Condition("a cat", extra={"clean_caption": True}))
    asked: list[bool] = []
    monkeypatch.setattr(pixart, "can_clean", lambda: True)
    monkeypatch.setattr(type(pipe), "_text_preprocessing", lambda self, text, clean_caption: [asked.append(clean_caption) or "x"])
    load_model(pipe).encode([Condition("A cat")], guided=False)
    assert set(asked) == {True}


def test_a_prompt_that_is_too_long_is_noted(pipe: Any) -> None:
    model = load_model(pipe)
    model.encode([Condition("a" * 20, extra={"max_sequence_length": 12, "clean_caption": False})], guided=False)
    (notice,) = model.notices
    assert "longer than the 12 that T5 reads" in notice


def given(tokens: int, hidden: int, seed: int) -> tuple[Tensor, Tensor]:
    """Embeddings (tokens, 24) and their mask, with `hidden` tokens of padding."""
    mask = torch.ones(tokens)
    mask[tokens - hidden :] = 0
    return torch.randn((tokens, 24), generator=torch.Generator().manual_seed(seed)), mask


def test_embeddings_of_other_lengths_are_padded_behind_their_masks(pipe: Any) -> None:
    """They share batches with prompts, and guidance with a negative row of another length, and change no result."""
    bare = tiny_pixart(text_encoder=None, tokenizer=None, **{name: part for name, part in pipe.components.items() if name not in ("text_encoder", "tokenizer")})
    model, noise = load_model(bare), noise_of()
    embeds, mask = given(20, 4, seed=1)
    negative, negative_mask = given(9, 0, seed=2)
    tensors = {"prompt_embeds": embeds, "prompt_attention_mask": mask[None].bool(), "negative_prompt_embeds": negative[None], "negative_prompt_attention_mask": negative_mask}
    model.check(Condition(tensors=tensors), guided=True)
    encoded = model.encode([Condition("for verifiers only", tensors=tensors)], guided=True)
    assert encoded[0].bucket == load_model(pipe).encode([Condition("a cat")], guided=True)[0].bucket
    info = model.solver()
    ours = sample(model, model.schedule(info, STEPS, None), info, noise[0, :1], encoded, noise[1:, :1], "on")
    longer = {"negative_prompt_embeds": torch.nn.functional.pad(negative, (0, 0, 0, 11))[None], "negative_prompt_attention_mask": torch.nn.functional.pad(negative_mask, (0, 11))[None]}
    theirs = run(swapped(bare), prompt_embeds=embeds[None], prompt_attention_mask=mask[None], negative_prompt=None, **longer, latents=noise[0, :1], guidance_scale=GUIDANCE["on"][0])
    assert_latents_equal(ours, theirs)
    long, long_mask = given(310, 3, seed=3)
    (more,) = model.encode([Condition(tensors=tensors | {"prompt_embeds": long, "prompt_attention_mask": long_mask})], guided=True)
    assert [row["prompt_embeds"].shape for row in more.rows] == [(310, 24)] * 2
    with pytest.raises(UsageError, match=r"no text_encoder, so a prompt cannot be encoded; give prompt_embeds and prompt_attention_mask"):
        model.check(Condition("a cat"))


def wrong(**tensors: Tensor) -> Condition:
    embeds, mask = given(6, 2, seed=1)
    return Condition(tensors={"prompt_embeds": embeds, "prompt_attention_mask": mask} | tensors)


REFUSED: dict[str, tuple[Condition, str]] = {
    "class": (Condition(class_label=3), "conditioned on text"),
    "unknown option": (Condition("a", extra={"clean_captions": True}), "did you mean 'clean_caption'"),
    "binning": (Condition("a", extra={"use_resolution_binning": True}), "images have the size that is asked for"),
    "length": (Condition("a", extra={"max_sequence_length": 0}), "between 1 and 512"),
    "clean_caption": (Condition("a", extra={"clean_caption": 1}), "must be true or false"),
    "width": (wrong(prompt_embeds=torch.zeros(6, 23)), r"\(tokens, 24\)"),
    "no mask": (Condition(tensors={"prompt_embeds": torch.zeros(6, 24)}), "without prompt_attention_mask"),
    "mask's length": (wrong(prompt_attention_mask=torch.ones(5)), "prompt_attention_mask has 5 tokens but prompt_embeds has 6"),
    "mask's numbers": (wrong(prompt_attention_mask=torch.full((6,), 0.5)), "must hold 1 for tokens and 0 for padding"),
    "all hidden": (wrong(prompt_attention_mask=torch.zeros(6)), "with a token at least"),
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
    assert plan.latent_shape(plan.size(32, None)) == (4, 16, 8)
    with pytest.raises(UsageError, match="height is 18 but must be a multiple of 4; the nearest are 16 or 20"):
        plan.size(18, None)


def test_a_search_is_counted_and_leaves_the_pipeline_as_it_was() -> None:
    own = tiny_pixart()
    before = {name: (id(part), sorted(vars(part)), [len(child._forward_hooks) for child in part.modules()]) for name, part in own.components.items() if isinstance(part, torch.nn.Module)}
    scheduler = json.dumps({key: str(value) for key, value in vars(own.scheduler).items()})
    rows = 0

    def count(module: Any, args: tuple[Any, ...]) -> None:
        nonlocal rows
        rows += args[0].shape[0]

    handle = own.transformer.register_forward_pre_hook(count)
    results = tsdiff.search(own, PROMPTS, policy=Beam(width=2, branch=2), verifier="luminance", steps=4, solver="dpm++2m-sde", guidance_scale=4.0)
    handle.remove()
    assert not results.failures
    assert rows == results.engine.network_rows
    assert results.engine.rows == sum(one.ledger.rows for result in results for one in (result, result.baseline))
    after = {name: (id(part), sorted(vars(part)), [len(child._forward_hooks) for child in part.modules()]) for name, part in own.components.items() if isinstance(part, torch.nn.Module)}
    assert after == before
    assert json.dumps({key: str(value) for key, value in vars(own.scheduler).items()}) == scheduler


# Folders -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pixart") / "saved"
    tiny_pixart(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A saved pipeline that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("published", [False, True], ids=["as saved today", "as the published models were saved"])
def test_a_folder_and_the_object_it_was_saved_from_are_one_model(folder: Path, pipe: Any, capfd: pytest.CaptureFixture[str], published: bool) -> None:
    if published:
        edit(folder / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
        edit(folder / "transformer/config.json", _class_name="Transformer2DModel")
    model = load_model(folder, device="cpu")
    assert capfd.readouterr() == ("", "")
    assert model.fingerprint == load_model(pipe).fingerprint
    rows = [one.encode([Condition("a cat")], guided=False)[0].rows for one in (model, load_model(pipe))]
    latents, time = noise_of()[0, :1], torch.tensor([500.0])
    torch.testing.assert_close(model.forward(latents, time, rows[0]), load_model(pipe).forward(latents, time, rows[1]), rtol=0, atol=1e-5)
    assert outline(str(folder), LoadOptions()).schedule(model.solver(), 10, (16, 16)) == model.schedule(model.solver(), 10, (16, 16))


def test_half_precision_keeps_latents_in_float32(saved: Path) -> None:
    model, noise = load_model(saved, device="cpu", dtype="bfloat16"), noise_of()
    info = model.solver()
    encoded = model.encode([Condition(prompt) for prompt in PROMPTS], guided=True)
    ours = sample(model, model.schedule(info, 3, None), info, noise[0], encoded, noise[1:], "on")
    assert (model.dtype, ours.dtype, model.decode(ours).pixels.dtype) == (torch.bfloat16, torch.float32, torch.float32)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no transformer": (lambda f: edit(f / "model_index.json", transformer=[None, None]), "has no transformer"),
    "another transformer": (lambda f: edit(f / "model_index.json", transformer=["diffusers", "DiTTransformer2DModel"]), "DiTTransformer2DModel, which is not supported"),
    "another norm": (lambda f: edit(f / "transformer/config.json", norm_type="ada_norm_zero"), "none of PixArt's .*ada_norm_zero"),
    "no tokenizer": (lambda f: edit(f / "model_index.json", tokenizer=[None, None]), "has no tokenizer"),
    "another encoder": (lambda f: edit(f / "model_index.json", text_encoder=["transformers", "CLIPTextModel"]), "text_encoder .* is a CLIPTextModel"),
    "flow scheduler": (lambda f: edit(f / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"]), "is for flow models"),
    "empty config": (lambda f: (f / "transformer/config.json").write_text("{}"), "has no in_channels"),
    "other channels": (lambda f: edit(f / "transformer/config.json", in_channels=8), "takes 8 channels but its autoencoder makes 4"),
    "other text width": (lambda f: edit(f / "text_encoder/config.json", d_model=32), "do not belong together"),
    "no weights": (lambda f: (f / "transformer/diffusion_pytorch_model.safetensors").unlink(), "transformer' holds no weights"),
    "no T5 weights": (lambda f: (f / "text_encoder/model.safetensors").unlink(), "text_encoder' holds no weights"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_one_clear_line_before_weights_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights were read"))
    spoil, says = DAMAGE[damage]
    spoil(folder)
    with pytest.raises(UsageError, match=says) as caught:
        outline(str(folder), LoadOptions())
    assert "\n" not in str(caught.value)


def test_a_scheduler_without_a_solver_is_replaced_and_said(folder: Path) -> None:
    edit(folder / "model_index.json", scheduler=["diffusers", "TCDScheduler"])
    assert outline(str(folder), LoadOptions()).notices == ("scheduler TCDScheduler is not supported; replaced by ddim on the same betas",)
    with pytest.raises(UsageError, match="strict_scheduler forbids"):
        outline(str(folder), LoadOptions(strict_scheduler=True))
