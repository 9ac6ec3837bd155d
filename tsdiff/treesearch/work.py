"""Pieces of work that wait in the engine's queues, and the batches that verifiers see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.node import Node, Value
from tsdiff.treesearch.noise import step_noise
from tsdiff.treesearch.protocols import Condition, DiffusionModel, Page, Row, Sampler, Verifier
from tsdiff.treesearch.run import Binding, Group, Run
from tsdiff.treesearch.schedule import Schedule
from tsdiff.treesearch.video import is_video, key_frames, still

if TYPE_CHECKING:
    from torch import Tensor

    from tsdiff.treesearch.noise import Array


@dataclass(eq=False, slots=True)
class Evaluation:
    """One guided network evaluation: one row, or with guidance a conditional and an unconditional row.

    Attributes:
      owner: the node whose NFE it counts for.
      then: called with the raw outputs (conditional, unconditional or None).
      failed: called with the reason when the network could not evaluate a row.
    """

    run: Run
    binding: Binding
    level: int
    latents: Tensor
    owner: Node
    then: Callable[[Tensor, Tensor | None], None]
    failed: Callable[[str], None]
    outputs: list[Tensor | None] = field(default_factory=list)
    over: bool = False

    @property
    def rows(self) -> tuple[Row, ...]:
        """The conditionings to evaluate: without active guidance only the first."""
        assert self.binding.encoded is not None
        rows = self.binding.encoded.rows
        return rows if self.run.guidance.active(self.run.tree.schedule, self.level) else rows[:1]


@dataclass(eq=False, slots=True)
class Chain:
    """A denoise on its way: one node's latent through `levels` to `child`.

    Attributes:
      position: index into `levels` of the level that `latents` stand at.
      stage: 0, or 1 while a two-stage solver waits for its corrector's evaluation.
      noise: makes the single step's noise, None for the noise of the child's stream.
      captured: clean estimates to remember, by name in the store.
      then: called when the child has its latent, or has failed.
    """

    run: Run
    binding: Binding
    sampler: Sampler
    levels: tuple[int, ...]
    child: Node
    latents: Tensor
    history: tuple[Tensor, ...]
    history_level: int
    captured: dict[str, Tensor]
    noise: Callable[[], Array] | None
    then: Callable[[], None]
    position: int = 0
    stage: int = 0

    @property
    def level(self) -> int:
        """The level that the step in progress starts from."""
        return self.levels[self.position]

    @property
    def next(self) -> int:
        """The level that the step in progress lands on."""
        return self.levels[self.position + 1]

    def draw(self) -> Array:
        """Noise of the step in progress, float32 (num_noise, ...)."""
        if self.noise is not None:
            return self.noise()[None]
        return step_noise(self.child.stream, self.next, self.run.shape, self.sampler.solver.num_noise)


@dataclass(eq=False, slots=True)
class Step:
    """A chain whose evaluation has arrived."""

    chain: Chain
    cond: Tensor
    uncond: Tensor | None


@dataclass(eq=False, slots=True)
class Estimate:
    """A clean estimate to be formed from a node's prediction; `failed` is told why if it is not finite."""

    run: Run
    binding: Binding
    level: int
    latents: Tensor
    cond: Tensor
    uncond: Tensor | None
    then: Callable[[Tensor], None]
    failed: Callable[[str], None]


@dataclass(eq=False, slots=True)
class Decode:
    """A clean latent to be decoded; `then` receives pixels, (3, H, W) or (F, 3, H, W), or a reason.

    Attributes:
      estimated: of a node that is not finished, for which a cheaper decoder will do.
    """

    run: Run
    model: DiffusionModel
    x0: Tensor
    then: Callable[[Tensor | None, str | None], None]
    estimated: bool = False


@dataclass(eq=False, slots=True)
class Candidate:
    """One row for a verifier; its value's key is the verifier's name and `suffix` ("@lookahead6").

    Attributes:
      pictures: by the need that asked for them; of videos only the key frames (K, 3, H, W) are kept.
    """

    run: Run
    node: Node
    level: int
    latents: Tensor
    x0: Tensor
    pictures: dict[str, Tensor]
    ancestors: dict[str, Tensor]
    suffix: str = ""

    def __post_init__(self) -> None:
        self.pictures = {need: key_frames(pixels) for need, pixels in self.pictures.items()}

    @property
    def views(self) -> int:
        """How many pictures a verifier has to see, one after the other: the key frames of a video, else one."""
        return max((len(pixels) for pixels in self.pictures.values() if is_video(pixels)), default=1)

    def picture(self, need: str, view: int | None) -> Tensor:
        """One of the pictures (3, H, W) of a need; None is the one that stands for a video."""
        pixels = self.pictures[need]
        return pixels[min(view, len(pixels) - 1)] if view is not None and is_video(pixels) else still(pixels)


