"""SMC: its price, the identities it obeys, weights and normaliser by the formulas, who has offspring, its fit to a budget."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest
from fake_driver import STOCHASTIC, FakeDriver, setting
from fakes import Judge
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_checks import check_fill

import tsdiff
from tsdiff.plugin.conformance import PolicyConformance
from tsdiff.policies.best_of_n import BestOfN
from tsdiff.policies.smc import SMC
from tsdiff.treesearch.errors import BudgetExhausted, UsageError
from tsdiff.treesearch.parameters import build
from tsdiff.treesearch.requests import Denoise, Score

few = settings(max_examples=40)
POTENTIALS = ["difference", "max", "sum", "rt"]


@st.composite
def particles(draw, count=None):
    start, end = sorted(draw(st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.0))))
    return SMC(
        particles=draw(st.integers(1, 5)) if count is None else count,
        inverse_temperature=draw(st.floats(0.0, 5.0)),
        potential=draw(st.sampled_from(POTENTIALS)),
        interval=draw(st.floats(0.01, 1.0)),
        t_start=start,
        t_end=end,
        resampling=draw(st.sampled_from(["multinomial", "residual", "systematic", "ssp"])),
        ess_threshold=draw(st.none() | st.floats(0.0, 1.0)),
        tempering=draw(st.sampled_from(["none", "ramp", "ess"])),
        gamma=draw(st.floats(0.001, 0.1)),
        keep_ess=draw(st.floats(0.1, 0.9)),
    )


EVERY_LEVEL = {"interval": 0.01, "t_start": 0.0, "t_end": 1.0}


class TestConformance(PolicyConformance):
    examples = 6

    @pytest.fixture
    def policy(self):
        return SMC(particles=3, potential="sum", tempering="ess", resampling="multinomial", ess_threshold=0.9, **EVERY_LEVEL)


def checks(driver):
    """The notes of the levels to resample at."""
    return [note for note in driver.tree.notes if "level" in note]


def weights(driver):
    return [leaf.note["weight"] for leaf in driver.leaves()]


def scores(nodes):
    return [node.score("value") for node in nodes]


def softmax(logs):
    unit = np.exp(np.array(logs) - np.max(logs))
    return unit / unit.sum()


# Cost ---------------------------------------------------------------------------------------------------------------


@few
@given(policy=particles(), steps=st.integers(1, 16), others=st.integers(0, 1), stages=st.integers(1, 2))
def test_cost_is_what_is_counted(policy, steps, others, stages):
    where = setting(steps, replace(STOCHASTIC, stages=stages), others)
    driver = FakeDriver(where)
    answer = driver.run(policy)
    assert policy.cost(where).exact
    assert policy.cost(where).upper == driver.spend
    assert sum(node.nfe for node in driver.tree.nodes) == driver.nfe
    assert answer is driver.tree.best()
    assert answer.level == steps


def test_the_price_by_hand():
    spend = SMC(particles=4).cost(setting(100)).upper
    assert spend.nfe == 4 * 100, "K S: the evaluation that scores a particle is its next step's"
    assert spend.verifier_calls == spend.decodes == 4 * (4 + 1), "K (checks + 1), at levels 20, 40, 60, 80 and the end"


def test_levels_by_hand():
    levels = lambda steps, **options: SMC(**options).levels(setting(steps).schedule)  # noqa: E731
    assert levels(100) == [20, 40, 60, 80]
    assert levels(10) == [2, 4, 6, 8]
    assert levels(7) == [1, 3, 4, 6]
    assert levels(6, **EVERY_LEVEL) == [1, 2, 3, 4, 5]
    assert levels(20, t_start=0.5, t_end=0.5) == [10]
    assert levels(20, t_start=0.0, t_end=0.0) == [1], "level 0 is pure noise"
    assert levels(1) == []


@few
@given(policy=particles(), steps=st.integers(1, 200))
def test_levels_are_between_noise_and_sample(policy, steps):
    levels = policy.levels(setting(steps).schedule)
    assert levels == sorted(set(levels))
    assert all(1 <= level < steps for level in levels)


# Identities ---------------------------------------------------------------------------------------------------------


@few
@given(policy=particles(), seed=st.integers(0, 99))
def test_without_tilt_it_is_plain_sampling(policy, seed):
    """Bit for bit: weights stay equal, and all schemes but multinomial leave equal weights alone."""
    policy = replace(policy, inverse_temperature=0.0, resampling="ssp" if policy.ess_threshold is None else policy.resampling)
    steered, plain = FakeDriver(setting(9), seed=seed), FakeDriver(setting(9), seed=seed)
    answer, best = steered.run(policy), plain.run(BestOfN(n=policy.particles))
    assert scores(steered.leaves()) == scores(plain.leaves())
    assert answer.score("value") == best.score("value")
    assert steered.nfe == plain.nfe
    assert weights(steered) == pytest.approx([1.0 / policy.particles] * policy.particles)
    assert steered.tree.notes[-1]["log_z"] == 0.0


@few
@given(policy=particles(count=1), seed=st.integers(0, 99))
def test_one_particle_is_one_plain_sample(policy, seed):
    steered, plain = FakeDriver(setting(9), seed=seed), FakeDriver(setting(9), seed=seed)
    answer, best = steered.run(policy), plain.run(BestOfN(n=1))
    assert answer.score("value") == best.score("value")
    assert steered.tree.notes[-1]["log_z"] == pytest.approx(policy.inverse_temperature * answer.score("value")), "its potentials multiply to exp(lambda r)"


@few
@given(policy=particles(), seed=st.integers(0, 99))
def test_without_resampling_all_potentials_come_to_the_same(policy, seed):
    """Importance weights of plain samples: the product of potentials telescopes, tempered or not."""
    policy = replace(policy, ess_threshold=0.0, tempering="ramp" if policy.tempering == "ess" else policy.tempering)
    driver = FakeDriver(setting(9), seed=seed)
    driver.run(policy)
    logs = [policy.inverse_temperature * score for score in scores(driver.leaves())]
    assert weights(driver) == pytest.approx(softmax(logs))
    assert driver.tree.notes[-1]["log_z"] == pytest.approx(np.log(np.mean(np.exp(logs))))


def log_potential(kind, rewards):
    """The paper's potential of the last of some rewards, over lambda."""
    if kind == "difference":
        return rewards[-1] - (rewards[-2] if len(rewards) > 1 else 0.0)
    return {"max": max, "sum": sum, "rt": lambda rewards: rewards[-1]}[kind](rewards)


