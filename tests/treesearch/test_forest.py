"""Many trees under one budget: exact books, an image for everybody, and trees that do not depend on their company."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest
from fakes import Hooked, Judge, closeness
from forests import PROMPTS, STEPS, Ask, bytes_of, once, shared
from hypothesis import given, settings
from hypothesis import strategies as st

from tsdiff.policies import Beam, BestOfN
from tsdiff.treesearch.errors import BudgetExhausted
from tsdiff.treesearch.ledger import Cost, Spend
from tsdiff.treesearch.noise import Fresh, Mix, Rotate, Slerp
from tsdiff.treesearch.protocols import Grant
from tsdiff.treesearch.requests import Denoise, Draw, Gather, Release, Renoise, Score
from tsdiff.treesearch.search import execute, prepare, search

# Books ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wild:
    """A policy that asks for random things and does not mind refusals."""

    seed: int
    name = "wild"

    def search(self, tree):
        rng = np.random.default_rng(self.seed)
        last = tree.schedule.last
        nodes, roots = [], 0
        for _ in range(int(rng.integers(1, 7))):
            kind = int(rng.integers(5))
            recipe = [None, Rotate(0, 0.9, int(rng.integers(9))), Mix({0: 0.6}, fresh=(1, 0.8)), Slerp(0, roots - 1, 0.3)][int(rng.integers(4)) if roots else 0]
            group = [nodes[int(i)] for i in rng.integers(0, len(nodes), 2)] if nodes else []
            growing = [node for node in group if node.level < last and node.status != "closed"]
            if kind == 0 or not growing:
                request = Draw(2, recipe)
            elif kind == 1:
                request = Denoise(growing, to=[int(rng.integers(node.level, last + 1)) for node in growing])
            elif kind == 2:
                request = Score(growing)
            elif kind == 3:
                request = Gather(Draw(1, recipe), Denoise(growing, to=last))
            else:
                request = Renoise(growing, 0)
            try:
                reply = yield request
            except BudgetExhausted:
                if rng.random() < 0.3:
                    raise
                continue
            made = [*reply[0], *reply[1]] if kind == 3 and growing else reply if not isinstance(request, Score) else []
            roots += 2 * isinstance(request, Draw) + isinstance(request, Gather)
            nodes += made
            leaves = [node for node in made if node.level == last]
            if leaves and rng.random() < 0.7:
                yield Score(leaves)
        if nodes and rng.random() < 0.3:
            yield Release(nodes)
        return tree.best() if rng.random() < 0.8 else None


def wildly(seed):
    """An allocator that grants random policies random amounts, too large ones among them."""

    def allocate(forest):
        rng = np.random.default_rng(seed)
        for _ in range(int(rng.integers(0, 5))):
            trees = [tree for tree in forest.trees if rng.random() < 0.7] or [forest.trees[0]]
            grants = [
                Grant(tree, BestOfN(n=int(rng.integers(1, 9))) if rng.random() < 0.4 else Wild(int(rng.integers(1000))), int(rng.integers(STEPS, 40)))
                for tree in trees
            ]
            before = [tree.budget.spent for tree in trees]
            try:
                outcomes = yield grants
            except BudgetExhausted:
                if rng.random() < 0.3:
                    raise
                continue
            assert len(outcomes) == len(grants)
            for grant, spent, outcome in zip(grants, before, outcomes, strict=True):
                assert outcome.nfe == grant.tree.budget.spent - spent <= grant.nfe
                assert not outcome.failed
            assert forest.budget.spent == sum(tree.budget.spent for tree in forest.trees) <= forest.budget.limit

    return allocate


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000), total=st.integers(15, 200), spoilt=st.sampled_from([0, 0, 0, 3]), target=st.sampled_from([None, -2.0]), null=st.booleans())
def test_the_total_is_never_exceeded_and_everybody_has_an_answer(seed, total, spoilt, target, null):
    model = Hooked()
    if spoilt:
        calls = iter(range(10_000))
        model.spoil = lambda latents, timesteps, outputs: outputs * float("nan") if next(calls) < spoilt else outputs
    judge = Judge(value=(lambda candidates: closeness(candidates) * float("nan")) if null else closeness)
    results = shared(wildly(seed), total, model=model, verifier=judge, target=target, max_batch=4)
    assert model.seen == results.engine.network_rows
    assert results.engine.rows == results.nfe <= total
    assert results.forest.spent <= total
    if not spoilt:
        assert not results.failures
        assert len(results) == len(PROMPTS)
        assert results.nfe == results.forest.spent == sum(result.ledger.nfe for result in results)
    for result in results:
        assert result.image is not None
        assert result.node.level == STEPS
        assert null or result.score == max(node.score("judge") for node in result.tree.nodes if node.level == STEPS and not node.draft and node.score("judge") is not None) or len(
            [entry for grants in results.forest.grants for entry in grants if entry["tree"] == PROMPTS.index(result.prompt)]
        ) == 1
    record = results.forest.to_json()
    json.dumps(record, allow_nan=False)
    for place, tree in enumerate(results.forest.trees):
        granted = [entry for grants in record["grants"] for entry in grants if entry["tree"] == place]
        rest = tree.budget.spent - sum(entry["spent"] for entry in granted)
        assert 0 <= rest <= STEPS, "beside its grants a tree has at most one sample of its own"


def test_a_forest_without_grants_makes_plain_samples():
    def nothing(forest):
        return
        yield

    results = shared(nothing, total=15)
    plain = search(Hooked(), PROMPTS, policy=BestOfN(n=1), verifier=Judge(), steps=STEPS, eta=1.0, baseline=False)
    assert [result.ledger.nfe for result in results] == [STEPS] * 3
    assert [result.score for result in results] == [result.score for result in plain]


def test_time_that_is_over_leaves_everybody_one_sample():
    results = shared(once(BestOfN(n=6), 30), seconds=1e-9)
    assert [result.ledger.nfe for result in results] == [STEPS] * 3
    assert all("seconds" in result.truncated for result in results)


# Trees ---------------------------------------------------------------------------------------------------------------


def give_up(tree):
    roots = yield Draw(8)
    yield Denoise(roots[:2], to=2)
    yield Denoise(roots, to=tree.schedule.last)
    raise AssertionError("the budget does not pay for this")


def no_answer(tree):
    roots = yield Draw(2)
    yield Denoise(roots, to=tree.schedule.last)


def not_the_best(tree):
    roots = yield Draw(3)
    leaves = yield Denoise(roots, to=tree.schedule.last)
    values = yield Score(leaves)
    tree.note(leaves[0], seen=True)
    tree.note(draws=int(tree.rng("own").integers(1000)))
    return leaves[int(np.argmin(values))]


LONE = {
    "best of n": (BestOfN(n=4), {}),
    "best of n, cut": (BestOfN(n=50), {}),
    "beam": (Beam(width=2, branch=2, levels=(0.4,)), {}),
    "beam, cut": (Beam(width=2, branch=8, levels=(0.4, 0.8)), {}),
    "look-ahead": (Beam(width=1, branch=2, levels=(0.4,), value="lookahead"), {}),
    "deterministic": (Beam(width=1, branch=3, levels=(0.4,)), {"eta": 0.0}),
    "gives up": (Ask(give_up), {}),
    "no answer": (Ask(no_answer), {}),
    "not the best": (Ask(not_the_best), {}),
    "sets": (BestOfN(n=3), {"verifier": Judge(scope="set")}),
    "sets, no answer": (Ask(no_answer), {"verifier": Judge(scope="set")}),
    "torch noise": (BestOfN(n=3), {"initial_noise": "torch"}),
}


@pytest.mark.parametrize("case", LONE)
def test_one_grant_grows_the_tree_of_a_lone_search(case, tmp_path):
    policy, options = LONE[case]
    verifier = options.pop("verifier", Judge()) if "verifier" in options else Judge()
    forest = shared(once(policy, 30), deterministic=True, verifier=verifier, **options)

    @dataclass(frozen=True)
    class Lone:
        name = policy.name
        size_parameters = ()
        needs = frozenset()

        def search(self, tree):
            return policy.search(tree)

        def cost(self, setting):
            return Cost(Spend(), Spend(30))

    lone = execute(prepare(Hooked(), PROMPTS, policy=Lone(), verifiers=verifier, nfe=30, **({"steps": STEPS, "baseline": False, "eta": 1.0, "deterministic": True} | options)))
    assert len(forest) == len(lone) == 3
    for left, right in zip(forest, lone, strict=True):
        assert bytes_of(left) == bytes_of(right)
        assert (left.node.index, left.score, left.truncated) == (right.node.index, right.score, right.truncated)
        assert {i: latent.numpy().tobytes() for i, latent in left.latents.items()} == {i: latent.numpy().tobytes() for i, latent in right.latents.items()}
        assert left.image.tobytes() == right.image.tobytes()
        assert left.ledger == right.ledger


def test_grants_in_parts_make_the_samples_of_the_whole():
    def parts(forest):
        for n in (1, 3, 2):
            yield [Grant(tree, BestOfN(n=n), n * STEPS) for tree in forest.trees]

    whole = shared(once(BestOfN(n=6), 30), deterministic=True)
    for left, right in zip(shared(parts, deterministic=True), whole, strict=True):
        assert [node.stream for node in left.tree.roots] == [node.stream for node in right.tree.roots]
        leaves = [[node.score("judge") for node in one.tree.nodes if node.level == STEPS] for one in (left, right)]
        assert leaves[0] == leaves[1]
        assert left.score == right.score
        assert left.ledger == right.ledger


def test_a_later_policy_sees_a_tree_of_its_own():
    seen = []

    def look(tree):
        first = (len(tree.nodes), tree.best(), tree.budget.limit, tree.budget.spent)
        roots = yield Draw(2)
        leaves = yield Denoise(roots, to=tree.schedule.last)
        yield Score(leaves[1])
        seen.append((*first, list(tree.nodes) == [*roots, *leaves], tree.best() is leaves[1], tree.budget.spent, tree.budget.remaining, int(tree.rng("x").integers(1 << 40)), tree.condition.prompt))
        return tree.best()

    def twice(forest):
        for nfe in (12, 17):
            yield [Grant(forest.trees[0], Ask(look), nfe)]

    (result,) = shared(twice, prompts=PROMPTS[:1])
    (*first, luck, _), (*second, other, prompt) = seen
    assert first == [0, None, 12, 0, True, True, 10, 2]
    assert second == [0, None, 17, 0, True, True, 10, 7]
    assert luck != other
    assert prompt == PROMPTS[0]
    assert result.ledger.nfe == 20


def test_recipes_of_a_later_policy_count_from_its_own_first_root():
    def neighbours(tree):
        (root,) = yield Draw()
        others = yield Gather(Draw(2, [Rotate(0, 0.9, 0), Rotate(0, 0.9, 1)]), Draw(1, Mix({0: 0.6}, fresh=(2, 0.8))), Draw(1, Fresh(7)))
        last = yield Draw(1, Slerp(0, 1, 0.5))
        leaves = yield Denoise([root, *(node for group in (*others, last) for node in group)], to=tree.schedule.last)
        yield Score(leaves)
        return tree.best()

    def twice(forest):
        for _ in range(2):
            yield [Grant(forest.trees[0], Ask(neighbours), 6 * STEPS)]

    (result,) = shared(twice, prompts=PROMPTS[:1])
    recipes = [root.move.noise for root in result.tree.roots]
    assert recipes[:6] == [Fresh(0), Rotate(0, 0.9, 0), Rotate(0, 0.9, 1), Mix({0: 0.6}, fresh=(2, 0.8)), Fresh(7), Slerp(0, 1, 0.5)]
    assert recipes[6:] == [Fresh(6), Rotate(6, 0.9, 6), Rotate(6, 0.9, 7), Mix({6: 0.6}, fresh=(8, 0.8)), Fresh(13), Slerp(6, 7, 0.5)]
    scores = [node.score("judge") for node in result.tree.nodes if node.level == STEPS]
    assert len(set(scores)) == 12, "no noise is used twice"


def test_the_best_of_all_grants_is_the_answer():
    def parts(forest):
        for _ in range(4):
            yield [Grant(tree, Ask(not_the_best), 3 * STEPS) for tree in forest.trees]

    for result in shared(parts, total=180):
        assert result.score == max(node.score("judge") for node in result.tree.nodes if node.level == STEPS)


def test_between_grants_only_the_way_to_the_best_sample_stays_open():
    def parts(forest):
        (tree,) = forest.trees
        for policy in (Beam(width=2, branch=2, levels=(0.4,)), BestOfN(n=4), BestOfN(n=1)):
            yield [Grant(tree, policy, 30)]
            ways = set(tree.best().path())
            still = {node for node in tree.nodes if node.status == "open"}
            assert len(still) <= len(ways) < len(tree.nodes)
            assert still <= ways

    (result,) = shared(parts, prompts=PROMPTS[:1])
    assert result.score is not None


def test_neither_company_nor_order_changes_a_byte():
    def own(forest):
        for n in (2, 1, 3):
            yield [Grant(tree, BestOfN(n=n) if "3" in tree.condition.prompt else Beam(width=n, branch=2, levels=(0.4,)), 40) for tree in forest.trees]

    options = {"deterministic": True, "total": 360}
    together = {result.prompt: bytes_of(result) for result in shared(own, **options)}
    assert {result.prompt: bytes_of(result) for result in shared(own, prompts=PROMPTS[::-1], **options)} == together
    assert {result.prompt: bytes_of(result) for result in shared(own, baseline=True, max_batch=16, memory_limit=1, **options)} == together
    for prompt in PROMPTS:
        (alone,) = shared(own, prompts=[prompt], **options)
        assert bytes_of(alone) == together[prompt]


def test_outcomes_are_in_the_order_of_the_grants():
    def backwards(forest):
        outcomes = yield [Grant(tree, BestOfN(n=n), n * STEPS) for n, tree in zip((3, 1, 2), forest.trees[::-1], strict=True)]
        assert [(outcome.nfe, len(outcome.scores)) for outcome in outcomes] == [(15, 3), (5, 1), (10, 2)]
        for tree, outcome in zip(forest.trees[::-1], outcomes, strict=True):
            assert list(outcome.scores) == [node.score("judge") for node in tree.nodes if node.level == STEPS]

    assert not shared(backwards).failures


def test_failed_scores_are_null_in_outcomes_and_the_sample_is_an_answer():
    def see(forest):
        outcomes = yield [Grant(tree, BestOfN(n=2), 10) for tree in forest.trees]
        assert [outcome.scores for outcome in outcomes] == [(None, None)] * 3
        yield [Grant(tree, BestOfN(n=2), 10) for tree in forest.trees]

    results = shared(see, verifier=Judge(value=lambda candidates: closeness(candidates) * float("nan")))
    assert [result.score for result in results] == [None] * 3
    assert all(result.image is not None for result in results)


# Targets -------------------------------------------------------------------------------------------------------------


def one_by_one(tree):
    while True:
        (root,) = yield Draw()
        (leaf,) = yield Denoise(root, to=tree.schedule.last)
        yield Score(leaf)


def test_a_search_stops_as_soon_as_a_sample_reaches_the_target():
    free = shared(once(Ask(one_by_one), 50), total=150)
    scores = [[node.score("judge") for node in result.tree.nodes if node.level == STEPS] for result in free]
    target = sorted(scores[0])[-2]
    aimed = shared(once(Ask(one_by_one), 50), total=150, target=target)
    for own, result in zip(scores, aimed, strict=True):
        needed = next((number for number, score in enumerate(own, 1) if score >= target), 10)
        assert result.ledger.nfe == needed * STEPS
        assert result.score == max(own[:needed])
    assert aimed.forest.reached == sum(max(own) >= target for own in scores) >= 1
    assert aimed.forest.to_json()["target"] == target
    assert free.forest.reached is None


def test_partly_denoised_nodes_and_drafts_do_not_reach_a_target():
    policy = Beam(width=2, branch=2, levels=(0.4, 0.8), value="lookahead")
    easy, free = (shared(once(policy, 60), total=180, target=target) for target in (-1e9, None))
    for reached, whole in zip(easy, free, strict=True):
        assert bytes_of(reached) == bytes_of(whole), "the first finished samples are the last request"
