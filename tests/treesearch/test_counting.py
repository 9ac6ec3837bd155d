"""Promise 2: every row that the network sees is counted once, under the right name, whatever was asked for."""

from __future__ import annotations

import pytest
import torch
from fakes import PROMPT, Hooked, Judge, RandomSearch, check_books, grow, sample
from hypothesis import given, settings
from hypothesis import strategies as st

from tsdiff.policies.beam import Beam
from tsdiff.policies.best_of_n import BestOfN
from tsdiff.treesearch.engine import Limits
from tsdiff.treesearch.noise import Fresh, Rotate
from tsdiff.treesearch.protocols import Condition, Guidance
from tsdiff.treesearch.requests import Denoise, Draw, Gather, Perturb, Release, Renoise, Score, Start
from tsdiff.treesearch.search import execute, prepare

LAST = 6


def spent(search, **options):
    """NFE of each request of a search, and its books checked; the search yields (request, expected NFE)."""
    prices = []

    def policy(tree):
        reply, asked = None, search(tree)
        while True:
            try:
                request, expected = asked.send(reply)
            except StopIteration as stop:
                return stop.value
            before, booked = tree.budget.spent, tree.ledger.nfe
            reply = yield request
            assert tree.budget.spent - before == tree.ledger.nfe - booked, request
            prices.append((request, tree.budget.spent - before, expected))

    grown = grow(policy, steps=LAST, **options)
    check_books(grown)
    for request, price, expected in prices:
        assert price == expected, (request, price, expected)
    return grown


def every_request(tree):
    """One of each kind on a one-stage solver, with the NFE it should cost."""
    roots = yield Draw(2), 0
    (more,) = yield Draw(noise=Rotate(0, 0.9, 1)), 0
    middle = yield Denoise(roots, to=3), 2 * 3
    yield Score(middle), 2
    yield Score(middle), 0
    yield Score(middle, verifier="other"), 0
    yield Score(middle, at="lookahead", num_steps=2), 2 * 1
    yield Score(more, at="lookahead", num_steps=3), 3
    yield Renoise(middle, to=1, copies=3), 0
    yield Renoise(middle, to=1, source="x0"), 0
    fresh = yield Renoise(middle[0], to=2), 0
    yield Renoise(fresh, to=1, source="x0"), 1
    yield Perturb(fresh, 0.5, copies=2), 0
    (part,) = yield Denoise(middle[0], to=LAST, num_steps=2), 1
    yield Denoise(more, to=5, via=(1, 3)), 4
    leaves = yield Denoise(middle, to=LAST), 2 * 2
    yield Start(leaves[0], 0.5, copies=2), 0
    yield Gather(Score(leaves), Gather(Score(leaves, verifier="other"), Renoise(leaves, to=4)), Denoise(fresh, to=4)), 1
    yield Release([more, *fresh]), 0
    yield Denoise(middle, to=[3, 5]), 1
    yield Score([part, *leaves]), 0
    return tree.best()


