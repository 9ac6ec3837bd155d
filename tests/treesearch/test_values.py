"""Scores: sets, several verifiers, people who answer late, look-ahead, and estimates captured in passing."""

from __future__ import annotations

import threading

import pytest
import torch
from fakes import PROMPT, Hooked, Judge, Jury, check_books, closeness, grow, sample

from tsdiff.policies.beam import Beam
from tsdiff.policies.best_of_n import BestOfN
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Condition, Guidance, StepState
from tsdiff.treesearch.requests import Denoise, Draw, Gather, Perturb, Renoise, Score
from tsdiff.treesearch.search import search

LAST = 6


def best_of(n):
    return BestOfN(n=n).search


# What is judged ------------------------------------------------------------------------------------------------------


def test_the_clean_estimate_is_judged_and_at_the_end_the_latent():
    seen = {}

    def value(candidates):
        for node, level, x, x0 in zip(candidates.node_ids, candidates.levels, candidates.latents, candidates.x0, strict=True):
            seen[node] = (level, x.clone(), x0.clone())
        return closeness(candidates)

    def policy(tree):
        roots = yield Draw(2)
        yield Score(roots)
        leaves = yield Denoise(roots, to=LAST)
        yield Score(leaves)
        return tree.best()

    model = Hooked()
    grown = grow(policy, model=model, verifiers=[Judge(value=value)])
    sampler = model.sampler(grown.tree.schedule, grown.tree.solver)
    rows = list(model.encode([Condition()], guided=False)[0].rows)
    for node in grown.nodes:
        level, x, x0 = seen[f"{node.id:032x}"]
        assert level == node.level
        assert torch.equal(x, grown.latent(node))
        expected = x if level == LAST else sampler.x0(x[None], [level], sampler.evaluate(x[None], [level], rows))[0]
        assert torch.allclose(x0, expected, atol=1e-6)


def test_a_guided_estimate_is_guided():
    seen = []
    model = Hooked()

    def policy(tree):
        yield Score((yield Draw()))
        return (yield from sample(tree))

    def value(candidates):
        seen.append(candidates.x0[0].clone())
        return closeness(candidates)

    grown = grow(policy, model=model, class_label=8, guidance=Guidance(3.0), verifiers=[Judge(value=value)])
    sampler = model.sampler(grown.tree.schedule, grown.tree.solver)
    cond, uncond = model.encode([Condition(class_label=8)], guided=True)[0].rows
    x = grown.latent(0)[None]
    guided = sampler.guide(sampler.evaluate(x, [0], [cond]), sampler.evaluate(x, [0], [uncond]), [3.0], [0.0])
    assert torch.allclose(seen[0], sampler.x0(x, [0], guided)[0], atol=1e-5)


def test_pictures_are_made_only_where_they_are_looked_at():
    def policy(tree):
        nodes = yield Denoise((yield Draw(2)), to=3)
        yield Score(nodes)
        yield Score((yield Denoise(nodes, to=LAST)))
        return tree.best()

    for needs, decodes in ((["images"], 4), (["x0"], 1)):
        model = Hooked()
        grow(policy, model=model, verifiers=[Judge(needs=needs)])
        assert sum(model.decodes) == decodes


def test_images_without_the_need_are_refused():
    def value(candidates):
        return candidates.images.mean((1, 2, 3))

    with pytest.raises(UsageError, match="does not declare 'images'"):
        search(Hooked(), PROMPT, policy=BestOfN(n=1), verifier=Judge(value=value), steps=3)


def test_a_plain_function_is_a_verifier():
    def brightness(images, prompts):
        assert images.shape[1:] == (3, 4, 4)
        assert prompts == [PROMPT] * len(images)
        return images.mean((1, 2, 3))

    result = search(Hooked(), PROMPT, policy=BestOfN(n=4), verifier=brightness, steps=3)
    assert result.tree.verifier == "brightness"
    assert result.score == max(node.score("brightness") for node in result.tree.nodes if node.level == 3)


# Several verifiers ---------------------------------------------------------------------------------------------------