@few
@given(policy=particles(), seed=st.integers(0, 99))
def test_weights_and_normaliser_follow_the_formulas(policy, seed):
    """Recomputed from the tree, generation by generation: unspent weights are carried, resampled ones start anew."""
    policy = replace(policy, tempering="none")
    driver = FakeDriver(setting(9), seed=seed)
    driver.run(policy)
    generations = [request.group for request in driver.requests if isinstance(request, Score)]
    log_w, log_z = np.zeros(policy.particles), 0.0
    for generation, note in zip(generations, checks(driver), strict=False):
        histories = [[node.score("value") for node in particle.path() if node.values] for particle in generation]
        log_w = log_w + [policy.inverse_temperature * log_potential(policy.potential, rewards) for rewards in histories]
        share = softmax(log_w)
        assert note["ess"] == pytest.approx(1.0 / (share**2).sum())
        assert note["max_weight"] == pytest.approx(share.max())
        assert note["exponent"] == 1.0
        if note["resampled"]:
            log_z += np.log(np.mean(np.exp(log_w)))
            log_w = np.zeros(policy.particles)
    for k, leaf in enumerate(driver.leaves()):
        *rewards, final = [node.score("value") for node in leaf.path() if node.values]
        spent = sum(log_potential(policy.potential, rewards[: i + 1]) for i in range(len(rewards)))
        log_w[k] += policy.inverse_temperature * (final - spent)
    assert weights(driver) == pytest.approx(softmax(log_w), abs=1e-12)
    note = driver.tree.notes[-1]
    assert note["log_z"] == pytest.approx(log_z + np.log(np.mean(np.exp(log_w))))
    assert note["ess"] == pytest.approx(1.0 / (softmax(log_w) ** 2).sum())


# Resampling ---------------------------------------------------------------------------------------------------------


def parents(driver):
    """What each Denoise between two levels started from, after the first."""
    return [request.group for request in driver.requests if isinstance(request, Denoise)][1:]


@few
@given(seed=st.integers(0, 99), scheme=st.sampled_from(["systematic", "ssp"]), size=st.integers(2, 6))
def test_offspring_are_in_proportion_to_weight(seed, scheme, size):
    driver = FakeDriver(setting(8), seed=seed)
    driver.run(SMC(particles=size, potential="difference", inverse_temperature=2.0, resampling=scheme, ess_threshold=None, t_start=0.5, t_end=0.5))
    (scored, _), (chosen,) = [request.group for request in driver.requests if isinstance(request, Score)], parents(driver)
    counts, wanted = Counter(chosen), size * softmax([2.0 * score for score in scores(scored)])
    for particle, expected in zip(scored, wanted, strict=True):
        assert math.floor(expected - 1e-9) <= counts[particle] <= math.ceil(expected + 1e-9)
    assert [node.index for node in chosen] == sorted(node.index for node in chosen)


