"""What is peculiar to PixArt-Sigma and PixArt-alpha; what they have in common with all families is in `test_family_*.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family import Shelf, ours
from family_pixart import PIXART
from sd_reference import swapped
from tiny_dit import tiny_pixart

from tsdiff.diffusion import pixart
from tsdiff.diffusion.loading import load_model, outline
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Condition, LoadOptions

# Of numpy, about how diffusers itself computes sigmas.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def pipe(shelf: Shelf) -> Any:
    """Tests must not change it."""
    return shelf.pipe(PIXART)


def alpha_of(pipe: Any) -> Any:
    """PixArt-alpha with the other parts of PixArt-Sigma."""
    return tiny_pixart(alpha=True, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer, vae=pipe.vae)


@pytest.mark.parametrize("size", [(16, 16), (24, 32)])
def test_alpha_is_told_the_size_as_in_its_pipeline(pipe: Any, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]) -> None:
    own = alpha_of(pipe)
    model = load_model(own)
    assert (model.told_size, load_model(pipe).told_size) == (True, False)
    call = PIXART.call(size=size, guidance="on", noise=True, latent=model.latent_shape(size))
    PIXART.require_equal(ours(model, call), PIXART.reference(own, call, monkeypatch))


def test_the_size_matters_to_a_network_that_is_told_it(pipe: Any) -> None:
    own = alpha_of(pipe)
    assert outline(own, LoadOptions()).size(None, None) == (256, 256)
    model = load_model(own)
    (encoded,) = model.encode([Condition("a cat")], guided=False)
    assert encoded.rows[0]["prompt_embeds"].shape == (120, 24)
    latents, time = torch.randn((1, *PIXART.latent), generator=torch.Generator().manual_seed(5)), torch.tensor([500.0])
    told = model.forward(latents, time, encoded.rows)
    model.scale_factor *= 64
    assert (model.forward(latents, time, encoded.rows) - told).abs().max() > 1e-4


# Texts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [{}, {"max_sequence_length": 12}, {"clean_caption": False}], ids=str)
def test_options_reach_the_text_encoder_as_in_the_pipeline(pipe: Any, extra: dict[str, Any]) -> None:
    model = load_model(pipe)
    (encoded,) = model.encode([Condition("A cat", negative_prompt="blurry", extra=extra)], guided=True)
    length = extra.get("max_sequence_length", 300)
    with torch.no_grad():
        theirs = swapped(pipe, "dpm++2m").encode_prompt("A cat", negative_prompt="blurry", clean_caption=extra.get("clean_caption", True), max_sequence_length=length)
    for row, embeds, mask in zip(encoded.rows, theirs[::2], theirs[1::2], strict=True):
        torch.testing.assert_close(row["prompt_embeds"], embeds[0], rtol=0, atol=1e-6)
        assert torch.equal(row["prompt_attention_mask"], mask[0])
        assert 0 < row["prompt_attention_mask"].sum() < length


def test_captions_are_cleaned_where_the_pipeline_can(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixart, "can_clean", lambda: False)
    model = load_model(pipe)
    model.encode([Condition("A cat"), Condition("b")], guided=True)
    assert [notice.partition(";")[0] for notice in model.notices] == ["captions are made lower-case but not freed of links and markup"]
    plain = load_model(pipe)
    plain.encode([Condition("A cat", extra={"clean_caption": False})], guided=True)
    assert plain.notices == ()
    with pytest.raises(UsageError, match="clean_caption needs beautifulsoup4 and ftfy"):
        model.check(Condition("a cat", extra={"clean_caption": True}))
    asked: list[bool] = []
    monkeypatch.setattr(pixart, "can_clean", lambda: True)
    monkeypatch.setattr(type(pipe), "_text_preprocessing", lambda self, text, clean_caption: [asked.append(clean_caption) or "x"])
    load_model(pipe).encode([Condition("A cat")], guided=False)
    assert set(asked) == {True}
