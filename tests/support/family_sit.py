"""SiT to the tests of all families: there are folders alone, and the paper's own code instead of a pipeline."""

from __future__ import annotations

import argparse
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from damages import configured, indexed
from family import Call, Family, Refused
from flow_reference import NAMES, NoisyFlow
from sit_reference import CHANNELS, HEADS, SIDE, checkpoint, guided, tiny_vae_folder
from torch import Tensor

from tsdiff.diffusion.sit_checkpoint import convert
from tsdiff.diffusion.solvers import SOLVERS, solver_info
from tsdiff.treesearch.protocols import Condition


@cache
def weights() -> dict[str, Tensor]:
    """Those of the checkpoint that `save` converts; nobody must change them."""
    return checkpoint()


def save(folder: Path) -> None:
    """A converted checkpoint of the training script."""
    options = argparse.Namespace(model="SiT-S/2", path_type="Linear", prediction="velocity", epochs=1400, ckpt=None)
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "0050000.pt"
        torch.save({"model": checkpoint(seed=1), "ema": weights(), "opt": {"state": {}, "param_groups": []}, "args": options}, source)
        convert(source, folder, vae=tiny_vae_folder(Path(place) / "vae"), heads=HEADS)


def reference(pipe: Any, call: Call, patch: pytest.MonkeyPatch) -> Any:
    """Steps from noise at t = 0 to data at t = 1: plain ones of Euler's, or those of any flow."""
    info = solver_info(call.solver, None, tuple(SOLVERS))
    shape = (len(call.conditions), CHANNELS, SIDE, SIDE)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(call.seed)) if call.noise is None else call.noise[0].clone()
    scheduler = NoisyFlow(shift=1.0)
    scheduler.solver, scheduler.noises = info, iter([] if call.noise is None else call.drawn())
    scheduler.set_timesteps(sigmas=[1 - step / call.steps for step in range(call.steps)])
    y = torch.tensor([one.class_label for one in call.conditions])
    for step, time in enumerate(scheduler.timesteps):
        along = guided(weights(), x, torch.full((len(x),), step / call.steps), y, call.scale)
        x = scheduler.step(-along, time, x)[0] if info.stochastic else x + along / call.steps
    if call.output == "latent":
        return x
    with torch.no_grad():
        pixels = (pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    return pixels if call.output == "pt" else pipe.numpy_to_pil(pixels.permute(0, 2, 3, 1).numpy())


SIT = Family(
    name="sit",
    make=None,
    save=save,
    reference=reference,
    conditions=[Condition("gold", class_label=3), Condition("fish", class_label=7)],
    multiple=None,
    solvers=NAMES,
    branching="flow-sde",
    defaults=(50, 4.0),
    close=1e-5,
    refused={
        "no class": Refused(Condition(), r"conditioned on classes; give one \(--class, class_label=\), by number from 0 to 9"),
        "a name": Refused(Condition(class_label="cat"), r"knows its classes by number alone, from 0 to 9; give a number instead of 'cat', or add id2label to its model_index.json"),
        "too high": Refused(Condition(class_label=10), "has no class 10; classes run from 0 to 9"),
    },
    damages={
        "a transformer of Stable Diffusion 3": indexed("SD3Transformer2DModel, which is not supported", transformer=["diffusers", "SD3Transformer2DModel"]),
        "other channels": configured("transformer", "takes 8 channels but its autoencoder makes 4", in_channels=8),
        "guided channels": indexed("guided_channels .* is 5 but must be a whole number between 1 and 4", guided_channels=5),
        "names": indexed("id2label .* says '12': 'cat', but .* numbers from 0 to 9", id2label={"12": "cat"}),
    },
)