@few
@given(policy=particles(), seed=st.integers(0, 99))
def test_it_resamples_where_the_effective_size_says_so(policy, seed):
    driver = FakeDriver(setting(9), seed=seed)
    driver.run(policy)
    before = policy.particles
    for note, group, scored in zip(checks(driver), parents(driver), [r.group for r in driver.requests if isinstance(r, Score)], strict=False):
        if policy.tempering != "ess":
            assert note["resampled"] == (policy.ess_threshold is None or note["ess"] < policy.ess_threshold * policy.particles)
        if not note["resampled"]:
            assert group == scored, "everyone goes on, once"
        alive = len({node.path()[0] for node in group})
        assert note["ancestors"] == alive <= before
        before = alive


def test_copies_of_a_particle_part():
    driver = FakeDriver(setting(8))
    driver.run(SMC(particles=6, inverse_temperature=1000.0, ess_threshold=None, t_start=0.5, t_end=0.5))
    assert len(set(parents(driver)[0])) == 1, "such a tilt leaves one ancestor"
    assert len(set(scores(driver.leaves()))) == 6


@few
@given(policy=particles(), seed=st.integers(0, 99))
def test_what_has_no_offspring_is_released(policy, seed):
    driver = FakeDriver(setting(9), seed=seed)
    answer = driver.run(policy)  # the driver refuses released nodes
    assert [node for node in driver.tree.nodes if node.status == "open"] == driver.leaves()
    assert answer in driver.leaves()


# Tempering ----------------------------------------------------------------------------------------------------------


def test_the_ramp_by_hand():
    driver = FakeDriver(setting(100))
    driver.run(SMC(tempering="ramp", interval=0.1, t_start=0.1, t_end=0.9))
    exponents = [note["exponent"] for note in checks(driver)]
    assert exponents == pytest.approx([min(1.008**level - 1.0, 1.0) for level in range(10, 100, 10)])
    assert exponents[-2] < 1.0 == exponents[-1], "full strength after 87 of 100 steps"


@few
@given(policy=particles(count=5), seed=st.integers(0, 99))
def test_tempering_keeps_the_effective_size_and_never_goes_back(policy, seed):
    policy = replace(policy, tempering="ess", **EVERY_LEVEL)
    driver = FakeDriver(setting(7), seed=seed)
    driver.run(policy)
    before = 0.0
    for note in checks(driver):
        assert before <= note["exponent"] <= 1.0
        assert note["exponent"] == before or note["ess"] >= policy.keep_ess * 5 - 1e-9
        assert note["resampled"] or note["exponent"] == 1.0, "what holds rewards back resamples"
        before = note["exponent"]


# Null scores and failures -------------------------------------------------------------------------------------------


def test_a_particle_without_a_score_keeps_its_share():
    values = {}

    def value(latent):
        number = values.setdefault(latent.tobytes(), len(values))
        return None if number == 1 else float(number)

    driver = FakeDriver(setting(8), value=value)
    driver.run(SMC(particles=3, potential="difference", inverse_temperature=1.0, t_start=0.5, t_end=0.5, ess_threshold=0.0))
    (note,) = checks(driver)
    first, third = softmax([0.0, 2.0]) * 2.0 / 3.0
    assert note["ess"] == pytest.approx(1.0 / (first**2 + (1.0 / 3.0) ** 2 + third**2))
    assert weights(driver) == pytest.approx(softmax([3.0, 4.0, 5.0])), "in the end only the finished samples' rewards count"


@few
@given(policy=particles(), share=st.integers(2, 4), seed=st.integers(0, 99))
def test_null_scores_hurt_no_one_else(policy, share, seed):
    calls = Counter()

    def value(latent):
        calls["n"] += 1
        return None if calls["n"] % share == 0 else -float(np.abs(latent).sum())

    driver = FakeDriver(setting(9), seed=seed, value=value)
    assert driver.run(policy) is driver.tree.best()
    assert len(driver.leaves()) == policy.particles
    if any(score is not None for score in scores(driver.leaves())):
        assert sum(weights(driver)) == pytest.approx(1.0)
        assert all(leaf.note["weight"] == 0.0 for leaf in driver.leaves() if leaf.score("value") is None)


