"""What is peculiar to LTX-Video; what it has in common with all families is in `test_family_*.py`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family import Shelf, ours
from family_ltx import LTX
from flow_reference import swapped
from tiny_ltx import tiny_ltx, video_autoencoder

import tsdiff
from tsdiff.diffusion.loading import load_model, outline
from tsdiff.policies import BestOfN
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Condition, LoadOptions, VideoOutline


@pytest.fixture(scope="module")
def pipe(shelf: Shelf) -> Any:
    """Tests must not change it."""
    return shelf.pipe(LTX)


@pytest.mark.parametrize("size", [(32, 32, 1), (64, 32, 9)])
def test_levels_follow_the_size_and_the_length(pipe: Any, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int, int]) -> None:
    model = load_model(pipe)
    call = LTX.call(size=size, noise=True, latent=model.latent_shape(size))
    schedule = model.schedule(model.solver(), call.steps, size)
    assert schedule.sigma != model.schedule(model.solver(), call.steps, LTX.size).sigma
    assert schedule.sigma[-2:] == (pytest.approx(0.1), 0.0)  # shift_terminal
    LTX.require_equal(ours(model, call), LTX.reference(pipe, call, monkeypatch))


def test_the_frame_rate_may_differ_in_a_batch(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, first = load_model(pipe), LTX.conditions[0]
    told = [dataclasses.replace(first, extra={**first.extra, "frame_rate": rate}) for rate in (8, 50.0)]
    encoded = model.encode(told, guided=False)
    assert encoded[0].bucket == encoded[1].bucket
    alone = [LTX.call(conditions=[condition], noise=True) for condition in told]
    assert alone[0].noise is not None
    both = ours(model, LTX.call(conditions=told, noise=alone[0].noise.expand(-1, 2, -1, -1, -1, -1)))
    for row, call in zip(both, alone, strict=True):
        LTX.require_equal(row[None], LTX.reference(pipe, call, monkeypatch))
    assert (both[0] - both[1]).abs().max() > 1e-3


# Decoding ------------------------------------------------------------------------------------------------------------


def test_decoders_that_are_told_a_timestep_decode_as_in_the_pipeline(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tiny_ltx(vae=video_autoencoder(timestep_conditioning=True).eval(), **others(pipe))
    clean, pictures = (LTX.reference(own, LTX.call(steps=2, noise=True, output=output), monkeypatch) for output in ("latent", "pt"))
    media = load_model(own).decode(clean)
    assert (media.kind, media.pixels.shape) == ("video", (2, 5, 3, 32, 64))
    torch.testing.assert_close(media.pixels, pictures, rtol=0, atol=1e-5)
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
    latents = torch.randn((2, *LTX.latent), generator=torch.Generator().manual_seed(5))
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


# Samples -------------------------------------------------------------------------------------------------------------


def test_lengths_and_frame_rates(pipe: Any) -> None:
    plan = outline(pipe, LoadOptions())
    assert isinstance(plan, VideoOutline)
    assert isinstance(load_model(pipe), VideoOutline)
    assert plan.latent_shape(plan.size(32, 64, 9)) == (8, 3, 8, 16)
    assert plan.frame_rate(Condition("a")) == 25.0
    for frames, nearest in ((8, "5 or 9"), (2, "1 or 5"), (0, "1")):
        with pytest.raises(UsageError, match=f"frames is {frames} but must be one more than a multiple of 4; the nearest are {nearest}"):
            plan.size(None, None, frames)


def test_a_video_is_scored_by_its_key_frames_and_shown_by_the_middle_one(pipe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    call = LTX.call(conditions=[dataclasses.replace(LTX.conditions[0], extra={"frame_rate": 24})], steps=3, seed=7, guidance="on", output="pil")
    result = tsdiff.search(
        pipe, LTX.conditions[0].prompt, negative_prompt="blurry", policy=BestOfN(n=1), verifier="luminance", steps=3, seed=7, fps=24,
        initial_noise="torch", baseline=False, guidance_scale=call.scale, out=tmp_path, **call.sides,
    )  # fmt: skip
    (theirs,) = LTX.reference(pipe, call, monkeypatch)
    frames = tsdiff.load_run(result.path).frames()
    assert len(frames) == len(theirs) == 5
    for own, other in zip(frames, theirs, strict=True):
        assert np.abs(np.asarray(own, dtype=int) - np.asarray(other, dtype=int)).max() <= 1  # rounding to 8 bits
    assert np.array_equal(np.asarray(result.image), np.asarray(frames[2]))
    lights = [float((np.asarray(frames[i], dtype=float) @ [0.2126, 0.7152, 0.0722]).mean() / 255) for i in (0, 2, 4)]
    assert result.score == pytest.approx(np.mean(lights), abs=2e-3)


def test_half_precision_follows_the_pipeline(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(shelf.folder(LTX), device="cpu", dtype="bfloat16")
    call = LTX.call(steps=2, guidance="on", noise=True)
    mine = ours(model, call)
    assert (mine - LTX.reference(model.pipeline, call, monkeypatch)).abs().max() < 0.05 * mine.std()
