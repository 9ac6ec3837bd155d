"""Plain functions as verifiers: every reasonable way to return scores, and clear errors for the others."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tsdiff.treesearch.callables import CallableVerifier
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Condition


class Pictures:
    """Candidates that are images with prompts."""

    images = torch.rand((3, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    conditions = (Condition("a"), Condition("bb"), Condition("ccc"))


def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))


def test_the_function_sees_images_and_prompts():
    verifier = CallableVerifier(lambda images, prompts: [len(prompt) for prompt in prompts])
    assert verifier.score(Pictures()).values.tolist() == [1.0, 2.0, 3.0]
    assert torch.equal(CallableVerifier(brightness).score(Pictures()).values, brightness(Pictures.images, []))


@pytest.mark.parametrize(
    "scores",
    [[1, 2.5, 3], (1, 2.5, 3), np.array([1, 2.5, 3]), torch.tensor([1, 2.5, 3.0]), torch.tensor([[1], [2.5], [3.0]]), [np.float32(1), 2.5, torch.tensor(3.0)]],
    ids=["list", "tuple", "array", "tensor", "column", "mixed"],
)
def test_scores_may_come_in_many_forms(scores):
    assert CallableVerifier(lambda images, prompts: scores).score(Pictures()).values.tolist() == [1.0, 2.5, 3.0]


def test_none_is_a_failed_row():
    values = CallableVerifier(lambda images, prompts: [1.0, None, 3.0]).score(Pictures()).values
    assert math.isnan(values[1])
    assert values[[0, 2]].tolist() == [1.0, 3.0]


@pytest.mark.parametrize("scores", [[1.0], torch.ones(3, 3), 1.0, torch.ones(4), None, "abc", {"a": 1.0}, [[1.0], [2.0], [3.0, 4.0]]], ids=str)
def test_anything_else_is_refused_with_what_to_return(scores):
    with pytest.raises(UsageError, match=r"judge.*(one number for each image|numbers, one for each image)"):
        CallableVerifier(lambda images, prompts: scores, "judge").score(Pictures())


def test_an_error_inside_the_function_is_not_swallowed():
    def broken(images, prompts):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        CallableVerifier(broken).score(Pictures())


def test_scores_carry_the_functions_name():
    assert CallableVerifier(brightness).name == "brightness"
    assert CallableVerifier(brightness, "bright").name == "bright"
    assert CallableVerifier(lambda images, prompts: []).name == "callable"
    with pytest.raises(UsageError, match="not callable"):
        CallableVerifier("luminanse")