def test_the_first_steers_and_the_others_score_finished_samples_only():
    first, second = Judge("first"), Judge("second", value=lambda c: -closeness(c), needs=["images", "x0"])
    grown = grow(Beam(width=2, branch=2).search, verifiers=[first, second], steps=10)
    last = [node for node in grown.nodes if node.level == 10]
    assert all("second" in node.values for node in last)
    assert not any("second" in node.values for node in grown.nodes if node.level < 10)
    assert second.rows == len(last)
    assert {level for _, levels in second.batches for level in levels} == {10}
    assert grown.run.answer.score("first") == max(node.score("first") for node in last)
    assert grown.tree.best("second").score("second") == max(node.score("second") for node in last)
    alone = grow(Beam(width=2, branch=2).search, verifiers=[Judge("first")], steps=10)
    assert alone.run.answer.id == grown.run.answer.id


def test_the_second_can_be_asked_by_name():
    def policy(tree):
        nodes = yield Draw(2)
        values = yield Score(nodes, verifier="second")
        assert values == [node.score("second") for node in nodes]
        assert not any("first" in node.values for node in nodes)
        return (yield from sample(tree))

    check_books(grow(policy, verifiers=[Judge("first"), Judge("second")]))


def test_a_final_judge_refuses_unfinished_samples():
    def policy(tree):
        nodes = yield Draw(2)
        with pytest.raises(UsageError, match="lookahead"):
            yield Score(nodes)
        ahead = yield Score(nodes, at="lookahead", num_steps=3)
        assert None not in ahead
        return (yield from sample(tree))

    judge = Judge(judges="final")
    check_books(grow(policy, verifiers=[judge]))
    assert {level for _, levels in judge.batches for level in levels} == {LAST}


# Sets ----------------------------------------------------------------------------------------------------------------


def ranks(candidates):
    """Place within the set: the closest gets the highest."""
    return closeness(candidates).argsort().argsort().float()


def test_a_set_is_seen_at_once_in_node_order():
    judge = Judge(value=ranks, scope="set")

    def policy(tree):
        roots = yield Draw(5)
        nodes = yield Denoise(roots, to=[1, 5, 2, 4, 3])
        values = yield Score(nodes[::-1])
        assert sorted(values) == [0.0, 1.0, 2.0, 3.0, 4.0]
        assert judge.batches == [([f"{node.id:032x}" for node in nodes], [1, 5, 2, 4, 3])]
        again = yield Score(nodes[:2])
        assert sorted(again) == [0.0, 1.0]
        yield Gather(Score(nodes[2:]), Score(nodes[:3]))
        return (yield from end(tree, (yield Denoise(nodes, to=LAST))))

    grown = grow(policy, verifiers=[judge])
    check_books(grown)
    assert [len(ids) for ids, _ in judge.batches] == [5, 2, *sorted([3, 3]), 5, 5]


def end(tree, leaves):
    yield Score(leaves)
    return tree.best()


def test_for_the_answer_all_finished_samples_are_ranked_as_one_set():
    judge = Judge(value=ranks, scope="set")

    def policy(tree):
        first = yield Denoise((yield Draw(3)), to=LAST)
        yield Score(first)
        second = yield Denoise((yield Draw(2)), to=LAST)
        yield Score(second)
        return first[0]

    grown = grow(policy, verifiers=[judge])
    leaves = [node for node in grown.nodes if node.level == LAST]
    assert judge.batches[-1][0] == [f"{leaf.id:032x}" for leaf in leaves]
    assert sorted(leaf.score("judge") for leaf in leaves) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert grown.run.answer.score("judge") == 4.0


def test_what_fails_on_the_way_leaves_the_set():
    model = Hooked()
    sick = grow(best_of(3)).latent(0)
    model.spoil = lambda latents, timesteps, outputs: torch.where((latents == sick).all(1)[:, None], torch.nan, outputs)
    judge = Judge(value=ranks, scope="set")

    def policy(tree):
        roots = yield Draw(3)
        values = yield Score(roots)
        assert values[0] is None
        assert sorted(values[1:]) == [0.0, 1.0]
        only = yield Score([roots[0]])
        assert only == [None]
        return (yield from end(tree, (yield Denoise(roots, to=LAST))))

    check_books(grow(policy, model=model, verifiers=[judge]))


