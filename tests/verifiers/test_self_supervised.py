"""Samples compared with what their trajectories promised: features, levels, ancestors, whole searches."""

from __future__ import annotations

import functools
import itertools

import pytest
import tiny_clip
import tiny_dino
import tiny_sd
import torch

import tsdiff
from tsdiff.plugin.conformance import VerifierConformance
from tsdiff.policies.best_of_n import BestOfN
from tsdiff.treesearch import registry
from tsdiff.treesearch.errors import SetupError, UsageError
from tsdiff.treesearch.noise import derive, initial_noise
from tsdiff.treesearch.parameters import describe
from tsdiff.treesearch.protocols import Condition, StepState
from tsdiff.treesearch.requests import Denoise, Draw, Score
from tsdiff.verifiers.self_supervised import PathStability, SelfSupervised
from tsdiff.worlds.gaussian.model import GaussianModel
from tsdiff.worlds.gaussian.presets import preset

COLOURS = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.3, 0.3, 0.3], [0.2, 0.4, 0.4]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("self")
    quick = tiny_clip.config(quick_gelu=True)
    return {
        "dino": tiny_dino.save_dino(root / "dino"),
        "dino-classes": tiny_dino.save_dino(root / "dino-classes", ("a", "b")),
        "dino-colours": tiny_dino.colour_dino(root / "dino-colours", classes=False),
        "clip": tiny_clip.save_clip(root / "clip"),
        "clip-open": tiny_clip.save_open_clip(root / "clip-open", tiny_clip.open_clip_module(quick), quick),
        "clip-siglip": tiny_clip.save_siglip(root / "clip-siglip"),
        "clip-colours": tiny_clip.colour_model(root / "clip-colours"),
    }


KINDS = ["dino", "dino-classes", "clip", "clip-open", "clip-siglip"]


@pytest.fixture(scope="module")
def prepared(folders):
    @functools.cache
    def make(kind, cls=SelfSupervised, **options):
        verifier = cls(features=kind.partition("-")[0], model=str(folders[kind]), **options)
        verifier.prepare("cpu")
        return verifier

    return make


class Pairs:
    """Candidates that are images, and pictures of ancestors."""

    def __init__(self, images, ancestors):
        self.images = images
        self.ancestors = ancestors

    def ancestor_images(self, ratio):
        assert ratio == pytest.approx(2.0 / 3.0), "sigma 0.4 of x = (1 - sigma) x0 + sigma eps"
        return self.ancestors


def noise(count=4, size=(40, 48), seed=0):
    return torch.rand((count, 3, *size), generator=torch.Generator().manual_seed(seed))