@dataclass(eq=False, slots=True)
class Judgement:
    """Candidates to be scored by one verifier: one row, or a whole set; `then` receives a value for each."""

    verifier: Verifier
    candidates: list[Candidate]
    then: Callable[[list[Value]], None]


class CandidateBatch:
    """Implements `tsdiff.treesearch.protocols.Candidates`: stacks rows when they are asked for.

    Args:
      rows: the candidates.
      view: which of a video's key frames is seen; None is the one that stands for it.
    """

    def __init__(self, rows: Sequence[Candidate], view: int | None = None) -> None:
        self._rows = rows
        self._view = view

    def __len__(self) -> int:
        return len(self._rows)

    @cached_property
    def images(self) -> Tensor:
        """(B, 3, H, W) in [0, 1]."""
        import torch

        if any("images" not in row.pictures for row in self._rows):
            raise UsageError("a verifier reads candidates.images but does not declare 'images' in its needs")
        return torch.stack([row.picture("images", self._view) for row in self._rows])

    @cached_property
    def x0(self) -> Tensor:
        """(B, ...) clean estimates."""
        import torch

        return torch.stack([row.x0 for row in self._rows])

    @cached_property
    def latents(self) -> Tensor:
        """(B, ...) latents at their own levels."""
        import torch

        return torch.stack([row.latents for row in self._rows])

    @property
    def levels(self) -> list[int]:
        """Level of each row."""
        return [row.level for row in self._rows]

    @property
    def schedules(self) -> list[Schedule]:
        """Schedule of each row's tree."""
        return [row.run.tree.schedule for row in self._rows]

    @property
    def conditions(self) -> list[Condition]:
        """Condition of each row."""
        return [row.run.tree.condition for row in self._rows]

    @property
    def node_ids(self) -> list[str]:
        """Hexadecimal id of each row's node."""
        return [f"{row.node.id:032x}" for row in self._rows]

    @property
    def pages(self) -> list[Page]:
        """The page of each row's run."""
        return [_Page(row) for row in self._rows]

    def ancestor_x0(self, ratio: float) -> Tensor:
        """(B, ...) clean estimates of each row's ancestor at sigma/alpha `ratio`."""
        import torch

        name = self._ancestors("ancestor_x0", ratio, [row.ancestors for row in self._rows])
        return torch.stack([row.ancestors[name] for row in self._rows])

    def ancestor_images(self, ratio: float) -> Tensor:
        """(B, 3, H, W) pictures of each row's ancestor at sigma/alpha `ratio`."""
        import torch

        name = self._ancestors("ancestor_images", ratio, [row.pictures for row in self._rows])
        return torch.stack([row.picture(name, self._view) for row in self._rows])

    def _ancestors(self, kind: str, ratio: float, kept: Sequence[dict[str, Tensor]]) -> str:
        """The need that stands for a ratio; every row has it."""
        declared = {name for tensors in kept for name in tensors if name.startswith(f"{kind}@") and float(name.partition("@")[2]) == ratio}
        name = next(iter(declared), f"{kind}@{ratio:g}")
        missing = [row.node.index for row, tensors in zip(self._rows, kept, strict=True) if name not in tensors]
        if missing:
            raise UsageError(f"nodes {missing} have no ancestor estimate at sigma/alpha {ratio:g}: they are noisier, or the verifier does not declare {name!r}")
        return name


class _Page:
    """Implements `tsdiff.treesearch.protocols.Page` for one candidate."""

    def __init__(self, row: Candidate) -> None:
        if row.run.questions is None:
            raise UsageError("a verifier asks a person in the page of the run, but this search is not recorded; search with out=FOLDER")
        self._row, self._questions = row, row.run.questions

    def ask(self, who: str, picture: bytes, *, low: float, high: float, heard: Callable[[float | None], None]) -> None:
        """Put a question."""
        row = self._row
        self._questions.ask(row.node, row.suffix, row.run.tree.condition.label, who, picture, low=low, high=high, heard=heard)


__all__ = ["Candidate", "CandidateBatch", "Chain", "Decode", "Estimate", "Evaluation", "Group", "Judgement", "Step"]