def test_a_set_with_members_that_lack_an_ancestor_is_complete_without_them():
    judge = Judge(value=ranks, scope="set", needs=["x0", "ancestor_x0@1"])

    def policy(tree):
        roots = yield Draw(3)
        nodes = yield Denoise(roots, to=[1, 5, 5])
        values = yield Score(nodes)
        assert values[0] is None
        assert sorted(values[1:]) == [0.0, 1.0]
        assert (yield Score(nodes[:1])) == [None]
        return (yield from end(tree, (yield Denoise(nodes, to=LAST))))

    grown = grow(policy, verifiers=[judge])
    check_books(grown)
    assert "has not reached" in next(node for node in grown.nodes if node.level == 1).values["judge"].reason


# Answers that come late ----------------------------------------------------------------------------------------------


def test_answers_may_come_in_any_order_from_any_thread():
    grown = grow(best_of(4), best_of(3), seeds=[0, 1], verifiers=[Jury(delay=0.001)])
    at_once = grow(best_of(4), best_of(3), seeds=[0, 1], verifiers=[Judge()])
    check_books(grown)
    for late, prompt in zip(grown.runs, at_once.runs, strict=True):
        assert late.answer.index == prompt.answer.index
        for one, other in zip(late.tree.nodes, prompt.tree.nodes, strict=True):
            assert one.score("judge") == pytest.approx(other.score("judge"), abs=1e-6) if one.level == LAST else not one.values


def test_a_tree_that_waits_for_a_person_does_not_stop_the_others():
    release = threading.Event()
    finished = threading.Event()

    class Person(Jury):
        def ask(self, candidates, answer):
            patient = candidates.conditions[0].prompt == PROMPT

            def later():
                if patient:
                    assert finished.wait(20.0), "the other tree did not go on"
                for node in candidates.node_ids:
                    answer(node, 1.0, None)

            self.threads.append(threading.Thread(target=later))
            self.threads[-1].start()

    def quick(tree):
        for _ in range(3):
            answer = yield from sample(tree)
        finished.set()
        return answer

    grown = grow(sample, quick, conditions=[Condition(PROMPT), Condition("near (0, 0)")], verifiers=[Person()])
    release.set()
    check_books(grown)
    assert [run.answer.score("judge") for run in grown.runs] == [1.0, 1.0]


def test_equal_nodes_of_different_prompts_get_their_own_answers():
    """Noise has no prompt in it, so the i-th nodes of two trees have equal ids."""

    def value(candidates):
        return torch.tensor([float(len(condition.prompt)) for condition in candidates.conditions])

    prompts = ["near (0, 0)", "near (3.25, 0)", "near (3.25, 4.5)"]
    grown = grow(sample, sample, sample, conditions=[Condition(prompt) for prompt in prompts], verifiers=[Jury(value=value)])
    assert len({run.answer.id for run in grown.runs}) == 1
    assert [run.answer.score("judge") for run in grown.runs] == [float(len(prompt)) for prompt in prompts]


def test_a_person_may_decline():
    class Shy(Jury):
        def ask(self, candidates, answer):
            for i, node in enumerate(candidates.node_ids):
                answer(node, None if i == 0 else float(i), "no opinion" if i == 0 else None)
                answer(node, 77.0, None)  # a second answer to the same question is none

    grown = grow(best_of(3), verifiers=[Shy()])
    leaves = [node for node in grown.nodes if node.level == LAST]
    assert [leaf.score("judge") for leaf in leaves] == [None, 1.0, 2.0]
    assert leaves[0].values["judge"].reason == "no opinion"


def test_a_pending_set_is_asked_as_one():
    jury = Jury(value=ranks, scope="set")
    grown = grow(best_of(4), verifiers=[jury])
    check_books(grown)
    assert [len(ids) for ids, _ in jury.batches] == [4, 4]


def test_a_mute_pending_verifier_is_refused_before_the_search():
    class Mute(Judge):
        latency = "pending"

    with pytest.raises(UsageError, match="has no method `ask`"):
        search(Hooked(), PROMPT, verifier=Mute(), steps=3)


