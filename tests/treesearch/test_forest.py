"""Many trees under one budget: exact books, an image for everybody, and trees that do not depend on their company."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from fakes import Hooked, Judge, closeness
from hypothesis import given, settings
from hypothesis import strategies as st

from tsdiff.policies import Beam, BestOfN
from tsdiff.treesearch.engine import Limits
from tsdiff.treesearch.errors import BudgetExhausted, UsageError
from tsdiff.treesearch.ledger import Cost, Spend
from tsdiff.treesearch.noise import Fresh, Mix, Rotate, Slerp
from tsdiff.treesearch.protocols import Condition, Grant, Outcome
from tsdiff.treesearch.requests import Denoise, Draw, Gather, Release, Renoise, Score
from tsdiff.treesearch.search import execute, prepare, search

PROMPTS = [f"near ({x}, {y})" for x, y in ((3, 2.4), (0, 0), (1, -2))]
STEPS = 5


@dataclass(frozen=True)
class Script:
    """An allocator made of a function of the forest."""

    allocate: Callable[[Any], Generator[Any, Any, None]]
    needs: frozenset[str] = frozenset()

    name = "script"

    def search(self, forest):
        return self.allocate(forest)

    def forecast(self, total_nfe, runs, setting):
        return Cost(Spend(), Spend(total_nfe))


@dataclass(frozen=True)
class Ask:
    """A policy made of a function of the tree."""

    ask: Callable[[Any], Generator[Any, Any, Any]]
    name = "ask"

    def search(self, tree):
        return self.ask(tree)


def once(policy, nfe):
    """Grants every tree one search, and asserts what came of it."""

    def allocate(forest):
        outcomes = yield [Grant(tree, policy, nfe) for tree in forest.trees]
        for tree, outcome in zip(forest.trees, outcomes, strict=True):
            assert outcome.nfe == tree.budget.spent

    return Script(allocate)


def shared(allocate, total=90, prompts=PROMPTS, model=None, verifier=None, **options):
    allocator = allocate if isinstance(allocate, Script) else Script(allocate)
    options = {"steps": STEPS, "baseline": False, "eta": 1.0} | options
    return execute(prepare(model or Hooked(), prompts, policy=allocator, verifiers=verifier or Judge(), total_nfe=total, **options))


def bytes_of(result):
    return json.dumps(result.tree.to_json(), sort_keys=True)


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


# Refusals and failures -----------------------------------------------------------------------------------------------


def test_grants_that_leave_too_little_for_first_samples_are_refused_whole():
    def greedy(forest):
        first, *others = forest.trees
        with pytest.raises(BudgetExhausted, match="the grants come to 81 NFE, but 80 of 90 can be granted") as refused:
            yield [Grant(first, BestOfN(n=16), 81)]
        assert (refused.value.price, refused.value.remaining) == (81, 80)
        (outcome,) = yield [Grant(first, BestOfN(n=16), 80)]
        assert outcome.nfe == 80
        with pytest.raises(BudgetExhausted):
            yield [Grant(first, BestOfN(n=1), 5)]
        yield [Grant(tree, BestOfN(n=1), 5) for tree in others]
        assert forest.budget.remaining == 0

    assert [result.ledger.nfe for result in shared(greedy)] == [80, 5, 5]


def test_a_refusal_that_is_not_caught_ends_the_allocator_and_nobody_goes_without():
    def greedy(forest):
        yield [Grant(forest.trees[0], BestOfN(n=2), 10)]
        yield [Grant(forest.trees[0], BestOfN(n=2), 1000)]

    results = shared(greedy)
    assert [result.ledger.nfe for result in results] == [10, 5, 5]
    assert "1000 NFE" in results.forest.truncated


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda forest: [], "at least one Grant"),
        (lambda forest: None, "at least one Grant"),
        (lambda forest: [forest.trees[0]], "at least one Grant"),
        (lambda forest: [Grant(forest.trees[0], BestOfN(), 4)], "needs at least 5"),
        (lambda forest: [Grant(forest.trees[0], BestOfN(), 10), Grant(forest.trees[0], BestOfN(), 10)], "twice at once"),
        (lambda forest: [Grant(None, BestOfN(), 10)], "not a tree of this forest"),
    ],
)
def test_wrong_grants_are_told_to_the_allocator(wrong, message):
    def allocate(forest):
        with pytest.raises(UsageError, match=message):
            yield wrong(forest)
        yield [Grant(tree, BestOfN(n=1), 5) for tree in forest.trees]

    assert not shared(allocate).failures
    failures = shared(lambda forest: iter_once(wrong(forest))).failures
    assert len(failures) == 3
    assert all(message in failure.message for failure in failures)


def iter_once(grants):
    yield grants


def test_a_search_without_a_sample_keeps_what_one_costs():
    def draws(tree):
        yield Draw(2)

    def allocate(forest):
        first, *others = forest.trees
        (outcome,) = yield [Grant(first, Ask(draws), 30)]
        assert (outcome.nfe, outcome.scores) == (0, ())
        with pytest.raises(BudgetExhausted, match="10 are kept"):
            yield [Grant(others[0], BestOfN(n=17), 81)]
        yield [Grant(others[0], BestOfN(n=16), 80)]
        with pytest.raises(UsageError, match="needs at least 5"):
            yield [Grant(first, Ask(draws), 4)]

    assert [result.ledger.nfe for result in shared(allocate)] == [5, 80, 5]


def test_an_allocators_own_error_ends_its_forest():
    def broken(forest):
        yield [Grant(forest.trees[0], BestOfN(n=1), 5)]
        raise ZeroDivisionError("an allocator's bug")

    failures = shared(broken).failures
    assert [type(failure.error) for failure in failures] == [ZeroDivisionError] * 3
    assert all("generator of lists of grants" in failure.message for failure in shared(lambda forest: 3).failures)


def test_notes_of_allocators_are_strict_json():
    def note(forest):
        with pytest.raises(UsageError, match="strict JSON"):
            forest.note(best=float("nan"))
        forest.note(best=1.0)
        yield [Grant(tree, BestOfN(n=1), 5) for tree in forest.trees]

    assert shared(note).forest.notes == [{"best": 1.0}]


def test_a_search_that_fails_is_reported_and_left_alone():
    def bug(tree):
        yield Draw()
        if "(0, 0)" in tree.condition.prompt:
            raise RuntimeError("a policy's bug")
        (leaf,) = yield Denoise(tree.nodes, to=tree.schedule.last)
        yield Score(leaf)
        return leaf

    def allocate(forest):
        outcomes = yield [Grant(tree, Ask(bug), 20) for tree in forest.trees]
        assert [outcome.failed for outcome in outcomes] == [False, True, False]
        (again,) = yield [Grant(forest.trees[1], BestOfN(n=2), 10)]
        assert again == Outcome(0, (), failed=True)
        yield [Grant(tree, BestOfN(n=5), 25) for tree in forest.trees]

    results = shared(allocate, total=70)
    assert [result.prompt for result in results] == [PROMPTS[0], PROMPTS[2]]
    assert [failure.prompt for failure in results.failures] == [PROMPTS[1]]
    assert results.nfe == 60


def test_a_search_that_fails_before_it_starts_is_reported_too():
    class Mute(Hooked):
        def encode(self, conditions, *, guided):
            if conditions[0].prompt == PROMPTS[0]:
                raise RuntimeError("cannot encode")
            return super().encode(conditions, guided=guided)

    def allocate(forest):
        outcomes = yield [Grant(tree, BestOfN(n=1), 5) for tree in forest.trees]
        assert [(outcome.failed, outcome.nfe) for outcome in outcomes] == [(True, 0), (False, 5), (False, 5)]

    results = shared(allocate, model=Mute())
    assert [failure.message for failure in results.failures] == ["cannot encode"]
    assert len(results) == 2


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Ask(lambda tree: 3), "policy ask: search gave 3"),
        (Ask(lambda tree: iter_once(Draw(0.5))), "whole number"),
        (Ask(lambda tree: iter_once(3)), "policy ask yielded 3"),
    ],
)
def test_a_policys_mistakes_are_its_own(policy, message):
    (failure,) = shared(once_only_first(policy)).failures
    assert message in failure.message


def once_only_first(policy):
    def allocate(forest):
        yield [Grant(forest.trees[0], policy, 20)]

    return allocate


def test_a_wrong_answer_of_a_granted_policy_is_refused():
    def root(tree):
        (node,) = yield Draw()
        return node

    def allocate(forest):
        yield [Grant(tree, BestOfN(n=1), 5) for tree in forest.trees]
        yield [Grant(forest.trees[0], Ask(root), 5)]

    (failure,) = shared(allocate).failures
    assert "return a finished node" in failure.message


# Planning and files --------------------------------------------------------------------------------------------------

USAGE = {
    "both budgets": ("give one", {"policy": "beam", "nfe": 100, "total_nfe": 300}),
    "allocator with nfe": ("nfe=100 for each of 3 is total_nfe=300", {"policy": once(BestOfN(), 10), "nfe": 100}),
    "allocator without": ("at least 15", {"policy": once(BestOfN(), 10)}),
    "too small": ("the smallest total is 15", {"policy": once(BestOfN(), 10), "total_nfe": 14}),
    "too small for a policy": ("the smallest total is 15", {"policy": "best-of-n", "total_nfe": 14}),
    "too small for this policy": (r"total_nfe=15 is 5 for each of 3 searches", {"policy": "beam", "total_nfe": 15}),
    "no number": ("whole number", {"policy": "beam", "total_nfe": 99.5}),
    "target of a policy": ("spends its budget whatever it finds", {"policy": "beam", "target": 0.5}),
    "target": ("finite number", {"policy": once(BestOfN(), 10), "total_nfe": 90, "target": float("nan")}),
    "needs": ("deterministic", {"policy": Script(wildly(0), needs=frozenset({"stochastic"})), "total_nfe": 90, "eta": 0.0}),
}


@pytest.mark.parametrize("case", USAGE)
def test_usage_errors_come_before_weights_and_say_what_to_do(case):
    message, options = USAGE[case]
    with pytest.raises(UsageError, match=message):
        prepare(Hooked(), PROMPTS, verifiers=Judge(), **({"steps": STEPS, "eta": 1.0} | options))


@given(total=st.integers(15, 400))
def test_with_a_policy_a_total_is_an_equal_budget_for_each(total):
    plan = prepare(Hooked(), PROMPTS, policy="best-of-n", verifiers=Judge(), steps=STEPS, total_nfe=total)
    assert plan.nfe == total // 3
    assert plan.policy == BestOfN(n=total // 3 // STEPS)
    assert plan.to_json()["total_nfe"] == total
    assert plan.nfe_upper <= total + 3 * STEPS


def test_the_plan_of_an_allocator_is_the_total():
    plan = prepare(Hooked(), PROMPTS, policy=once(BestOfN(), 10), verifiers=Judge(), steps=STEPS, total_nfe=99, target=0)
    assert plan.nfe_upper == 99 + 3 * STEPS
    assert plan.nfe is None
    assert (plan.to_json()["total_nfe"], plan.to_json()["target"]) == (99, 0)


def test_the_index_tells_how_the_budget_was_shared(tmp_path):
    results = shared(once(BestOfN(n=2), 12), out=tmp_path, target=5.0)
    index = json.loads((results.path / "index.json").read_text())
    assert index["forest"] == results.forest.to_json()
    assert index["forest"]["grants"] == [[{"tree": i, "policy": "best-of-n", "nfe": 12, "spent": 10, "samples": 2, "best": result.score, "failed": False} for i, result in enumerate(results)]]
    assert (index["forest"]["total_nfe"], index["forest"]["nfe"], index["forest"]["reached"]) == (90, 30, 0)
    assert json.loads((shared(once(BestOfN(n=1), 5), out=tmp_path).path / "index.json").read_text())["forest"]["target"] is None


def test_prompts_and_seeds_are_trees_of_one_forest():
    results = shared(once(BestOfN(n=1), 5), seed=[0, 1])
    assert len(results.forest.trees) == 6
    assert [(result.prompt, result.seed) for result in results] == [(prompt, seed) for prompt in PROMPTS for seed in (0, 1)]


def test_one_prompt_gives_one_result():
    result = search(Hooked(), Condition(PROMPTS[0]), policy=once(BestOfN(n=2), 10), verifier=Judge(), steps=STEPS, total_nfe=20)
    assert result.ledger.nfe == 10
    assert Limits().deterministic is False
