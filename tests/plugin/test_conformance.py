"""The built-in policies and verifiers keep to what plug-ins have to keep to: no special case for any of them."""

from __future__ import annotations

from importlib.metadata import entry_points

import pytest

from tsdiff.plugin import CallableVerifier, Scores
from tsdiff.plugin.conformance import (
    AllocatorConformance,
    ExampleCandidates,
    NearOrigin,
    PolicyConformance,
    VerifierConformance,
    gaussian,
)
from tsdiff.policies import Beam
from tsdiff.treesearch import registry
from tsdiff.treesearch.protocols import Allocator
from tsdiff.verifiers import JpegCompressibility, JpegSize, Luminance, Sharpness, TargetColor, TotalVariation

SAMPLES = 5

BUILT_IN = [point.name for point in entry_points(group=registry.policies.group) if point.value.startswith("tsdiff.")]
ALLOCATORS = sorted(name for name in BUILT_IN if isinstance(registry.policies.load(name)(), Allocator))
POLICIES = sorted(set(BUILT_IN) - set(ALLOCATORS))


class TestBuiltInPolicies(PolicyConformance):
    """Every registered policy, as it is where nobody chooses its options, for a few samples' compute."""

    examples = 6

    @pytest.fixture(params=POLICIES)
    def policy(self, request):
        plain = registry.policies.load(request.param)()
        setting = self.setting(plain)
        return plain.fit(SAMPLES * setting.sample_cost, setting)


def test_all_built_in_policies_are_here():
    assert {"best-of-n", "beam"} <= set(POLICIES)


class TestBuiltInAllocators(AllocatorConformance):
    @pytest.fixture(params=ALLOCATORS)
    def allocator(self, request):
        return registry.policies.load(request.param)()


class TestTwoStages(PolicyConformance):
    """Heun evaluates twice a step: prices must know, those of look-ahead too."""

    model = gaussian("ve")
    solver = "heun"

    @pytest.fixture
    def policy(self):
        return Beam(width=2, branch=2, levels=(0.3, 0.7), value="lookahead", lookahead_steps=3)


PROGRAMMATIC = [Luminance(), JpegSize(), JpegCompressibility(), TargetColor(), TotalVariation(), Sharpness()]


class TestProgrammatic(VerifierConformance):
    tolerance = 0.0

    @pytest.fixture(params=PROGRAMMATIC, ids=lambda verifier: verifier.name)
    def verifier(self, request):
        return request.param


class TestNearOrigin(VerifierConformance):
    @pytest.fixture(params=["row", "set"])
    def verifier(self, request):
        return NearOrigin(scope=request.param)


class TestCallable(VerifierConformance):
    @pytest.fixture
    def verifier(self):
        return CallableVerifier(lambda images, prompts: [len(prompt) for prompt in prompts], "length")


# Verifiers that do not keep to it are caught. ------------------------------------------------------------------------


class Checks(VerifierConformance):
    """Its tests are called by hand."""

    __test__ = False


class Relative(NearOrigin):
    """Says that its scores are of rows, and compares rows."""

    def score(self, candidates):
        values = NearOrigin.score(self, candidates).values
        return Scores([value - sum(values) / len(values) for value in values])


class Positional(NearOrigin):
    """Prefers what stands first."""

    def score(self, candidates):
        return Scores([-place for place in range(len(candidates))])


class Overwriting(NearOrigin):
    """Works in the tensors that it was given."""

    def score(self, candidates):
        candidates.x0.mul_(0.5)
        return NearOrigin.score(self, candidates)


MISTAKES = {Relative: "a_batch_scores_like_its_rows", Positional: "order_does_not_matter", Overwriting: "leaves_the_candidates_alone"}


@pytest.mark.parametrize("kind", MISTAKES, ids=lambda kind: kind.__name__)
def test_a_broken_verifier_is_caught(kind):
    check = getattr(Checks(), f"test_{MISTAKES[kind]}")
    check(NearOrigin(), ExampleCandidates.random(["a", "b", "c"]))
    with pytest.raises(AssertionError):
        check(kind(), ExampleCandidates.random(["a", "b", "c"]))
