"""A short name for a pipeline's weights and configs, cheap enough to compute at every start."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from tsdiff.diffusion.source import unwrapped

SAMPLES = 64
"""Elements of each tensor that enter the checksum, spread evenly over it."""


def fingerprint(components: Mapping[str, Any], **facts: Any) -> str:
    """Name what a pipeline computes: 32 hexadecimal digits.

    Covers the configs, the number format, the names, shapes and a strided sample of all weights, loaded adapters with
    their scales, and attention processors with theirs. It does not depend on where the files came from or on the device.

    Args:
      components: modules and tokenizers by name; None for parts that are not there.
      facts: further plain data that results depend on, e.g. the scheduler's config.
    """
    digest = hashlib.sha256(json.dumps(_public(facts), sort_keys=True, default=str).encode())
    for name, part in sorted(components.items()):
        if part is None:
            continue
        part = unwrapped(part)
        described = {"component": name, "class": type(part).__name__, "config": _config(part), "adapters": _adapters(part)}
        if hasattr(part, "get_added_vocab"):
            described["added_tokens"] = sorted(part.get_added_vocab())
        digest.update(json.dumps(described, sort_keys=True, default=str).encode())
        if hasattr(part, "named_modules"):
            for fact, sample in _weights(part):
                digest.update(fact.encode())
                digest.update(sample)
    return digest.hexdigest()[:32]


def _config(part: Any) -> dict[str, Any]:
    config = getattr(part, "config", {})
    public: dict[str, Any] = _public(dict(config) if isinstance(config, Mapping) else config.to_dict())
    return public


def _public(value: Any) -> Any:
    """Plain data without what changes no result: where a config came from and which version wrote it."""
    if isinstance(value, Mapping):
        dropped = ("transformers_version", "torch_dtype", "dtype", "architectures")
        return {key: _public(entry) for key, entry in value.items() if not str(key).startswith("_") and key not in dropped}
    return [_public(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _adapters(part: Any) -> list[Any]:
    if not hasattr(part, "named_modules"):
        return []
    adapters: list[Any] = [
        [name, sorted(module.scaling.items()), list(getattr(module, "active_adapters", ()))]
        for name, module in part.named_modules()
        if isinstance(getattr(module, "scaling", None), dict)
    ]
    for name, processor in getattr(part, "attn_processors", {}).items():
        # Only IP adapters have a scale; the plain kernels (2.0, xformers, ...) are a matter of speed.
        if hasattr(processor, "scale"):
            adapters.append([name, type(processor).__name__, str(processor.scale)])
    return adapters


def _weights(module: Any) -> Iterator[tuple[str, bytes]]:
    """Description and sampled bytes of every tensor; the samples leave the device in one transfer a module tree."""
    import torch
    from accelerate.utils import align_module_device  # type: ignore[import-untyped]

    facts: list[str] = []
    samples: list[torch.Tensor] = []
    with torch.no_grad():
        for prefix, child in module.named_modules():
            own = [*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)]
            if any(tensor.is_meta for _, tensor in own):  # weights that accelerate keeps elsewhere between calls
                with align_module_device(child):
                    samples += [_sample(tensor) for tensor in _tensors(child)]
            else:
                samples += [_sample(tensor) for tensor in _tensors(child)]
            facts += [f"{prefix}.{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in own]
        parts = torch.split(torch.cat(samples).cpu(), [sample.numel() for sample in samples]) if samples else ()
    for fact, part in zip(facts, parts, strict=True):
        yield fact, part.numpy().tobytes()


def _tensors(module: Any) -> list[Any]:
    return [tensor for _, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]


def _sample(tensor: Any) -> Any:
    import torch

    flat = tensor.detach().reshape(-1)
    index = torch.linspace(0, max(flat.numel() - 1, 0), min(SAMPLES, flat.numel()), dtype=torch.float64)
    return flat[index.round().long().to(flat.device)].to(torch.float32)