SETTINGS = {
    "plain": {},
    "guided": {"class_label": 8, "guidance": Guidance(3.0)},
    "rescaled": {"class_label": 8, "guidance": Guidance(3.0, 0.7)},
    "interval": {"class_label": 8, "guidance": Guidance(3.0, 0.0, (0.3, 3.0))},
    "flow": {"model": ("flow",), "solver": "flow-euler"},
    "dpm": {"solver": "dpm++2m"},
    "deterministic": {"limits": Limits(deterministic=True, network=8)},
    "singly": {"limits": Limits(network=1)},
    "probed": {"expected_rows": 10**6},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_kind_of_request_is_counted(name):
    options = dict(SETTINGS[name])
    model = Hooked(*options.pop("model", ()))
    grown = spent(every_request, model=model, verifiers=[Judge(), Judge("other")], **options)
    ledger, tree = grown.engine.ledger, grown.tree
    assert (ledger.probe > 0) == (name == "probed")
    assert (ledger.padding > 0) == (name == "deterministic")
    assert ledger.batches == len(model.calls) or name == "probed"
    guided = {"guided": 2.0, "rescaled": 2.0, "interval": None}.get(name, 1.0)
    if guided is None:
        assert tree.ledger.nfe < tree.ledger.rows < 2 * tree.ledger.nfe
    else:
        assert tree.ledger.rows == guided * tree.ledger.nfe


def test_inside_a_guidance_interval_only_are_there_two_rows():
    model = Hooked()
    schedule = model.schedule(model.solver(), LAST, None)
    guidance = Guidance(3.0, 0.0, (0.5, 5.0))
    inside = [level for level in range(LAST) if 0.5 <= schedule.sigma[level] / schedule.alpha[level] <= 5.0]
    assert 0 < len(inside) < LAST
    grown = grow(sample, model=model, class_label=8, guidance=guidance, steps=LAST)
    check_books(grown)
    assert grown.tree.ledger.rows == LAST + len(inside)


def heun_requests(tree):
    """A step costs two, the last one."""
    roots = yield Draw(2), 0
    middle = yield Denoise(roots, to=3), 2 * 6
    yield Score(middle), 2
    yield Score(middle, at="lookahead", num_steps=2), 2 * (3 - 1)
    yield Denoise(middle, to=5, via=(4,)), 2 * (4 - 1)
    yield Denoise(middle[0], to=LAST, solver="euler"), 2
    leaves = yield Denoise(middle, to=LAST), 2 * (5 - 1)
    yield Score(leaves), 0
    return tree.best()


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("network", [1, 3, None])
def test_the_second_stage_of_heun_is_counted(guided, network):
    options = {"class_label": 8, "guidance": Guidance(2.0)} if guided else {}
    spent(heun_requests, model=Hooked("ve"), solver="heun", limits=Limits(network=network), verifiers=[Judge(), Judge("other")], **options)


def stochastic_requests(tree):
    roots = yield Draw(2), 0
    middle = yield Denoise(roots, to=3, copies=3), 2 * (1 + 3 * 2)
    yield Denoise(middle[0], to=4, copies=2), 1
    yield Denoise(middle[0], to=5, noise=Fresh(7)), 1
    yield Denoise(middle[0], to=5, noise=Fresh(7)), 0
    yield Denoise(middle[0], to=4, noise=Rotate(1, 0.3, 0)), 0
    yield Denoise(middle[1:3], to=5, solver="ddim", via=(4,)), 2 * 2
    yield Denoise(middle[1], to=5, model="small"), 2
    yield Score(middle, at="lookahead", num_steps=3), 6 * 2 + 3
    yield Gather(Denoise(middle[3], to=4, copies=2), Denoise(middle[3], to=4), Score(middle[3])), 0
    leaves = yield Denoise(middle, to=LAST, copies=2), 6 * 2 * 2
    yield Score(leaves), 0
    return tree.best()


@pytest.mark.parametrize("solver", ["ddim(eta=1)", "ddpm", "exact"])
def test_stochastic_children_share_the_first_prediction(solver):
    if solver == "exact":  # two noises a step: a recipe cannot stand for them

        def policy(tree):
            asked, reply = stochastic_requests(tree), None
            while True:
                try:
                    request, price = asked.send(reply)
                except StopIteration as stop:
                    return stop.value
                if isinstance(request, Denoise) and isinstance(request.noise, Rotate):
                    request = Score(())
                reply = yield request, price

        spent(policy, model=Hooked(), solver=solver, helpers={"small": Hooked()})
        return
    spent(stochastic_requests, solver=solver, helpers={"small": Hooked()})


def test_calls_of_decoder_and_verifiers_are_counted():
    model, judges = Hooked(), [Judge(needs=["images"]), Judge("other", needs=["images", "x0"])]
    grown = spent(every_request, model=model, verifiers=judges)
    assert grown.tree.ledger.decodes == sum(model.decodes)
    assert grown.tree.ledger.verifier_calls == {judge.name: judge.rows for judge in judges}


def test_padding_of_decoder_and_verifiers_is_not_the_trees():
    model, judge = Hooked(), Judge(needs=["images"])
    grown = grow(sample, model=model, verifiers=[judge], limits=Limits(deterministic=True, decode=4, verify=5))
    assert (model.decodes, judge.rows) == ([4], 5)
    assert (grown.tree.ledger.decodes, grown.tree.ledger.verifier_calls["judge"]) == (1, 1)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    process=st.sampled_from(["vp", "ve", "flow"]),
    guided=st.sampled_from([None, Guidance(3.0), Guidance(3.0, 0.5, (0.3, 3.0))]),
    network=st.sampled_from([1, 2, 7, None]),
    deterministic=st.booleans(),
    expected_rows=st.sampled_from([0, 10**6]),
)
def test_the_books_balance_for_random_policies(seed, process, guided, network, deterministic, expected_rows):
    solver, others = {
        "vp": ("ddim(eta=0.8)", (("ddim", False), ("ddpm", True))),
        "ve": ("heun", (("euler", False), ("euler-ancestral", True))),
        "flow": ("flow-ancestral", (("flow-euler", False), ("flow-sde", True))),
    }[process]
    options = {} if guided is None else {"guidance": guided, "class_label": 3}
    searches = [RandomSearch(seed + i, solvers=others, models=("small",), verifiers=("judge", "other")) for i in range(2)]
    limits = Limits(network=network, deterministic=deterministic)
    grown = grow(
        *searches, model=Hooked(process), helpers={"small": Hooked(process)}, solver=solver, limits=limits, seeds=[seed, 1], steps=5,
        expected_rows=expected_rows, verifiers=[Judge(), Judge("other", needs=["images"])], **options,
    )
    check_books(grown)


# What policies promise beforehand ------------------------------------------------------------------------------------


