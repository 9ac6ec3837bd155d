"""One bad latent, image, score or policy fails what depends on it, and nothing else."""

from __future__ import annotations

import pytest
import torch
from fakes import PROMPT, Hooked, Judge, Jury, check_books, closeness, grow, sample
from hypothesis import given, settings
from hypothesis import strategies as st

from tsdiff.policies.beam import Beam
from tsdiff.policies.best_of_n import BestOfN
from tsdiff.treesearch.engine import Limits
from tsdiff.treesearch.errors import SearchFailed, SetupError, UsageError
from tsdiff.treesearch.noise import Fresh, Given, Mix, Rotate, Torch, derive, initial_noise
from tsdiff.treesearch.protocols import Condition, Guidance
from tsdiff.treesearch.requests import Denoise, Draw, Gather, Perturb, Release, Renoise, Score, Start
from tsdiff.treesearch.search import execute, prepare, search

LAST = 6


def bad_root(index: int, seed: int = 0):
    """Which rows of a batch hold the latent of a root (of a VP tree)."""
    latent = torch.from_numpy(initial_noise(derive(seed, "draw", index), (2,)))
    return lambda latents: (latents == latent).all(1)


def nan_at(which):
    def spoil(latents, timesteps, outputs):
        return torch.where(which(latents)[:, None], torch.nan, outputs)

    return spoil


def raise_at(which):
    def fault(latents, timesteps):
        if bool(which(latents).any()):
            raise ValueError("this row is poison")

    return fault


def four(tree):
    """Four samples, scored."""
    leaves = yield Denoise((yield Draw(4)), to=LAST)
    yield Score(leaves)
    return tree.best()


MODES = [Limits(), Limits(network=3), Limits(deterministic=True)]


@pytest.mark.parametrize("limits", MODES, ids=["full", "three", "deterministic"])
@pytest.mark.parametrize("kind", ["nan", "raises"])
@pytest.mark.parametrize("guided", [False, True])
def test_a_bad_row_fails_one_node(limits, kind, guided):
    model = Hooked()
    if kind == "nan":
        model.spoil = nan_at(bad_root(2))
    else:
        model.fault = raise_at(bad_root(2))
    options = {"class_label": 1, "guidance": Guidance(2.0)} if guided else {}
    grown = grow(four, model=model, limits=limits, **options)
    check_books(grown)
    failed = [node for node in grown.nodes if node.failed]
    assert [node.parent.index for node in failed] == [2]
    assert ("not finite" if kind == "nan" else "poison") in failed[0].reason
    assert grown.run.answer.score("judge") == max(node.score("judge") for node in grown.nodes if node.level == LAST and not node.failed)
    whole = grow(four, limits=limits, **options)
    for leaf in (4, 5, 7):
        assert torch.equal(grown.latent(leaf), whole.latent(leaf))


@pytest.mark.parametrize("expected_rows", [0, 10**6])
def test_a_bad_first_row_does_not_stop_other_trees(expected_rows):
    model = Hooked()
    model.fault = raise_at(bad_root(0, seed=1))
    grown = grow(four, four, seeds=[1, 2], model=model, expected_rows=expected_rows)
    check_books(grown)
    assert [sum(node.failed for node in run.tree.nodes) for run in grown.runs] == [1, 0]


@pytest.mark.parametrize("second", [False, True])
def test_a_corrector_that_fails_fails_one_node(second):
    model = Hooked("ve")
    broken: list[int] = []

    def spoil(latents, timesteps, outputs):
        if timesteps[0] < 1.0 and not broken:
            broken.append(1)
            outputs = outputs.clone()
            outputs[0] = torch.inf
        return outputs

    model.spoil = spoil
    grown = grow(four, model=model, solver="heun" if second else "euler")
    check_books(grown)
    assert sum(node.failed for node in grown.nodes) == 1


def test_all_failing_names_the_nodes():
    model = Hooked()
    model.spoil = lambda latents, timesteps, outputs: outputs * torch.nan
    grown = grow(four, model=model, ok=False)
    check_books(grown)
    assert isinstance(grown.run.error, SearchFailed)
    assert "nodes [4, 5, 6, 7" in str(grown.run.error)
    assert "not finite" in str(grown.run.error)
    with pytest.raises(SearchFailed, match="not finite"):
        search(model, PROMPT, verifier=Judge(), steps=4)


