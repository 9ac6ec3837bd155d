"""Classifier-free guidance of some channels only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tsdiff.diffusion.sampler import Network, TableSampler
from tsdiff.diffusion.tables import Tables
from tsdiff.treesearch.schedule import SolverInfo


class GuidedChannelsSampler(TableSampler):
    """A sampler that guides the first channels of a prediction; the others are those of the conditional row.

    Args:
      guided: how many channels.
    """

    def __init__(self, model: Network, tables: Tables, solver: SolverInfo, guided: int) -> None:
        super().__init__(model, tables, solver)
        self.guided = guided

    def guide(self, cond: Tensor, uncond: Tensor, scale: Sequence[float], rescale: Sequence[float]) -> Tensor:
        """See `TableSampler`."""
        first = super().guide(cond[:, : self.guided], uncond[:, : self.guided], scale, rescale)
        return torch.cat([first, cond[:, self.guided :].float()], dim=1)
