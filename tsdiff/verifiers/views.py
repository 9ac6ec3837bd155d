"""What verifiers need that ask other verifiers: some of a batch's candidates, other prompts for them, and the answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Candidates, Condition, Page, Verifier
from tsdiff.treesearch.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor


class View:
    """Rows of a batch, as `tsdiff.treesearch.protocols.Candidates`; tensors keep their gradients.

    Args:
      candidates: the batch.
      rows: which of its rows, in this order; one may appear several times.
      conditions: what each of them is judged by, instead of its own.
    """

    def __init__(self, candidates: Candidates, rows: Sequence[int], conditions: Sequence[Condition] | None = None) -> None:
        self._whole = candidates
        self._rows = list(rows)
        self._conditions = conditions

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def images(self) -> Tensor:
        """(B, 3, H, W) in [0, 1]."""
        return self._whole.images[self._rows]

    @property
    def x0(self) -> Tensor:
        """(B, ...) clean estimates."""
        return self._whole.x0[self._rows]

    @property
    def latents(self) -> Tensor:
        """(B, ...) latents at their own levels."""
        return self._whole.latents[self._rows]

    @property
    def levels(self) -> list[int]:
        """Level of each row."""
        return [self._whole.levels[row] for row in self._rows]

    @property
    def schedules(self) -> list[Schedule]:
        """Schedule of each row's tree."""
        return [self._whole.schedules[row] for row in self._rows]

    @property
    def conditions(self) -> list[Condition]:
        """What each row is judged by."""
        return [self._whole.conditions[row] for row in self._rows] if self._conditions is None else list(self._conditions)

    @property
    def node_ids(self) -> list[str]:
        """Hexadecimal id of each row's node."""
        return [self._whole.node_ids[row] for row in self._rows]

    @property
    def pages(self) -> list[Page]:
        """Where a person can be asked about each row."""
        return [self._whole.pages[row] for row in self._rows]

    def ancestor_x0(self, ratio: float) -> Tensor:
        """(B, ...) clean estimates of each row's ancestor at sigma/alpha `ratio`."""
        return self._whole.ancestor_x0(ratio)[self._rows]

    def ancestor_images(self, ratio: float) -> Tensor:
        """(B, 3, H, W) pictures of each row's ancestor at sigma/alpha `ratio`."""
        return self._whole.ancestor_images(ratio)[self._rows]


def numbers_of(member: Verifier, numbers: Any, rows: int) -> Tensor:
    """A verifier's scores as float64 (B,) on the CPU, gradients kept; what is not finite is NaN.

    Raises:
      UsageError: if it has not given one for each row.
    """
    import torch

    column = numbers if isinstance(numbers, torch.Tensor) else torch.tensor([float(number) for number in numbers], dtype=torch.float64)
    column = column.to("cpu", torch.float64)
    if tuple(column.shape) != (rows,):
        raise UsageError(f"verifier {member.name} gave scores of shape {tuple(column.shape)} for {rows} candidates; give one for each, in order")
    return torch.where(column.isfinite(), column, torch.full_like(column, math.nan))
