"""Searches that start from an image, in the families that diffusers has no such pipeline for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from family_folders import asked, condition, guidance, kept_in
from PIL import Image
from sit_reference import checkpoint, guided
from torch import Tensor

import tsdiff
from tsdiff.policies import BestOfN
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.noise import derive, initial_noise, normals

STEPS, STRENGTH, SEED = 5, 0.6, 3
SCALE = 3.0


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Saved pipelines by family; tests must not change them."""
    return kept_in(tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("family", ["pixart", "dit", "sit"])
def test_an_initial_image_is_noised_and_remade_by_the_last_steps(folders: Any, family: str) -> None:
    picture = Image.new("RGB", (16, 16), (200, 40, 90))
    solver = "flow-euler" if family == "sit" else "ddim"
    result = tsdiff.search(
        folders(family), condition(family, 3), policy=BestOfN(n=1), verifier="luminance", steps=STEPS, seed=SEED, init_image=picture, strength=STRENGTH,
        solver=solver, baseline=False, device="cpu", **asked(family), **guidance(family),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL.from_pretrained(folders(family) / "vae").eval()
    pixels = torch.tensor([200.0, 40.0, 90.0])[None, :, None, None].expand(1, 3, 16, 16) / 255
    noises = [torch.from_numpy(normals(derive(SEED, "encode"), 256).reshape(1, 4, 8, 8)), torch.from_numpy(initial_noise(derive(SEED, "draw", 0), (4, 8, 8)))[None]]
    with torch.no_grad():
        posterior = vae.encode(2 * pixels - 1).latent_dist
        clean = (posterior.mean + posterior.std * noises[0]) * vae.config.scaling_factor
        theirs = (remade_flow if family == "sit" else remade)(folders(family), family, clean, noises[1])
    ours = result.latents[result.node.index][None]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * max(1.0, float(theirs.std())))
    assert (ours - clean).abs().max() > 0.1
    assert result.ledger.nfe == STEPS * STRENGTH


def remade(folder: Path, family: str, clean: Tensor, noise: Tensor) -> Tensor:
    """As image-to-image pipelines do, with the scheduler DDIM of diffusers."""
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    scheduler = diffusers.DDIMScheduler.from_config(config, clip_sample=False)
    scheduler.set_timesteps(STEPS)
    times = scheduler.timesteps[STEPS - int(STEPS * STRENGTH) :]
    predict = predictor(folder, family)
    latents = scheduler.add_noise(clean, noise, times[:1])
    for time in times:
        cond, uncond = predict(latents, time)
        latents = scheduler.step(uncond + SCALE * (cond - uncond), time, latents).prev_sample
    return latents


def predictor(folder: Path, family: str) -> Any:
    """The noise that a network sees in latents (1, 4, 8, 8) at a time, with its condition and without."""
    if family == "dit":
        network = diffusers.DiTTransformer2DModel.from_pretrained(folder / "transformer").eval()
        return lambda latents, time: [network(latents, timestep=time.expand(1), class_labels=torch.tensor([label])).sample[:, :4] for label in (3, 1000)]
    pipe = diffusers.PixArtSigmaPipeline.from_pretrained(folder)
    wanted = condition(family, 3)
    embeds, mask, other, other_mask = pipe.encode_prompt(wanted.prompt, negative_prompt=wanted.negative_prompt, **wanted.extra)
    sizes = {"resolution": None, "aspect_ratio": None}
    return lambda latents, time: [
        pipe.transformer(latents, encoder_hidden_states=text, encoder_attention_mask=hidden, timestep=time.expand(1), added_cond_kwargs=sizes).sample[:, :4]
        for text, hidden in ((embeds, mask), (other, other_mask))
    ]


def remade_flow(folder: Path, family: str, clean: Tensor, noise: Tensor) -> Tensor:
    """As SiT's paper has it: along the straight path back to a time, and from there on with Euler's steps."""
    start = STEPS - int(STEPS * STRENGTH)
    x = start / STEPS * clean + (1 - start / STEPS) * noise
    for step in range(start, STEPS):
        x = x + guided(checkpoint(), x, torch.tensor([step / STEPS]), torch.tensor([3]), SCALE) / STEPS
    return x


def test_videos_do_not_start_from_an_image_and_say_so_before_weights_are_read(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights were read"))
    with pytest.raises(UsageError, match=r"init_image was given but .* makes videos, which cannot start from an image"):
        tsdiff.search(folders("ltx"), condition("ltx"), verifier="luminance", init_image=Image.new("RGB", (32, 32)), strength=0.5, device="cpu", **asked("ltx"))
