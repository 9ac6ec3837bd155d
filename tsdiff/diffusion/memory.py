"""Memory and speed: what of it a pipeline can have, checked before weights are read, and done to a pipeline of ours.

A caller's pipeline object is never changed: its owner turns these on, and is told how.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from os import environ
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdiff.diffusion.devices import resolve_device
from tsdiff.diffusion.quiet import quiet_libraries
from tsdiff.diffusion.source import Source, read_json, unwrapped, weights_variant
from tsdiff.treesearch.errors import SetupError, UsageError

if TYPE_CHECKING:
    import torch

LATENT_DTYPES = ("float32", "model")
TINY = "AutoencoderTiny"

BACKEND = "inductor"
"""What compiles regions, for torch.compile."""

_OWNERS = {
    "offload": "pipe.enable_model_cpu_offload()",
    "vae_slicing": "pipe.vae.enable_slicing()",
    "vae_tiling": "pipe.vae.enable_tiling()",
    "channels_last": "pipe.vae.to(memory_format=torch.channels_last)",
    "compile": "pipe.{network}.compile()",
}
_BLOCKS = ("BasicTransformerBlock", "JointTransformerBlock")
"""Blocks that networks repeat whose classes of diffusers do not say which."""


# Checks, before weights are read -------------------------------------------------------------------------------------


def check_memory(source: Source, takes_no: Mapping[str, str]) -> None:
    """Raise unless a pipeline can have the options of memory and speed that were asked for.

    Args:
      source: of the pipeline.
      takes_no: options that its family does not take, and why.

    Raises:
      UsageError: naming the option that does not apply.
      SetupError: if compiling needs something that is not there.
    """
    options = source.options
    if options.latent_dtype not in LATENT_DTYPES:
        raise UsageError(f"latent_dtype is {options.latent_dtype!r} but must be 'float32', or 'model' to round latents to the weights' format")
    for name, why in takes_no.items():
        if getattr(options, name):
            raise UsageError(f"{name} was asked for but {source.name!r} ({source.class_name}) {why}; leave {name} out")
    if source.pipeline is not None:
        network = "unet" if "unet" in source.components else "transformer"
        for name, told in _OWNERS.items():
            if getattr(options, name):
                call = told.format(network=network)
                raise UsageError(f"{name} was asked for but the {source.class_name} object is never changed; call `{call}` yourself and hand the pipeline over without {name}")
    for name, method in (("vae_slicing", "enable_slicing"), ("vae_tiling", "enable_tiling"), ("channels_last", "to")):
        if getattr(options, name):
            _check_autoencoder(source, name, method)
    if options.offload and (device := resolve_device(options.device)) in ("cpu", "mps"):
        raise UsageError(f"offload keeps resting components in host memory, but the device is {device}, whose memory that is; leave offload out")
    if options.compile:
        _check_compiler(resolve_device(options.device))
    if options.x0_decoder is not None:
        _check_tiny(source, options.x0_decoder)


def _check_autoencoder(source: Source, name: str, method: str) -> None:
    if "vae" not in source.components:
        raise UsageError(f"{name} was asked for but {source.name!r} ({source.class_name}) has no autoencoder; leave {name} out")
    class_name = source.components["vae"][1]
    with quiet_libraries():
        import diffusers
    if not hasattr(getattr(diffusers, class_name, None), method):
        raise UsageError(f"{name} was asked for but the autoencoder of {source.name!r}, {class_name}, has no {method}; leave {name} out")


def _check_compiler(device: str) -> None:
    if device == "mps":
        raise UsageError("compile was asked for but the device is mps; it is for cpu and cuda: leave compile out")
    if device == "cpu" and BACKEND == "inductor" and not any(shutil.which(name) for name in (environ.get("CXX", "g++"), "clang++")):
        raise SetupError("compile on a CPU needs a C++ compiler, and there is no g++ or clang++; install one, or leave compile out")
    if device.startswith("cuda") and BACKEND == "inductor" and find_spec("triton") is None:
        raise SetupError("compile on CUDA needs triton, which is not installed; run `pip install triton`, or leave compile out")


def _check_tiny(source: Source, named: str) -> None:
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise UsageError(f"x0_decoder {named!r} is no folder; give one with a saved {TINY}, e.g. of `hf download madebyollin/taesd --local-dir taesd`")
    config = read_json(folder / "config.json")
    if config.get("_class_name") != TINY:
        raise UsageError(f"x0_decoder {named!r} is a {config.get('_class_name')}, not an {TINY}; give the tiny autoencoder of this model's latents")
    if "vae" not in source.components:
        raise UsageError(f"x0_decoder was given but {source.name!r} ({source.class_name}) has no autoencoder, so that there is nothing to decode; leave it out")
    channels, own = config.get("latent_channels", 4), source.entry("vae", "latent_channels")
    if channels != own:
        raise UsageError(f"x0_decoder {named!r} decodes latents of {channels} channels but those of {source.name!r} have {own}; give the tiny autoencoder of this model's latents")
    factors = [2 ** (len(blocks) - 1) for blocks in (config.get("decoder_block_out_channels", (64,) * 4), source.entry("vae", "block_out_channels"))]
    if factors[0] != factors[1]:
        raise UsageError(f"x0_decoder {named!r} enlarges latents {factors[0]} times but {source.name!r} {factors[1]} times; give the tiny autoencoder of this model's latents")
    weights_variant(folder, "diffusers", None)


# What is done to a pipeline of ours ----------------------------------------------------------------------------------


def apply_memory(source: Source, pipeline: Any, network: Any) -> None:
    """Turn on what was asked for in a pipeline that we loaded."""
    import torch

    options = source.options
    if options.vae_slicing:
        pipeline.vae.enable_slicing()
    if options.vae_tiling:
        pipeline.vae.enable_tiling()
    if options.channels_last:
        for module in (network, pipeline.vae):
            module.to(memory_format=torch.channels_last)
    if options.compile:
        compile_blocks(network)


def compile_blocks(network: Any) -> None:
    """Compile the blocks that a network repeats, in place; all of it where it is not made of such blocks.

    Each shape is compiled for itself, so that the number of rows should stay one.
    """
    named = getattr(network, "_repeated_blocks", None) or _BLOCKS
    blocks = [module for module in network.modules() if type(module).__name__ in named]
    for module in blocks or [network]:
        module.compile(backend=BACKEND, dynamic=False)


def is_compiled(network: Any) -> bool:
    """Whether a network is compiled, all of it or some of its blocks, by us or by its owner."""
    return unwrapped(network) is not network or any(getattr(module, "_compiled_call_impl", None) is not None for module in network.modules())


def load_tiny(source: Source, device: str, dtype: torch.dtype) -> Any:
    """The decoder of clean estimates, None where none was asked for."""
    named = source.options.x0_decoder
    if named is None:
        return None
    with quiet_libraries():
        from diffusers import AutoencoderTiny

        kind: Any = AutoencoderTiny  # diffusers has no types for it
        try:
            return kind.from_pretrained(str(Path(named).expanduser()), torch_dtype=dtype, local_files_only=True).to(device).eval()
        except Exception as error:
            # Exception types of three libraries mean the same here; the cause stays attached.
            raise UsageError(f"x0_decoder {named!r} cannot be loaded ({type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:300]}); download it again") from error


class Stages:
    """Which components are on the device: those of one stage, while the others wait in host memory.

    Args:
      stages: components by stage; None among them is skipped.
      device: where they work.
    """

    def __init__(self, stages: Mapping[str, Sequence[Any]], device: str, rest: str = "cpu") -> None:
        self.stages = {name: [part for part in parts if part is not None] for name, parts in stages.items()}
        self.device = device
        self.rest = rest
        self.current: str | None = None

    def bring(self, stage: str) -> None:
        """Move a stage's components to the device, those of any other away."""
        if stage != self.current:
            self.leave()
            self.current = stage  # also if there is no room for all of it: what has moved must be moved away again
            for part in self.stages[stage]:
                part.to(self.device)

    def leave(self) -> None:
        """Move what is on the device away."""
        for part in self.stages.get(self.current or "", ()):
            part.to(self.rest)
        self.current = None

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """A stage that is over at the end; nothing moves for one without components."""
        if not self.stages[stage]:
            yield
            return
        self.bring(stage)
        try:
            yield
        finally:
            self.leave()
