"""Stable Diffusion 3: trajectories equal those of diffusers' own pipelines, whatever shares the batch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines.stable_diffusion_3 import pipeline_stable_diffusion_3_img2img as img2img
from flow_reference import SOLVERS, inject, sample, swapped
from tiny_sd3 import tiny_sd3
from torch import Tensor

import tsdiff
from tsdiff.diffusion.loading import load_model, outline
from tsdiff.policies import Beam
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Condition, LoadOptions

STEPS = 5
CLOSE = {"rtol": 0.0, "atol": 1e-4}
PROMPTS = ["a red cube on a blue sphere", "two cats"]
DYNAMIC = {"use_dynamic_shifting": True, "base_image_seq_len": 16, "max_image_seq_len": 64}


@pytest.fixture(scope="module")
def pipe() -> Any:
    """Tests must not change it."""
    return tiny_sd3()


def noise_of(shape: tuple[int, ...] = (4, 8, 8)) -> Tensor:
    """(1 + STEPS, B, ...): initial noise, then one for each step."""
    return torch.randn((1 + STEPS, 2, *shape), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("scale", [1.0, 5.0], ids=["unguided", "guided"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_trajectory_equals_the_pipelines_in_one_batch_of_mixed_levels(pipe: Any, solver: str, scale: float) -> None:
    model, noise = load_model(pipe), noise_of()
    info = model.solver(solver)
    schedule = model.schedule(info, STEPS, None)
    encoded = model.encode([Condition(prompt, negative_prompt="blurry") for prompt in PROMPTS], guided=scale > 1)
    assert len(encoded[0].rows) == 1 + (scale > 1)
    ours = sample(model, schedule, info, model.sampler(schedule, info).draw(noise[0]), encoded, noise[1:], scale, stagger=2)
    theirs = swapped(pipe, info, iter(noise[1:]))(
        PROMPTS, negative_prompt=["blurry"] * 2, latents=noise[0], height=16, width=16, num_inference_steps=STEPS, guidance_scale=scale, output_type="latent"
    ).images
    torch.testing.assert_close(ours, theirs, **CLOSE)
    assert ours.std() > 0.1


@pytest.mark.parametrize("size", [(16, 16), (24, 32)])
def test_dynamic_shifting_follows_the_size(pipe: Any, size: tuple[int, int]) -> None:
    shifted = tiny_sd3(scheduler_config=DYNAMIC, **{name: part for name, part in pipe.components.items() if name != "scheduler"})
    model = load_model(shifted)
    info, noise = model.solver(), noise_of(model.latent_shape(size))
    schedule = model.schedule(info, STEPS, size)
    assert schedule.sigma != model.schedule(info, STEPS, (32, 16)).sigma
    ours = sample(model, schedule, info, noise[0], model.encode([Condition(prompt) for prompt in PROMPTS], guided=True), noise[1:], 4.0)
    theirs = swapped(shifted)(PROMPTS, latents=noise[0], height=size[0], width=size[1], num_inference_steps=STEPS, guidance_scale=4.0, output_type="latent").images
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_starting_from_an_image_equals_image_to_image(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    images, noise = torch.rand((2, 3, 16, 16), generator=torch.Generator().manual_seed(1)), noise_of()
    model = load_model(swapped(pipe, name_of_class="StableDiffusion3Img2ImgPipeline"))
    info = model.solver()
    tail = model.schedule(info, STEPS, None).tail(STEPS - int(STEPS * 0.6))
    origin = model.encode_images(images, noise[1])
    start = model.sampler(tail, info).draw(noise[0], origin)
    ours = sample(model, tail, info, start, model.encode([Condition(prompt) for prompt in PROMPTS], guided=True), noise[1:], 5.0)
    inject(monkeypatch, img2img, [noise[1], noise[0]])
    theirs = swapped(pipe, name_of_class="StableDiffusion3Img2ImgPipeline")(
        PROMPTS, image=images, height=16, width=16, strength=0.6, num_inference_steps=STEPS, guidance_scale=5.0, output_type="latent"
    ).images
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_decoded_images_equal_the_pipelines(pipe: Any) -> None:
    latents, options = noise_of()[0], {"height": 16, "width": 16, "num_inference_steps": 2}
    theirs = swapped(pipe)(PROMPTS, latents=latents, output_type="pt", **options).images
    clean = swapped(pipe)(PROMPTS, latents=latents, output_type="latent", **options).images
    torch.testing.assert_close(load_model(pipe).decode(clean).pixels, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("extra", [{"clip_skip": 1}, {"max_sequence_length": 20}, {"prompt_2": "x", "prompt_3": "y", "negative_prompt_3": "z"}], ids=str)
def test_options_reach_the_text_encoders_as_in_the_pipeline(pipe: Any, extra: dict[str, Any]) -> None:
    condition = Condition("a cat", negative_prompt="blurry", extra=extra)
    model = load_model(pipe)
    (encoded,) = model.encode([condition], guided=True)
    with torch.no_grad():
        embeds, negative, pooled, negative_pooled = swapped(pipe).encode_prompt(
            "a cat", extra.get("prompt_2"), extra.get("prompt_3"), negative_prompt="blurry", negative_prompt_3=extra.get("negative_prompt_3"),
            clip_skip=extra.get("clip_skip"), max_sequence_length=extra.get("max_sequence_length", 256),
        )  # fmt: skip
    cond, uncond = encoded.rows
    for ours, theirs in ((cond["prompt_embeds"], embeds), (uncond["prompt_embeds"], negative), (cond["pooled_prompt_embeds"], pooled), (uncond["pooled_prompt_embeds"], negative_pooled)):
        torch.testing.assert_close(ours, theirs[0], rtol=0, atol=1e-6)
    plain = model.encode([Condition("a cat", negative_prompt="blurry")], guided=True)[0]
    assert (encoded.bucket == plain.bucket) == ("max_sequence_length" not in extra)
    assert not any(torch.equal(encoded.rows[0]["prompt_embeds"], row["prompt_embeds"]) for row in plain.rows)


def test_embeddings_replace_prompts_and_a_pipeline_needs_no_text_encoders(pipe: Any) -> None:
    parts = {name: None if "text_encoder" in name or "tokenizer" in name else part for name, part in pipe.components.items()}
    bare = tiny_sd3(**parts)
    generator, noise = torch.Generator().manual_seed(2), noise_of()
    embeds = {f"{side}{name}": torch.randn(shape, generator=generator) for side in ("", "negative_") for name, shape in (("prompt_embeds", (1, 30, 48)), ("pooled_prompt_embeds", (1, 40)))}
    model = load_model(bare)
    info = model.solver()
    schedule = model.schedule(info, STEPS, None)
    encoded = model.encode([Condition("for verifiers only", tensors={name: tensor[0] for name, tensor in embeds.items()})], guided=True)
    ours = sample(model, schedule, info, noise[0, :1], encoded, noise[1:], 5.0)
    theirs = swapped(bare)(latents=noise[0, :1], height=16, width=16, num_inference_steps=STEPS, guidance_scale=5.0, output_type="latent", **embeds).images
    torch.testing.assert_close(ours, theirs, **CLOSE)
    assert model.encode([Condition(tensors=embeds)], guided=True)[0].bucket == encoded[0].bucket
    with pytest.raises(UsageError, match=r"no text_encoder, so a prompt cannot be encoded; give prompt_embeds and pooled_prompt_embeds"):
        model.check(Condition("a cat"))
    half = {name: tensor for name, tensor in embeds.items() if not name.startswith("negative_")}
    model.check(Condition(tensors=half))
    with pytest.raises(UsageError, match="give negative_prompt_embeds and negative_pooled_prompt_embeds"):
        model.check(Condition(tensors=half), guided=True)


def test_without_t5_its_part_of_the_embedding_is_zero(pipe: Any) -> None:
    two = tiny_sd3(**{**pipe.components, "text_encoder_3": None, "tokenizer_3": None})
    (encoded,) = load_model(two).encode([Condition("a cat")], guided=False)
    embeds = encoded.rows[0]["prompt_embeds"]
    assert embeds.shape == (77 + 256, 48)
    assert not embeds[77:].any()
    torch.testing.assert_close(embeds[:77], load_model(pipe).encode([Condition("a cat")], guided=False)[0].rows[0]["prompt_embeds"][:77])


def test_a_prompt_that_is_too_long_is_noted_for_each_reader(pipe: Any) -> None:
    model = load_model(pipe)
    model.encode([Condition("a" * 90)], guided=False)
    assert [notice.partition(" that ")[2] for notice in model.notices] == [f"{reader} reads; its last 15 tokens are dropped there" for reader in ("CLIP", "the second CLIP")]


REFUSED: dict[str, tuple[Condition, str]] = {
    "class": (Condition(class_label=3), "conditioned on text"),
    "unknown option": (Condition("a", extra={"clip_skp": 1}), "did you mean 'clip_skip'"),
    "skipped layers": (Condition("a", extra={"skip_guidance_layers": [1]}), "third network row"),
    "clip_skip": (Condition("a", extra={"clip_skip": 3}), "between 0 and 2"),
    "length": (Condition("a", extra={"max_sequence_length": 513}), "between 1 and 512"),
    "prompt_2": (Condition("a", extra={"prompt_2": ["a"]}), "must be a text"),
    "unknown tensor": (Condition("a", tensors={"prompt_embed": torch.zeros(3, 48)}), "did you mean 'prompt_embeds'"),
    "width": (Condition(tensors={"prompt_embeds": torch.zeros(3, 47), "pooled_prompt_embeds": torch.zeros(40)}), r"\(tokens, 48\)"),
    "pooled shape": (Condition(tensors={"prompt_embeds": torch.zeros(3, 48), "pooled_prompt_embeds": torch.zeros(2, 40)}), r"must be \(40,\) or \(1, 40\)"),
    "not pooled": (Condition(tensors={"prompt_embeds": torch.zeros(3, 48)}), "without pooled_prompt_embeds"),
    "lengths": (Condition(tensors={"prompt_embeds": torch.zeros(3, 48), "pooled_prompt_embeds": torch.zeros(40)}), "3 tokens and the negative prompt's 333"),
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
    with pytest.raises(UsageError, match=r"width is 36 .* at most 32"):
        plan.size(None, 36)


def test_a_search_is_counted_and_leaves_the_pipeline_as_it_was(pipe: Any) -> None:
    own = tiny_sd3()
    before = {name: (id(part), sorted(vars(part)), [len(child._forward_hooks) for child in part.modules()]) for name, part in own.components.items() if isinstance(part, torch.nn.Module)}
    scheduler = json.dumps({key: str(value) for key, value in vars(own.scheduler).items()})
    rows = 0

    def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal rows
        rows += kwargs["hidden_states"].shape[0]

    handle = own.transformer.register_forward_pre_hook(count, with_kwargs=True)
    results = tsdiff.search(own, PROMPTS, policy=Beam(width=2, branch=2), verifier="luminance", steps=4, solver="flow-sde", guidance_scale=4.0)
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
    folder = tmp_path_factory.mktemp("sd3") / "saved"
    tiny_sd3(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A saved pipeline that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(data))


def test_a_folder_and_the_object_it_was_saved_from_are_one_model(folder: Path, pipe: Any, capfd: pytest.CaptureFixture[str]) -> None:
    model = load_model(folder, device="cpu")
    assert capfd.readouterr() == ("", "")
    assert model.fingerprint == load_model(pipe).fingerprint
    rows = [one.encode([Condition("a cat")], guided=False)[0].rows for one in (model, load_model(pipe))]
    latents, time = noise_of()[0, :1], torch.tensor([500.0])
    # Weights that are read from a file lie elsewhere in memory, which the last digits of matrix kernels depend on.
    torch.testing.assert_close(model.forward(latents, time, rows[0]), load_model(pipe).forward(latents, time, rows[1]), rtol=0, atol=1e-5)
    assert outline(str(folder), LoadOptions()).schedule(model.solver(), 10, (16, 16)) == model.schedule(model.solver(), 10, (16, 16))


def test_half_precision_keeps_latents_in_float32(folder: Path) -> None:
    model = load_model(folder, device="cpu", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    info, noise = model.solver(), noise_of()
    encoded = model.encode([Condition(prompt) for prompt in PROMPTS], guided=True)
    ours = sample(model, model.schedule(info, STEPS, None), info, noise[0], encoded, noise[1:], 4.0)
    assert ours.dtype == torch.float32
    assert model.decode(ours).pixels.dtype == torch.float32


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no transformer": (lambda f: edit(f / "model_index.json", transformer=[None, None]), "has no transformer"),
    "another transformer": (lambda f: edit(f / "model_index.json", transformer=["diffusers", "FluxTransformer2DModel"]), "FluxTransformer2DModel, which is not supported"),
    "no tokenizer": (lambda f: edit(f / "model_index.json", tokenizer_2=[None, None]), "has no tokenizer_2"),
    "another encoder": (lambda f: edit(f / "model_index.json", text_encoder=["transformers", "CLIPTextModel"]), "text_encoder .* is a CLIPTextModel"),
    "no scheduler": (lambda f: edit(f / "model_index.json", scheduler=[None, None]), "has no scheduler"),
    "diffusion scheduler": (lambda f: edit(f / "model_index.json", scheduler=["diffusers", "DDIMScheduler"]), "DDIMScheduler, is not for flow models"),
    "no config": (lambda f: (f / "transformer/config.json").unlink(), "config.json' is missing"),
    "empty config": (lambda f: (f / "transformer/config.json").write_text("{}"), "has no in_channels"),
    "other channels": (lambda f: edit(f / "transformer/config.json", in_channels=8), "takes 8 channels but its autoencoder makes 4"),
    "other text width": (lambda f: edit(f / "text_encoder_3/config.json", d_model=32), "do not belong together"),
    "other pooled width": (lambda f: edit(f / "text_encoder/config.json", projection_dim=20), "do not belong together"),
    "no weights": (lambda f: (f / "transformer/diffusion_pytorch_model.safetensors").unlink(), "transformer' holds no weights"),
    "no T5 weights": (lambda f: (f / "text_encoder_3/model.safetensors").unlink(), "text_encoder_3' holds no weights"),
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


def test_a_text_encoder_that_is_not_there_leaves_embeddings(folder: Path) -> None:
    edit(folder / "model_index.json", text_encoder_2=[None, None], tokenizer_2=[None, None])
    with pytest.raises(UsageError, match="no text_encoder_2, so a prompt cannot be encoded"):
        outline(str(folder), LoadOptions()).check(Condition("a cat"))


def test_modules_in_training_mode_are_refused(pipe: Any) -> None:
    training = tiny_sd3()
    training.transformer.train()
    with pytest.raises(UsageError, match=r"call `pipe\.transformer\.eval\(\)`"):
        load_model(training)
