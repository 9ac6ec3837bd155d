"""From a checkpoint of SiT's published code to a folder that this package loads: `tsdiff convert sit`.

The checkpoint is a file of `torch.save` (the averaged weights of the training script's dictionary, or plain weights), read
without running code, or of safetensors. Its sizes are told from the tensors, every tensor must be there with the shape that
follows, and nothing else may be. See `tsdiff.diffusion.sit` for what the numbers mean.

The folder holds the weights as a `DiTTransformer2DModel` of diffusers, whose blocks each have the embedding of time and class
of their own, which makes it a tenth larger; without the channels of a variance, which velocities do not have.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdiff.diffusion.quiet import quiet_libraries
from tsdiff.diffusion.sit import GUIDED, PIPELINE
from tsdiff.diffusion.source import INDEX, read_json, weights_variant
from tsdiff.treesearch.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    State = Mapping[str, Tensor]

FREQUENCIES = 256
"""Cosines and sines that the embedding of time begins with."""

POSITIONS_APART = 1e-3
"""How far positions may be from sines and cosines: averaging and half precision move them by less."""

PUBLISHED = {384: ("S", 12, 6), 768: ("B", 12, 12), 1024: ("L", 24, 16), 1152: ("XL", 28, 16)}
"""Width of the published networks -> name, blocks and attention heads; the heads are not to be told from the tensors."""

GUIDED_USUALLY = 3
BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
"""Layers of a block: the name in diffusers, and SiT's."""


