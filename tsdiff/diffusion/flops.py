"""How many operations a network row and a decode take: counted on torch's meta device, where nothing is stored or computed.

Matrix products, convolutions and attention count, two operations for each multiply-add, which is all but a few per cent of the
work. Attention counts as the two products that it is made of, however it is computed.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from tsdiff.diffusion.quiet import quiet_libraries
from tsdiff.treesearch.protocols import Flops, LoadOptions, Size

if TYPE_CHECKING:
    from tsdiff.diffusion.family import PipelineOutline

MIDDLE = 500.0
"""A timestep; the number of operations depends on none."""


def count(outline: PipelineOutline, size: Size) -> Flops:
    """The operations of one network row of a size, and of decoding one sample.

    The model is the family's own with components of the same configs and no weights, so that what is counted is the very
    call that a search makes.
    """
    import torch

    model = made_of_configs(outline, "meta")
    latents, time = torch.zeros((1, *outline.latent_shape(size)), device="meta"), torch.full((1,), MIDDLE, device="meta")
    row = {name: tensor.to("meta") for name, tensor in outline.row().items()}
    tiny = outline.source.options.x0_decoder
    estimates = None if tiny is None else operations(lambda: _tiny(tiny).decode(latents))
    return Flops(operations(lambda: model.forward(latents, time, [row])), operations(lambda: model.decode(latents)), estimates)


def operations(call: Callable[[], Any]) -> int:
    """The operations of what a function does."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def made_of_configs(outline: PipelineOutline, device: str) -> Any:
    """The model of an outline with new components of its configs: with random weights, or with none on the meta device.

    It has a network and an autoencoder, and nothing to encode prompts with. Weights have torch's default dtype.
    """
    source = outline.source
    assert outline.network is not None
    component, class_name = outline.network
    classes = {component: class_name, "vae": source.components["vae"][1]}
    parts = {name: _built(classes[name], dict(source.config(name)), device) for name in classes}
    shell = SimpleNamespace(**dict.fromkeys(source.components) | parts, components=parts, _execution_device=device)
    bare = copy.copy(outline)
    bare.source = dataclasses.replace(source, pipeline=shell, options=LoadOptions())
    return bare.load()


def _built(class_name: str, config: dict[str, Any], device: str) -> Any:
    """A component of diffusers."""
    with quiet_libraries():
        import diffusers
        import torch

        with torch.device(device):
            module = getattr(diffusers, class_name).from_config(config)
        return module.to(device).eval()


def _tiny(folder: str) -> Any:
    return _built("AutoencoderTiny", json.loads((Path(folder).expanduser() / "config.json").read_text()), "meta")