def test_one_failing_search_does_not_stop_the_others():
    model = Hooked()
    model.spoil = nan_at(lambda latents: bad_root(0, seed=1)(latents) | bad_root(1, seed=1)(latents))
    results = execute(prepare(model, PROMPT, policy=BestOfN(n=1), verifiers=[Judge()], seed=[0, 1, 2], steps=5, baseline=False))
    assert [result.seed for result in results] == [0, 2]
    (failure,) = results.failures
    assert failure.seed == 1
    assert "not finite" in failure.message


# Memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [1, 2, 5])
@pytest.mark.parametrize("expected_rows", [0, 10**6])
def test_out_of_memory_halves_and_tries_again(capacity, expected_rows):
    model = Hooked()
    model.capacity = capacity
    grown = grow(four, four, four, seeds=[0, 1, 2], model=model, expected_rows=expected_rows)
    check_books(grown)
    assert not any(node.failed for run in grown.runs for node in run.tree.nodes)
    whole = grow(four, four, four, seeds=[0, 1, 2])
    for run in range(3):
        for node, latent in whole.latents[run].items():
            assert torch.allclose(grown.latents[run][node], latent, atol=1e-5)
    if not expected_rows:
        assert grown.engine.ledger.retried > 0
        assert max(model.calls[-5:]) <= capacity


def test_too_little_memory_for_one_row_fails_the_nodes():
    model = Hooked()
    model.capacity = 0
    grown = grow(four, model=model, ok=False)
    check_books(grown)
    assert isinstance(grown.run.error, SearchFailed)
    assert "OutOfMemory" in str(grown.run.error)


def test_deterministic_mode_keeps_its_row_count():
    model = Hooked()
    model.capacity = 4
    with pytest.raises(SetupError, match="--max-batch"):
        grow(four, model=model, limits=Limits(deterministic=True, network=8))
    assert model.calls == [8]
    check_books(grow(four, model=Hooked(), limits=Limits(deterministic=True, network=4)))


@pytest.mark.parametrize("stage", ["decode", "verify"])
def test_the_decoder_and_verifiers_shrink_too(stage):
    most: list[int] = []

    def choke(rows) -> None:
        most.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("full")

    def judged(candidates):
        if stage == "verify":
            choke(candidates)
        return closeness(candidates)

    model = Hooked()
    if stage == "decode":
        model.blind = choke
    grown = grow(four, model=model, verifiers=[Judge(value=judged, needs=["images", "x0"])])
    assert all(node.score("judge") is not None for node in grown.nodes if node.level == LAST)
    assert most == [4, 2, 2]


# Pictures and scores -------------------------------------------------------------------------------------------------


def test_a_latent_that_cannot_be_decoded_has_a_null_value():
    model = Hooked()
    sick = grow(four, model=Hooked()).latent(5)

    def blind(latents):
        if bool((latents == sick).all(1).any()):
            raise RuntimeError("cannot decode")

    model.blind = blind
    grown = grow(four, model=model, verifiers=[Judge(needs=["images", "x0"])])
    assert [node.score("judge") is None for node in grown.nodes[4:]] == [False, True, False, False]
    assert "cannot decode" in grown.nodes[5].values["judge"].reason
    assert not any(node.failed for node in grown.nodes)
    assert grown.run.answer is not grown.nodes[5]


def test_an_answer_that_cannot_be_decoded_is_still_an_answer():
    model = Hooked()
    model.blind = lambda latents: (_ for _ in ()).throw(RuntimeError("cannot decode"))
    result = search(model, PROMPT, policy=BestOfN(n=2), verifier=Judge(), steps=4)
    assert result.image is None
    assert result.score is not None
    assert "cannot decode" in result.node.note["image"]