# Look-ahead ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("process", "solver", "ode"), [("vp", "ddim(eta=1)", "ddim"), ("vp", "dpm++2m-sde", "dpm++2m"), ("ve", "euler-ancestral", "euler"), ("flow", "flow-sde", "flow-euler")])
def test_a_look_ahead_is_a_short_deterministic_denoise(process, solver, ode):
    seen = []

    def value(candidates):
        seen.append(candidates.x0.clone())
        return closeness(candidates)

    def policy(tree):
        nodes = yield Denoise((yield Draw()), to=2)
        (ahead,) = yield Score(nodes, at="lookahead", num_steps=2)
        leaves = yield Denoise(nodes, to=LAST, num_steps=2, solver=ode)
        (value,) = yield Score(leaves)
        assert value == ahead
        assert nodes[0].values.keys() == {"judge@lookahead2"}
        return (yield from sample(tree))

    grown = grow(policy, model=Hooked(process), solver=solver, verifiers=[Judge(value=value)])
    check_books(grown)
    assert torch.equal(seen[0], seen[1])


def test_look_ahead_leaves_are_drafts_and_never_the_answer():
    def value(candidates):  # the less was denoised, the better
        return torch.tensor([1.0]).repeat(len(candidates)) if not finished else torch.zeros(len(candidates))

    finished = []

    def policy(tree):
        nodes = yield Draw(3)
        yield Score(nodes, at="lookahead", num_steps=1)
        drafts = [node for node in tree.nodes if node.draft]
        assert [draft.level for draft in drafts] == [LAST] * 3
        assert all(draft.status == "closed" for draft in drafts)
        assert tree.best() is None
        assert not any(draft.values for draft in drafts)
        finished.append(True)
        with pytest.raises(UsageError, match="released"):
            yield Denoise(drafts[0], to=LAST)
        return (yield from sample(tree))

    grown = grow(policy, verifiers=[Judge(value=value)])
    check_books(grown)
    assert not grown.run.answer.draft
    assert sum(node.draft for node in grown.tree.nodes) == 3


def test_one_look_ahead_serves_two_verifiers_in_flight():
    def policy(tree):
        nodes = yield Denoise((yield Draw(2)), to=2)
        before = tree.budget.spent
        yield Gather(Score(nodes, at="lookahead", num_steps=2), Score(nodes, "other", at="lookahead", num_steps=2))
        assert tree.budget.spent - before == 2 * 2
        assert sum(node.draft for node in tree.nodes) == 2
        return (yield from sample(tree))

    check_books(grow(policy, verifiers=[Judge(), Judge("other")]))


def test_at_the_last_level_a_look_ahead_is_a_plain_score():
    def policy(tree):
        leaves = yield Denoise((yield Draw(2)), to=LAST)
        ahead = yield Score(leaves, at="lookahead", num_steps=3)
        assert ahead == (yield Score(leaves))
        assert len(tree.nodes) == 4
        return tree.best()

    check_books(grow(policy))


# Ancestors' estimates --------------------------------------------------------------------------------------------------


class Captured(Judge):
    """Keeps what it is shown."""

    def __init__(self, ratio):
        super().__init__(needs=["x0", f"ancestor_x0@{ratio}"])
        self.ratio = ratio
        self.shown = {}

    def score(self, candidates):
        for node, ancestor in zip(candidates.node_ids, candidates.ancestor_x0(self.ratio), strict=True):
            self.shown[node] = ancestor.clone()
        return super().score(candidates)


def ratio_of(level, steps=LAST, process="vp"):
    model = Hooked(process)
    schedule = model.schedule(model.solver(), steps, None)
    return schedule.sigma[level] / schedule.alpha[level]


def x0_at(grown, node, latent):
    model = grown.models[0]
    sampler = model.sampler(grown.tree.schedule, grown.tree.solver)
    rows = list(model.encode([Condition()], guided=False)[0].rows)
    return sampler.x0(latent[None], [node], sampler.evaluate(latent[None], [node], rows))[0]


@pytest.mark.parametrize("stops", [(), (3,), (2,), (1, 4), (1, 2, 3, 4, 5)])
@pytest.mark.parametrize("eta", [None, 1.0])
def test_an_ancestors_estimate_is_captured_in_passing_at_no_cost(stops, eta):
    judge = Captured(ratio_of(2))

    def policy(tree):
        nodes = yield Draw(2)
        for stop in (*stops, LAST):
            nodes = yield Denoise(nodes, to=stop)
        yield Score(nodes)
        return tree.best()

    def whole(tree):
        nodes = yield Denoise((yield Draw(2)), to=LAST, via=range(1, LAST))
        yield Score(nodes)
        return tree.best()

    grown, reference = grow(policy, verifiers=[judge], eta=eta), grow(whole, eta=eta)
    check_books(grown)
    assert grown.tree.ledger.nfe == 2 * LAST
    ends = [node for node in reference.nodes if node.level == LAST]
    for leaf, end_ in zip([node for node in grown.nodes if node.level == LAST], ends, strict=True):
        expected = x0_at(reference, 2, reference.latent(end_.path()[2]))
        assert torch.allclose(judge.shown[f"{leaf.id:032x}"], expected, atol=1e-5)


