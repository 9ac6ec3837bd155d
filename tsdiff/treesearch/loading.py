"""From a plan to what carries it out: models with their weights, prepared verifiers, torch's settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tsdiff.treesearch.noise import Recipe, Torch
from tsdiff.treesearch.plan import Plan
from tsdiff.treesearch.protocols import BoundVerifier, DiffusionModel

if TYPE_CHECKING:
    from torch import Tensor


def load_models(plan: Plan) -> dict[str | None, DiffusionModel]:
    """The main model under None and the helpers by name, with their weights; the verifiers are prepared too.

    Raises:
      UsageError, SetupError: if something cannot be loaded, or a verifier belongs to another model.
    """
    model = plan.model.load()
    models: dict[str | None, DiffusionModel] = {None: model}
    models.update({name: outline.load() for name, outline in plan.helpers.items()})
    for verifier in plan.verifiers:
        if isinstance(verifier, BoundVerifier):
            verifier.require_model(model.fingerprint, model.latent_shape(plan.size), plan.schedule.kind)
        verifier.prepare(model.device)
    return models


@contextmanager
def settings(deterministic: bool) -> Iterator[None]:
    """torch's global switches for bit-stable kernels, restored afterwards."""
    import torch

    if not deterministic:
        yield
        return
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(), torch.backends.cudnn.benchmark)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = before[2]


def first_noise(recipe: Recipe | None, seed: int) -> Recipe | None:
    """The recipe of a search's first root, if it is not the usual one."""
    return Torch(seed) if isinstance(recipe, Torch) else recipe


def pixels(image: Any) -> Tensor:
    """An initial image as a tensor (3, H, W) in [0, 1]."""
    import numpy as np
    import torch

    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0).permute(2, 0, 1).contiguous()