# Right answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dino-colours", "clip-colours"])
def test_cosines_of_plain_pictures_are_known_in_closed_form(prepared, kind):
    """Of two colours' directions, whatever the brightness and the size."""
    later = COLOURS.flip(0)
    pictures = [colours[:, :, None, None].expand(-1, -1, *size) for colours, size in ((0.5 * COLOURS, (40, 24)), (later, (16, 16)))]
    expected = (COLOURS * later).sum(1) / COLOURS.norm(dim=1) / later.norm(dim=1)
    verifier = prepared(kind)
    assert torch.allclose(verifier.values(*pictures), expected, atol=1e-4)
    scores = verifier.score(Pairs(pictures[1], pictures[0]))
    assert torch.allclose(scores.values, expected, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_that_kept_its_promise_scores_one(prepared, kind):
    images = noise()
    verifier = prepared(kind)
    assert torch.allclose(verifier.score(Pairs(images, images)).values, torch.ones(4), atol=1e-5)
    other = verifier.values(images, noise(seed=1))
    assert other.max() < 0.9999
    assert torch.allclose(other, verifier.values(noise(seed=1), images), atol=1e-5), "symmetric"


def test_features_are_those_of_the_named_network(folders, prepared):
    from tsdiff.verifiers import Clip

    clip = Clip(model=str(folders["clip"]))
    clip.prepare("cpu")
    before, after = noise(), noise(seed=1)
    expected = (clip.network.image_features(before) * clip.network.image_features(after)).sum(1)
    assert torch.equal(prepared("clip").values(before, after), expected)
    assert not torch.allclose(prepared("dino").values(before, after), expected, atol=1e-3)


@pytest.mark.parametrize(("sigma", "ratio"), [(0.4, 2.0 / 3.0), (0.5, 1.0), (0.8, 4.0)])
def test_levels_are_matched_by_signal_to_noise_ratio(prepared, sigma, ratio):
    """EDM's sigma 0.667 and a VP process' abar 0.692 are the flow's 0.4 (sigma / alpha, and 1 / (1 + ratio^2))."""
    verifier = prepared("dino-colours", sigma=sigma)
    assert verifier.ratio == pytest.approx(ratio)
    (need,) = (need for need in verifier.needs if need != "images")
    assert need.startswith("ancestor_images@")
    assert float(need.partition("@")[2]) == verifier.ratio, "to the last bit, as the engine looks it up"
    if sigma == 0.4:
        assert 1.0 / (1.0 + verifier.ratio**2) == pytest.approx(0.692, abs=5e-4)


# Batches, gradients, bad pixels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_does_not_depend_on_its_batch(prepared, kind):
    verifier, after, before = prepared(kind), noise(7), noise(7, seed=1)
    together = verifier.values(after, before)
    alone = torch.cat([verifier.values(left[None], right[None]) for left, right in zip(after, before, strict=True)])
    assert torch.allclose(together, alone, atol=1e-5, rtol=0)
    assert torch.allclose(verifier.values(after.flip(0), before.flip(0)), together.flip(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["dino", "clip"])
def test_gradients_flow_to_both_pictures_and_are_those_of_finite_differences(prepared, kind):
    verifier = prepared(kind)
    pictures = [(0.2 + 0.6 * noise(2, seed=seed)).requires_grad_() for seed in (1, 2)]
    directions = [noise(2, seed=seed) - 0.5 for seed in (3, 4)]
    verifier.score(Pairs(pictures[0], pictures[1])).values.sum().backward()
    for which in (0, 1):
        slope = (pictures[which].grad * directions[which]).sum((1, 2, 3))
        with torch.no_grad():
            moved = [[picture + sign * 3e-2 * directions[which] * (place == which) for place, picture in enumerate(pictures)] for sign in (1, -1)]
            ahead, behind = (verifier.values(*pair).double() for pair in moved)
        assert torch.allclose(slope.double(), (ahead - behind) / 6e-2, rtol=0.05, atol=0.05 * slope.abs().max().item())
        assert slope.abs().min() > 0


@pytest.mark.parametrize("kind", ["dino", "clip"])
def test_a_picture_that_is_not_finite_fails_alone(prepared, kind):
    verifier, after, before = prepared(kind), noise(), noise(seed=1)
    good = verifier.score(Pairs(after, before)).values
    after[1, 0, 0, 0] = float("nan")
    before[3, 2, 5, 5] = float("inf")
    scores = verifier.score(Pairs(after, before))
    assert scores.values.isnan().tolist() == [False, True, False, True]
    assert set(scores.reasons) == {1, 3}
    assert torch.allclose(scores.values[[0, 2]], good[[0, 2]], atol=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, "dino-colours", "clip-colours"])
def test_black_and_white_pictures_score(prepared, kind):
    black, white = torch.zeros(2, 3, 20, 30), torch.ones(2, 3, 20, 30)
    assert torch.isfinite(prepared(kind).values(black, white)).all()


# Options -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, r"^self-supervised: model is missing; write features=dino,model=\.\.\."),
        ({"features": "vgg"}, "features is 'vgg' but must be one of 'dino', 'clip'"),
        ({"model": "./nowhere"}, "there is no folder 'nowhere'"),
        ({"model": "dino", "features": "clip"}, "must be clip or siglip"),
        ({"model": "clip"}, "must be of 'dinov2'"),
        ({"model": "dino", "pretrained": "openai"}, "leave pretrained out"),
        ({"model": "dino", "sigma": 1.0}, "sigma is 1 but must be above 0 and below 1"),
        ({"model": "dino", "sigma": 0.0}, "sigma"),
    ],
)
def test_wrong_options_are_refused_at_once(folders, options, match):
    options = options | ({"model": str(folders[options["model"]])} if options.get("model") in folders else {})
    with pytest.raises(UsageError, match=match):
        SelfSupervised(**options)


