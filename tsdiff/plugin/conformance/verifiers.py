"""What every verifier keeps to, as tests to inherit. See `tsdiff.plugin.conformance`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Condition, Page, PendingVerifier, Scores
from tsdiff.treesearch.registry import verifiers
from tsdiff.treesearch.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class ExampleCandidates:
    """Candidates made of random pictures and latents.

    Shapes: images (B, 3, H, W) in [0, 1]; x0 and latents (B, ...).
    """

    images: Tensor
    x0: Tensor
    latents: Tensor
    levels: list[int]
    schedules: list[Schedule]
    conditions: list[Condition]
    node_ids: list[str]
    ancestors: Tensor = field(repr=False)

    @staticmethod
    def random(prompts: Sequence[str], *, size: tuple[int, int] = (64, 48), latent_shape: tuple[int, ...] = (4, 8, 6), seed: int = 0) -> ExampleCandidates:
        """One finished sample for each prompt."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        count = len(prompts)
        images = torch.rand((count, 3, *size), generator=generator)
        x0 = torch.randn((count, *latent_shape), generator=generator)
        ancestors = torch.randn((count, *latent_shape), generator=generator)
        schedule = Schedule("ddim", "example", (1.0,), (0.0, 1.0), (1.0, 0.0), ((0.0, 1.0), (1.0, 0.0)), 1.0)
        ids = [f"{index:032x}" for index in range(count)]
        return ExampleCandidates(images, x0, x0, [1] * count, [schedule] * count, [Condition(prompt) for prompt in prompts], ids, ancestors)

    def take(self, rows: Sequence[int]) -> ExampleCandidates:
        """Some of the rows, in the order asked for."""
        index = list(rows)
        tensors = [tensor[index] for tensor in (self.images, self.x0, self.latents)]
        lists: list[Any] = [[column[row] for row in index] for column in (self.levels, self.schedules, self.conditions, self.node_ids)]
        return ExampleCandidates(*tensors, *lists, self.ancestors[index])

    def ancestor_x0(self, ratio: float) -> Tensor:
        """(B, ...), the same for every ratio."""
        return self.ancestors

    def ancestor_images(self, ratio: float) -> Tensor:
        """(B, 3, H, W), the negatives of `images` for every ratio."""
        return 1.0 - self.images

    @property
    def pages(self) -> Sequence[Page]:
        """None: they are of no recorded search."""
        raise UsageError("these candidates are of no recorded search, so that nobody can be asked about them")

    def __len__(self) -> int:
        return len(self.node_ids)


class VerifierConformance:
    """What every verifier keeps to.

    Attributes:
      tolerance: how far, relative to the largest score, a row may differ between batches; 0 asks for equal bits.
    """

    tolerance: float = 1e-4

    @pytest.fixture
    def verifier(self) -> Any:
        """The verifier to test, weights not yet loaded. Override it."""
        raise NotImplementedError(f"{type(self).__name__} must override the fixture `verifier` and return a verifier")

    @pytest.fixture
    def candidates(self) -> ExampleCandidates:
        """At least three samples that the verifier can score. Override it where it asks for special prompts or latents."""
        return ExampleCandidates.random(["a red cube", "two dogs on a lawn", "", "a star left of a circle", "near (0, 0)"])

    @pytest.fixture
    def prepared(self, verifier: Any) -> Any:
        """The verifier with its weights loaded."""
        verifier.prepare("cpu")
        return verifier

    def scores(self, verifier: Any, candidates: ExampleCandidates) -> list[float]:
        """Its scores as floats."""
        answer = verifier.score(candidates)
        assert isinstance(answer, Scores)
        assert all(len(part) == len(candidates) for part in answer.parts.values()), "every part has one number for each row"
        return [float(value) for value in answer.values]

    def same(self, left: Sequence[float], right: Sequence[float]) -> None:
        """Assert that two lists of scores agree within the tolerance, failures included."""
        scale = max((abs(value) for value in left if value == value), default=1.0)
        assert list(left) == pytest.approx(list(right), rel=0.0, abs=self.tolerance * scale, nan_ok=True)

    def test_declares_what_it_is(self, verifier: Any) -> None:
        """The engine understands what it reads and how it answers."""
        assert isinstance(verifier.name, str)
        assert verifier.name
        assert verifier.needs, "a verifier reads something"
        known = {"images", "x0", "latents", "levels", "conditions", "node_ids", "pages"}
        assert all(need in known or need.startswith(("ancestor_x0@", "ancestor_images@")) for need in verifier.needs), verifier.needs
        assert verifier.scope in ("row", "set")
        assert verifier.latency in ("immediate", "pending")
        assert verifier.judges in ("any", "final")
        assert isinstance(verifier.differentiable, bool)
        assert verifier.latency == "immediate" or isinstance(verifier, PendingVerifier), "a pending verifier has `ask`"

    def test_registered_under_its_own_name(self, verifier: Any) -> None:
        """If its name is taken by a registered verifier, that is this one."""
        if verifier.name in verifiers:
            assert isinstance(verifier, verifiers.load(verifier.name))

    def test_checks_conditions_without_weights(self, verifier: Any, candidates: ExampleCandidates) -> None:
        """A condition is accepted or refused before anything loads."""
        for condition in candidates.conditions:
            assert verifier.check(condition) is None

    def test_one_finite_score_for_each_row(self, prepared: Any, candidates: ExampleCandidates) -> None:
        """B rows in, B scores out."""
        scores = self.scores(prepared, candidates)
        assert len(scores) == len(candidates)
        assert all(abs(score) < float("inf") for score in scores), "these candidates can be scored"

    def test_repeats_itself(self, prepared: Any, candidates: ExampleCandidates) -> None:
        """The same candidates score the same twice."""
        assert self.scores(prepared, candidates) == self.scores(prepared, candidates)

    def test_leaves_the_candidates_alone(self, prepared: Any, candidates: ExampleCandidates) -> None:
        """Nothing it is given is changed in place."""
        import torch

        before = [tensor.clone() for tensor in (candidates.images, candidates.x0, candidates.latents)]
        self.scores(prepared, candidates)
        after = (candidates.images, candidates.x0, candidates.latents)
        assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))

    def test_order_does_not_matter(self, prepared: Any, candidates: ExampleCandidates) -> None:
        """Permuted rows get permuted scores."""
        order = list(reversed(range(len(candidates))))
        scores = self.scores(prepared, candidates)
        self.same([scores[row] for row in order], self.scores(prepared, candidates.take(order)))

    def test_a_batch_scores_like_its_rows(self, prepared: Any, candidates: ExampleCandidates) -> None:
        """Of scope "row": a row's score does not depend on its neighbours."""
        if prepared.scope == "set":
            pytest.skip("scores of a set depend on the set")
        singles = [self.scores(prepared, candidates.take([row]))[0] for row in range(len(candidates))]
        self.same(self.scores(prepared, candidates), singles)