def agrees(policy, **options):
    plan = prepare(Hooked(options.pop("process", "vp")), PROMPT, policy=policy, verifiers=options.pop("verifiers", [Judge(needs=["images"])]), **options)
    results = execute(plan)
    for failure in results.failures:
        raise failure.error
    assert plan.cost.exact
    for result in results:
        spend, ledger = plan.cost.upper, result.ledger
        assert (spend.nfe, spend.decodes, spend.verifier_calls) == (ledger.nfe, ledger.decodes, ledger.verifier_calls.total())
        assert ledger.nfe == result.tree.budget.spent == sum(node.nfe for node in result.tree.nodes)
        plain, baseline = plan.baseline_cost, result.baseline_ledger
        assert (plain.nfe, plain.decodes, plain.verifier_calls) == (baseline.nfe, baseline.decodes, baseline.verifier_calls.total())
    assert results.engine.network_rows == plan.model.seen
    assert plan.nfe_upper == sum(result.ledger.nfe + result.baseline_ledger.nfe for result in results)


SOLVERS = st.sampled_from(
    [("vp", "ddim", None), ("vp", "ddim", 1.0), ("vp", "ddpm", None), ("vp", "dpm++2m", None), ("vp", "dpm++2m-sde", None), ("vp", "exact", None),
     ("ve", "euler", None), ("ve", "euler-ancestral", None), ("ve", "heun", None), ("flow", "flow-euler", None), ("flow", "flow-sde", None)]
)
JUDGES = st.sampled_from([(("images",),), (("x0",),), (("x0",), ("images",)), (("images",), ("x0",), ("images",))])


def judges(needs):
    return [Judge(f"judge{i}", needs=need) for i, need in enumerate(needs)]


@settings(max_examples=25)
@given(SOLVERS, st.integers(1, 5), st.integers(1, 9), JUDGES)
def test_best_of_n_costs_what_it_says(solver, n, steps, needs):
    process, name, eta = solver
    agrees(BestOfN(n=n), process=process, solver=name, eta=eta, steps=steps, verifiers=judges(needs))


@settings(max_examples=40)
@given(
    solver=SOLVERS, steps=st.integers(1, 12), width=st.integers(1, 3), branch=st.integers(1, 3), jump=st.sampled_from([0.1, 0.2, 0.5, 1.0]),
    levels=st.lists(st.sampled_from([0.1, 0.25, 0.5, 0.75, 0.9]), min_size=1, max_size=4, unique=True).map(lambda shares: tuple(sorted(shares))),
    value=st.sampled_from(["x0", "lookahead", "final"]), by=st.sampled_from(["renoise", "step"]), ahead=st.integers(1, 7), needs=JUDGES,
)
def test_beam_costs_what_it_says(solver, steps, width, branch, jump, levels, value, by, ahead, needs):
    process, name, eta = solver
    stochastic = Hooked(process).solver(name, eta).stochastic
    policy = Beam(
        width=width, branch=branch, jump=jump, levels=levels, value=value, lookahead_steps=ahead, branch_by=by if stochastic or branch == 1 else "renoise"
    )
    agrees(policy, process=process, solver=name, eta=eta, steps=steps, verifiers=judges(needs))


def ranks(candidates):
    return candidates.x0[:, 0].argsort().argsort().float()


@settings(max_examples=30)
@given(st.sampled_from([BestOfN(n=3), Beam(width=2, branch=2), Beam(width=2, branch=2, value="final"), Beam(width=2, branch=2, value="lookahead")]), JUDGES, st.integers(2, 8))
def test_ranking_all_finished_samples_for_the_answer_is_in_the_cost(policy, needs, steps):
    verifiers = judges(needs)
    verifiers[0].scope, verifiers[0].value = "set", ranks
    agrees(policy, verifiers=verifiers, steps=steps)


def test_guidance_doubles_the_rows_not_the_evaluations():
    plan = prepare(Hooked(), PROMPT, policy=BestOfN(n=3), verifiers=[Judge()], class_label=8, guidance_scale=3.0, steps=5)
    (result,) = execute(plan)
    assert (result.ledger.nfe, result.ledger.rows, plan.rows_upper) == (15, 30, 2 * (15 + 5))


def test_a_decode_in_scoring_is_not_made_again_for_the_answer():
    for needs, decodes in ((["images"], 3), (["x0"], 1)):
        model = Hooked()
        (result,) = execute(prepare(model, PROMPT, policy=BestOfN(n=3), verifiers=[Judge(needs=needs)], baseline=False, steps=4))
        assert result.ledger.decodes == sum(model.decodes) == decodes
        assert result.image is not None


def test_conditions_are_encoded_once_a_tree():
    grown = grow(sample, sample, conditions=[Condition(PROMPT), Condition("near (0, 0)")], helpers={"small": Hooked()})
    assert [run.tree.ledger.encodes for run in grown.runs] == [2, 2]


def test_seconds_are_booked_without_overlap():
    grown = grow(sample, sample)
    ledger = grown.engine.ledger
    assert set(ledger.seconds) <= {"network", "step", "noise", "decode", "verify", "encode", "policy", "store", "previews", "calibrate"}
    assert all(seconds >= 0.0 for seconds in ledger.seconds.values())
    assert torch.is_grad_enabled()
