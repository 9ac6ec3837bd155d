"""What is peculiar to FLUX.1; what it has in common with all families is in `test_family_*.py`."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from family import Shelf, ours
from family_flux import FLUX
from tiny_flux import tiny_flux
from torch import Tensor

from tsdiff.diffusion.loading import load_model, outline
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Condition, LoadOptions

SHORT = {"max_sequence_length": 24}


@pytest.fixture(scope="module")
def dev(shelf: Shelf) -> Any:
    """Told a guidance scale; tests must not change it."""
    return shelf.pipe(FLUX)


def test_the_scale_that_the_network_is_told_costs_no_row_and_may_differ_in_a_batch(dev: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(dev)
    told = [dataclasses.replace(FLUX.conditions[0], extra=SHORT | {"guidance_scale": scale}) for scale in (1.5, 9.0)]
    encoded = model.encode(told, guided=False)
    assert {len(one.rows) for one in encoded} == {1}
    assert encoded[0].bucket == encoded[1].bucket
    alone = [FLUX.call(conditions=[condition], noise=True) for condition in told]
    assert alone[0].noise is not None
    both = ours(model, FLUX.call(conditions=told, noise=alone[0].noise.expand(-1, 2, -1, -1, -1)))
    for row, call in zip(both, alone, strict=True):
        FLUX.require_equal(row[None], FLUX.reference(dev, call, monkeypatch))
    assert (both[0] - both[1]).abs().max() > 1e-3


@pytest.mark.parametrize("size", [(16, 16), (32, 24)])
def test_dynamic_shifting_follows_the_size(dev: Any, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]) -> None:
    model = load_model(dev)
    call = FLUX.call(size=size, noise=True, latent=model.latent_shape(size))
    assert model.schedule(model.solver(), call.steps, size).sigma != model.schedule(model.solver(), call.steps, FLUX.size).sigma
    FLUX.require_equal(ours(model, call), FLUX.reference(dev, call, monkeypatch))


def test_schnell_takes_few_even_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    schnell = tiny_flux(told=False)
    model = load_model(schnell)
    assert model.default_steps == 4
    call = FLUX.call(steps=4, noise=True)
    assert model.schedule(model.solver(), 4, FLUX.size).sigma == (1.0, 0.75, 0.5, 0.25, 0.0)
    FLUX.require_equal(ours(model, call), FLUX.reference(schnell, call, monkeypatch))
    with pytest.raises(UsageError, match="not told a guidance scale"):
        model.check(Condition("a", extra={"guidance_scale": 3.5}))


def test_options_reach_the_text_encoders_whose_embeddings_may_replace_them(dev: Any) -> None:
    model = load_model(dev)
    extra = SHORT | {"prompt_2": "x", "negative_prompt_2": "z"}
    (encoded,) = model.encode([Condition("a cat", negative_prompt="blurry", extra=extra)], guided=True)
    tensors = {}
    for side, prompts, row in zip(("", "negative_"), (("a cat", "x"), ("blurry", "z")), encoded.rows, strict=True):
        with torch.no_grad():
            embeds, pooled, _ = dev.encode_prompt(*prompts, max_sequence_length=24)
        torch.testing.assert_close(row["prompt_embeds"], embeds[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(row["pooled_prompt_embeds"], pooled[0], rtol=0, atol=1e-6)
        tensors |= {f"{side}prompt_embeds": embeds, f"{side}pooled_prompt_embeds": pooled[0]}
    assert not torch.equal(encoded.rows[0]["prompt_embeds"], encoded.rows[1]["prompt_embeds"])
    bare = outline(tiny_flux(**{**dev.components, "text_encoder": None, "tokenizer": None}), LoadOptions())
    bare.check(Condition(tensors=tensors), guided=True)
    (given,) = bare.load().encode([Condition(tensors=tensors)], guided=True)
    assert given.bucket == encoded.bucket
    for own, theirs in zip(given.rows, encoded.rows, strict=True):
        torch.testing.assert_close(own["prompt_embeds"], theirs["prompt_embeds"], rtol=0, atol=1e-6)
        assert own["guidance"] == theirs["guidance"] == 3.5


def test_texts_of_other_lengths_go_into_other_batches(dev: Any) -> None:
    model = load_model(dev)
    buckets = [model.encode([Condition("a cat", extra={"max_sequence_length": length})], guided=False)[0].bucket for length in (24, 24, 30)]
    assert buckets[0] == buckets[1] != buckets[2]
    assert model.encode([Condition("a cat")], guided=False)[0].rows[0]["prompt_embeds"].shape == (512, 48)


def test_in_half_precision_timesteps_are_rounded_as_the_pipeline_rounds_them(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(shelf.folder(FLUX), device="cpu", dtype="bfloat16")
    told: list[Tensor] = []
    handle = model.pipeline.transformer.register_forward_pre_hook(lambda module, args, kwargs: told.append(kwargs["timestep"]), with_kwargs=True)
    call = FLUX.call(noise=True)
    assert ours(model, call).dtype == torch.float32
    mine = told.copy()
    told.clear()
    FLUX.reference(model.pipeline, call, monkeypatch)
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(mine, told, strict=True))
