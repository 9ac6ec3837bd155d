"""LTX-Video: trajectories equal those of diffusers' own pipeline, whatever shares the batch; samples are videos."""

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
from flow_reference import SOLVERS, sample, swapped
from tiny_ltx import tiny_ltx, video_autoencoder
from torch import Tensor

import tsdiff
from tsdiff.diffusion.loading import load_model, outline
from tsdiff.policies import Beam, BestOfN
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Condition, LoadOptions, VideoOutline

STEPS = 4
CLOSE = {"rtol": 0.0, "atol": 1e-4}
PROMPTS = ["a red cube on a blue sphere", "two cats"]
SIZE = (32, 64, 5)
ASKED = {"height": 32, "width": 64, "frames": 5}


@pytest.fixture(scope="module")
def pipe() -> Any:
    """Tests must not change it."""
    return tiny_ltx()


def noise_of(shape: tuple[int, ...] = (8, 2, 8, 16)) -> Tensor:
    """(1 + STEPS, B, ...): initial noise, then one for each step."""
    return torch.randn((1 + STEPS, 2, *shape), generator=torch.Generator().manual_seed(5))


def packed(latents: Tensor) -> Tensor:
    """(..., C, f, h, w) as the sequence that the pipeline takes and gives."""
    return latents.flatten(-3).transpose(-1, -2)


def run(pipe: Any, size: tuple[int, int, int] = SIZE, **options: Any) -> Tensor:
    """Latents (B, tokens, C) of diffusers' pipeline."""
    usual = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "output_type": "latent"}
    latents: Tensor = pipe(height=size[0], width=size[1], num_frames=size[2], **usual | options).frames
    return latents


def conditions(**extra: Any) -> list[Condition]:
    return [Condition(prompt, negative_prompt="blurry", extra=extra) for prompt in PROMPTS]