def test_weights_that_are_not_here_or_not_loaded(folders):
    with pytest.raises(SetupError, match=r"path-stability: .*hf download owner/model"):
        PathStability(model="owner/model")
    with pytest.raises(UsageError, match="self-supervised has no weights yet"):
        SelfSupervised(model=str(folders["dino"])).values(noise(), noise())


def test_the_two_differ_in_what_they_judge():
    assert (SelfSupervised.judges, PathStability.judges) == ("final", "any")
    defaults = [{row["name"]: row["default"] for row in describe(cls)} for cls in (SelfSupervised, PathStability)]
    assert [default["sigma"] for default in defaults] == [0.4, 0.8]


# Whole searches ------------------------------------------------------------------------------------------------------


def estimates(model, index, steps, prompt, seed=0):
    """Level, ratio and clean estimate of every level of a plain DDIM trajectory, and the final latent: without the engine."""
    solver = model.solver("ddim")
    schedule = model.schedule(solver, steps, None)
    sampler = model.sampler(schedule, solver)
    shape = model.latent_shape(model.size(None, None))
    rows = list(model.encode([Condition(prompt)], guided=False)[0].rows)
    state = StepState(sampler.draw(torch.from_numpy(initial_noise(derive(seed, "draw", index), shape))[None]))
    found = []
    with torch.no_grad():
        for level in range(schedule.last):
            output = sampler.evaluate(state.latents, [level], rows)
            found.append((level, schedule.sigma[level] / schedule.alpha[level], sampler.x0(state.latents, [level], output)))
            state = sampler.advance(state, 0, [level], [level + 1], output, None)
    return found, state.latents


def promise(found, ratio):
    """The first estimate at least as clean."""
    return next(x0 for _, sigma, x0 in found if sigma <= ratio)


@pytest.fixture(scope="module")
def gaussian():
    chosen = preset("rare-mode")
    return GaussianModel(chosen.mixture, "vp", class_names=chosen.class_names)


@pytest.fixture(scope="module")
def stable_diffusion():
    return tsdiff.load_model(tiny_sd.tiny_stable_diffusion())


WORLDS = [("gaussian", "near (3, 2.4)", 20), ("stable_diffusion", "a red cube", 8)]


@pytest.mark.parametrize(("world", "prompt", "steps"), WORLDS)
@pytest.mark.parametrize(("kind", "sigma"), [("dino", 0.4), ("clip", 0.4), ("dino", 0.93)])
def test_a_search_keeps_the_sample_that_kept_its_promise(request, prepared, world, prompt, steps, kind, sigma):
    """Every score is what a trajectory computed by hand says, at no network evaluation more than the samples need."""
    model = request.getfixturevalue(world)
    verifier = prepared(kind, sigma=sigma)
    options = {"policy": BestOfN(n=3), "verifier": verifier, "solver": "ddim", "steps": steps, "guidance_scale": 1.0, "baseline": False}
    result = tsdiff.search(model, prompt, **options)
    expected = []
    for index in range(3):
        found, final = estimates(model, index, steps, prompt)
        promised = promise(found, sigma / (1.0 - sigma))
        assert not torch.allclose(promised, final, atol=1e-3)
        with torch.no_grad():
            expected.append(verifier.values(model.decode(final).pixels, model.decode(promised).pixels).item())
    leaves = [node for node in result.tree.nodes if node.level == steps]
    assert [node.values["self-supervised"].score for node in leaves] == pytest.approx(expected, abs=2e-6)
    if sigma > 0.9:
        assert min(abs(left - right) for left, right in itertools.combinations(expected, 2)) > 2e-6, "or the choice means nothing"
        assert result.node is leaves[expected.index(max(expected))]
    assert result.tree.ledger.nfe == 3 * steps
    assert result.tree.ledger.decodes == 6, "of three samples, and of what they promised to be"


