"""DTS on the analytic mixture, against closed forms: the more simulations, the closer its draws are to the tilted law.

The solver `exact` has no discretisation error and DTS scores finished samples only, so all error is that of a finite tree.
Many trees grow side by side in one engine; each one's law is on its finished nodes.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
from tilted_laws import ESTIMATE, LAMBDA, RIGHT, search, tilted

from tsdiff.policies.dts import DTS

PROCESSES = ["vp", "flow"]
STEPS = 4
NARROW = {"levels": (0.25, 0.5), "widening": 1.0, "exponent": 0.5}  # a tree that shares much, from its first simulations on


@cache
def laws(process, simulations, runs, strength=LAMBDA, read_out="weights", **shape):
    """For each tree: E[x] and P(x > RIGHT) under its probabilities, exp(log_normalizer), and the points that it drew."""
    policy = DTS(simulations=simulations, inverse_temperature=strength, read_out=read_out, **(shape or NARROW))
    rows, drawn = [], []
    for result in search(policy, process, range(runs), steps=STEPS, verifier=ESTIMATE):
        nodes = result.tree.nodes
        leaves = [node for node in nodes if "probability" in node.note]
        x = np.array([leaf.score("place") for leaf in leaves])
        p = np.array([leaf.note["probability"] for leaf in leaves])
        facts = result.tree.notes[-1]
        rows.append((p @ x, p @ (x > RIGHT), math.exp(facts["log_normalizer"])))
        drawn.append([nodes[draw["node"]].score("place") for draw in facts["draws"]])
    return np.array(rows), np.array(drawn)


def root_mean_square(rows, wanted):
    return math.sqrt(float(((rows[:, :2] - (wanted.mean, wanted.right)) ** 2).mean()))


def close(samples, wanted, slack=0.0):
    """Within 4 standard errors of the mean over trees, and a stated bias."""
    return abs(samples.mean() - wanted) <= 4.0 * samples.std() / math.sqrt(len(samples)) + slack


RUNS = {16: 50, 64: 28, 256: 8}


@pytest.mark.parametrize("process", PROCESSES)
def test_the_draws_converge_to_the_tilted_law(process):
    """Four times the simulations about halve the error of a tree's law; the mean over trees is right within its error."""
    wanted, plain = tilted(process, STEPS), tilted(process, STEPS, 0.0)
    errors = []
    for simulations, runs in RUNS.items():
        rows, drawn = laws(process, simulations, runs)
        errors.append(root_mean_square(rows, wanted))
        # Few simulations may all have missed the rarer mode, which the reward prefers.
        slack = 2.0 / simulations
        assert close(rows[:, 0], wanted.mean, slack), (simulations, rows[:, 0].mean(), wanted)
        assert close(rows[:, 1], wanted.right, slack), (simulations, rows[:, 1].mean(), wanted)
        assert close(drawn.mean(1), wanted.mean, slack)
        assert close((drawn > RIGHT).mean(1), wanted.right, slack)
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < 0.7 * errors[1]
    assert errors[2] < 0.15 < 0.3 < wanted.right - plain.right, "and tells it from plain sampling"


@pytest.mark.parametrize("process", PROCESSES)
def test_the_mean_weight_estimates_the_normaliser(process):
    wanted = tilted(process, STEPS).normaliser
    for simulations, runs in RUNS.items():
        rows, _ = laws(process, simulations, runs)
        assert close(rows[:, 2], wanted)
        assert rows[:, 2].std() / math.sqrt(runs) < 0.1 * wanted, "which is a narrow bound"


def test_the_published_width_converges_too():
    """C = 2 and alpha = 0.8: the first 36 simulations are independent, so a tree begins as importance sampling."""
    wanted = tilted("vp", STEPS)
    coarse, _ = laws("vp", 16, 30, widening=2.0, exponent=0.8)
    fine, _ = laws("vp", 80, 14, widening=2.0, exponent=0.8)
    assert close(fine[:, 0], wanted.mean, 0.05)
    assert close(fine[:, 1], wanted.right, 0.03)
    assert root_mean_square(fine, wanted) < 0.6 * root_mean_square(coarse, wanted)


def test_descending_by_values_lags_behind():
    """Poor first samples keep a child from being visited again, good ones are averaged out: values are too low for long."""
    wanted = tilted("vp", STEPS)
    weights, _ = laws("vp", 64, 28)
    descent, _ = laws("vp", 64, 16, read_out="descent")
    assert root_mean_square(weights, wanted) < 0.8 * root_mean_square(descent, wanted)
    assert descent[:, 0].mean() < wanted.mean - 4.0 * descent[:, 0].std() / 4.0
    assert descent[:, 2].mean() < 0.8 * wanted.normaliser


@pytest.mark.parametrize("read_out", ["weights", "descent"])
def test_at_lambda_0_draws_are_plain_samples(read_out):
    plain = tilted("vp", STEPS, 0.0)
    rows, drawn = laws("vp", 16, 40, 0.0, read_out)
    assert close(rows[:, 0], plain.mean)
    assert close(rows[:, 1], plain.right)
    assert close(drawn.mean(1), plain.mean)
    assert rows[:, 2] == pytest.approx(1.0)
