"""Each verifier has a batch of its own: measured on an accelerator, halved where memory runs out."""

import pytest
import torch
from fakes import Judge, closeness, grow

from tsdiff.treesearch import batches as module
from tsdiff.treesearch.engine import Limits
from tsdiff.treesearch.requests import Denoise, Draw, Score

LAST = 6


def many(tree):
    """Eighty samples, scored."""
    leaves = yield Denoise((yield Draw(80)), to=LAST)
    yield Score(leaves)
    return tree.best()


def test_one_verifier_out_of_memory_does_not_shrink_another():
    def choke(candidates):
        if len(candidates) > 4:
            raise torch.OutOfMemoryError("full")
        return closeness(candidates)

    small, large = Judge("small", choke), Judge("large")
    grown = grow(many, verifiers=[small, large])
    assert all(node.score("small") is not None and node.score("large") is not None for node in grown.nodes if node.level == LAST)
    assert max(len(ids) for ids, _ in large.batches) == 16
    assert [len(ids) for ids, _ in small.batches][-1] <= 4


@pytest.mark.parametrize("limits", [Limits(), Limits(verify=8), Limits(deterministic=True)])
def test_a_verifier_on_an_accelerator_is_measured_where_nobody_says_how_many(monkeypatch, limits):
    asked = []

    def calibrate(probe, *, device):
        asked.append(device)
        probe(3)
        return 40

    monkeypatch.setattr(module, "calibrate", calibrate)
    judge = Judge()
    judge.device = "cuda:1"
    grown = grow(many, verifiers=[judge], limits=limits)
    sizes = [len(ids) for ids, _ in judge.batches]
    if limits == Limits():
        assert asked == ["cuda:1"]
        assert sizes[0] == 3
        assert max(sizes) == 40
    else:
        assert asked == []
        assert max(sizes) <= 16
    assert grown.tree.ledger.verifier_calls["judge"] == 80, "measuring counts for nothing"
    plain = grow(many, verifiers=[Judge()], limits=limits)
    assert [node.score("judge") for node in grown.nodes] == pytest.approx([node.score("judge") for node in plain.nodes])
