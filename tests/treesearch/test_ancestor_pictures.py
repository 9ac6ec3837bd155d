"""Pictures of ancestors' clean estimates: decoded for the verifiers that compare with them, counted, failing alone."""

from __future__ import annotations

import pytest
import torch
from fakes import Hooked, Judge, check_books, grow

from tsdiff.policies.best_of_n import BestOfN
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Setting
from tsdiff.treesearch.requests import Denoise, Draw, Score

LAST = 6
RATIO = 1.0
NEEDS = ("images", f"ancestor_images@{RATIO!r}")


def difference(candidates):
    """How much brighter a picture is than its ancestor's; these models' pictures are plain."""
    return (candidates.images - candidates.ancestor_images(RATIO)).mean((1, 2, 3))


def comparing(name="compares", value=difference, needs=NEEDS, **options):
    return Judge(name, value, needs=needs, **options)


def decodes_of(verifiers, count, *, final=True, model=None):
    model = model or Hooked()
    solver = model.solver()
    setting = Setting(model.schedule(solver, LAST, None), solver, verifiers[0], tuple(verifiers[1:]))
    return setting.scoring(count, final=final).decodes


@pytest.mark.parametrize("limit", [1, 8])
def test_an_ancestors_picture_is_its_estimate_decoded(limit):
    from tsdiff.treesearch.engine import Limits

    shown = []

    def value(candidates):
        shown.extend(zip(candidates.ancestor_x0(RATIO), candidates.ancestor_images(RATIO), candidates.x0, candidates.images, strict=True))
        return difference(candidates)

    judge = comparing(value=value, needs=(*NEEDS, "x0", f"ancestor_x0@{RATIO!r}"))
    grown = grow(BestOfN(n=3).search, verifiers=[judge], limits=Limits(decode=limit))
    check_books(grown)
    assert len(shown) == 3
    for before, picture_before, x0, picture in shown:
        assert torch.allclose(picture_before, Hooked().decode(before[None]).pixels[0])
        assert torch.allclose(picture, Hooked().decode(x0[None]).pixels[0])
        assert not torch.allclose(before, x0, atol=1e-3)
    leaves = [node for node in grown.nodes if node.level == LAST]
    assert all(node.values["compares"].score == pytest.approx((after - before).mean().item(), abs=1e-6) for node, (_, before, _, after) in zip(leaves, shown, strict=True))


OTHERS = {
    "alone": [comparing()],
    "beside another picture's": [comparing(), Judge("looks", lambda candidates: candidates.images.mean((1, 2, 3)), needs=["images"])],
    "beside one without": [comparing(), Judge()],
    "not first": [Judge(), comparing()],
    "two of one ancestor": [comparing(), comparing("again")],
    "two of two": [comparing(), Judge("coarse", lambda candidates: candidates.ancestor_images(3.0).mean((1, 2, 3)), needs=["ancestor_images@3.0"])],
    "of a set": [comparing(scope="set")],
}


@pytest.mark.parametrize("verifiers", OTHERS.values(), ids=OTHERS)
def test_each_picture_is_decoded_once_for_all_verifiers_and_priced(verifiers):
    grown = grow(BestOfN(n=3).search, verifiers=verifiers)
    check_books(grown)
    assert all(node.score(judge.name) is not None for node in grown.nodes if node.level == LAST for judge in verifiers)
    again = 3 * 2 * (verifiers[0].scope == "set")  # ranked once more, as one set
    distinct = len({need for judge in verifiers for need in judge.needs if "images" in need})
    assert sum(grown.models[0].decodes) == grown.tree.ledger.decodes == 3 * distinct + again
    assert decodes_of(verifiers, 3) == 3 * distinct + again


def test_a_node_that_has_not_got_there_costs_no_decode_of_it():
    judge = comparing()

    def policy(tree):
        nodes = yield Denoise((yield Draw(2)), to=1)
        assert (yield Score(nodes)) == [None, None]
        leaves = yield Denoise(nodes, to=LAST)
        assert None not in (yield Score(leaves))
        return tree.best()

    grown = grow(policy, verifiers=[judge])
    early = [node for node in grown.nodes if node.level == 1]
    assert all("at sigma/alpha 1.0, which this node has not reached" in node.values["compares"].reason for node in early)
    assert not any(node.failed for node in grown.nodes)
    assert grown.tree.ledger.decodes == 2 + 2 * 2 <= 2 * decodes_of([judge], 2, final=False)


@pytest.mark.parametrize("scope", ["row", "set"])
def test_an_ancestor_that_cannot_be_decoded_fails_the_comparison_only(scope):
    """The others, and the other verifiers, score as ever."""
    plain = grow(BestOfN(n=3).search, verifiers=[Judge(needs=["x0", f"ancestor_x0@{RATIO!r}"], value=lambda candidates: candidates.ancestor_x0(RATIO)[:, 0])])
    marks = [node.score("judge") for node in plain.nodes if node.level == LAST]
    model = Hooked()

    def blind(latents):
        if any(abs(row[0].item() - marks[1]) < 1e-6 for row in latents):
            raise RuntimeError("no picture of this one")

    model.blind = blind
    grown = grow(BestOfN(n=3).search, model=model, verifiers=[comparing(scope=scope), Judge("looks", lambda candidates: candidates.images.mean((1, 2, 3)), needs=["images"])])
    leaves = [node for node in grown.nodes if node.level == LAST]
    assert [node.score("compares") is None for node in leaves] == [False, True, False]
    assert "no picture of this one" in leaves[1].values["compares"].reason
    assert all(node.score("looks") is not None for node in leaves)
    assert not any(node.failed for node in leaves)


def test_a_look_ahead_is_compared_with_its_own_ancestor():
    def policy(tree):
        nodes = yield Denoise((yield Draw(2)), to=1)
        assert None not in (yield Score(nodes, at="lookahead", num_steps=5))
        leaves = yield Denoise(nodes, to=LAST)
        yield Score(leaves)
        return tree.best()

    grown = grow(policy, verifiers=[comparing()])
    check_books(grown)
    assert grown.tree.ledger.decodes == 8


def test_an_undeclared_ancestor_is_told():
    judge = Judge(value=lambda candidates: candidates.ancestor_images(2.0).mean((1, 2, 3)), needs=["images"])
    grown = grow(BestOfN(n=1).search, verifiers=[judge], ok=False)
    reason = next(node for node in grown.nodes if node.level == LAST).values["judge"].reason
    assert UsageError.__name__ in reason
    assert "the verifier does not declare 'ancestor_images@2'" in reason
