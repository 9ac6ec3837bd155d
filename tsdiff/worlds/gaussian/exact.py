"""The solver `exact`: a step draws from the true transition p(x_s | x_t), so no number of steps is too small."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tsdiff.diffusion.sampler import Network, TableSampler
from tsdiff.diffusion.tables import Tables
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Row, StepState
from tsdiff.treesearch.schedule import SolverInfo
from tsdiff.worlds.gaussian.mixture import Mixture


class ExactSampler(TableSampler):
    """Ancestral sampling without discretisation error, over any distance between levels, down to clean data.

    A step needs no prediction of the network (one is evaluated and counted like any other solver's, so that costs
    compare). It follows the whole mixture: rows of a class are refused.
    """

    def __init__(self, model: Network, tables: Tables, solver: SolverInfo, mixture: Mixture) -> None:
        super().__init__(model, tables, solver)
        self.mixture = mixture
        self._whole = torch.tensor(mixture.log_weights(), dtype=torch.float64, device=model.device)

    def evaluate(self, latents: Tensor, levels: Sequence[int], rows: Sequence[Row]) -> Tensor:
        """Exact predictions, as with any solver. Raises UsageError for rows of a class."""
        if not bool((torch.stack([row["log_weights"] for row in rows]) == self._whole).all()):
            raise UsageError(
                "solver 'exact' samples the whole mixture, not a class of it; choose another solver, or a GaussianModel of `mixture.component(k)`"
            )
        return super().evaluate(latents, levels, rows)

    def advance(
        self, state: StepState, stage: int, levels: Sequence[int], nexts: Sequence[int], output: Tensor, noise: Tensor | None
    ) -> StepState:
        """Draw the next latents from p(x_s | x_t).

        Args:
          output: not used; the transition is known.
          noise: (2, B, d). The normal distribution function of the second's first coordinate is the uniform number that
            chooses the component; the first is the Gaussian noise within it.
        """
        if noise is None or len(noise) != 2:
            raise ValueError("the solver 'exact' needs two noises, (2, B, d)")
        x = state.latents
        schedule = self.schedule
        scales = [
            (schedule.alpha[t], schedule.sigma[t], schedule.alpha[s], schedule.sigma[s])
            for t, s in zip(levels, nexts, strict=True)
        ]
        law = self.mixture.transition(x, *torch.tensor(scales, dtype=torch.float64, device=x.device).unbind(1))
        means, variances = law.pick(torch.special.ndtr(noise[1, :, 0].double()))
        return StepState((means + variances.sqrt().unsqueeze(-1) * noise[0].double()).to(x.dtype))
