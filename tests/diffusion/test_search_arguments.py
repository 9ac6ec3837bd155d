"""Arguments of a search that belong to its conditions: embeddings by name, and options that a run remembers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import PIPELINES, condition

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.plan import prepare

SIZE = {"height": 16, "width": 16}
WIDTHS = {"sdxl": (40, 20), "sd3": (48, 40), "flux": (48, 16)}


@pytest.mark.parametrize("family", WIDTHS)
def test_pooled_embeddings_are_given_beside_the_others(family: str) -> None:
    width, pooled = WIDTHS[family]
    pipe = PIPELINES[family]()
    given = {f"{side}{name}": torch.zeros(shape) for side in ("", "negative_") for name, shape in (("prompt_embeds", (5, width)), ("pooled_prompt_embeds", (pooled,)))}
    plan = prepare(pipe, verifiers="luminance", **SIZE, **given)
    assert plan.conditions[0].tensors.keys() == given.keys()
    with pytest.raises(UsageError, match="without pooled_prompt_embeds"):
        prepare(pipe, verifiers="luminance", **SIZE, **{name: tensor for name, tensor in given.items() if "pooled" not in name})


def test_pixarts_masks_are_given_beside_its_embeddings() -> None:
    given = {"prompt_embeds": torch.zeros(5, 24), "prompt_attention_mask": torch.ones(5)}
    plan = prepare(PIPELINES["pixart"](), verifiers="luminance", guidance_scale=1.0, **given)
    assert plan.conditions[0].tensors.keys() == given.keys()


def test_a_run_remembers_the_scale_that_its_network_is_told() -> None:
    pipe, cond = PIPELINES["flux"](), condition("flux")
    for scale, said in ((None, 3.5), (5.0, 5.0)):
        plan = prepare(pipe, cond, verifiers="luminance", guidance_scale=scale, **SIZE)
        assert plan.to_json()["condition_extra"] == {"guidance_scale": said}
        assert plan.to_json()["guidance_scale"] == 1.0  # no second row


def test_a_run_remembers_options_of_its_conditions_but_not_pictures() -> None:
    pipe: Any = PIPELINES["sd"]()
    assert prepare(pipe, "a cat", verifiers="luminance").to_json()["condition_extra"] is None
    plan = prepare(pipe, "a cat", verifiers="luminance", condition_extra={"clip_skip": 1, "cross_attention_kwargs": {"scale": 0.5, "mask": torch.zeros(2)}})
    assert plan.to_json()["condition_extra"] == {"clip_skip": 1, "cross_attention_kwargs": {"scale": 0.5, "mask": "Tensor"}}
