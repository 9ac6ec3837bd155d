"""SiT in plain torch: random checkpoints, and the forward pass of the paper's code on their tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, linear, scaled_dot_product_attention, silu

WIDTH, HEADS, BLOCKS, PATCH, CHANNELS, GRID, CLASSES = 48, 3, 2, 2, 4, 4, 10
SIDE = GRID * PATCH


def checkpoint(*, seed: int = 0, made: int = 2 * CHANNELS, width: int = WIDTH, blocks: int = BLOCKS) -> dict[str, Tensor]:
    """Random tensors of a SiT with latents (4, 8, 8) and 10 classes; `made` output channels."""
    generator = torch.Generator().manual_seed(seed)

    def layer(rows: int, *columns: int) -> dict[str, Tensor]:
        scale = 1.0 / math.sqrt(math.prod(columns))
        return {"weight": scale * torch.randn((rows, *columns), generator=generator), "bias": 0.1 * torch.randn(rows, generator=generator)}

    layers = {
        "x_embedder.proj": layer(width, CHANNELS, PATCH, PATCH),
        "t_embedder.mlp.0": layer(width, 256),
        "t_embedder.mlp.2": layer(width, width),
        "final_layer.linear": layer(PATCH * PATCH * made, width),
        "final_layer.adaLN_modulation.1": layer(2 * width, width),
    }
    for block in range(blocks):
        layers |= {
            f"blocks.{block}.attn.qkv": layer(3 * width, width),
            f"blocks.{block}.attn.proj": layer(width, width),
            f"blocks.{block}.mlp.fc1": layer(4 * width, width),
            f"blocks.{block}.mlp.fc2": layer(width, 4 * width),
            f"blocks.{block}.adaLN_modulation.1": layer(6 * width, width),
        }
    state = {f"{name}.{kind}": tensor for name, tensors in layers.items() for kind, tensor in tensors.items()}
    state["y_embedder.embedding_table.weight"] = torch.randn((CLASSES + 1, width), generator=generator)
    state["pos_embed"] = positions(width, GRID)[None]
    return state


def positions(width: int, grid: int) -> Tensor:
    """Sines and cosines (grid * grid, width): a half for the column of a patch, a half for its row."""
    frequencies = 1.0 / 10000.0 ** (np.arange(width // 4) / (width / 4))
    angles = np.arange(grid)[:, None] * frequencies
    one = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (grid, width / 2)
    table = np.concatenate([np.tile(one, (grid, 1)), np.repeat(one, grid, axis=0)], axis=1)
    return torch.from_numpy(table).float()


def velocity(state: Mapping[str, Tensor], x: Tensor, t: Tensor, y: Tensor, heads: int = HEADS) -> Tensor:
    """dx/dt = x0 - eps (B, 4, h, w) at times t (B,), of which 0 is noise and 1 is data, for classes y (B,)."""

    def apply(name: str, inputs: Tensor) -> Tensor:
        return linear(inputs, state[f"{name}.weight"], state[f"{name}.bias"])

    def normal(inputs: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return layer_norm(inputs, inputs.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    angles = t[:, None] * torch.exp(-math.log(10000.0) * torch.arange(128) / 128)
    time = apply("t_embedder.mlp.2", silu(apply("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], dim=1))))
    told = silu(time + state["y_embedder.embedding_table.weight"][y])
    tokens = conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=PATCH).flatten(2).transpose(1, 2) + state["pos_embed"]
    for block in range(sum(key.endswith("attn.qkv.bias") for key in state)):
        name = f"blocks.{block}"
        shift, scale, gate, shift2, scale2, gate2 = apply(f"{name}.adaLN_modulation.1", told).chunk(6, dim=1)
        q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in apply(f"{name}.attn.qkv", normal(tokens, shift, scale)).chunk(3, dim=2))
        mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens = tokens + gate[:, None] * apply(f"{name}.attn.proj", mixed)
        inner = gelu(apply(f"{name}.mlp.fc1", normal(tokens, shift2, scale2)), approximate="tanh")
        tokens = tokens + gate2[:, None] * apply(f"{name}.mlp.fc2", inner)
    shift, scale = apply("final_layer.adaLN_modulation.1", told).chunk(2, dim=1)
    patches = apply("final_layer.linear", normal(tokens, shift, scale))  # (B, patches, p * p * channels), channels last
    made = patches.shape[2] // PATCH**2
    image = patches.reshape(len(x), GRID, GRID, PATCH, PATCH, made).permute(0, 5, 1, 3, 2, 4).reshape(len(x), made, SIDE, SIDE)
    return image[:, :CHANNELS]


def guided(state: Mapping[str, Tensor], x: Tensor, t: Tensor, y: Tensor, scale: float, channels: int = 3) -> Tensor:
    """The velocity under guidance of the first channels; the others are those of the class alone."""
    cond = velocity(state, x, t, y)
    if scale <= 1.0:
        return cond
    uncond = velocity(state, x, t, torch.full_like(y, CLASSES))
    return torch.cat([(uncond + scale * (cond - uncond))[:, :channels], cond[:, channels:]], dim=1)


def tiny_vae_folder(folder: Path, **config: Any) -> Path:
    """A saved autoencoder with factor 2 for latents of 4 channels."""
    from tiny_dit import tiny_vae

    state = torch.get_rng_state()
    torch.manual_seed(3)
    tiny_vae(**config).save_pretrained(folder)
    torch.set_rng_state(state)
    return folder