@few
@given(policy=particles())
def test_nothing_but_null_scores_is_plain_sampling(policy):
    policy = replace(policy, resampling="ssp")
    driver, plain = FakeDriver(setting(9), value=lambda latent: None), FakeDriver(setting(9))
    assert driver.run(policy) is None
    plain.run(BestOfN(n=policy.particles))
    assert [driver.latents[leaf.index].tolist() for leaf in driver.leaves()] == [plain.latents[leaf.index].tolist() for leaf in plain.leaves()]
    assert driver.tree.notes[-1] == {"particles": policy.particles, "log_z": None}


@few
@given(policy=particles(), seed=st.integers(0, 40))
def test_failed_particles_have_no_weight_and_no_offspring(policy, seed):
    driver = FakeDriver(setting(9), fails=lambda node: node.move.kind == "denoise" and (node.index * 7 + seed) % 5 == 0)
    answer = driver.run(policy)
    assert answer is driver.tree.best()
    assert driver.nfe <= policy.cost(setting(9)).upper.nfe
    for note, group in zip(checks(driver), parents(driver), strict=False):
        assert not note["resampled"] or not any(node.failed for node in group)
    assert all(leaf.note.get("weight", 0.0) == 0.0 for leaf in driver.leaves() if leaf.failed)


def test_all_failing_ends_without_an_answer():
    driver = FakeDriver(setting(9), fails=lambda node: node.move.kind == "denoise")
    assert driver.run(SMC()) is None


# Budgets, needs and parameters --------------------------------------------------------------------------------------


@few
@given(policy=particles(), steps=st.integers(1, 24), nfe=st.integers(0, 500))
def test_fit_is_the_largest_that_fits(policy, steps, nfe):
    where = setting(steps)
    if nfe < where.sample_cost:
        with pytest.raises(UsageError, match=f"needs {where.sample_cost} NFE"):
            policy.fit(nfe, where)
        return
    fitted = policy.fit(nfe, where)
    assert fitted.cost(where).upper.nfe <= nfe < replace(fitted, particles=fitted.particles + 1).cost(where).upper.nfe
    assert replace(fitted, particles=policy.particles) == policy, "nothing else is changed"


def test_fit_fills_budgets():
    check_fill(SMC(), least=1.0)


@few
@given(limit=st.integers(9, 80))
def test_a_cap_takes_as_many_particles_as_can_be_finished(limit):
    driver = FakeDriver(setting(9), limit=limit)
    driver.run(SMC(particles=6))
    assert len(driver.leaves()) == min(6, limit // 9) == driver.tree.notes[-1]["particles"]
    assert driver.nfe == len(driver.leaves()) * 9


def test_a_cap_below_one_sample_is_passed_on():
    with pytest.raises(BudgetExhausted):
        FakeDriver(setting(9), limit=8).run(SMC())


def test_it_needs_steps_that_differ_and_scores_that_compare():
    assert SMC().needs == {"stochastic", "absolute"}
    assert SMC(particles=1).needs == {"absolute"}
    with pytest.raises(UsageError, match=r"policy smc .*deterministic"):
        tsdiff.search("gaussian", "near (0, 0)", policy=SMC(), verifier=Judge(), solver="ddim")
    with pytest.raises(UsageError, match="policy smc compares scores across sets"):
        tsdiff.search("gaussian", "near (0, 0)", policy=SMC(), verifier=Judge(scope="set"), solver="ddim", eta=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"particles": 0}, "particles is 0 but must be at least 1"),
        ({"inverse_temperature": -1.0}, "inverse_temperature is -1"),
        ({"inverse_temperature": math.inf}, "inverse_temperature is inf"),
        ({"potential": "min"}, "'difference', 'max', 'sum', 'rt'"),
        ({"resampling": "stratified"}, "'multinomial', 'residual', 'systematic', 'ssp'"),
        ({"t_start": 0.7, "t_end": 0.6}, "t_start is 0.7 but must be at most t_end, which is 0.6"),
        ({"ess_threshold": 1.1}, "ess_threshold is 1.1"),
        ({"tempering": "yes"}, "'none', 'ramp', 'ess'"),
        ({"keep_ess": 1.0}, "keep_ess is 1"),
    ],
)
def test_wrong_parameters_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        SMC(**options)


@few
@given(policy=particles())
def test_options_survive_json_and_the_command_line(policy):
    options = json.loads(json.dumps(asdict(policy), allow_nan=False))
    assert build(SMC, options) == policy
    assert build(SMC, {key: str(value) for key, value in options.items()}) == policy
