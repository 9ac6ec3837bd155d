"""The solvers and schedules of flow-matching pipelines, whose noise levels may depend on the size of the image.

Latents lie on the straight line x = (1 - s) x0 + s eps and the network predicts the velocity eps - x0 (Lipman et al. 2022,
arXiv 2210.02747; Liu et al. 2022, arXiv 2209.03003). Larger images need more noise to hide the same structure, so levels
are shifted towards noise (Esser et al. 2024, arXiv 2403.03206): by a constant of the scheduler's config (`shift`; diffusers
applies it to its training grid and again to the grid of a run), or by an amount that grows with the number of image tokens
(`use_dynamic_shifting`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tsdiff.diffusion.level_plan import LevelPlan
from tsdiff.treesearch.errors import UsageError

FLOW_SOLVERS = ("flow-euler", "flow-ancestral", "flow-sde")
"""Solvers of flow models."""

_NATIVE = "FlowMatchEulerDiscreteScheduler"
_SHIFT = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}


class FlowPlan(LevelPlan):
    """The solvers and schedules of a pipeline with a flow-matching scheduler.

    Args:
      name: of the model, for messages.
      class_name, config: of the pipeline's own scheduler.
      strict: refuse a scheduler without a solver of ours instead of replacing it by flow-euler on the same config.
      even_sigmas: whether the pipeline hands sigmas 1, (N - 1) / N, ..., 1 / N to its scheduler, to be shifted, instead of
        leaving the range to the scheduler.

    Raises:
      UsageError: for a scheduler that is not for flow models, or one to replace when `strict`.
    """

    def __init__(self, name: str, class_name: str, config: Mapping[str, Any], *, strict: bool, even_sigmas: bool = False) -> None:
        if not class_name.startswith("FlowMatch") and not config.get("use_flow_sigmas"):
            raise UsageError(f"the scheduler of {name!r}, {class_name}, is not for flow models, but this model is one; give it a {_NATIVE}")
        variant = " with stochastic_sampling" if config.get("stochastic_sampling") else ""
        notices: tuple[str, ...] = ()
        config = dict(config) | {"_class_name": _NATIVE}
        if class_name != _NATIVE or variant:
            if strict:
                raise UsageError(f"the scheduler of {name!r}, {class_name}{variant}, is not supported and strict_scheduler forbids replacing it; choose a solver of {', '.join(FLOW_SOLVERS)} without strict_scheduler")
            notices = (f"scheduler {class_name}{variant} is not supported; replaced by flow-euler on the same config",)
            if config.pop("use_flow_sigmas", False):  # of a scheduler for diffusion models, which calls the shift by another name
                config.setdefault("shift", config.get("flow_shift", 1.0))
        super().__init__(_NATIVE, config, solvers=FLOW_SOLVERS, prediction_type="flow", notices=notices)
        self.even_sigmas = even_sigmas
        if config.get("use_dynamic_shifting"):
            numbers = [config.get(key, usual) for key, usual in _SHIFT.items()]
            if not all(isinstance(number, (int, float)) for number in numbers) or numbers[0] == numbers[1]:
                raise UsageError(f"the scheduler of {name!r} shifts its levels with the size of the image but its config does not say how ({', '.join(_SHIFT)}); save or download the pipeline again")

    def shift(self, tokens: int | None) -> float | None:
        """A line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift); None without dynamic shifting."""
        if not self.config.get("use_dynamic_shifting"):
            return None
        if tokens is None:
            raise ValueError("a schedule with dynamic shifting needs the number of image tokens")
        low, high, at_low, at_high = (self.config.get(key, usual) for key, usual in _SHIFT.items())
        slope = (at_high - at_low) / (high - low)
        return float(tokens * slope + (at_low - slope * low))

    def sigmas(self, num_steps: int) -> list[float] | None:
        """1, (N - 1) / N, ..., 1 / N where the pipeline hands them over."""
        return np.linspace(1.0, 1 / num_steps, num_steps).tolist() if self.even_sigmas else None
