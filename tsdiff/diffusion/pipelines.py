"""Pipelines as objects: load ours from disk, look at a caller's without touching it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdiff.diffusion.devices import resolve_device, resolve_dtype
from tsdiff.diffusion.quiet import quiet_libraries
from tsdiff.diffusion.source import Source, unwrapped, weights_variant
from tsdiff.treesearch.errors import SetupError, TsdiffError, UsageError

if TYPE_CHECKING:
    import torch


def load_pipeline(source: Source, pipeline_class: str, *, usual_dtype: str = "bfloat16", **without: Any) -> tuple[Any, str]:
    """The pipeline of a source and the device it runs on; an object that was handed over comes back as it is.

    Where components take turns on the device (`offload`), all of them are in host memory first.

    Args:
      source: where it comes from.
      pipeline_class: name of the class of diffusers to load it as.
      usual_dtype: number format of the weights on an accelerator, unless the options say otherwise.
      without: arguments of `from_pretrained` that replace components, e.g. `safety_checker=None`.

    Raises:
      UsageError: if the weights cannot be read.
      SetupError: if the device is not there or too small, or weights of a hub id cannot be obtained.
    """
    if source.pipeline is not None:
        return source.pipeline, str(source.pipeline._execution_device)
    device = resolve_device(source.options.device)
    dtype = resolve_dtype(source.options.dtype, device, usual_dtype)
    with quiet_libraries():
        import diffusers
        import torch
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        cls = getattr(diffusers, pipeline_class)
        try:
            folder = source.folder or _download(cls, source, without)
            text_encoders = _text_encoders(folder, source, dtype, without)
            pipeline = cls.from_pretrained(str(folder), torch_dtype=dtype, variant=source.options.variant, local_files_only=True, **text_encoders, **without)
            return pipeline if source.options.offload else pipeline.to(device), device
        except torch.OutOfMemoryError as error:
            raise SetupError(f"{source.name!r} does not fit into the memory of {device}; try dtype='bfloat16', offload=True (--offload) or another device") from error
        except (LocalEntryNotFoundError, HfHubHTTPError) as error:
            raise SetupError(f"the weights of {source.name!r} cannot be obtained ({_first_line(error)}); fetch them once with `hf download {source.name}`") from error
        except TsdiffError:
            raise
        except Exception as error:
            # Dozens of exception types of five libraries mean the same here; the cause stays attached.
            raise UsageError(f"{source.name!r} cannot be loaded ({type(error).__name__}: {_first_line(error)}); check that its configs and weights belong together, or download it again") from error


def _download(cls: Any, source: Source, without: Mapping[str, Any]) -> Path:
    """The folder in the hub's cache that holds a pipeline's weights; only what is missing is downloaded."""
    options = source.options
    return Path(cls.download(source.name, revision=options.revision, variant=options.variant, local_files_only=options.offline, **without))


def _text_encoders(folder: Path, source: Source, dtype: torch.dtype, without: Mapping[str, Any]) -> dict[str, Any]:
    """The pipeline's models of transformers, which would make up weights that a file lacks: here that is an error."""
    import transformers

    encoders: dict[str, Any] = {}
    for name, (library, class_name) in source.components.items():
        cls: Any = getattr(transformers, class_name, None) if library == "transformers" and name not in without else None
        if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
            continue
        variant = weights_variant(folder / name, library, source.options.variant)
        loaded: Any = cls.from_pretrained(str(folder / name), dtype=dtype, variant=variant, local_files_only=True, output_loading_info=True)
        encoders[name], facts = loaded
        wrong = sorted({*facts["missing_keys"], *(key if isinstance(key, str) else key[0] for key in facts["mismatched_keys"])})
        if wrong:
            raise UsageError(f"the weights of {str(folder / name)!r} lack {len(wrong)} tensors that its config asks for ({wrong[0]}, ...); download or save it again")
    return encoders


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0][:300]


def refuse_training(pipeline: Any) -> None:
    """Raise UsageError if a module of a pipeline is in training mode, where dropout would make results random."""
    for name, part in pipeline.components.items():
        module = unwrapped(part)
        if hasattr(module, "modules") and any(child.training for child in module.modules()):
            raise UsageError(f"pipe.{name} is in training mode, which makes its outputs random; call `pipe.{name}.eval()` first")


def device_of(module: Any, otherwise: str) -> torch.device:
    """Where a module wants its inputs: its own device, or `otherwise` if hooks move its weights about."""
    import torch

    moved = module.device.type == "meta" or hasattr(unwrapped(module), "_hf_hook")
    return torch.device(otherwise) if moved else module.device


@contextmanager
def lora_scales_kept(pipeline: Any) -> Iterator[None]:
    """Put back what a call with a LoRA scale leaves behind on a pipeline: its `_lora_scale` and its layers' scales.

    `encode_prompt(lora_scale=...)` sets the attribute and never removes it; unscaling from 0 resets layers to 1, whatever
    they were.
    """
    missing = object()
    scale = pipeline.__dict__.get("_lora_scale", missing)
    modules = [unwrapped(part) for part in pipeline.components.values() if hasattr(part, "modules")]
    layers = [layer for module in modules for layer in module.modules() if isinstance(getattr(layer, "scaling", None), dict)]
    scalings = [(layer.scaling, dict(layer.scaling)) for layer in layers]
    try:
        yield
    finally:
        if scale is missing:
            pipeline.__dict__.pop("_lora_scale", None)
        else:
            pipeline.__dict__["_lora_scale"] = scale
        for scaling, values in scalings:
            scaling.clear()
            scaling.update(values)
