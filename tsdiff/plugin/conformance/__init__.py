"""Tests that every policy, allocator and verifier should pass: subclass, override a fixture, inherit the tests.

    from tsdiff.plugin.conformance import PolicyConformance

    class TestMyPolicy(PolicyConformance):
        @pytest.fixture
        def policy(self):
            return MyPolicy(width=2)

Policies are run for real, by `tsdiff.search` on the analytic model `gaussian`, in a second or so and without weights.
Needs pytest and hypothesis; torch is imported when a test runs.

    policies.py     what every policy keeps to
    allocators.py   what everything that shares one budget among prompts keeps to
    trials.py       the searches that it is tried in
    watching.py     a search seen from the policy's side
    replaying.py    a search recorded, and replayed
    verifiers.py    what every verifier keeps to, and candidates to score
    judges.py       a verifier whose scores fail, tie or are ranks
    laboratory.py   the analytic model, its network observed, the global generators held still
"""

from __future__ import annotations

import pytest

for _name in ("policies", "allocators", "trials", "replaying", "verifiers", "watching"):
    pytest.register_assert_rewrite(f"{__name__}.{_name}")  # an assertion that fails shows its values

from tsdiff.plugin.conformance.allocators import AllocatorConformance  # noqa: E402 - after the rewriting is asked for
from tsdiff.plugin.conformance.judges import NearOrigin  # noqa: E402
from tsdiff.plugin.conformance.laboratory import gaussian  # noqa: E402
from tsdiff.plugin.conformance.policies import PolicyConformance  # noqa: E402
from tsdiff.plugin.conformance.verifiers import ExampleCandidates, VerifierConformance  # noqa: E402

__all__ = ["AllocatorConformance", "ExampleCandidates", "NearOrigin", "PolicyConformance", "VerifierConformance", "gaussian"]
