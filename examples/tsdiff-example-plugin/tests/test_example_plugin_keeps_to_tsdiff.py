"""The plug-in keeps to what the built-in policies and verifiers keep to, and is found by name."""

from __future__ import annotations

from typing import Any

import pytest
from tsdiff_example_plugin.contrast import RmsContrast
from tsdiff_example_plugin.halving import SuccessiveHalving

import tsdiff
from tsdiff.plugin.conformance import ExampleCandidates, PolicyConformance, VerifierConformance
from tsdiff.policies import BestOfN


class TestSuccessiveHalving(PolicyConformance):
    @pytest.fixture
    def policy(self) -> Any:
        return SuccessiveHalving(n=5, rounds=2)


class TestRmsContrast(VerifierConformance):
    @pytest.fixture
    def verifier(self) -> Any:
        return RmsContrast()


def test_both_are_found_by_name_and_fill_a_budget() -> None:
    result = tsdiff.search("gaussian", "near (3, 2.4)", policy="successive-halving", verifier="rms-contrast", nfe=100, steps=5, baseline=False)
    assert 90 <= result.ledger.nfe <= 100
    assert 0.0 < result.score <= 0.5
    assert set(result.scores["rms-contrast"].parts) == {"brightness"}


def test_without_rounds_it_is_best_of_n() -> None:
    one, other = (
        tsdiff.search("gaussian", "near (3, 2.4)", policy=policy, verifier="gaussian-target", steps=6, deterministic=True, baseline=False)
        for policy in (SuccessiveHalving(n=6, rounds=0), BestOfN(n=6))
    )
    assert one.score == other.score
    assert one.ledger.nfe == other.ledger.nfe


def test_contrast_by_hand() -> None:
    candidates = ExampleCandidates.random(["half black, half white", "plain"])
    candidates.images[0, :, :, ::2], candidates.images[0, :, :, 1::2], candidates.images[1] = 0.0, 1.0, 0.3
    assert [float(value) for value in RmsContrast().score(candidates).values] == pytest.approx([0.5, 0.0], abs=1e-6)