@pytest.mark.parametrize("scale", [1.0, 4.0], ids=["unguided", "guided"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_trajectory_equals_the_pipelines_in_one_batch_of_mixed_levels(pipe: Any, solver: str, scale: float) -> None:
    model, noise = load_model(pipe), noise_of()
    info = model.solver(solver)
    schedule = model.schedule(info, STEPS, SIZE)
    encoded = model.encode(conditions(), guided=scale > 1)
    ours = sample(model, schedule, info, model.sampler(schedule, info).draw(noise[0]), encoded, noise[1:], scale, stagger=2)
    theirs = run(swapped(pipe, info, iter(packed(noise[1:]))), prompt=PROMPTS, negative_prompt=["blurry"] * 2, guidance_scale=scale, latents=packed(noise[0]))
    torch.testing.assert_close(packed(ours), theirs, **CLOSE)
    assert ours.std() > 0.1


@pytest.mark.parametrize("size", [(32, 32, 1), (64, 32, 9)])
def test_levels_follow_the_size_and_the_length(pipe: Any, size: tuple[int, int, int]) -> None:
    model = load_model(pipe)
    info, noise = model.solver(), noise_of(model.latent_shape(size))
    schedule = model.schedule(info, STEPS, size)
    assert schedule.sigma != model.schedule(info, STEPS, SIZE).sigma
    assert schedule.sigma[-2:] == (pytest.approx(0.1), 0.0)  # shift_terminal
    ours = sample(model, schedule, info, noise[0], model.encode(conditions(), guided=False), noise[1:], 1.0)
    torch.testing.assert_close(packed(ours), run(swapped(pipe), size, prompt=PROMPTS, latents=packed(noise[0])), **CLOSE)


def test_the_frame_rate_may_differ_in_a_batch(pipe: Any) -> None:
    model, noise = load_model(pipe), noise_of()
    info = model.solver()
    encoded = model.encode([conditions(frame_rate=rate)[0] for rate in (8, 50.0)], guided=False)
    assert encoded[0].bucket == encoded[1].bucket
    same = noise[:, :1].expand(-1, 2, -1, -1, -1, -1)
    ours = sample(model, model.schedule(info, STEPS, SIZE), info, same[0], encoded, same[1:], 1.0)
    for row, rate in zip(ours, (8, 50), strict=True):
        torch.testing.assert_close(packed(row)[None], run(swapped(pipe), prompt=PROMPTS[0], frame_rate=rate, latents=packed(same[0, :1])), **CLOSE)
    assert (ours[0] - ours[1]).abs().max() > 1e-3


# Decoding ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timestep", [False, True], ids=["plain", "told the timestep"])
def test_decoded_videos_equal_the_pipelines(pipe: Any, timestep: bool) -> None:
    own = tiny_ltx(vae=video_autoencoder(timestep_conditioning=True).eval(), **others(pipe)) if timestep else pipe
    latents = noise_of()[0]
    options = {"prompt": PROMPTS, "latents": packed(latents), "num_inference_steps": 2}
    clean = run(swapped(own), **options).transpose(1, 2).reshape(latents.shape)
    media = load_model(own).decode(clean)
    assert (media.kind, media.pixels.shape) == ("video", (2, 5, 3, 32, 64))
    torch.testing.assert_close(media.pixels, run(swapped(own), **options, output_type="pt"), rtol=0, atol=1e-5)
    assert media.pixels.std() > 0.01


def others(pipe: Any) -> dict[str, Any]:
    """All components but the autoencoder."""
    return {name: part for name, part in pipe.components.items() if name != "vae"}


def test_a_decoder_that_adds_noise_adds_the_same_to_every_video(pipe: Any) -> None:
    vae = video_autoencoder(decoder_inject_noise=(True,) * 5).eval()
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if "per_channel_scale" in name:
                parameter.fill_(0.5)
    model = load_model(tiny_ltx(vae=vae, **others(pipe)))
    latents = noise_of()[0]
    torch.manual_seed(7)
    before = torch.get_rng_state()
    both = model.decode(latents).pixels
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(model.decode(latents.flip(0)).pixels.flip(0), both)
    mean, std = (part.view(-1, 1, 1, 1) for part in (vae.latents_mean, vae.latents_std))
    torch.manual_seed(0)
    with torch.no_grad():
        theirs = vae.decode(latents[:1] * std / vae.config.scaling_factor + mean).sample
    torch.testing.assert_close(both[0], (theirs[0] / 2 + 0.5).clamp(0, 1).transpose(0, 1), rtol=0, atol=1e-6)


# Texts ---------------------------------------------------------------------------------------------------------------


def given(tokens: int, hidden: int, seed: int) -> tuple[Tensor, Tensor]:
    """Embeddings (tokens, 24) and their mask, with `hidden` tokens of padding."""
    mask = torch.ones(tokens)
    mask[tokens - hidden :] = 0
    return torch.randn((tokens, 24), generator=torch.Generator().manual_seed(seed)), mask


def test_texts_of_all_lengths_share_batches_behind_their_masks(pipe: Any) -> None:
    bare = tiny_ltx(**{**pipe.components, "text_encoder": None, "tokenizer": None})
    model, noise = load_model(bare), noise_of()
    embeds, mask = given(20, 4, seed=1)
    negative, negative_mask = given(9, 0, seed=2)
    tensors = {"prompt_embeds": embeds, "prompt_attention_mask": mask[None].bool(), "negative_prompt_embeds": negative[None], "negative_prompt_attention_mask": negative_mask}
    model.check(Condition(tensors=tensors), guided=True)
    encoded = model.encode([Condition("for verifiers only", tensors=tensors)], guided=True)
    assert encoded[0].bucket == load_model(pipe).encode([Condition("a cat")], guided=True)[0].bucket
    info = model.solver()
    ours = sample(model, model.schedule(info, STEPS, SIZE), info, noise[0, :1], encoded, noise[1:, :1], 4.0)
    longer = {"negative_prompt_embeds": torch.nn.functional.pad(negative, (0, 0, 0, 11))[None], "negative_prompt_attention_mask": torch.nn.functional.pad(negative_mask, (0, 11))[None]}
    theirs = run(swapped(bare), prompt_embeds=embeds[None], prompt_attention_mask=mask[None], **longer, latents=packed(noise[0, :1]), guidance_scale=4.0)
    torch.testing.assert_close(packed(ours), theirs, **CLOSE)
    with pytest.raises(UsageError, match="no text_encoder, so a prompt cannot be encoded; give prompt_embeds and prompt_attention_mask"):
        model.check(Condition("a cat"))


def test_what_the_mask_hides_has_no_effect_and_what_it_shows_has(pipe: Any) -> None:
    model, (latents,) = load_model(pipe), noise_of()[0, :1]
    embeds, mask = given(128, 40, seed=1)

    def velocity(embeds: Tensor, mask: Tensor) -> Tensor:
        (encoded,) = model.encode([Condition(tensors={"prompt_embeds": embeds, "prompt_attention_mask": mask})], guided=False)
        return model.forward(latents[None], torch.tensor([500.0]), encoded.rows)

    usual, hidden, shown = velocity(embeds, mask), embeds.clone(), embeds.clone()
    hidden[100:] += 3
    shown[:20] += 3
    torch.testing.assert_close(velocity(hidden, mask), usual, rtol=0, atol=1e-6)
    assert (velocity(shown, mask) - usual).abs().max() > 1e-3
    assert (velocity(embeds, torch.ones(128)) - usual).abs().max() > 1e-4


@pytest.mark.parametrize("extra", [{}, {"max_sequence_length": 12}], ids=str)
def test_prompts_are_encoded_as_in_the_pipeline(pipe: Any, extra: dict[str, Any]) -> None:
    model = load_model(pipe)
    (encoded,) = model.encode([Condition("a cat", negative_prompt="blurry", extra=extra)], guided=True)
    with torch.no_grad():
        theirs = swapped(pipe).encode_prompt("a cat", negative_prompt="blurry", **extra)
    for row, embeds, mask in zip(encoded.rows, theirs[::2], theirs[1::2], strict=True):
        torch.testing.assert_close(row["prompt_embeds"], embeds[0], rtol=0, atol=1e-6)
        assert torch.equal(row["prompt_attention_mask"], mask[0])
        assert 0 < row["prompt_attention_mask"].sum() < extra.get("max_sequence_length", 128)


REFUSED: dict[str, tuple[Condition, str]] = {
    "class": (Condition(class_label=3), "conditioned on text"),
    "unknown option": (Condition("a", extra={"framerate": 25}), "did you mean 'frame_rate'"),
    "rate": (Condition("a", extra={"frame_rate": 0}), "above 0 and up to 1000"),
    "length": (Condition("a", extra={"max_sequence_length": 600}), "between 1 and 512"),
    "decode": (Condition("a", extra={"decode_timestep": 0.05}), "videos are decoded at timestep 0"),
    "no mask": (Condition(tensors={"prompt_embeds": torch.zeros(6, 24)}), "without prompt_attention_mask"),
    "mask": (Condition(tensors={"prompt_embeds": torch.zeros(6, 24), "prompt_attention_mask": torch.zeros(6)}), "with a token at least"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_conditions_are_checked_before_weights_are_loaded(pipe: Any, case: str) -> None:
    condition, says = REFUSED[case]
    with pytest.raises(UsageError, match=says) as caught:
        outline(pipe, LoadOptions()).check(condition, guided=True)
    assert "\n" not in str(caught.value)


def test_sizes_and_lengths(pipe: Any) -> None:
    plan = outline(pipe, LoadOptions())
    assert isinstance(plan, VideoOutline)
    assert isinstance(load_model(pipe), VideoOutline)
    assert (plan.media, plan.default_steps, plan.default_guidance_scale) == ("video", 50, 3.0)
    assert plan.size(None, None) == load_model(pipe).size(None, None) == (512, 704, 161)
    assert plan.latent_shape(plan.size(32, 64, 9)) == (8, 3, 8, 16)
    assert plan.frame_rate(Condition("a")) == 25.0
    with pytest.raises(UsageError, match="height is 18 but must be a multiple of 4; the nearest are 16 or 20"):
        plan.size(18, None, None)
    for frames, nearest in ((8, "5 or 9"), (2, "1 or 5"), (0, "1")):
        with pytest.raises(UsageError, match=f"frames is {frames} but must be one more than a multiple of 4; the nearest are {nearest}"):
            plan.size(None, None, frames)


# Searching -----------------------------------------------------------------------------------------------------------


def test_users_meet_their_own_video_first(pipe: Any, tmp_path: Path) -> None:
    result = tsdiff.search(pipe, PROMPTS[0], policy=BestOfN(n=1), verifier="luminance", steps=3, seed=7, fps=24, initial_noise="torch", baseline=False, out=tmp_path, **ASKED)
    theirs = swapped(pipe)(PROMPTS[0], num_inference_steps=3, generator=torch.Generator().manual_seed(7), frame_rate=24, height=32, width=64, num_frames=5).frames[0]
    frames = tsdiff.load_run(result.path).frames()
    assert len(frames) == len(theirs) == 5
    for ours, other in zip(frames, theirs, strict=True):
        assert np.abs(np.asarray(ours, dtype=int) - np.asarray(other, dtype=int)).max() <= 1  # rounding to 8 bits
    assert np.array_equal(np.asarray(result.image), np.asarray(frames[2]))
    lights = [float((np.asarray(frames[i], dtype=float) @ [0.2126, 0.7152, 0.0722]).mean() / 255) for i in (0, 2, 4)]
    assert result.score == pytest.approx(np.mean(lights), abs=2e-3)


@pytest.mark.parametrize("scale", [1.0, 3.0], ids=["one row", "two rows"])
def test_a_search_is_counted_and_leaves_the_pipeline_as_it_was(scale: float) -> None:
    own = tiny_ltx()
    before = {name: (id(part), sorted(vars(part)), [len(child._forward_hooks) for child in part.modules()]) for name, part in own.components.items() if isinstance(part, torch.nn.Module)}
    scheduler = json.dumps({key: str(value) for key, value in vars(own.scheduler).items()})
    rows = 0

    def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal rows
        rows += kwargs["hidden_states"].shape[0]

    handle = own.transformer.register_forward_pre_hook(count, with_kwargs=True)
    results = tsdiff.search(own, PROMPTS, policy=Beam(width=2, branch=2), verifier="luminance", steps=4, solver="flow-ancestral", guidance_scale=scale, **ASKED)
    handle.remove()
    assert not results.failures
    assert rows == results.engine.network_rows
    ledgers = [one.ledger for result in results for one in (result, result.baseline)]
    assert results.engine.rows == sum(ledger.rows for ledger in ledgers)
    assert all(ledger.rows == ledger.nfe * (1 + (scale > 1)) for ledger in ledgers)
    after = {name: (id(part), sorted(vars(part)), [len(child._forward_hooks) for child in part.modules()]) for name, part in own.components.items() if isinstance(part, torch.nn.Module)}
    assert after == before
    assert json.dumps({key: str(value) for key, value in vars(own.scheduler).items()}) == scheduler


def test_neither_order_nor_neighbours_change_a_byte(pipe: Any, tmp_path: Path) -> None:
    """In deterministic mode every call has the same number of rows, whatever they are; searches of one prompt are filled up."""
    shared = {"policy": Beam(width=2, branch=2), "verifier": "luminance", "steps": 3, "solver": "flow-ancestral", "guidance_scale": 3.0, "deterministic": True, "max_batch": 3}
    orders = [PROMPTS, PROMPTS[::-1], PROMPTS[:1]]
    trees: list[dict[str, bytes]] = []
    for number, prompts in enumerate(orders):
        results = tsdiff.search(pipe, prompts, **shared, **ASKED, out=tmp_path / str(number))
        trees.append({result.prompt: b"".join((result.path / name).read_bytes() for name in ("tree.json", "baseline.json", "best.webp", "latents.safetensors")) for result in results})
    assert trees[0] == trees[1]
    assert trees[2] == {PROMPTS[0]: trees[0][PROMPTS[0]]}


# Folders -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ltx") / "saved"
    tiny_ltx(folder)
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
    latents, time = noise_of()[0, :1], torch.tensor([500.0])
    velocities = [one.forward(latents, time, one.encode(conditions()[:1], guided=False)[0].rows) for one in (model, load_model(pipe))]
    # Weights that are read from a file lie elsewhere in memory, which the last digits of matrix kernels depend on.
    torch.testing.assert_close(*velocities, rtol=0, atol=1e-5)
    assert outline(str(folder), LoadOptions()).schedule(model.solver(), 10, SIZE) == model.schedule(model.solver(), 10, SIZE)


def test_half_precision_keeps_latents_in_float32(saved: Path) -> None:
    model, noise = load_model(saved, device="cpu", dtype="bfloat16"), noise_of()
    info = model.solver()
    encoded = model.encode(conditions(), guided=True)
    ours = sample(model, model.schedule(info, 2, SIZE), info, noise[0], encoded, noise[1:], 4.0)
    assert (model.dtype, ours.dtype, model.decode(ours).pixels.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    theirs = run(swapped(model.pipeline), prompt=PROMPTS, negative_prompt=["blurry"] * 2, latents=packed(noise[0]), num_inference_steps=2, guidance_scale=4.0)
    assert (packed(ours) - theirs).abs().max() < 0.05 * ours.std()


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no transformer": (lambda f: edit(f / "model_index.json", transformer=[None, None]), "has no transformer"),
    "another transformer": (lambda f: edit(f / "model_index.json", transformer=["diffusers", "WanTransformer3DModel"]), "WanTransformer3DModel, which is not supported"),
    "an autoencoder of images": (lambda f: edit(f / "model_index.json", vae=["diffusers", "AutoencoderKL"]), "AutoencoderKL, which is not supported"),
    "no tokenizer": (lambda f: edit(f / "model_index.json", tokenizer=[None, None]), "has no tokenizer"),
    "diffusion scheduler": (lambda f: edit(f / "model_index.json", scheduler=["diffusers", "DDIMScheduler"]), "is not for flow models"),
    "other channels": (lambda f: edit(f / "transformer/config.json", in_channels=16), "takes 16 channels but its autoencoder makes 8"),
    "patches": (lambda f: edit(f / "transformer/config.json", patch_size=2), "reads patches of 2 pixels and 1 frames"),
    "other text width": (lambda f: edit(f / "text_encoder/config.json", d_model=32), "do not belong together"),
    "no weights": (lambda f: (f / "transformer/diffusion_pytorch_model.safetensors").unlink(), "transformer' holds no weights"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_one_clear_line_before_weights_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights were read"))
    spoil, says = DAMAGE[damage]
    spoil(folder)
    with pytest.raises(UsageError, match=says) as caught:
        outline(str(folder), LoadOptions())
    assert "\n" not in str(caught.value)


def test_other_pipelines_of_the_family_are_refused(pipe: Any) -> None:
    with pytest.raises(UsageError, match="LTXImageToVideoPipeline"):
        load_model(diffusers.LTXImageToVideoPipeline(**pipe.components))
