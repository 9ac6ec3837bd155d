"""SVDD on the analytic mixture, against closed forms: with exact values and more candidates it tends to the tilted law.

The solver `exact` has no discretisation error, and the value is exact at every level; what remains is that M is finite
and that the last step is a plain one.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from tilted_laws import LAMBDA, RIGHT, search, tilted, tilted_but_for_the_last_step

from tsdiff.policies.svdd import SVDD
from tsdiff.worlds.gaussian.gaussians import Quadratic
from tsdiff.worlds.gaussian.mixture import Mixture
from tsdiff.worlds.gaussian.verifiers import SoftValue

PROCESSES = ["vp", "flow"]


def places(results):
    return np.array([result.node.score("place") for result in results])


@pytest.mark.parametrize("process", PROCESSES)
def test_the_plain_last_step_matters_less_the_shorter_it_is(process):
    """The limit of many candidates, by integration: it is the tilted law but for the last step."""
    errors = [abs(tilted_but_for_the_last_step(process, steps).mean - tilted(process, steps).mean) for steps in (2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 10.0 * errors[-1]


@pytest.mark.parametrize(("process", "steps", "runs"), [("vp", 3, 150), ("flow", 2, 250)])
def test_the_soft_choice_samples_the_tilted_law(process, steps, runs):
    """Mode weights and mean with 16 candidates: within 4 standard errors, and 0.03 for the finite number of them."""
    plain, wanted = tilted(process, steps, 0.0), tilted_but_for_the_last_step(process, steps)
    x = places(search(SVDD(candidates=16, temperature=1.0 / LAMBDA), process, range(runs), steps=steps))
    error = math.sqrt(wanted.right * (1.0 - wanted.right) / runs)
    assert np.mean(x > RIGHT) == pytest.approx(wanted.right, abs=4.0 * error + 0.03)
    assert x.mean() == pytest.approx(wanted.mean, abs=4.0 * x.std() / math.sqrt(runs) + 0.03)
    assert wanted.right - plain.right > 5.0 * error + 0.03, "the test tells it from plain sampling"


RARE, SHARE, NEAR_IT = Mixture([0.97, 0.03], [(-2.0,), (3.0,)], [0.4, 0.3]), 0.03, 3.0


@pytest.mark.parametrize(("process", "steps"), [("vp", 3), ("flow", 2)])
def test_the_error_shrinks_with_the_candidates(process, steps):
    """The reward makes e^-50 of the common mode: few candidates do not contain the rare one, and that is all of the error.

    With one choice (two steps of a flow, whose middle level tells the modes apart) it is missed (1 - p)^M of the time.
    """
    runs, errors = 60, []
    wanted = tilted_but_for_the_last_step(process, steps, 1.0, RARE, Quadratic((NEAR_IT,), 0.5)).right
    value = SoftValue(mixture=RARE, rho=0.5, temperature=1.0)
    for candidates in (4, 20, 64):
        x = places(search(SVDD(candidates=candidates, temperature=1.0), process, range(runs), steps=steps, verifier=value, mixture=RARE, point=NEAR_IT))
        errors.append(wanted - float(np.mean(x > RIGHT)))
        if steps == 2:
            missed = (1.0 - SHARE) ** candidates
            assert errors[-1] == pytest.approx(wanted * missed, abs=4.0 * math.sqrt(missed * (1.0 - missed) / runs))
    assert errors[0] > errors[1] + 0.1
    assert errors[1] > errors[2] + 0.1
    assert abs(errors[2]) < 0.2
