"""Latents in the network's number format, as the pipelines of diffusers keep them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from tsdiff.treesearch.protocols import Row, Sampler, StepState
from tsdiff.treesearch.schedule import Schedule, SolverInfo

if TYPE_CHECKING:
    import torch


class RoundedSampler:
    """A sampler whose latents, guided predictions and histories are rounded to a number format.

    They are float32 tensors as ever, of numbers that the format has. The arithmetic within a step stays in float32, where
    schedulers of diffusers differ among each other; so equality with a pipeline is up to a few units in the last place.

    Args:
      sampler: does the arithmetic.
      dtype: of the network.
    """

    def __init__(self, sampler: Sampler, dtype: torch.dtype) -> None:
        self.sampler = sampler
        self.dtype = dtype

    @property
    def schedule(self) -> Schedule:
        """See `Sampler`."""
        return self.sampler.schedule

    @property
    def solver(self) -> SolverInfo:
        """See `Sampler`."""
        return self.sampler.solver

    def _rounded(self, latents: Tensor) -> Tensor:
        return latents.to(self.dtype).to(latents.dtype)

    def draw(self, noise: Tensor, origin: Tensor | None = None) -> Tensor:
        """See `Sampler`; the noise is rounded too."""
        return self._rounded(self.sampler.draw(self._rounded(noise), origin))

    def add_noise(self, x0: Tensor, levels: Sequence[int], noise: Tensor) -> Tensor:
        """See `Sampler`."""
        return self._rounded(self.sampler.add_noise(x0, levels, self._rounded(noise)))

    def renoise(self, latents: Tensor, arrived: Sequence[bool], levels: Sequence[int], to: Sequence[int], noise: Tensor) -> Tensor:
        """See `Sampler`."""
        return self._rounded(self.sampler.renoise(latents, arrived, levels, to, self._rounded(noise)))

    def perturb(self, latents: Tensor, x0: Tensor, arrived: Sequence[bool], levels: Sequence[int], scale: Sequence[float], noise: Tensor) -> Tensor:
        """See `Sampler`."""
        return self._rounded(self.sampler.perturb(latents, x0, arrived, levels, scale, self._rounded(noise)))

    def evaluate(self, latents: Tensor, levels: Sequence[int], rows: Sequence[Row]) -> Tensor:
        """See `Sampler`."""
        return self.sampler.evaluate(latents, levels, rows)

    def guide(self, cond: Tensor, uncond: Tensor, scale: Sequence[float], rescale: Sequence[float]) -> Tensor:
        """See `Sampler`."""
        return self._rounded(self.sampler.guide(cond, uncond, scale, rescale))

    def x0(self, latents: Tensor, levels: Sequence[int], output: Tensor) -> Tensor:
        """See `Sampler`."""
        return self.sampler.x0(latents, levels, output)

    def advance(self, state: StepState, stage: int, levels: Sequence[int], nexts: Sequence[int], output: Tensor, noise: Tensor | None) -> StepState:
        """See `Sampler`."""
        done = self.sampler.advance(state, stage, levels, nexts, output, None if noise is None else self._rounded(noise))
        return StepState(self._rounded(done.latents), tuple(map(self._rounded, done.history)), done.history_levels)
