"""Promise 3: a result follows from seed, prompt and options; not from neighbours, order or batch size."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from fakes import Hooked, Judge, RandomSearch, grow
from hypothesis import given, settings
from hypothesis import strategies as st

from tsdiff.policies.beam import Beam
from tsdiff.policies.best_of_n import BestOfN
from tsdiff.treesearch.engine import Limits
from tsdiff.treesearch.noise import derive, initial_noise
from tsdiff.treesearch.protocols import Condition
from tsdiff.treesearch.search import execute, prepare, search

PROMPTS = [f"near ({x}, {y})" for x, y in ((3, 2.4), (0, 0), (1, -2), (-2, 0.5), (2, 2), (-1, -1), (0, 2), (1.4, 1.4))]


def trees(prompts=PROMPTS, seeds=0, policy=Beam(width=2, branch=3), **options):  # noqa: B008 - frozen
    options = {"deterministic": True, "steps": 10, "baseline": True, "eta": 1.0} | options
    plan = prepare("gaussian", prompts, policy=policy, seed=seeds, **options)
    results = execute(plan)
    assert not results.failures
    return {
        (result.prompt, result.seed): json.dumps(result.tree.to_json(), sort_keys=True) + json.dumps(result.baseline.tree.to_json(), sort_keys=True)
        for result in results
    }


def latents(prompts, **options):
    options = {"deterministic": True, "steps": 10, "baseline": False, "eta": 1.0} | options
    results = execute(prepare("gaussian", prompts, policy=Beam(width=2, branch=3), **options))
    return {result.prompt: b"".join(latent.numpy().tobytes() for _, latent in sorted(result.latents.items())) for result in results}


@pytest.fixture(scope="module")
def together():
    return trees()


def test_alone_or_together_a_tree_has_the_same_bytes(together):
    for prompt in PROMPTS[:3]:
        assert trees([prompt]) == {(prompt, 0): together[prompt, 0]}


def test_the_order_of_prompts_changes_no_byte(together):
    assert trees(PROMPTS[::-1]) == together
    assert trees(PROMPTS[3:] + PROMPTS[:3]) == together


@pytest.mark.parametrize("max_batch", [8, 16, 64])
def test_the_batch_size_changes_no_byte(together, max_batch):
    assert trees(max_batch=max_batch) == together


def test_memory_limits_change_no_byte(together):
    assert trees(memory_limit=1) == together


def test_other_seeds_beside_change_no_byte(together):
    both = trees(PROMPTS[:2], seeds=[0, 1])
    assert {key: both[key] for key in both if key[1] == 0} == {(prompt, 0): together[prompt, 0] for prompt in PROMPTS[:2]}
    assert both[PROMPTS[0], 0] != both[PROMPTS[0], 1]


def test_latents_have_the_same_bytes_too():
    every = latents(PROMPTS)
    assert latents(PROMPTS[::-1], max_batch=16) == every
    assert latents([PROMPTS[4]]) == {PROMPTS[4]: every[PROMPTS[4]]}


@pytest.mark.parametrize("solver", ["dpm++2m-sde", "ddpm", "exact", "dpm++2m"])
def test_whatever_the_solver(solver):
    options = {"solver": solver, "eta": None, "baseline": True}
    every = trees(PROMPTS[:4], **options)
    assert trees(PROMPTS[2::-1], **options).items() <= every.items()


def test_guided_too():
    options = {"class_label": "rare", "guidance_scale": 3.0, "guidance_interval": (0.2, 5.0)}
    every = trees(PROMPTS[:4], **options)
    assert trees(PROMPTS[2::-1], **options).items() <= every.items()


@settings(max_examples=12)
@given(seed=st.integers(0, 10**6), others=st.lists(st.integers(0, 10**6), max_size=3, unique=True), host=st.sampled_from([1, 4 << 30]))
def test_random_policies_neither_see_nor_disturb_each_other(seed, others, host):
    def tree_bytes(searches, seeds, host_bytes):
        limits = Limits(deterministic=True, network=4, host_bytes=host_bytes)
        grown = grow(*searches, seeds=seeds, eta=0.5, limits=limits, conditions=[Condition(f"near ({s % 7}, 1)") for s in seeds])
        shown = [json.dumps(run.tree.to_json(), sort_keys=True) for run in grown.runs]
        return dict(zip(seeds, zip(shown, [{i: t.numpy().tobytes() for i, t in kept.items()} for kept in grown.latents], strict=True), strict=True))

    seeds = list(dict.fromkeys([*others, seed]))
    alone = tree_bytes([RandomSearch(seed)], [seed], 4 << 30)
    assert tree_bytes([RandomSearch(s) for s in seeds], seeds, host)[seed] == alone[seed]


@pytest.mark.parametrize("max_batch", [1, 3, 16, 64, None])
def test_without_deterministic_scores_agree_to_rounding(max_batch):
    options = {"steps": 10, "policy": BestOfN(n=6), "seed": [0, 1]}
    reference = execute(prepare("gaussian", PROMPTS[:4], max_batch=7, **options))
    for one, other in zip(reference, execute(prepare("gaussian", PROMPTS[:4], max_batch=max_batch, **options)), strict=True):
        ours = [node.score(one.tree.verifier) for node in one.tree.nodes if node.level == 10]
        theirs = [node.score(other.tree.verifier) for node in other.tree.nodes if node.level == 10]
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)


def test_the_ith_first_noise_is_the_same_for_every_prompt_and_policy():
    found = []

    for policy in (BestOfN(n=2), Beam(width=3, branch=2)):
        for prompt in PROMPTS[:2]:
            found.append(_noises(policy, prompt))
    assert len(found) == 4
    for noises in found:
        for i, noise in enumerate(noises):
            assert torch.equal(noise, torch.from_numpy(initial_noise(derive(41, "draw", i), (2,))))


def _noises(policy, prompt):
    """The noises of the first two roots, as they were when the roots were made."""
    from tsdiff.treesearch.engine import Engine
    from tsdiff.treesearch.run import Run
    from tsdiff.treesearch.store import Store
    from tsdiff.treesearch.tree import Tree

    model = Hooked()
    info = model.solver()
    tree = Tree(model.schedule(info, 6, None), info, Condition(prompt), seed=41, verifier="judge")
    noises = {}

    class Watched(Store):
        def put(self, key, tensors):
            if key[1] == "noise" and key[2] < 2:
                noises.setdefault(key[2], tensors["noise"].clone())
            super().put(key, tensors)

    engine = Engine(Limits(), Watched("cpu"))
    engine.add(Run(tree, policy.search, {None: model}, [Judge()]))
    engine.run()
    return [noises[i] for i in range(min(2, len(tree.roots)))]


@pytest.mark.parametrize("solver", ["ddim", "ddim(eta=1)", "dpm++2m-sde", "exact"])
def test_the_baseline_is_best_of_ns_first_sample(solver):
    for result in execute(prepare("gaussian", PROMPTS[:3], policy=BestOfN(n=3), solver=solver, steps=8, deterministic=True, seed=[0, 9])):
        leaf = next(node for node in result.tree.nodes if node.level == 8)
        assert leaf.path()[0].move.noise == result.baseline.node.path()[0].move.noise
        assert leaf.score(result.tree.verifier) == result.baseline.score
        assert leaf.id == result.baseline.node.id


def test_more_samples_never_score_worse():
    scores = [search("gaussian", PROMPTS[0], policy=BestOfN(n=n), steps=6, deterministic=True).score for n in (1, 2, 4, 8, 16)]
    assert scores == sorted(scores)


def test_the_callers_latents_are_root_0():
    own = torch.tensor([0.3, -1.2])
    result = search("gaussian", PROMPTS[0], policy=BestOfN(n=2), latents=own, steps=6)
    assert torch.equal(search("gaussian", PROMPTS[0], policy=BestOfN(n=1), latents=own[None], steps=6).latents[0], own)
    assert result.tree.nodes[0].move.noise.sha256
    assert result.baseline.tree.nodes[0].move.noise == result.tree.nodes[0].move.noise
    assert [type(node.move.noise).__name__ for node in result.tree.nodes[:2]] == ["Given", "Fresh"]


@pytest.mark.parametrize("seed", [0, 7])
def test_torchs_noise_is_root_0(seed):
    result = search("gaussian", PROMPTS[0], policy=BestOfN(n=1), initial_noise="torch", seed=seed, steps=6)
    assert torch.equal(result.latents[0], torch.randn((1, 2), generator=torch.Generator().manual_seed(seed))[0])
    assert result.score == result.baseline.score


def test_torchs_switches_are_restored():
    before = torch.are_deterministic_algorithms_enabled()
    search("gaussian", PROMPTS[0], policy=BestOfN(n=1), steps=3, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled() == before


def test_plans_are_plain_values():
    plan = prepare("gaussian", PROMPTS, steps=5)
    assert dataclasses.replace(plan, nfe=None) == plan
    json.dumps(plan.to_json(), allow_nan=False)
