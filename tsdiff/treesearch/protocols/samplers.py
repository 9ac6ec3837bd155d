"""All arithmetic on latents: `Sampler`. Shapes: B = rows of a batch, `...` = one latent's shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tsdiff.treesearch.protocols.models import Row
from tsdiff.treesearch.schedule import Schedule, SolverInfo

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class StepState:
    """A batch of latents on their way, with what a multi-step or multi-stage solver remembers.

    Attributes:
      latents: (B, ...).
      history: tensors (B, ...) carried along; rows without history hold anything finite.
      history_levels: level of each row's history, -1 for none.
    """

    latents: Tensor
    history: tuple[Tensor, ...] = ()
    history_levels: Sequence[int] = ()


class Sampler(Protocol):
    """All arithmetic on latents, vectorised over rows at different levels. Levels are plain integers, one per row."""

    @property
    def schedule(self) -> Schedule: ...
    @property
    def solver(self) -> SolverInfo: ...

    def draw(self, noise: Tensor, origin: Tensor | None = None) -> Tensor:
        """Latents of level 0 (B, ...) from unit noise, around the clean latents `origin` if there are any."""
        ...

    def add_noise(self, x0: Tensor, levels: Sequence[int], noise: Tensor) -> Tensor:
        """alpha * x0 + sigma * noise at the nominal scales of `levels`."""
        ...

    def renoise(self, latents: Tensor, arrived: Sequence[bool], levels: Sequence[int], to: Sequence[int], noise: Tensor) -> Tensor:
        """The forward kernel from `levels` (where a denoise step landed, if `arrived`) up to the noisier `to`."""
        ...

    def perturb(self, latents: Tensor, x0: Tensor, arrived: Sequence[bool], levels: Sequence[int], scale: Sequence[float], noise: Tensor) -> Tensor:
        """Replace the share `scale` of each latent's noise by `noise`, at the same level."""
        ...

    def evaluate(self, latents: Tensor, levels: Sequence[int], rows: Sequence[Row]) -> Tensor:
        """One network call: raw outputs (B, ...). Scales the input as the solver's coordinates need."""
        ...

    def guide(self, cond: Tensor, uncond: Tensor, scale: Sequence[float], rescale: Sequence[float]) -> Tensor:
        """Classifier-free guidance of raw outputs, per row."""
        ...

    def x0(self, latents: Tensor, levels: Sequence[int], output: Tensor) -> Tensor:
        """The clean estimate E[x0 | x] that a raw output stands for."""
        ...

    def advance(
        self, state: StepState, stage: int, levels: Sequence[int], nexts: Sequence[int], output: Tensor, noise: Tensor | None
    ) -> StepState:
        """One stage of a step from `levels` to `nexts`.

        Args:
          state: the latents and history before this stage.
          stage: 0, or 1 for a corrector; the latents returned by stage 0 are then evaluated at `nexts` first. The
            corrector of a step that ends at sigma 0 is never called.
          output: raw (guided) network output for `state.latents`, (B, ...).
          noise: (num_noise, B, ...) for stochastic solvers, None otherwise.
        """
        ...