def test_estimates_are_inherited_and_cleared_by_re_noising_above():
    judge = Captured(ratio_of(2))

    def policy(tree):
        nodes = yield Denoise((yield Draw()), to=5)
        below = yield Renoise(nodes, to=4)  # still past level 2
        moved = yield Perturb(below, 0.5)
        above = yield Renoise(nodes, to=1)  # back before level 2: a new estimate is due
        same = yield Renoise(nodes, to=2)
        values = yield Score([*nodes, *below, *moved, *above, *same])
        assert [value is None for value in values] == [False, False, False, True, True]
        tree.note(first=[f"{node.id:032x}" for node in (*nodes, *below, *moved)])
        leaves = yield Denoise([*below, *above, *same], to=LAST, via=(5,))
        tree.note(leaves=[f"{leaf.id:032x}" for leaf in leaves])
        return (yield from end(tree, leaves))

    grown = grow(policy, verifiers=[judge])
    check_books(grown)
    first, leaves = grown.tree.notes[0]["first"], grown.tree.notes[1]["leaves"]
    original = judge.shown[first[0]]
    for node in (*first, leaves[0]):
        assert torch.equal(judge.shown[node], original)
    by_id = {f"{node.id:032x}": node for node in grown.nodes}
    assert not torch.allclose(judge.shown[leaves[1]], original, atol=1e-3)
    start = next(node for node in by_id[leaves[2]].path() if node.move.kind == "renoise")
    assert torch.allclose(judge.shown[leaves[2]], x0_at(grown, 2, grown.latent(start)), atol=1e-5)


def test_an_estimate_noisier_than_where_a_node_stands_now_is_no_ancestors():
    """A coarse span passes level 2 at level 3 only; re-noised to level 2.. the node is on its way there again."""
    judge = Captured(ratio_of(1))

    def policy(tree):
        nodes = yield Denoise((yield Draw()), to=LAST, num_steps=2)  # visits 0, 3, 6: the estimate is of level 3
        back = yield Renoise(nodes, to=2)
        leaves = yield Denoise(back, to=LAST)
        yield Score(leaves)
        tree.note(back=back[0].index, leaf=f"{leaves[0].id:032x}")
        return tree.best()

    grown = grow(policy, verifiers=[judge])
    note = grown.tree.notes[0]
    assert torch.allclose(judge.shown[note["leaf"]], x0_at(grown, 2, grown.latent(note["back"])), atol=1e-5)


def test_a_look_ahead_captures_too():
    judge = Captured(ratio_of(2))

    def policy(tree):
        nodes = yield Denoise((yield Draw()), to=1)
        assert None not in (yield Score(nodes, at="lookahead", num_steps=5))
        return (yield from sample(tree))

    check_books(grow(policy, verifiers=[judge]))


def test_history_of_a_multistep_solver_survives_the_disk_and_a_re_noising_clears_it():
    from tsdiff.treesearch.engine import Limits

    def policy(tree):
        nodes = yield Denoise((yield Draw()), to=3)
        back = yield Renoise(nodes, to=2)
        forth = yield Denoise(back, to=3)
        return (yield from end(tree, (yield Denoise([*nodes, *forth], to=LAST))))

    grown = grow(policy, solver="dpm++2m", limits=Limits(host_bytes=1))
    model, tree = grown.models[0], grown.tree
    sampler = model.sampler(tree.schedule, tree.solver)
    rows = list(model.encode([Condition()], guided=False)[0].rows)
    back = next(node for node in grown.nodes if node.move.kind == "renoise")
    state = StepState(grown.latent(back)[None])
    forth = grown.nodes[back.index + 1]
    stepped = sampler.advance(state, 0, [2], [3], sampler.evaluate(state.latents, [2], rows), None)
    assert torch.equal(grown.latent(forth), stepped.latents[0])