@dataclass(frozen=True)
class Sizes:
    """Of a network, from the shapes of its tensors."""

    width: int
    channels: int
    patch: int
    blocks: int
    classes: int
    grid: int
    made: int

    @property
    def name(self) -> str:
        """ "SiT-XL/2", or its width and depth where they are none of the published."""
        letter, blocks, _ = PUBLISHED.get(self.width, ("", 0, 0))
        return f"SiT-{letter}/{self.patch}" if blocks == self.blocks else f"SiT, width {self.width}, depth {self.blocks}, patch {self.patch}"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of a checkpoint."""
        width = self.width
        layers = {
            "t_embedder.mlp.0": (width, FREQUENCIES),
            "t_embedder.mlp.2": (width, width),
            "final_layer.adaLN_modulation.1": (2 * width, width),
            "final_layer.linear": (self.patch**2 * self.made, width),
        }
        for block in range(self.blocks):
            layers |= {
                f"blocks.{block}.attn.qkv": (3 * width, width),
                f"blocks.{block}.attn.proj": (width, width),
                f"blocks.{block}.mlp.fc1": (4 * width, width),
                f"blocks.{block}.mlp.fc2": (width, 4 * width),
                f"blocks.{block}.adaLN_modulation.1": (6 * width, width),
            }
        shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, self.grid**2, width), "y_embedder.embedding_table.weight": (self.classes + 1, width)}
        for name, shape in (("x_embedder.proj", (width, self.channels, self.patch, self.patch)), *layers.items()):
            shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        return shapes


def convert(checkpoint: Path, out: Path, *, vae: Path | None = None, heads: int | None = None) -> dict[str, Any]:
    """Write a checkpoint of SiT as a folder that `tsdiff search --model` takes; all of it or nothing.

    Args:
      checkpoint: a file of `torch.save` or safetensors.
      out: a new folder.
      vae: a folder with the `AutoencoderKL` of diffusers that the latents are of, or a pipeline's folder with one; it is
        copied. None leaves its place empty.
      heads: of attention; None takes the number of the published network of that width.

    Returns:
      Facts about the model, for people.

    Raises:
      UsageError: if the checkpoint is no SiT, or one of a kind that is not supported; if `out` is there; if the autoencoder
        does not fit.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{str(out)!r} is there already; nothing is ever overwritten, choose a new folder")
    state, which = read_checkpoint(checkpoint)
    sizes = sizes_of(state, str(checkpoint))
    heads = _heads(sizes, heads)
    autoencoder = None if vae is None else _autoencoder(vae, sizes.channels)
    apart = _check_positions(state, sizes)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part-{os.getpid()}")
    part.mkdir()
    try:
        parameters = _write(part, state, sizes, heads)
        if autoencoder is not None:
            (part / "vae").mkdir()
            for file in (autoencoder / "config.json", *sorted(autoencoder.glob("diffusion_pytorch_model*"))):
                shutil.copyfile(file, part / "vae" / file.name)
        os.replace(part, out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return {
        "model": str(out),
        "network": sizes.name,
        "parameters": parameters,
        "weights": which,
        "latents": [sizes.channels, sizes.grid * sizes.patch, sizes.grid * sizes.patch],
        "classes": sizes.classes,
        "variance": "dropped" if sizes.made != sizes.channels else None,
        "positions": f"sines and cosines; the checkpoint's were up to {apart:.1e} off" if apart > 1e-6 else None,
        "autoencoder": None if autoencoder is None else str(autoencoder),
        "missing": None if autoencoder is not None else f"an autoencoder: put the AutoencoderKL that the latents are of (config.json and weights) into {out / 'vae'}, or convert again with --vae",
    }


# Reading -------------------------------------------------------------------------------------------------------------


def read_checkpoint(path: Path) -> tuple[State, str]:
    """The weights of a checkpoint, and which they are ("averaged (ema)", "plain").

    Raises:
      UsageError: if there is no such file, it holds more than tensors and options, or its options say that the network does
        not predict the velocity of a linear path.
    """
    import torch

    if not path.is_file():
        raise UsageError(f"checkpoint {str(path)!r} is not there; give a file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            data: Any = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # the training script's options: plain attributes
                data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        # Pickle, zip, torch and safetensors raise a dozen types of errors for files that they cannot read.
        first = (str(error).strip() or "no message").splitlines()[0][:200]
        raise UsageError(f"checkpoint {str(path)!r} cannot be read as weights ({type(error).__name__}: {first}); files that would run code are not opened: save the weights alone, as safetensors or by torch.save of a dictionary of tensors") from error
    which = "plain"
    if isinstance(data, Mapping):
        _check_arguments(data.get("args"))
        for key, name in (("ema", "averaged (ema)"), ("model", "plain (model)"), ("state_dict", "plain (state_dict)")):
            if isinstance(data.get(key), Mapping):
                data, which = data[key], name
                break
    if not isinstance(data, Mapping) or not all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in data.items()):
        raise UsageError(f"checkpoint {str(path)!r} is no dictionary of tensors; give a checkpoint of SiT, with its weights under 'ema' or 'model', or alone")
    return data, which


def _check_arguments(arguments: Any) -> None:
    """Raise UsageError if the training script's options name another path or prediction than the supported ones."""
    for name, wanted in (("path_type", "linear"), ("prediction", "velocity")):
        given = getattr(arguments, name, None)
        if given is not None and str(given).lower() != wanted:
            raise UsageError(f"the checkpoint was trained with {name} {given!r}, but only {wanted!r} is supported")


def sizes_of(state: State, name: str) -> Sizes:
    """The sizes of a network whose tensors are all there, with the shapes that follow from them.

    Raises:
      UsageError: naming what is missing, not expected, or of another shape.
    """
    needed = ("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "pos_embed", "final_layer.linear.weight")
    ranks = (4, 2, 3, 2)
    found = [state.get(key) for key in needed]
    for key, tensor, rank in zip(needed, found, ranks, strict=True):
        if tensor is None or tensor.ndim != rank:
            some = ", ".join(sorted(state)[:3]) or "nothing"
            raise UsageError(f"{name!r} is no checkpoint of SiT: {key} is {'missing' if tensor is None else f'of shape {tuple(tensor.shape)}'}; it holds {some}, ...")
    patches, table, positions, last = (tensor.shape for tensor in found if tensor is not None)
    width, channels, patch, _ = patches
    blocks = {int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key))}
    sizes = Sizes(width, channels, patch, max(blocks, default=-1) + 1, table[0] - 1, math.isqrt(positions[1]), last[0] // patch**2)
    expected = sizes.shapes()
    wrong = {
        "missing": sorted(expected.keys() - state.keys()),
        "not expected": sorted(state.keys() - expected.keys()),
        "of another shape": [f"{key} {tuple(state[key].shape)} for {shape}" for key, shape in expected.items() if key in state and tuple(state[key].shape) != shape],
        "not finite numbers": [key for key in expected if key in state and not (state[key].is_floating_point() and bool(state[key].isfinite().all()))],
    }
    if any(wrong.values()):
        raise UsageError(f"{name!r} is no checkpoint of SiT: {'; '.join(f'{what}: {_some(keys)}' for what, keys in wrong.items() if keys)}")
    if sizes.made not in (channels, 2 * channels) or sizes.blocks < 1 or sizes.classes < 1:
        raise UsageError(f"{name!r} is no checkpoint of SiT: it takes {channels} channels and makes {sizes.made}, with {sizes.blocks} blocks and {sizes.classes} classes")
    return sizes


def _some(keys: Sequence[str]) -> str:
    more = len(keys) - 3
    return ", ".join(keys[:3]) + (f" and {more} more" if more > 0 else "")


def _heads(sizes: Sizes, heads: int | None) -> int:
    if heads is None:
        if sizes.width not in PUBLISHED:
            raise UsageError(f"the network is {sizes.width} wide, which no published one is, so its number of attention heads is not known; say it with --heads")
        return PUBLISHED[sizes.width][2]
    if heads < 1 or sizes.width % heads:
        raise UsageError(f"the network is {sizes.width} wide, which {heads} attention heads do not divide; check --heads")
    return heads


def _check_positions(state: State, sizes: Sizes) -> float:
    """How far a checkpoint's positions are from sines and cosines. Raises UsageError if they are something else."""
    with quiet_libraries():
        from diffusers.models.embeddings import get_2d_sincos_pos_embed

        usual = get_2d_sincos_pos_embed(sizes.width, sizes.grid, base_size=sizes.grid)
    apart = float((state["pos_embed"][0].double() - usual.double()).abs().max())
    if apart > POSITIONS_APART:
        raise UsageError(f"the checkpoint's positions (pos_embed) differ from sines and cosines by up to {apart:.2g}; networks that have learned their positions are not supported")
    return apart


def _autoencoder(folder: Path, channels: int) -> Path:
    """The folder of an autoencoder's files. Raises UsageError if there is none, or it makes other latents."""
    inner = folder / "vae" if (folder / INDEX).is_file() else folder
    config = read_json(inner / "config.json")
    if config.get("_class_name") != "AutoencoderKL":
        raise UsageError(f"--vae {str(folder)!r} holds a {config.get('_class_name')}; give the folder of an AutoencoderKL of diffusers, or of a pipeline with one")
    if config.get("latent_channels") != channels:
        raise UsageError(f"--vae {str(folder)!r} makes latents of {config.get('latent_channels')} channels but the network takes {channels}; they do not belong together")
    weights_variant(inner, "diffusers", None)
    return inner


# Writing -------------------------------------------------------------------------------------------------------------


def _write(folder: Path, state: State, sizes: Sizes, heads: int) -> int:
    """Write everything but the autoencoder; returns the number of parameters that the checkpoint has of it."""
    with quiet_libraries():
        import torch
        from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler, __version__

        with torch.device("meta"):
            network = DiTTransformer2DModel(
                num_attention_heads=heads,
                attention_head_dim=sizes.width // heads,
                in_channels=sizes.channels,
                out_channels=sizes.channels,
                num_layers=sizes.blocks,
                sample_size=sizes.grid * sizes.patch,
                patch_size=sizes.patch,
                num_embeds_ada_norm=sizes.classes,
                norm_eps=1e-6,
            )
        translated = translate(state, sizes)
        network.load_state_dict(translated, strict=True, assign=True)
        network.save_pretrained(folder / "transformer")
        FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": PIPELINE,
        "_diffusers_version": __version__,
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "vae": ["diffusers", "AutoencoderKL"],
        GUIDED: min(GUIDED_USUALLY, sizes.channels),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return sum(tensor.numel() for key, tensor in state.items() if key != "pos_embed") - (sizes.made - sizes.channels) * sizes.patch**2 * (sizes.width + 1)


def translate(state: State, sizes: Sizes) -> dict[str, Tensor]:
    """A checkpoint's tensors under the names of `DiTTransformer2DModel`, of its own memory each."""
    translated: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        translated[f"pos_embed.proj.{kind}"] = state[f"x_embedder.proj.{kind}"]
        translated[f"proj_out_1.{kind}"] = state[f"final_layer.adaLN_modulation.1.{kind}"]
        last = state[f"final_layer.linear.{kind}"]  # a prediction and its variance lie side by side, patch by patch
        translated[f"proj_out_2.{kind}"] = last.unflatten(0, (-1, sizes.made))[:, : sizes.channels].flatten(0, 1)
        for block in range(sizes.blocks):
            theirs, ours = f"blocks.{block}", f"transformer_blocks.{block}"
            for name, own in BLOCK.items():
                translated[f"{ours}.{name}.{kind}"] = state[f"{theirs}.{own}.{kind}"]
            for name, tensor in zip("qkv", state[f"{theirs}.attn.qkv.{kind}"].chunk(3), strict=True):
                translated[f"{ours}.attn1.to_{name}.{kind}"] = tensor
            for name, own in (("linear_1", "0"), ("linear_2", "2")):
                translated[f"{ours}.norm1.emb.timestep_embedder.{name}.{kind}"] = state[f"t_embedder.mlp.{own}.{kind}"]
    for block in range(sizes.blocks):
        translated[f"transformer_blocks.{block}.norm1.emb.class_embedder.embedding_table.weight"] = state["y_embedder.embedding_table.weight"]
    return {key: tensor.detach().clone().contiguous() for key, tensor in translated.items()}
