"""In deterministic mode rows that are filled up show whether equal rows have equal results wherever they stand in a batch."""

from __future__ import annotations

import pytest
import torch
from fakes import Hooked, Judge, closeness, grow

from tsdiff.treesearch.batches import PlaceMatters
from tsdiff.treesearch.engine import Limits
from tsdiff.treesearch.protocols import Condition
from tsdiff.treesearch.requests import Denoise, Draw, Score

DETERMINISTIC = Limits(deterministic=True)


def samples(count):
    def search(tree):
        roots = yield Draw(count)
        leaves = yield Denoise(roots, to=tree.schedule.last)
        yield Score(leaves)
        return tree.best()

    return search


def uneven(values):
    """What kernels do that treat the rest of a batch apart: the last row differs by one bit."""
    if len(values) > 1:
        values = values.clone()
        values[-1] = torch.nextafter(values[-1], torch.full_like(values[-1], torch.inf))
    return values


def uneven_network():
    model = Hooked()
    model.spoil = lambda latents, timesteps, outputs: uneven(outputs)
    return model


@pytest.mark.parametrize("count", [3, 8, 16])
def test_a_network_whose_rows_are_unequal_by_place_ends_the_search(count):
    """Also where every batch could be full: the first one keeps a place free."""
    with pytest.raises(PlaceMatters, match=r"one network call of 8 gave .* set max_batch"):
        grow(samples(count), model=uneven_network(), limits=DETERMINISTIC)


def test_a_single_row_has_one_place():
    grown = grow(samples(3), model=uneven_network(), limits=Limits(deterministic=True, network=1))
    assert set(grown.models[0].calls) == {1}


def test_other_searches_need_no_equal_rows():
    grown = grow(samples(8), model=uneven_network())
    assert grown.engine.ledger.padding == 0


def test_a_verifier_whose_scores_are_unequal_by_place_ends_the_search():
    judge = Judge(value=lambda candidates: uneven(closeness(candidates)))
    with pytest.raises(PlaceMatters, match=r"one verifier judge call of 16 gave"):
        grow(samples(3), verifiers=[judge], limits=DETERMINISTIC)


def test_a_verifier_that_draws_lots_cannot_be_deterministic():
    judge = Judge(value=lambda candidates: torch.rand(len(candidates.node_ids)))
    with pytest.raises(PlaceMatters, match="verifier judge"):
        grow(samples(3), verifiers=[judge], limits=DETERMINISTIC)


def test_a_decoder_whose_pictures_are_unequal_by_place_ends_the_search(monkeypatch):
    model = Hooked()
    decode = model.decode

    def spoilt(latents):
        media = decode(latents)
        media.pixels.copy_(uneven(media.pixels))
        return media

    monkeypatch.setattr(model, "decode", spoilt)
    judge = Judge(value=lambda candidates: candidates.images.mean((1, 2, 3)), needs=("images",))
    with pytest.raises(PlaceMatters, match=r"one decode call of 8 gave"):
        grow(samples(3), model=model, verifiers=[judge], limits=DETERMINISTIC)


def test_rows_that_are_no_numbers_are_equal_to_themselves():
    """They fail their nodes, and no more."""
    model = Hooked()
    model.spoil = lambda latents, timesteps, outputs: torch.full_like(outputs, torch.nan)
    grown = grow(samples(3), model=model, limits=DETERMINISTIC, ok=False)
    assert all(node.failed for node in grown.nodes if node.parent is not None)


def test_rows_filled_up_are_counted_and_bytes_stay():
    few = grow(samples(8), limits=DETERMINISTIC, conditions=[Condition("near (3, 2.4)")])
    assert few.engine.ledger.padding > 0
    many = grow(samples(8), samples(3), limits=DETERMINISTIC, conditions=[Condition("near (3, 2.4)")] * 2, seeds=[0, 1])
    for node in few.nodes:
        assert torch.equal(few.latent(node), many.latent(node))