def scripted(change):
    """A verifier whose second row (of the whole run) is changed."""
    count = [0]

    def value(candidates):
        numbers = closeness(candidates).tolist()
        for i in range(len(numbers)):
            count[0] += 1
            if count[0] == 2:
                numbers[i] = change
        return numbers

    return Judge(value=value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_no_number_is_null(bad):
    grown = grow(four, verifiers=[scripted(bad)])
    assert [node.score("judge") is None for node in grown.nodes[4:]] == [False, True, False, False]
    assert "judge gave" in grown.nodes[5].values["judge"].reason
    assert not any(node.failed for node in grown.nodes)


def test_a_verifier_that_raises_for_one_row_nulls_one_value():
    sick = grow(four, model=Hooked()).latent(6)

    def value(candidates):
        if bool((candidates.x0 == sick).all(1).any()):
            raise ZeroDivisionError("ugly")
        return closeness(candidates)

    grown = grow(four, verifiers=[Judge(value=value)])
    assert [node.score("judge") is None for node in grown.nodes[4:]] == [False, False, True, False]
    assert "ZeroDivisionError: ugly" in grown.nodes[6].values["judge"].reason
    check_books(grown)


@pytest.mark.parametrize("value", [lambda c: [0.0] * (len(c) + 1), lambda c: [], lambda c: ["x"] * len(c), lambda c: None], ids=["more", "none", "text", "null"])
def test_a_verifier_that_answers_nonsense_scores_nothing(value):
    grown = grow(four, verifiers=[Judge(value=value)], ok=False)
    assert all(node.score("judge") is None for node in grown.nodes)
    assert grown.run.error is None or "scores" in str(grown.run.error)
    assert not any(node.failed for node in grown.nodes)


def test_the_others_scores_survive_a_broken_verifier():
    def broken(candidates):
        raise RuntimeError("no")

    grown = grow(four, verifiers=[Judge(), Judge("broken", value=broken)])
    assert grown.run.answer.score("judge") is not None
    assert all("no" in node.values["broken"].reason for node in grown.nodes[4:])


def test_parts_that_are_no_numbers_are_left_out():
    class Parted(Judge):
        def score(self, candidates):
            scores = super().score(candidates)
            scores.parts = {"good": [1.0] * len(candidates), "bad": [float("nan")] * len(candidates)}
            scores.reasons = {0: "well"}
            return scores

    grown = grow(sample, verifiers=[Parted()])
    assert grown.run.answer.values["judge"].parts == {"good": 1.0}


def test_a_pending_verifier_that_cannot_be_asked_answers_null():
    class Offline(Jury):
        def ask(self, candidates, answer):
            answer(candidates.node_ids[0], 1.0, None)
            raise ConnectionError("nobody there")

    grown = grow(four, sample, seeds=[0, 1], verifiers=[Offline()])
    values = [node.score("judge") for node in grown.runs[0].tree.nodes[4:]]
    assert sorted(values, key=str) == [1.0, None, None, None]
    assert grown.runs[1].answer.score("judge") == 1.0


# Requests on what has failed, is gone, or never was --------------------------------------------------------------------


def test_requests_on_failed_nodes_cost_nothing():
    model = Hooked()
    model.spoil = nan_at(bad_root(0))

    def policy(tree):
        roots = yield Draw(2)
        sick, well = yield Denoise(roots, to=3)
        assert sick.failed
        before = tree.budget.spent
        for request in (
            Denoise(sick, to=5, via=(4,), copies=2), Renoise(sick, to=1, copies=2), Renoise(sick, to=1, source="x0"), Perturb(sick, 0.5, copies=2),
            Gather(Denoise(sick, to=LAST), Perturb(sick, 0.1)),
        ):  # fmt: skip
            reply = yield request
            made = [node for part in reply for node in part] if isinstance(request, Gather) else reply
            assert made
            assert all(node.failed for node in made)
            assert all(f"node {node.parent.index}, failed" in node.reason for node in made)
        assert (yield Score([sick, sick])) == [None, None]
        assert (yield Score(sick, at="lookahead", num_steps=2)) == [None]
        assert (yield Denoise(sick, to=3)) == [sick]
        leaves = yield Denoise(sick, to=LAST)
        assert all(node.failed for node in (yield Start(leaves[0], 0.5, copies=2)))
        yield Release(sick)
        assert sick.failed
        assert tree.budget.spent == before
        mixed = yield Denoise([sick, well], to=LAST)
        assert [node.failed for node in mixed] == [True, False]
        values = yield Score(mixed)
        assert values[0] is None
        return tree.best()

    check_books(grow(policy, model=model, eta=1.0))


def other_tree():
    kept = []

    def search(tree):
        yield from sample(tree)
        kept.extend(tree.nodes)
        return tree.best()

    grow(search)
    return kept


FOREIGN = other_tree()

MISTAKES = {
    "released": lambda tree, nodes: Denoise(nodes[1], to=5),
    "released score": lambda tree, nodes: Score(nodes[1]),
    "released renoise": lambda tree, nodes: Renoise(nodes[1], to=0),
    "foreign": lambda tree, nodes: Denoise(FOREIGN[0], to=3),
    "foreign score": lambda tree, nodes: Score(FOREIGN[-1]),
    "foreign release": lambda tree, nodes: Release(FOREIGN[0]),
    "foreign start": lambda tree, nodes: Start(FOREIGN[-1], 0.5),
    "backwards": lambda tree, nodes: Denoise(nodes[0], to=1),
    "past the end": lambda tree, nodes: Denoise(nodes[0], to=LAST + 1),
    "upwards": lambda tree, nodes: Renoise(nodes[0], to=4),
    "below": lambda tree, nodes: Renoise(nodes[0], to=-1),
    "no steps": lambda tree, nodes: Denoise(nodes[0], to=5, num_steps=0),
    "via": lambda tree, nodes: Denoise(nodes[0], to=5, via=(1,)),
    "via skipped": lambda tree, nodes: Denoise(nodes[0], to=LAST, num_steps=1, via=(4,)),
    "deterministic copies": lambda tree, nodes: Denoise(nodes[0], to=5, solver="ddim", copies=2),
    "deterministic noise": lambda tree, nodes: Denoise(nodes[0], to=4, solver="ddim", noise=Fresh(1)),
    "noise of a span": lambda tree, nodes: Denoise(nodes[0], to=5, noise=Rotate(0, 0.5, 0)),
    "noise of no root": lambda tree, nodes: Denoise(nodes[0], to=4, noise=Rotate(9, 0.5, 0)),
    "torch's noise": lambda tree, nodes: Denoise(nodes[0], to=4, noise=Torch(1)),
    "unknown solver": lambda tree, nodes: Denoise(nodes[0], to=4, solver="dddim"),
    "solver of another kind": lambda tree, nodes: Denoise(nodes[0], to=4, solver="dpm++2m"),
    "unknown model": lambda tree, nodes: Denoise(nodes[0], to=4, model="tiny"),
    "unknown verifier": lambda tree, nodes: Score(nodes[0], verifier="jugde"),
    "perturbed root": lambda tree, nodes: Perturb(tree.nodes[0], 0.5),
    "unfinished start": lambda tree, nodes: Start(nodes[0], 0.5),
    "start without image": lambda tree, nodes: Start("image", 0.5),
    "drawn of no root": lambda tree, nodes: Draw(noise=Mix({0: 0.6, 5: 0.8})),
    "drawn of -1": lambda tree, nodes: Draw(noise=Rotate(-1, 0.5, 0)),
    "drawn number -1": lambda tree, nodes: Draw(noise=Rotate(0, 0.5, -1)),
    "fresh number -1": lambda tree, nodes: Draw(noise=Mix({0: 0.6}, fresh=(-1, 0.8))),
    "torch's later": lambda tree, nodes: Draw(noise=Torch(0)),
    "not given": lambda tree, nodes: Draw(noise=Given("00")),
    "released beside": lambda tree, nodes: Gather(Release(nodes[0]), Gather(Denoise(nodes[0], to=4))),
    "one bad of many": lambda tree, nodes: Gather(Denoise(nodes[0], to=5), Score(nodes[1])),
    "a number": lambda tree, nodes: 7,
    "nothing": lambda tree, nodes: None,
    "a list": lambda tree, nodes: [Draw()],
    "a number gathered": lambda tree, nodes: Gather(Draw(), 7),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_to_the_policy_and_changes_nothing(name):
    def policy(tree):
        nodes = yield Denoise((yield Draw(2)), to=3)
        yield Release(nodes[1])
        before = (len(tree.nodes), tree.budget.spent)
        with pytest.raises(UsageError) as refused:
            yield MISTAKES[name](tree, nodes)
        assert (len(tree.nodes), tree.budget.spent) == before
        assert len(str(refused.value)) > 20
        leaves = yield Denoise(nodes[0], to=LAST)
        yield Score(leaves)
        return tree.best()

    for keep in (True, False):
        check_books(grow(policy, eta=1.0, keep=keep))


@pytest.mark.parametrize("name", ["released", "foreign", "a number"])
def test_an_uncaught_mistake_ends_its_tree_only(name):
    def policy(tree):
        nodes = yield Denoise((yield Draw(2)), to=3)
        yield Release(nodes[1])
        yield MISTAKES[name](tree, nodes)

    grown = grow(policy, sample, ok=False)
    assert isinstance(grown.runs[0].error, UsageError)
    assert grown.runs[1].error is None
    assert grown.runs[1].answer is not None


NODES = other_tree()

BAD_REQUESTS = [
    lambda: Draw(0), lambda: Draw(1.5), lambda: Draw(2, [Fresh(0)]), lambda: Denoise([3], to=2), lambda: Denoise(NODES[0], to=[1, 2]), lambda: Denoise(NODES[0], to=1.5),
    lambda: Denoise(NODES[0], to=[1.5]), lambda: Denoise(NODES[0], to=2, copies=0), lambda: Denoise(NODES[0], to=1, noise=Fresh(0), copies=2),
    lambda: Denoise(NODES[0], to=1, noise=Fresh(-1)), lambda: Denoise(NODES[0], to=2, num_steps=1.5), lambda: Denoise(NODES[0], to=2, via=(0.5,)), lambda: Renoise(NODES[0], to="a"),
    lambda: Renoise(NODES[0], to=0, copies=0), lambda: Renoise(NODES[0], to=0, source="eps"), lambda: Perturb(NODES[0], 1.1), lambda: Perturb(NODES[0], -0.1), lambda: Perturb(NODES[0], 0.5, 0),
    lambda: Score(NODES[0], at="x1"), lambda: Score(NODES[0], at="lookahead"), lambda: Score(NODES[0], at="lookahead", num_steps=0), lambda: Start("picture", 0.5), lambda: Start("image", 0.0),
    lambda: Start("image", 1.1), lambda: Start("image", 0.5, 0),
]  # fmt: skip


@pytest.mark.parametrize("request_", BAD_REQUESTS)
def test_requests_check_themselves(request_):
    with pytest.raises(UsageError, match=r"^(Draw|Denoise|Renoise|Perturb|Score|Start): "):
        request_()


def test_numpys_whole_numbers_are_levels_and_counts():
    def policy(tree):
        levels = tree.rng("levels").permutation(3) + 2
        roots = yield Draw(levels.max() - 1)
        nodes = yield Denoise(roots, to=list(levels), num_steps=levels[0])
        back = yield Renoise(nodes, to=levels.min(), copies=levels.min())
        yield Score(back, at="lookahead", num_steps=levels[1])
        return (yield from end(tree, (yield Denoise(back, to=levels.max() + 2))))

    import json

    json.dumps(grow(policy).tree.to_json(), allow_nan=False)


def end(tree, leaves):
    yield Score(leaves)
    return tree.best()


# Policies' own mistakes ------------------------------------------------------------------------------------------------


def raising(tree):
    yield Draw()
    raise LookupError("my own bug")


def unfinished(tree):
    nodes = yield Denoise((yield Draw()), to=3)
    return nodes[0]


def drafted(tree):
    nodes = yield Draw()
    yield Score(nodes, at="lookahead", num_steps=1)
    return next(node for node in tree.nodes if node.draft)


def a_failed_one(tree):
    leaves = yield Denoise((yield Draw(2)), to=LAST)
    return next(leaf for leaf in leaves if leaf.failed)


def from_elsewhere(tree):
    yield from sample(tree)
    return FOREIGN[-1]


def eager(tree):
    raise LookupError("my own bug")


BAD_POLICIES = {
    "raises": (raising, LookupError, "my own bug"),
    "raises at once": (eager, LookupError, "my own bug"),
    "unfinished": (unfinished, UsageError, "return a finished node"),
    "draft": (drafted, UsageError, "return a finished node"),
    "failed": (a_failed_one, UsageError, "return a finished node"),
    "foreign": (from_elsewhere, UsageError, "return a finished node"),
    "a list": (lambda tree: [Draw()], UsageError, "generator"),
    "None": (lambda tree: None, UsageError, "generator"),
    "bad note": (lambda tree: (tree.note(x=float("nan")) for _ in range(1)), UsageError, "strict JSON"),
}


@pytest.mark.parametrize("name", BAD_POLICIES)
def test_a_broken_policy_ends_its_own_tree_only(name):
    policy, kind, message = BAD_POLICIES[name]
    model = Hooked()
    if name == "failed":
        model.spoil = nan_at(bad_root(1))
    grown = grow(policy, sample, model=model, ok=False, keep=False)
    check_books(grown)
    assert isinstance(grown.runs[0].error, kind)
    assert message in str(grown.runs[0].error)
    assert grown.runs[0].answer is None
    assert grown.runs[1].error is None
    assert grown.runs[1].answer.score("judge") is not None


def test_a_verifiers_complaint_about_one_prompt_does_not_stop_another():
    def value(candidates):
        if any(condition.prompt != PROMPT for condition in candidates.conditions):
            raise UsageError("this verifier cannot judge that prompt")
        return closeness(candidates)

    grown = grow(four, four, conditions=[Condition(PROMPT), Condition("near (0, 0)")], verifiers=[Judge(value=value)], ok=False)
    assert grown.runs[0].answer.score("judge") is not None
    assert "cannot judge" in str(grown.runs[1].error)


def test_a_condition_that_cannot_be_encoded_ends_its_own_tree_only():
    class Illiterate(Hooked):
        def encode(self, conditions, *, guided):
            if conditions[0].class_label is None:
                raise RuntimeError("the encoder gave up")
            return super().encode(conditions, guided=guided)

    grown = grow(sample, sample, model=Illiterate(), conditions=[Condition(PROMPT), Condition(PROMPT, class_label=2)], ok=False)
    assert "gave up" in str(grown.runs[0].error)
    assert grown.runs[1].answer is not None


@settings(max_examples=25)
@given(sick=st.sets(st.integers(0, 7)), policy=st.sampled_from([BestOfN(n=4), Beam(width=2, branch=2), Beam(width=4, branch=2, value="final"), Beam(width=2, value="lookahead")]))
def test_policies_survive_failing_nodes(sick, policy):
    model = Hooked()
    tests = [bad_root(index) for index in sick]
    model.spoil = nan_at(lambda latents: torch.stack([torch.zeros(len(latents), dtype=torch.bool), *(test(latents) for test in tests)]).any(0))
    grown = grow(policy.search, model=model, ok=False)
    check_books(grown)
    if len(sick & set(range(4 if policy.name == "best-of-n" else policy.width))) == 0:
        assert grown.run.error is None
    if grown.run.error is None:
        assert grown.run.answer.score("judge") is not None
        assert not any(node.failed for node in grown.run.answer.path())
    else:
        assert isinstance(grown.run.error, SearchFailed)


@pytest.mark.parametrize("request_", [lambda node: Renoise(node, to=1, source="x0", copies=2), lambda node: Perturb(node, 0.5, copies=2)], ids=["renoise", "perturb"])
def test_noise_on_an_estimate_that_is_no_number_fails_the_children(request_):
    model = Hooked()

    def spoil(latents, timesteps, outputs):
        return outputs * torch.nan if model.seen > 3 else outputs

    def policy(tree):
        nodes = yield Denoise((yield Draw()), to=3)
        children = yield request_(nodes)
        assert [child.failed for child in children] == [True, True]
        assert "not finite" in children[0].reason
        assert not nodes[0].failed
        model.spoil = lambda latents, timesteps, outputs: outputs
        return (yield from end(tree, (yield Denoise((yield Renoise(nodes, to=2)), to=LAST))))

    model.spoil = spoil
    check_books(grow(policy, model=model))
