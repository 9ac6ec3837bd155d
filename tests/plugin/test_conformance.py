"""The conformance suite on the built-in policies and verifiers, and on broken ones, which it must catch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from tsdiff.plugin import Cost, Denoise, Draw, Score, Scores, Spend, UsageError, check, parameter
from tsdiff.plugin.conformance import ExampleCandidates, NearOrigin, PolicyConformance, VerifierConformance, gaussian
from tsdiff.policies import Beam, BestOfN
from tsdiff.verifiers import CallableVerifier, JpegCompressibility, JpegSize, Luminance, Sharpness, TargetColor, TotalVariation


class TestBestOfN(PolicyConformance):
    @pytest.fixture
    def policy(self):
        return BestOfN(n=3)


BEAMS = {
    "default": Beam(width=2, branch=2),
    "steps": Beam(width=2, branch=3, branch_by="step", max_children=1),
    "lookahead": Beam(width=2, branch=2, levels=(0.3, 0.7), value="lookahead", lookahead_steps=2),
    "final": Beam(width=2, branch=2, levels=(0.5,), value="final"),
    "final by steps": Beam(width=1, branch=3, levels=(0.25, 0.5), value="final", branch_by="step"),
    "no levels": Beam(width=3, levels=()),
}


class TestBeam(PolicyConformance):
    @pytest.fixture(params=BEAMS.values(), ids=BEAMS)
    def policy(self, request):
        return request.param


class TestTwoStageBeam(PolicyConformance):
    """Heun evaluates twice a step: prices must know."""

    model = gaussian("ve")
    solver = "heun"

    @pytest.fixture(params=["x0", "lookahead", "final"])
    def policy(self, request):
        return Beam(width=2, branch=2, levels=(0.3, 0.7), value=request.param, lookahead_steps=3)


PROGRAMMATIC = [Luminance(), JpegSize(), JpegCompressibility(), TargetColor(), TotalVariation(), Sharpness()]


class TestProgrammatic(VerifierConformance):
    tolerance = 0.0

    @pytest.fixture(params=PROGRAMMATIC, ids=lambda verifier: verifier.name)
    def verifier(self, request):
        return request.param


class TestNearOrigin(VerifierConformance):
    @pytest.fixture
    def verifier(self):
        return NearOrigin()


class TestCallable(VerifierConformance):
    @pytest.fixture
    def verifier(self):
        return CallableVerifier(lambda images, prompts: [len(prompt) for prompt in prompts], "length")


# The suite must catch what it is there to catch. ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Broken:
    """One plain sample, and a way to be wrong."""

    name = "broken"
    size_parameters = ()
    needs = frozenset()

    samples: int = parameter(1, low=1)
    claimed: int = 1
    fits_anything: bool = False

    def __post_init__(self):
        check(self)

    def search(self, tree):
        leaves = yield Denoise((yield Draw(self.samples)), to=tree.schedule.last)
        yield Score(leaves)
        return tree.best()

    def cost(self, setting):
        return Cost.exactly(Spend(nfe=self.claimed * setting.sample_cost) + setting.scoring(self.claimed, final=True) + setting.result())

    def fit(self, nfe, setting):
        if self.fits_anything:
            return self
        if nfe < setting.sample_cost:
            raise UsageError("too little")
        return replace(self, samples=nfe // setting.sample_cost, claimed=nfe // setting.sample_cost)


class Checks(PolicyConformance):
    """Not collected: its tests are called by hand."""


def test_a_wrong_price_is_caught():
    Checks().test_cost_bounds_hold_what_is_spent(Broken())
    with pytest.raises(AssertionError, match=r"nfe: spent 16, but cost\(\) says 8 to 8"):
        Checks().test_cost_bounds_hold_what_is_spent(Broken(samples=2))


def test_a_fit_that_does_not_fit_is_caught():
    Checks().test_fit_spends_at_most_its_budget(Broken())
    with pytest.raises(AssertionError):
        Checks().test_fit_spends_at_most_its_budget(Broken(fits_anything=True, samples=2, claimed=2))


def test_unchecked_parameters_are_caught():
    Checks().test_refuses_wrong_options(Broken(), [{"samples": 0}])
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        Checks().test_refuses_wrong_options(Broken(), [{"claimed": 0}])


def test_a_verifier_that_looks_at_its_neighbours_is_caught():
    class Relative(NearOrigin):
        def score(self, candidates):
            values = [float(image.mean()) for image in candidates.images]
            return Scores([value - sum(values) / len(values) for value in values])

    class VerifierChecks(VerifierConformance):
        pass

    candidates = ExampleCandidates.random(["a", "b", "c"])
    VerifierChecks().test_order_does_not_matter(Relative(), candidates)
    with pytest.raises(AssertionError):
        VerifierChecks().test_a_batch_scores_like_its_rows(Relative(), candidates)
