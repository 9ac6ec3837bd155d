"""What is peculiar to Stable Diffusion 3; what it has in common with all families is in `test_family_*.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family import Shelf, ours
from family_sd3 import SD3
from flow_reference import swapped
from tiny_sd3 import tiny_sd3

from tsdiff.diffusion.loading import load_model, outline
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Condition, LoadOptions

DYNAMIC = {"use_dynamic_shifting": True, "base_image_seq_len": 16, "max_image_seq_len": 64}


@pytest.fixture(scope="module")
def pipe(shelf: Shelf) -> Any:
    """Tests must not change it."""
    return shelf.pipe(SD3)


@pytest.mark.parametrize("size", [(16, 16), (24, 32)])
def test_dynamic_shifting_follows_the_size(pipe: Any, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]) -> None:
    shifted = tiny_sd3(scheduler_config=DYNAMIC, **{name: part for name, part in pipe.components.items() if name != "scheduler"})
    model = load_model(shifted)
    call = SD3.call(size=size, guidance="on", noise=True, latent=model.latent_shape(size))
    assert model.schedule(model.solver(), call.steps, size).sigma != model.schedule(model.solver(), call.steps, (32, 16)).sigma
    SD3.require_equal(ours(model, call), SD3.reference(shifted, call, monkeypatch))


def test_positions_end_somewhere(pipe: Any) -> None:
    with pytest.raises(UsageError, match=r"width is 36 .* at most 32"):
        outline(pipe, LoadOptions()).size(None, 36)


@pytest.mark.parametrize("extra", [{"clip_skip": 1}, {"max_sequence_length": 20}, {"prompt_2": "x", "prompt_3": "y", "negative_prompt_3": "z"}], ids=str)
def test_options_reach_the_text_encoders_as_in_the_pipeline(pipe: Any, extra: dict[str, Any]) -> None:
    condition = Condition("a cat", negative_prompt="blurry", extra=extra)
    model = load_model(pipe)
    (encoded,) = model.encode([condition], guided=True)
    with torch.no_grad():
        embeds, negative, pooled, negative_pooled = swapped(pipe).encode_prompt(
            "a cat", extra.get("prompt_2"), extra.get("prompt_3"), negative_prompt="blurry", negative_prompt_3=extra.get("negative_prompt_3"),
            clip_skip=extra.get("clip_skip"), max_sequence_length=extra.get("max_sequence_length", 256),
        )  # fmt: skip
    cond, uncond = encoded.rows
    for own, theirs in ((cond["prompt_embeds"], embeds), (uncond["prompt_embeds"], negative), (cond["pooled_prompt_embeds"], pooled), (uncond["pooled_prompt_embeds"], negative_pooled)):
        torch.testing.assert_close(own, theirs[0], rtol=0, atol=1e-6)
    plain = model.encode([Condition("a cat", negative_prompt="blurry")], guided=True)[0]
    assert (encoded.bucket == plain.bucket) == ("max_sequence_length" not in extra)
    assert not any(torch.equal(encoded.rows[0]["prompt_embeds"], row["prompt_embeds"]) for row in plain.rows)


def test_without_t5_its_part_of_the_embedding_is_zero(pipe: Any) -> None:
    two = tiny_sd3(**{**pipe.components, "text_encoder_3": None, "tokenizer_3": None})
    (encoded,) = load_model(two).encode([Condition("a cat")], guided=False)
    embeds = encoded.rows[0]["prompt_embeds"]
    assert embeds.shape == (77 + 256, 48)
    assert not embeds[77:].any()
    torch.testing.assert_close(embeds[:77], load_model(pipe).encode([Condition("a cat")], guided=False)[0].rows[0]["prompt_embeds"][:77])
