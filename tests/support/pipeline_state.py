"""Everything about a pipeline that its owner could notice."""

from __future__ import annotations

import hashlib
from typing import Any

import torch


def state_of(pipe: Any) -> dict[str, Any]:
    """Compares equal as long as a pipeline is left as it was: weights, configs, modes, hooks and attributes."""
    state: dict[str, Any] = {
        "attributes": {name: id(value) for name, value in vars(pipe).items() if name != "_internal_dict"},
        "config": dict(pipe.config),
        "scheduler": (dict(pipe.scheduler.config), {name: str(value) for name, value in vars(pipe.scheduler).items()}),
        "progress": dict(getattr(pipe, "_progress_bar_config", {})),
    }
    for name, module in pipe.components.items():
        if not isinstance(module, torch.nn.Module):
            state[name] = id(module)
            continue
        digest = hashlib.sha256()
        for key, tensor in module.state_dict().items():
            digest.update(key.encode() + str((tensor.dtype, tensor.device)).encode() + tensor.numpy().tobytes())
        state[name] = {
            "identity": id(module),
            "weights": digest.hexdigest(),
            "config": str(module.config),
            "training": [child.training for child in module.modules()],
            "gradients": [parameter.requires_grad for parameter in module.parameters()],
            "hooks": [(len(child._forward_hooks), len(child._forward_pre_hooks), len(child._backward_hooks)) for child in module.modules()],
            "attributes": [sorted(vars(child)) for child in module.modules()],
            "processors": {key: id(processor) for key, processor in getattr(module, "attn_processors", {}).items()},
        }
    return state
