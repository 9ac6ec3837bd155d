"""What scores samples: `Verifier`, what it is given and answers, and what some verifiers want beside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, runtime_checkable

from tsdiff.treesearch.ledger import Spend
from tsdiff.treesearch.protocols.conditions import Condition
from tsdiff.treesearch.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from tsdiff.treesearch.protocols.setting import Setting

Need: TypeAlias = str
"""What a verifier reads: "images", "x0", "latents", "levels", "conditions", "node_ids", "ancestor_x0@RATIO" or
"ancestor_images@RATIO", where RATIO is the sigma/alpha of the ancestor whose clean estimate, or its picture, is wanted; and
"pages", which only searches that are recorded in a folder have."""


class Page(Protocol):
    """The page of a candidate's run (`tsdiff view`), where a person can be asked about the candidate."""

    def ask(self, who: str, picture: bytes, *, low: float, high: float, heard: Callable[[float | None], None]) -> None:
        """Put a question: how good is this picture, from `low` to `high`? To be called by the thread that `PendingVerifier.ask` is called by.

        Args:
          who: name of the verifier that asks; it asks once about a candidate.
          picture: a PNG file.
          heard: called once, by that thread, with the score; None where the person gave none. At once if the question was
            answered before an interruption.

        Raises:
          UsageError, SetupError: if the question cannot be written into the run's folder.
        """
        ...


class Candidates(Protocol):
    """What a verifier is given; everything is made on first access, in row order."""

    @property
    def images(self) -> Tensor:
        """(B, 3, H, W) in [0, 1], decoded from `x0`.

        Of videos, one key frame: `score` is called for the first, the middle and the last one, and the mean counts; `ask`
        once, with the middle one.
        """
        ...

    @property
    def x0(self) -> Tensor:
        """(B, ...) clean estimates; at level T the latents themselves."""
        ...

    @property
    def latents(self) -> Tensor:
        """(B, ...) at their own levels."""
        ...

    @property
    def levels(self) -> list[int]:
        """Level of each row."""
        ...

    @property
    def schedules(self) -> list[Schedule]:
        """Schedule of each row's tree."""
        ...

    @property
    def conditions(self) -> list[Condition]:
        """Condition of each row."""
        ...

    @property
    def node_ids(self) -> list[str]:
        """Hexadecimal id of each row's node."""
        ...

    @property
    def pages(self) -> Sequence[Page]:
        """Where a person can be asked about each row. Raises UsageError where the search is not recorded."""
        ...

    def ancestor_x0(self, ratio: float) -> Tensor:
        """(B, ...) clean estimates of each row's ancestor at sigma/alpha `ratio`, for a declared need."""
        ...

    def ancestor_images(self, ratio: float) -> Tensor:
        """(B, 3, H, W) in [0, 1], decoded from `ancestor_x0(ratio)`, for a declared need."""
        ...

    def __len__(self) -> int: ...


@dataclass
class Scores:
    """A verifier's answer.

    Attributes:
      values: (B,) scores, a tensor or floats; higher is better. NaN and infinities count as failures of their row.
      parts: named components, (B,) each.
      reasons: why a row failed, by row.
    """

    values: Tensor | Sequence[float]
    parts: Mapping[str, Tensor | Sequence[float]] = field(default_factory=dict)
    reasons: Mapping[int, str] = field(default_factory=dict)


class Verifier(Protocol):
    """Scores samples. Construct cheaply; load weights in `prepare`.

    Attributes:
      name: what its scores are called.
      needs: what it reads of the candidates.
      scope: "row" if a score depends on its own row alone, "set" if on the whole set (ranks).
      latency: "immediate", or "pending" for people and remote services (then `ask` is called instead of `score`).
      judges: "any" level's x0 estimate, or "final" samples only.
      differentiable: whether gradients flow through `score`.
    """

    @property
    def name(self) -> str: ...
    @property
    def needs(self) -> frozenset[Need]: ...
    @property
    def scope(self) -> Literal["row", "set"]: ...
    @property
    def latency(self) -> Literal["immediate", "pending"]: ...
    @property
    def judges(self) -> Literal["any", "final"]: ...
    @property
    def differentiable(self) -> bool: ...

    def prepare(self, device: str) -> None:
        """Load weights; called once, after every option has been checked."""
        ...

    def check(self, condition: Condition) -> None:
        """Raise UsageError if the verifier cannot judge samples of this condition."""
        ...

    def score(self, candidates: Candidates) -> Scores:
        """Score a batch."""
        ...


@runtime_checkable
class PendingVerifier(Protocol):
    """A verifier whose answers arrive later, from any thread."""

    def ask(self, candidates: Candidates, answer: Callable[..., None]) -> None:
        """Ask for scores; call `answer(node_id, score, reason)` once for each candidate, whenever it is known.

        A fourth argument may be its parts, a number by name.
        """
        ...


@runtime_checkable
class BoundVerifier(Protocol):
    """A verifier that belongs to one model: it reads latents, which mean nothing in another model's space."""

    def require_model(self, fingerprint: str, latent_shape: tuple[int, ...], schedule_kind: str) -> None:
        """Raise UsageError unless this is the model that it was made for. Called when the model has loaded, before `prepare`."""
        ...


@dataclass(frozen=True)
class Pool:
    """Plain samples whose scores a verifier must know before it can score anything.

    Attributes:
      verifiers: whose scores; all of scope "row" and latency "immediate".
      samples: how many, of all prompts of a search together.
      levels: at how many levels their clean estimates are scored, evenly spread, the last among them; 0 is all.
    """

    verifiers: tuple[Verifier, ...]
    samples: int
    levels: int

    def at(self, last: int) -> tuple[int, ...]:
        """The levels, of a schedule that ends at `last`."""
        steps = last if self.levels == 0 else min(self.levels - 1, last)
        return tuple((2 * i * last + steps) // (2 * steps) for i in range(steps + 1)) if steps else (last,)

    def cost(self, setting: Setting, prompts: int) -> Spend:
        """What making and scoring them spends: every verifier reads the same decode, and the call counts once for all."""
        seen = pictures(self.verifiers)
        count = self.samples * len(self.at(setting.schedule.last))
        answers = 0 if seen or not setting.media else min(prompts, self.samples)  # the engine decodes the best of every tree
        return Spend(self.samples * setting.sample_cost, count * seen + answers, count)


@runtime_checkable
class CalibratedVerifier(Protocol):
    """A verifier that compares scores with those of plain samples of the same model, schedule and prompts.

    The engine makes them before the search, or finds their scores in the user's cache.

    Attributes:
      pool: which; None if as configured it needs none.
    """

    @property
    def pool(self) -> Pool | None: ...

    def calibrate(self, schedule: Schedule, scores: Mapping[str, Mapping[int, Sequence[float]]]) -> None:
        """Take the pool's scores, by verifier and level; failed ones are left out. Called once, after `prepare`.

        Raises:
          TsdiffError: if they are too few.
        """
        ...


def pictures(judges: Sequence[Verifier]) -> int:
    """Decodes of a node that some verifiers look at: its own, and one for each ancestor."""
    return len({need for judge in judges for need in judge.needs if need == "images" or need.startswith("ancestor_images@")})
