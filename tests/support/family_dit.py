"""DiT to the tests of all families."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from damages import configured, edit, indexed
from diffusers.pipelines.dit import pipeline_dit
from family import Call, Family, Refused
from sd_reference import SCHEDULERS, inject, swapped
from tiny_dit import tiny_dit
from torch import Tensor

from tsdiff.diffusion.solvers import SOLVERS, solver_info
from tsdiff.treesearch.protocols import Condition

NAMES = {"0": "tench, Tinca tinca", "134": "crane", "207": "golden retriever", "517": "crane"}


def save(folder: Path) -> None:
    """A pipeline whose classes have names."""
    tiny_dit(folder)
    edit(folder / "model_index.json", id2label=NAMES)


def as_published(folder: Path) -> None:
    """Under the name of a class that diffusers has since split up."""
    edit(folder / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    edit(folder / "transformer/config.json", _class_name="Transformer2DModel")


def reference(pipe: Any, call: Call, patch: pytest.MonkeyPatch) -> Any:
    """See `Family`."""
    info = solver_info(call.solver, None, tuple(SOLVERS))
    if info.kind == "euler":
        return _as_pipelines_do(pipe, call, patch)
    other = swapped(pipe, call.solver)
    if info.eta:
        other.scheduler.step = partial(other.scheduler.step, eta=info.eta)  # the pipeline cannot say it
    if call.noise is not None:
        first = call.noise[0]
        inject(patch, [torch.cat([one] * (1 + (call.scale > 1))) for one in call.drawn()])
        patch.setattr(pipeline_dit, "randn_tensor", lambda *args, **kwargs: first)
    decode, seen = pipe.vae.decode, []
    patch.setattr(pipe.vae, "decode", lambda latents: seen.append(latents) or decode(latents))
    labels, latent = [one.class_label for one in call.conditions], call.output == "latent"
    generator = {} if call.noise is not None else call.start()
    pictures = other(labels, guidance_scale=call.scale, num_inference_steps=call.steps, output_type="pt" if latent else call.output, **generator).images
    return seen[0] * pipe.vae.config.scaling_factor if latent else pictures


def _as_pipelines_do(pipe: Any, call: Call, patch: pytest.MonkeyPatch) -> Tensor:
    """Latents of a loop around Euler's schedulers, as in any pipeline but DiT's, which hands what the network sees to the step."""
    assert call.noise is not None
    inject(patch, call.drawn())
    scheduler = swapped(pipe, call.solver).scheduler
    scheduler.set_timesteps(call.steps)
    labels = [one.class_label for one in call.conditions]
    latents = call.noise[0] * scheduler.init_noise_sigma
    for time in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, time)
        with torch.no_grad():
            cond, uncond = (pipe.transformer(scaled, timestep=time.expand(len(labels)), class_labels=torch.tensor(which)).sample[:, :4] for which in (labels, [1000] * len(labels)))
        latents = scheduler.step(uncond + call.scale * (cond - uncond) if call.scale > 1 else cond, time, latents).prev_sample
    return latents


DIT = Family(
    name="dit",
    make=tiny_dit,
    save=save,
    reference=reference,
    conditions=[Condition("gold", class_label=207), Condition("fish", class_label=3)],
    multiple=None,
    solvers=tuple(SCHEDULERS),
    branching="ddpm",
    defaults=(50, 4.0),
    wide=True,
    close=1e-5,
    refused={
        "no class": Refused(Condition(), r"conditioned on classes; give one \(--class, class_label=\), by name or by number from 0 to 999"),
        "another name": Refused(Condition(class_label="golden retreiver"), "unknown class of .* did you mean 'golden retriever'.* Numbers from 0 to 999"),
        "two classes": Refused(Condition(class_label="crane"), "class 'crane' .* may be any of 134, 517; give its number"),
        "too high": Refused(Condition(class_label=1000), "no class 1000; classes run from 0 to 999"),
    },
    damages={
        "a transformer of PixArt": indexed("PixArtTransformer2DModel, which is not supported", transformer=["diffusers", "PixArtTransformer2DModel"]),
        "another norm": configured("transformer", "none of DiT's .*ada_norm_single", norm_type="ada_norm_single"),
        "other channels": configured("transformer", "takes 8 channels but its autoencoder makes 4", in_channels=8),
        "odd outputs": configured("transformer", "takes 4 channels and makes 6", out_channels=6),
        "names": indexed("id2label .* must give a name to numbers from 0 to 999", id2label={"cat": "cat"}),
        "names as a list": indexed("id2label .* must give a name", id2label=["cat"]),
    },
    saved_as={"as the published models were": as_published},
)
