"""SMC on the analytic mixture, against closed forms: the normaliser at any number of particles, and the tilted law.

The solver `exact` has no discretisation error. Errors are standard errors of the runs themselves; seeds are fixed.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from tilted_laws import ESTIMATE, LAMBDA, RIGHT, VALUE, search, tilted

from tsdiff.policies.smc import SMC

EVERY_LEVEL = {"interval": 0.01, "t_start": 0.0, "t_end": 1.0}
STEPS = 3


def particles(result):
    """The finished samples' weights and places."""
    leaves = [node for node in result.tree.nodes if node.level == STEPS]
    return np.array([leaf.note["weight"] for leaf in leaves]), np.array([leaf.score("place") for leaf in leaves])


def test_the_tilt_is_a_strong_one():
    for process in ("vp", "flow"):
        plain, wanted = tilted(process, STEPS, 0.0), tilted(process, STEPS)
        assert plain.normaliser == pytest.approx(1.0)
        assert plain.right == pytest.approx(0.25, abs=0.01)
        assert wanted.right > 0.65
        assert wanted.mean - plain.mean > 1.0
        assert wanted.normaliser == pytest.approx(0.33, abs=0.03)


SMALL = {
    "two by exact values, flow": ("flow", VALUE, 300, SMC(particles=2, potential="difference", ess_threshold=0.8)),
    "two by exact values, vp": ("vp", VALUE, 300, SMC(particles=2, potential="difference", resampling="systematic", ess_threshold=None)),
    "four by estimates, max": ("flow", ESTIMATE, 150, SMC(potential="max", resampling="multinomial", ess_threshold=None)),
    "four by estimates, sum, tempered": ("vp", ESTIMATE, 150, SMC(potential="sum", resampling="residual", tempering="ess", keep_ess=0.7)),
    "four by estimates, rt, on a ramp": ("flow", ESTIMATE, 150, SMC(potential="rt", tempering="ramp", ess_threshold=0.9)),
}


@pytest.mark.parametrize(("process", "verifier", "runs", "policy"), SMALL.values(), ids=SMALL)
def test_few_particles_estimate_the_normaliser_without_bias(process, verifier, runs, policy):
    """E[Z-hat] = Z, and E[Z-hat * weighted mean of f] = Z E_tilted[f], at any number of particles and with any potential."""
    wanted = tilted(process, STEPS)
    results = search(SMC(**{**policy.__dict__, **EVERY_LEVEL, "inverse_temperature": LAMBDA}), process, range(runs), steps=STEPS, verifier=verifier)
    assert any(note.get("resampled") for result in results for note in result.tree.notes)
    estimates = np.exp([result.tree.notes[-1]["log_z"] for result in results])
    error = estimates.std(ddof=1) / math.sqrt(runs)
    assert error < 0.08 * wanted.normaliser, "the test would notice a bias of a third"
    assert abs(estimates.mean() - wanted.normaliser) < 4.0 * error
    for function, expected in ((lambda x: x, wanted.mean), (lambda x: x > RIGHT, wanted.right)):
        excess = np.array([z * (weights @ (function(x) - expected)) for z, (weights, x) in zip(estimates, map(particles, results), strict=True)])
        assert abs(excess.mean()) < 4.0 * excess.std(ddof=1) / math.sqrt(runs)


LARGE = {
    "ssp": ("flow", VALUE, SMC(potential="difference", resampling="ssp")),
    "systematic": ("vp", VALUE, SMC(potential="difference", resampling="systematic", ess_threshold=None)),
    "residual": ("vp", ESTIMATE, SMC(potential="rt", resampling="residual", tempering="ess", keep_ess=0.8)),
    "multinomial": ("flow", ESTIMATE, SMC(potential="max", resampling="multinomial", ess_threshold=None)),
}


@pytest.mark.parametrize(("process", "verifier", "policy"), LARGE.values(), ids=LARGE)
def test_many_particles_have_the_tilted_law(process, verifier, policy):
    """Weighted mean, mode weights and normaliser of one population of 400. Stated errors: 0.2, 0.08 and 12 %, some 4 standard errors."""
    wanted = tilted(process, STEPS)
    policy = SMC(**{**policy.__dict__, **EVERY_LEVEL, "inverse_temperature": LAMBDA, "particles": 400})
    (result,) = search(policy, process, [0], steps=STEPS, verifier=verifier)
    weights, x = particles(result)
    assert weights @ (x > RIGHT) == pytest.approx(wanted.right, abs=0.08)
    assert weights @ x == pytest.approx(wanted.mean, abs=0.2)
    assert result.tree.notes[-1]["log_z"] == pytest.approx(math.log(wanted.normaliser), abs=0.12)
