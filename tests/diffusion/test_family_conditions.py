"""What every family is conditioned on, which sizes it makes, and what it refuses, in one line, before weights are read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from families import FAMILIES
from family import Family, Refused, Shelf, ours, refusal, require_embeddings_asked_for
from torch import Tensor
from torch.nn.functional import pad

from tsdiff.diffusion.loading import load_model, outline
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Condition, LoadOptions

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # numpy's, of diffusers

MASKED = [name for name, one in FAMILIES.items() if one.masked]
OF_TEXT = [name for name, one in FAMILIES.items() if one.embeddings]


def refused_by_all(family: Family) -> Iterator[tuple[str, Refused]]:
    """What every family refuses that is conditioned on text, or on classes."""
    if not family.embeddings:
        yield "a prompt", Refused(Condition("a cat"), "conditioned on classes, not on text such as 'a cat'; give one")
        yield "negative class", Refused(Condition(class_label=-1), "no class -1")
        yield "truth", Refused(Condition(class_label=True), "no class True")
        yield "negative prompt", Refused(Condition(class_label=3, negative_prompt="blurry"), "knows no negative prompt")
        yield "option", Refused(Condition(class_label=3, extra={"clip_skip": 1}), "clip_skip was given, but .* classes alone")
        yield "tensor", Refused(Condition(class_label=3, tensors={"prompt_embeds": torch.zeros(3, 4)}), "prompt_embeds was given")
        return
    width = family.embeddings["prompt_embeds"][1]
    whole = family.given(0, sides=("",))
    yield "class", Refused(Condition(class_label=3, negative_prompt="b"), "conditioned on text, not on classes")
    yield "unknown option", Refused(Condition("a", "b", extra={"nothing": 1}), "nothing")
    yield "unknown tensor", Refused(Condition("a", "b", tensors={"nothing": torch.zeros(3)}), "nothing")
    for side in ("", "negative_"):
        for shape in ((3, width + 1), (2, 3, width), (0, width), (width,)):
            tensors = {side + name: tensor for name, tensor in whole.items()} | {f"{side}prompt_embeds": torch.zeros(shape)}
            yield f"{side}{shape}", Refused(Condition("a", "b", tensors=tensors), rf"{side}prompt_embeds has shape .* must be \(tokens, {width}\) or \(1, tokens, {width}\)")
        for name in whole if len(whole) > 1 else ():
            others = {side + other: tensor for other, tensor in whole.items() if other != name}
            yield f"{side} without {name}", Refused(Condition("a", "b", tensors=others), f"without {side}{name}")


def test_conditions_are_checked_before_weights_are_loaded(shelf: Shelf, family: Family, loaded: Any) -> None:
    plan, model = outline(str(shelf.folder(family)), LoadOptions()), loaded
    cases = dict(refused_by_all(family)) | family.refused
    assert len(cases) > 6
    for case, (condition, says, guided) in cases.items():
        for one in (plan, model):
            for on in guided:
                assert re.search(says, refusal(partial(one.check, condition, guided=on))), case
        if False in guided:
            assert re.search(says, refusal(partial(model.encode, [condition], guided=True))), case
    for condition in family.conditions:
        plan.check(condition)
        plan.check(condition, guided=True)


@pytest.mark.parametrize("family", OF_TEXT, indirect=True)
def test_embeddings_replace_prompts_and_a_pipeline_needs_no_text_encoders(shelf: Shelf, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    assert family.make is not None
    pipe = shelf.pipe(family)
    bare = family.make(**{name: None if name.startswith(("text_encoder", "tokenizer")) else part for name, part in pipe.components.items()}, **family.bare)
    model, tensors = load_model(bare), family.given(2)
    asked = {"conditions": [Condition("for verifiers only", tensors=tensors)], "guidance": "on"}
    model.check(asked["conditions"][0], guided=True)
    call = family.call(noise=True, **asked)
    family.require_equal(ours(model, call), family.reference(bare, call, monkeypatch))
    (encoded,) = model.encode(asked["conditions"], guided=True)
    (batched,) = model.encode([Condition(tensors={name: tensor[None] for name, tensor in tensors.items()})], guided=True)
    assert batched.bucket == encoded.bucket
    for row, other in zip(batched.rows, encoded.rows, strict=True):
        torch.testing.assert_close(row, other, rtol=0, atol=0, equal_nan=True)  # a size that is the sample's is told by NaNs
    require_embeddings_asked_for(model, family)


@pytest.mark.parametrize("family", OF_TEXT, indirect=True)
def test_texts_of_other_lengths_share_batches_only_behind_masks(shelf: Shelf, family: Family) -> None:
    model = shelf.model(family)
    tensors = [family.given(3, tokens=tokens, sides=("",)) for tokens in (5, 6)]
    prompt, first, second = model.encode([family.conditions[0], *(Condition(tensors=one, extra=family.conditions[0].extra) for one in tensors)], guided=False)
    assert (first.bucket == second.bucket) == family.masked
    assert (first.bucket == prompt.bucket) == family.masked


def hidden(family: Family, tokens: int, padding: int, seed: int) -> tuple[Tensor, Tensor]:
    """Embeddings (tokens, width) and their mask, which hides the last `padding` of them."""
    embeds, mask = family.given(seed, tokens=tokens, sides=("",)).values()
    mask[tokens - padding :] = 0
    return embeds, mask


@pytest.mark.parametrize("family", MASKED, indirect=True)
def test_texts_of_all_lengths_are_padded_behind_their_masks(shelf: Shelf, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """They share batches with prompts, and guidance with a negative row of another length, and change no result."""
    model, names = shelf.model(family), ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    (embeds, mask), (negative, negative_mask) = hidden(family, 20, 4, seed=1), hidden(family, 9, 0, seed=2)
    condition = Condition("for verifiers only", tensors=dict(zip(names, (embeds, mask[None].bool(), negative[None], negative_mask), strict=True)))
    model.check(condition, guided=True)
    (encoded,), (prompt,) = (model.encode([one], guided=True) for one in (condition, Condition("a cat")))
    assert encoded.bucket == prompt.bucket
    call = family.call(conditions=[condition], guidance="on", noise=True)
    longer = dict(zip(names, (embeds, mask, pad(negative, (0, 0, 0, 11)), pad(negative_mask, (0, 11))), strict=True))
    theirs = dataclasses.replace(call, conditions=[Condition(tensors=longer)])
    family.require_equal(ours(model, call), family.reference(shelf.pipe(family), theirs, monkeypatch))
    long = dict(zip(names, (*hidden(family, 310, 3, seed=3), negative, negative_mask), strict=True))
    (more,) = model.encode([Condition(tensors=long)], guided=True)
    assert [row["prompt_embeds"].shape for row in more.rows] == [(310, embeds.shape[1])] * 2


@pytest.mark.parametrize("family", MASKED, indirect=True)
def test_what_the_mask_hides_has_no_effect_and_what_it_shows_has(shelf: Shelf, family: Family) -> None:
    model, latents = shelf.model(family), torch.randn((1, *family.latent), generator=torch.Generator().manual_seed(5))
    embeds, mask = hidden(family, 128, 40, seed=1)

    def output(embeds: Tensor, mask: Tensor) -> Tensor:
        (encoded,) = model.encode([Condition(tensors={"prompt_embeds": embeds, "prompt_attention_mask": mask})], guided=False)
        return model.forward(latents, torch.tensor([500.0]), encoded.rows)

    usual, unseen, seen = output(embeds, mask), embeds.clone(), embeds.clone()
    unseen[100:] += 3
    seen[:20] += 3
    torch.testing.assert_close(output(unseen, mask), usual, rtol=0, atol=1e-6)
    assert (output(seen, mask) - usual).abs().max() > 1e-3
    assert (output(embeds, torch.ones(128)) - usual).abs().max() > 1e-4


@pytest.mark.parametrize("family", OF_TEXT, indirect=True)
def test_equal_prompts_share_their_embeddings_and_none_asks_for_gradients(shelf: Shelf, family: Family) -> None:
    model, (condition, *_) = shelf.model(family), family.conditions
    other = Condition("a dog", negative_prompt=condition.negative_prompt, extra=condition.extra)
    encoded = model.encode([condition, other, condition], guided=True)
    assert len({each.bucket for each in encoded}) == 1
    texts = [name for name in encoded[0].rows[0] if "embed" in name or "hidden_states" in name]
    assert texts
    for name in texts:
        assert encoded[0].rows[0][name] is encoded[2].rows[0][name]
        assert encoded[0].rows[1][name] is encoded[1].rows[1][name]
        assert not encoded[0].rows[0][name].requires_grad
    assert not torch.equal(encoded[0].rows[0][texts[0]], encoded[1].rows[0][texts[0]])
    (later,) = model.encode([other], guided=True)
    assert later.rows[1][texts[0]] is encoded[0].rows[1][texts[0]]


@pytest.mark.parametrize("family", OF_TEXT, indirect=True)
def test_a_prompt_that_is_too_long_is_noted_once_for_each_reader(shelf: Shelf, family: Family, capfd: pytest.CaptureFixture[str]) -> None:
    assert family.long is not None
    condition, notices = family.long
    model = load_model(shelf.pipe(family))
    model.encode([Condition("a", extra={key: value for key, value in condition.extra.items() if "prompt" not in key})], guided=True)
    before = model.notices
    model.encode([condition, condition], guided=False)
    found = [notice for notice in model.notices if notice not in before]
    assert [notice.partition(" is ")[2] for notice in found] == list(notices)
    assert all(notice.startswith("prompt '") for notice in found)
    assert capfd.readouterr() == ("", "")


# Sizes ---------------------------------------------------------------------------------------------------------------


def test_sizes(shelf: Shelf, family: Family) -> None:
    for plan in (outline(str(shelf.folder(family)), LoadOptions()), shelf.model(family)):
        assert plan.size(None, None) == family.own_size
        assert plan.size(*family.size) == family.size
        assert plan.latent_shape(plan.size(*family.size)) == family.latent
        if family.multiple is None:
            height, width = family.own_size
            assert plan.latent_shape(None) == family.latent
            for asked, says in (((height, 2 * width), f"width is {2 * width}"), ((2 * height, None), f"height is {2 * height}")):
                with pytest.raises(UsageError, match=f"{says} but .* makes images of {height} x {width} pixels only"):
                    plan.size(*asked)
        else:
            near, length = 4 * family.multiple, family.size[2:]
            with pytest.raises(UsageError, match=f"height is {near + 1} but must be a multiple of {family.multiple}; the nearest are {near} or {near + family.multiple}"):
                plan.size(near + 1, None, *length)
            with pytest.raises(UsageError, match=f"width is 0 but must be a multiple of {family.multiple}; the nearest are {family.multiple}"):
                plan.size(None, 0, *length)
            assert plan.size(near, None, *length) == (near, family.own_size[1], *length)
            taller = (family.size[0] + family.multiple, *family.size[1:])
            assert plan.latent_shape(plan.size(*taller)) == stretched(family, taller)
        for steps in (0, 1001):
            with pytest.raises(UsageError, match=f"steps is {steps} but must lie between 1 and 1000"):
                plan.schedule(plan.solver(), steps, family.size)


def stretched(family: Family, size: tuple[int, ...]) -> tuple[int, ...]:
    """The latent of a size that differs in its height alone."""
    return (*family.latent[:-2], family.latent[-2] * size[0] // family.size[0], family.latent[-1])
