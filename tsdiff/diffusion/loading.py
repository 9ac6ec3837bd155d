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
from tsdiff.diffusion.source import source_of
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.models import ModelReference, file_names, resolve_model
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
    if source.class_name not in FAMILIES:
        raise UsageError(f"{source.class_name} ({source.name!r}) is not supported; supported are {', '.join(sorted(FAMILIES))}")
    module, _, name = FAMILIES[source.class_name].partition(":")
    family: ModelOutline = getattr(importlib.import_module(module), name)(source)
    return family


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
) -> DiffusionModel:
    """Load a model, ready to run.

    Args:
      model: a registered name ("gaussian"), the folder of a saved diffusers pipeline, a hub id "org/name", or a pipeline
        object. An object is never changed and keeps its device and dtype.
      device: "cpu", "cuda", "cuda:1", "mps", or "auto" for the best there is.
      dtype: "float32", "float16" or "bfloat16"; "auto" is float32 on a CPU and float16 elsewhere.
      offline: never touch the network.
      revision, variant: of a hub repository, as in diffusers (e.g. variant="fp16").
      strict_scheduler: refuse a pipeline whose scheduler is not supported instead of replacing the scheduler.
      lora: one or several LoRA files that are merged into the weights of a folder or hub id, "PATH" or "PATH:SCALE".

    Raises:
      UsageError: for a name, folder, class or option that will not do; before weights are read where it can be known.
      SetupError: if the device is not there, the weights cannot be obtained, or LoRA files are given without peft.
    """
    options = LoadOptions(device, dtype, offline, revision, variant, strict_scheduler, file_names(lora))
    return resolve_model(model, options).load()
