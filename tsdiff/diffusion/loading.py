"""Load models of diffusers: from a saved pipeline's folder, a hub id, or a pipeline object that is left untouched.

A model family is one file with an outline class, and one line of `FAMILIES`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any

from tsdiff.diffusion.devices import check_dtype
from tsdiff.diffusion.lora import check_loras
from tsdiff.diffusion.memory import check_memory
from tsdiff.diffusion.source import Source, source_of
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.models import ModelReference, load_options, resolve_model
from tsdiff.treesearch.protocols import DiffusionModel, LoadOptions, ModelOutline

FAMILIES = {
    "StableDiffusionPipeline": "tsdiff.diffusion.stable_diffusion:StableDiffusionOutline",
    "StableDiffusionImg2ImgPipeline": "tsdiff.diffusion.stable_diffusion:StableDiffusionOutline",
    "LatentConsistencyModelPipeline": "tsdiff.diffusion.stable_diffusion:StableDiffusionOutline",
    "StableDiffusionXLPipeline": "tsdiff.diffusion.stable_diffusion_xl:StableDiffusionXLOutline",
    "StableDiffusionXLImg2ImgPipeline": "tsdiff.diffusion.stable_diffusion_xl:StableDiffusionXLOutline",
    "StableDiffusion3Pipeline": "tsdiff.diffusion.stable_diffusion_3:StableDiffusion3Outline",
    "StableDiffusion3Img2ImgPipeline": "tsdiff.diffusion.stable_diffusion_3:StableDiffusion3Outline",
    "FluxPipeline": "tsdiff.diffusion.flux:FluxOutline",
    "FluxImg2ImgPipeline": "tsdiff.diffusion.flux:FluxOutline",
    "PixArtSigmaPipeline": "tsdiff.diffusion.pixart:PixArtOutline",
    "PixArtAlphaPipeline": "tsdiff.diffusion.pixart:PixArtOutline",
    "LTXPipeline": "tsdiff.diffusion.ltx:LTXOutline",
    "DiTPipeline": "tsdiff.diffusion.dit:DiTOutline",
    "SiTPipeline": "tsdiff.diffusion.sit:SiTOutline",
}
"""Pipeline class -> where its family's outline is; an outline is made from a `Source`."""


def outline(reference: Any, options: LoadOptions) -> ModelOutline:
    """What a pipeline is, from its configs alone.

    Args:
      reference: the folder of a saved pipeline, a hub id "org/name" (its configs are downloaded), or a pipeline object.
      options: how to load it. For an object, device and dtype must be "auto".

    Raises:
      UsageError: if it is no pipeline, its class is not supported, or its folder is incomplete or damaged.
      SetupError: if a hub id cannot be reached, or is not in the cache when offline.
    """
    check_dtype(options.dtype)
    source = source_of(reference, options)
    check_loras(source)
    check_memory(source, _family(source).takes_no)
    return outline_of(source)


def outline_of(source: Source) -> ModelOutline:
    """The outline of the family that a source belongs to. Raises UsageError if its class is not supported."""
    family: ModelOutline = _family(source)(source)
    return family


def _family(source: Source) -> Any:
    if source.class_name not in FAMILIES:
        raise UsageError(f"{source.class_name} ({source.name!r}) is not supported; supported are {', '.join(sorted(FAMILIES))}")
    module, _, name = FAMILIES[source.class_name].partition(":")
    return getattr(importlib.import_module(module), name)


def load_model(
    model: ModelReference,
    *,
    device: str = "auto",
    dtype: str = "auto",
    offline: bool = False,
    revision: str | None = None,
    variant: str | None = None,
    strict_scheduler: bool = False,
    lora: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    latent_dtype: str = "float32",
    offload: bool = False,
    vae_slicing: bool = False,
    vae_tiling: bool = False,
    channels_last: bool = False,
    compile: bool = False,
    x0_decoder: str | os.PathLike[str] | None = None,
) -> DiffusionModel:
    """Load a model, ready to run. `tsdiff.search` takes the same options.

    Args:
      model: a registered name ("gaussian"), the folder of a saved diffusers pipeline, a hub id "org/name", or a pipeline
        object. An object is never changed and keeps its device and dtype.
      device: "cpu", "cuda", "cuda:1", "mps", or "auto" for the best there is.
      dtype: "float32", "float16" ("fp16") or "bfloat16" ("bf16"); "auto" is float32 on a CPU, and elsewhere bfloat16 where the
        device has it.
      offline: never touch the network.
      revision, variant: of a hub repository, as in diffusers (e.g. variant="fp16").
      strict_scheduler: refuse a pipeline whose scheduler is not supported instead of replacing the scheduler.
      lora: one or several LoRA files that are merged into the weights of a folder or hub id, "PATH" or "PATH:SCALE".
      latent_dtype: "model" rounds latents to the network's number format after every step, as pipelines do.
      offload: keep only the components at work on the device, the others in host memory.
      vae_slicing, vae_tiling: decode images one by one, and large ones in overlapping tiles.
      channels_last: lay out the weights of convolutions with their channels last.
      compile: compile the network's repeated blocks; searches then make network calls of one row count.
      x0_decoder: folder of an `AutoencoderTiny` that decodes clean estimates for verifiers.

    Raises:
      UsageError: for a name, folder, class or option that will not do; before weights are read where it can be known.
      SetupError: if the device is not there, the weights cannot be obtained, or LoRA files are given without peft.
    """
    return resolve_model(model, load_options(locals())).load()
