"""The verifiers and the suite of the analytic world."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.parameters import build, describe
from tsdiff.treesearch.protocols import Condition
from tsdiff.treesearch.schedule import Schedule
from tsdiff.worlds.gaussian.mixture import Mixture
from tsdiff.worlds.gaussian.model import GaussianModel
from tsdiff.worlds.gaussian.presets import parse_target, preset
from tsdiff.worlds.gaussian.suites import rare_mode
from tsdiff.worlds.gaussian.verifiers import LogDensity, SoftValue, Target

LEVELS = Schedule("ddim", "test", (1.0, 0.5), (0.6, 0.8, 1.0), (0.8, 0.6, 0.0), ((0.6, 0.8), (0.8, 0.6), (1.0, 0.0)), 1.0)
MIXTURE = Mixture([0.3, 0.7], [(0.0, 1.0), (2.0, -1.0)], [0.4, 0.9])


@dataclass
class Batch:
    """Candidates whose tensors are all there."""

    x0: torch.Tensor
    conditions: list[Condition]
    latents: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    levels: list[int] = field(default_factory=list)

    @property
    def schedules(self) -> list[Schedule]:
        return [LEVELS] * len(self.levels)

    def __len__(self) -> int:
        return len(self.conditions)


def test_target_scores_each_row_against_its_own_prompt() -> None:
    batch = Batch(torch.tensor([[1.0, 2.0], [1.0, 2.0]]), [Condition("near (1, 2)"), Condition("near (4, 6)")])
    scores = Target(rho=0.5).score(batch)  # type: ignore[arg-type]
    assert scores.values.tolist() == pytest.approx([0.0, -25.0 / 0.5])  # type: ignore[union-attr]
    assert scores.parts["distance"].tolist() == pytest.approx([0.0, 5.0])  # type: ignore[union-attr]


def test_target_is_differentiable() -> None:
    x0 = torch.tensor([[1.0, 2.0]], requires_grad=True)
    values = Target(rho=2.0).score(Batch(x0, [Condition("near (2, 0)")])).values  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(values.sum(), x0)  # type: ignore[union-attr]
    torch.testing.assert_close(gradient, torch.tensor([[0.25, -0.5]]))  # (y - x0) / rho^2


def test_log_density_is_that_of_the_row_s_class() -> None:
    x0 = torch.tensor([[0.5, 0.2], [0.5, 0.2]])
    values = LogDensity(mixture=MIXTURE).score(Batch(x0, [Condition(), Condition(class_label=1)])).values  # type: ignore[arg-type]
    squared = 1.5**2 + 1.2**2
    assert float(values[1]) == pytest.approx(-squared / (2 * 0.81) - math.log(2 * math.pi * 0.81))
    assert float(values[0]) == pytest.approx(float(MIXTURE.log_density(x0[:1])))


def test_soft_value_uses_each_row_s_level_and_ends_at_the_target_s_reward() -> None:
    conditions = [Condition("near (1, 0)"), Condition("near (0, 1)"), Condition("near (1, 0)", class_label=0)]
    x = torch.tensor([[0.5, 0.2], [0.5, 0.2], [0.5, 0.2]])
    scores = SoftValue(mixture=MIXTURE, rho=0.8, temperature=2.0).score(Batch(x, conditions, x, [0, 2, 1]))  # type: ignore[arg-type]
    from tsdiff.worlds.gaussian.gaussians import Quadratic

    first = MIXTURE.soft_value(x[:1], 0.6, 0.8, Quadratic((1.0, 0.0), 0.8), 2.0)
    third = MIXTURE.component(0).soft_value(x[:1], 0.8, 0.6, Quadratic((1.0, 0.0), 0.8), 2.0)
    at_the_end = Target(rho=0.8).score(Batch(x[1:2], conditions[1:2])).values  # type: ignore[arg-type]
    torch.testing.assert_close(scores.values, torch.cat([first, at_the_end, third]))


def test_ordinary_options_build_them() -> None:
    assert build(Target, {"rho": "0.3"}).rho == 0.3
    assert build(SoftValue, {"temperature": "0", "mixture": "two-modes"}).temperature == 0.0
    assert build(LogDensity, {"mixture": MIXTURE}).mixture == MIXTURE
    assert [row["symbol"] for row in describe(SoftValue)] == ["", "rho", "lambda"]


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (Target, {"rho": 0.0}, "above 0"),
        (SoftValue, {"temperature": -1.0}, "at least 0"),
        (LogDensity, {"mixture": "rare"}, "did you mean 'rare-mode'"),
        (Target, {"rh": 1.0}, "did you mean 'rho'"),
    ],
)
def test_wrong_options_are_usage_errors(cls: type, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(cls, options)


@pytest.mark.parametrize("verifier", [Target(), SoftValue()])
def test_a_prompt_without_a_point_is_refused_before_the_search(verifier: Target | SoftValue) -> None:
    verifier.check(Condition("near (0, 0)"))
    for prompt in ("", "a cat"):
        with pytest.raises(UsageError, match="near"):
            verifier.check(Condition(prompt))


def test_a_class_that_the_mixture_lacks_is_refused() -> None:
    with pytest.raises(UsageError, match="0 to 1"):
        LogDensity(mixture=MIXTURE).check(Condition(class_label=7))


def test_suite_is_fixed_and_every_prompt_is_understood() -> None:
    conditions = rare_mode.conditions()
    assert [c.prompt for c in conditions] == [c.prompt for c in rare_mode.conditions()]
    assert len({c.prompt for c in conditions}) == 20
    chosen = preset("rare-mode")
    model = GaussianModel(chosen.mixture, class_names=chosen.class_names)
    for condition in conditions:
        model.check(condition)
        Target().check(condition)
        target = parse_target(condition.prompt, 2)
        nearest = min(range(9), key=lambda k: math.dist(chosen.mixture.means[k], target))
        assert condition.metadata["mode"] == chosen.class_names[nearest]
    assert {c.metadata["mode"] for c in conditions} == set(chosen.class_names)
    assert conditions[0].metadata["mode"] == "rare"