def checks(levels, sink):
    """Score all nodes at every one of some levels, then finish."""

    def policy(tree):
        nodes = yield Draw(3)
        for level in levels:
            nodes = yield Denoise(nodes, to=level)
            sink.append([(node, value) for node, value in zip(nodes, (yield Score(nodes)), strict=True)])
        leaves = yield Denoise(nodes, to=tree.schedule.last)
        yield Score(leaves)
        return tree.best()

    return policy


def run(policy, model, prompt, **options):
    """A search by a generator function."""

    class Probe(BestOfN):
        def search(self, tree):
            return (yield from policy(tree))

    return tsdiff.search(model, prompt, policy=Probe(n=3), solver="ddim", guidance_scale=1.0, baseline=False, **options)


@pytest.mark.parametrize(("world", "prompt", "steps"), WORLDS)
def test_path_stability_judges_nodes_on_the_way(request, prepared, world, prompt, steps):
    model = request.getfixturevalue(world)
    verifier = prepared("dino-colours", PathStability, sigma=0.8)
    sink = []
    result = run(checks(range(1, steps), sink), model, prompt, verifier=verifier, steps=steps)
    trajectories = [estimates(model, index, steps, prompt)[0] for index in range(3)]
    first = next(level for level, ratio, _ in trajectories[0] if ratio <= 4.0)
    assert 0 < first < steps - 2
    for level, scored in enumerate(sink, 1):
        for found, (node, value) in zip(trajectories, scored, strict=True):
            if level <= first:
                assert value is None
                assert "which this node has not reached" in node.values["path-stability"].reason
                continue
            with torch.no_grad():
                pictures = [model.decode(x0).pixels for x0 in (found[level][2], found[first][2])]
                assert value == pytest.approx(verifier.values(*pictures).item(), abs=1e-4)
    assert result.score is not None
    paths = [[scored[index][1] for scored in sink[first:]] for index in range(3)]
    assert any(later < earlier for path in paths for earlier, later in itertools.pairwise(path)), "estimates drift away"


def test_only_finished_samples_are_judged_by_the_final_one(gaussian, prepared):
    verifier = prepared("dino-colours")
    with pytest.raises(UsageError, match="self-supervised judges finished samples only, but node 3 stands at level 6"):
        run(checks([6], []), gaussian, "near (3, 2.4)", verifier=verifier, steps=8)


def test_look_aheads_are_judged_too(gaussian, prepared):
    """From above the ancestor's level the look-ahead captures it on its own way."""
    verifier = prepared("dino-colours")

    def policy(tree):
        nodes = yield Denoise((yield Draw(3)), to=2)
        values = yield Score(nodes, at="lookahead", num_steps=4)
        assert all(value is not None and 0.9 < value <= 1.00001 for value in values)
        leaves = yield Denoise(nodes, to=tree.schedule.last)
        yield Score(leaves)
        return tree.best()

    assert run(policy, gaussian, "near (3, 2.4)", verifier=verifier, steps=8).score is not None


def test_it_can_stand_beside_another_verifier(gaussian, prepared):
    """It scores finished samples there, and steers nothing."""
    verifier = prepared("dino-colours")
    result = tsdiff.search(gaussian, "near (3, 2.4)", policy=BestOfN(n=3), verifier=["gaussian-target", verifier], steps=6, baseline=False)
    leaves = [node for node in result.tree.nodes if node.level == 6]
    assert all(set(node.values) == {"gaussian-target", "self-supervised"} for node in leaves)
    assert result.score == max(node.values["gaussian-target"].score for node in leaves)


def test_by_name(folders):
    registry.verifiers.add("self-supervised", SelfSupervised)
    result = tsdiff.search("gaussian", "near (3, 2.4)", policy=BestOfN(n=2), verifier=f"self-supervised:features=dino,model={folders['dino']}", steps=6, baseline=False)
    assert 0.9 < result.score < 1.0001


class TestConforms(VerifierConformance):
    tolerance = 1e-5

    @pytest.fixture
    def verifier(self, folders):
        return SelfSupervised(model=str(folders["dino"]))
