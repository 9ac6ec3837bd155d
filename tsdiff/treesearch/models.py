"""From what a caller names a model by to its outline: a registered name, a folder, a hub id, or an object.

Nothing is loaded here, and torch is not imported: the registry's entry for the model does the rest.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from tsdiff.treesearch.errors import UsageError, unknown_name
from tsdiff.treesearch.protocols import LoadOptions, ModelOutline
from tsdiff.treesearch.registry import models, split_reference

ModelReference: TypeAlias = str | os.PathLike[str] | Any
"""A registered name ("gaussian"), the path of a pipeline folder, a hub id ("org/name"), a pipeline of diffusers, or a
model that is loaded already."""

PIPELINES = "diffusers"
"""The registry entry that reads pipeline folders, hub ids and pipeline objects; not a model name itself."""

_LASTING = ("dtype", "offline", "revision", "variant", "lora", "latent_dtype", "vae_tiling", "x0_decoder")
"""Options of loading that results depend on, and what finds the weights."""

_OF_PIPELINES = ("lora", "latent_dtype", "offload", "vae_slicing", "vae_tiling", "channels_last", "compile", "x0_decoder")
"""Options that models of other kinds have no use for."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve_model(reference: ModelReference, options: LoadOptions | None = None) -> ModelOutline:
    """The outline of a model, before its weights are loaded.

    Args:
      reference: a registered name (with options, "gaussian:process=flow"), an existing folder, a hub id "org/name", a pipeline object of diffusers, or a
        model that is loaded already (returned as it is). A registered name wins over a folder of the same name.
      options: how to load it; None takes the defaults.

    Raises:
      UsageError: if the name is unknown (the nearest are named), the path does not exist, or what is there is not a
        supported model.
      SetupError: if a hub id cannot be reached.
    """
    options = LoadOptions() if options is None else options
    if not isinstance(reference, (str, os.PathLike)):
        if _is_pipeline(reference):
            return _pipelines(reference, options)
        return _loaded(reference, options)
    text = os.fspath(reference)
    name = split_reference(text)[0]
    if isinstance(reference, str) and name != PIPELINES and name in models:
        _refuse_others(f"model {name!r}", options)
        outline: ModelOutline = models.load(name)(text, options)
        return outline
    if text and Path(text).expanduser().exists():
        return _pipelines(str(Path(text).expanduser()), options)
    if isinstance(reference, str) and _HUB_ID.fullmatch(text):
        return _pipelines(text, options)
    if not isinstance(reference, str) or "/" in text or os.sep in text:
        raise UsageError(f"model folder {text!r} does not exist; give the folder of a saved diffusers pipeline, a hub id 'org/name' or a name of `tsdiff list models`")
    raise unknown_name(
        "model", text, [name for name in models.names() if name != PIPELINES],
        "A model is also the folder of a diffusers pipeline, or a hub id 'org/name'.",
    )


def _pipelines(reference: Any, options: LoadOptions) -> ModelOutline:
    outline: ModelOutline = models.load(PIPELINES)(reference, options)
    return outline


def _is_pipeline(reference: object) -> bool:
    """Whether an object is a pipeline of diffusers, told without importing diffusers."""
    return any(cls.__name__ == "DiffusionPipeline" and cls.__module__.startswith("diffusers.") for cls in type(reference).__mro__)


def _loaded(reference: Any, options: LoadOptions) -> ModelOutline:
    # A protocol cannot be checked by isinstance without listing every attribute, so these three stand for it.
    if not all(callable(getattr(reference, name, None)) for name in ("schedule", "latent_shape", "load")):
        raise UsageError(f"a {type(reference).__name__} object is not a model; give a name, a folder, a hub id 'org/name', a pipeline of diffusers or a loaded model")
    if options.device != "auto" or options.dtype != "auto":
        raise UsageError("a loaded model keeps its device and dtype; leave device and dtype at 'auto'")
    _refuse_others("a loaded model", options)
    outline: ModelOutline = reference
    return outline


def _refuse_others(whose: str, options: LoadOptions) -> None:
    """Refuse the options that only pipelines of diffusers take."""
    usual = LoadOptions()
    for name in _OF_PIPELINES:
        given = getattr(options, name)
        if given != getattr(usual, name):
            text = f"{name} is {(given[0] if isinstance(given, tuple) else given)!r}" if given is not True else f"{name} was asked for"
            raise UsageError(f"{text} but {whose} takes none; {name} is for folders and hub ids of diffusers pipelines")


def load_options(arguments: Mapping[str, Any]) -> LoadOptions:
    """The options of loading among the arguments of `tsdiff.search`."""
    known = {field.name for field in dataclasses.fields(LoadOptions)}
    given = {name: value for name, value in arguments.items() if name in known}
    if "lora" in given:
        given["lora"] = file_names(given["lora"])
    if given.get("x0_decoder") is not None:
        given["x0_decoder"] = os.fspath(given["x0_decoder"])
    return LoadOptions(**given)


def saved_options(arguments: Mapping[str, Any], device: str) -> LoadOptions:
    """How to load the model of a saved run again so that it gives the same results, on a device of today's choice.

    Args:
      arguments: of the run's search, as they were saved.
    """
    return load_options({name: value for name, value in arguments.items() if name in _LASTING} | {"device": device})


def file_names(given: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> tuple[str, ...]:
    """One or several paths as strings."""
    return tuple(os.fspath(path) for path in ([given] if isinstance(given, (str, os.PathLike)) else given))
