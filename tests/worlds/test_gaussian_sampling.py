"""Samplers on the analytic model: the laws they end in, and the marginals that re-noising must keep.

For a single Gaussian every solver is an affine map of its noises, so the law of its samples is computed exactly, by
running the map on a basis, without drawing a sample.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.noise import derive, initial_noise, step_noise
from tsdiff.treesearch.protocols import Condition, StepState
from tsdiff.worlds.gaussian.mixture import Mixture
from tsdiff.worlds.gaussian.model import SOLVERS, GaussianModel, Process

MEAN, STD = 0.6, 0.5
MODEL_OF: dict[Process, GaussianModel] = {
    process: GaussianModel(Mixture([1.0], [(MEAN,)], [STD]), process) for process in ("vp", "ve", "flow")
}
TWO = Mixture([0.7, 0.3], [(-1.0, 0.5), (1.5, 0.0)], [0.4, 0.3])


def run(model: GaussianModel, solver: str, steps: int, initial: Tensor, noises: list[Tensor]) -> Tensor:
    """Denoise unit noise (B, d) from level 0 to T; `noises` has one (num_noise, B, d) for every step."""
    info = model.solver(solver)
    sampler = model.sampler(model.schedule(info, steps, None), info)
    count = len(initial)
    rows = model.encode([Condition()], guided=False)[0].rows * count
    state = StepState(sampler.draw(initial))
    for level in range(steps):
        levels, nexts = [level] * count, [level + 1] * count
        output = sampler.evaluate(state.latents, levels, rows)
        state = sampler.advance(state, 0, levels, nexts, output, noises[level] if info.stochastic else None)
        if info.stages == 2 and sampler.schedule.sigma[level + 1] > 0.0:
            state = sampler.advance(state, 1, levels, nexts, sampler.evaluate(state.latents, nexts, rows), None)
    return state.latents


def affine_law(process: Process, solver: str, steps: int) -> tuple[float, float]:
    """Exact mean and variance of a solver's samples on the single Gaussian.

    Row 0 has no noise at all, row j the unit of one noise; their differences are the coefficients of the affine map.
    """
    count = steps + 2
    initial = torch.zeros(count, 1)
    initial[1] = 1.0
    noises = []
    for step in range(steps):
        noise = torch.zeros(1, count, 1)
        noise[0, step + 2] = 1.0
        noises.append(noise)
    end = run(MODEL_OF[process], solver, steps, initial, noises).double()[:, 0]
    return float(end[0]), float(((end[1:] - end[0]) ** 2).sum())


GENERAL = [(process, solver) for process, solvers in SOLVERS.items() for solver in solvers if solver != "exact"]
GENERAL += [("vp", "ddim(eta=0.5)"), ("vp", "ddim(eta=1)"), ("flow", "flow-ancestral(eta=0.5)")]


def limit_law(process: Process, solver: str) -> tuple[float, float]:
    """Mean and variance of infinitely many steps, which differ from the data's where level 0 is not quite pure noise.

    In units of the marginal, z = (x - alpha m) / sqrt(v), a start off by (dz, dv) ends off by (c dz, c^2 dv), where
    c = rho^(eta^2) and rho = corr(x_0, x) at level 0: an ODE keeps z, the reverse process forgets it.
    """
    model = MODEL_OF[process]
    info = model.solver(solver)
    schedule = model.schedule(info, 50, None)
    eta = {"ddpm": 1.0, "euler-ancestral": 1.0, "dpm++2m-sde": 1.0}.get(info.name, info.eta)
    alpha = schedule.alpha[0]
    variance = alpha**2 * STD**2 + schedule.sigma[0] ** 2
    kept = 1.0 if eta == 0.0 else (alpha * STD / math.sqrt(variance)) ** (eta**2)
    z_mean, z_variance = -alpha * MEAN / math.sqrt(variance), schedule.init_noise_sigma**2 / variance
    return MEAN + STD * kept * z_mean, STD**2 * (1.0 + kept**2 * (z_variance - 1.0))


# Share by which the variance may be off after 200 steps. First-order steps shrink the law, the more the noisier.
TOLERANCE = {
    "ddpm": 0.08,
    "ddim(eta=1)": 0.08,
    "euler-ancestral": 0.07,
    "ddim(eta=0.5)": 0.06,
    "heun": 0.001,
    "dpm++2m-sde": 0.006,
    "flow-sde": 0.005,
}


@pytest.mark.parametrize(("process", "solver"), GENERAL)
def test_solvers_reach_the_law_of_the_data(process: Process, solver: str) -> None:
    mean, variance = limit_law(process, solver)
    errors = []
    for steps in (200, 400):
        reached_mean, reached = affine_law(process, solver, steps)
        assert reached_mean == pytest.approx(mean, abs=5e-4 * 200 / steps)
        errors.append(abs(reached / variance - 1.0))
    assert errors[0] < TOLERANCE.get(solver, 0.045)
    if solver == "flow-sde":
        # Its noise is infinite at t = 1, so the first steps are O(1) at any number of steps; their error fades only as
        # steps^(-a^2) and hides the first-order one, which has the other sign.
        assert errors[1] < 0.005
    else:
        assert errors[1] < 0.65 * errors[0]


def test_the_data_s_law_is_nearly_the_limit() -> None:
    """What the tests above allow for the start at level 0 is small, except for VP's mean under an ODE."""
    for process, solver in GENERAL:
        mean, variance = limit_law(process, solver)
        assert mean == pytest.approx(MEAN, abs=0.025)
        assert variance == pytest.approx(STD**2, rel=0.005)


def within(sample: Tensor, mean: np.ndarray, covariance: np.ndarray, *, errors: float = 5.0, bias: float = 0.0) -> bool:
    """Whether a sample (B, d) has a mean and covariance, to `errors` standard errors and a share `bias` of the std and variance."""
    data = sample.double().numpy()
    spread = np.sqrt(np.diag(covariance))
    centred = data - data.mean(0)
    products = centred[:, :, None] * centred[:, None, :]  # [B, d, d]
    mean_error = errors * spread / math.sqrt(len(data)) + bias * spread
    covariance_error = errors * products.std(0) / math.sqrt(len(data)) + bias * np.outer(spread, spread)
    return bool(
        np.all(np.abs(data.mean(0) - mean) < mean_error) and np.all(np.abs(products.mean(0) - covariance) < covariance_error)
    )


@pytest.mark.parametrize(
    ("process", "solver"),
    [
        ("vp", "ddim"),
        ("vp", "ddim(eta=0.5)"),
        ("vp", "ddim(eta=1)"),
        ("vp", "dpm++2m-sde"),
        ("ve", "euler-ancestral"),
        ("flow", "flow-ancestral"),
        ("flow", "flow-sde"),
    ],
)
def test_solvers_reach_the_mixture_s_weights_and_moments(process: Process, solver: str) -> None:
    count, steps = 2500, 200
    random = torch.Generator().manual_seed(11)
    initial = torch.randn(count, 2, generator=random)
    noises = [torch.randn(1, count, 2, generator=random) for _ in range(steps)]
    end = run(GaussianModel(TWO, process), solver, steps, initial, noises)
    share = float(TWO.posterior(end, 1.0, 0.01).log_weights[:, 0].exp().round().mean())
    assert share == pytest.approx(0.7, abs=4.0 * math.sqrt(0.21 / count) + 0.02)
    assert within(end, *TWO.moments(), errors=4.0, bias=0.05)


# Re-noising ----------------------------------------------------------------------------------------------------------

PROCESSES: tuple[Process, ...] = ("vp", "ve", "flow")
MAIN = {"vp": "ddim", "ve": "euler", "flow": "flow-euler"}
HOPS = [(20, 0), (20, 13), (17, 16), (11, 4), (5, 0)]


def main_sampler(model: GaussianModel, steps: int = 20):  # type: ignore[no-untyped-def]
    info = model.solver(MAIN[model.process])
    return model.sampler(model.schedule(info, steps, None), info)


def kernel(model: GaussianModel, path: tuple[int, ...]) -> tuple[float, float]:
    """Factor of the latent and variance of the noise that re-noising along levels adds, read off unit inputs."""
    sampler, factor, variance = main_sampler(model), 1.0, 0.0
    for level, to in itertools.pairwise(path):
        moved = sampler.renoise(
            torch.tensor([[1.0], [0.0]]), [False, True], [level] * 2, [to] * 2, torch.tensor([[0.0], [1.0]])
        )
        factor *= float(moved[0])
        variance = variance * float(moved[0]) ** 2 + float(moved[1]) ** 2
    return factor, variance


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(("start", "to"), HOPS)
def test_renoising_keeps_the_marginals(process: Process, start: int, to: int) -> None:
    """In one hop and in two: the forward kernel of an isotropic mixture is determined by these two numbers."""
    model = MODEL_OF[process]
    schedule = main_sampler(model).schedule
    mean, covariance = model.mixture.moments(schedule.alpha[start], schedule.sigma[start])
    wanted_mean, wanted = model.mixture.moments(schedule.alpha[to], schedule.sigma[to])
    for path in ((start, to), (start, (start + to) // 2, to)):
        factor, variance = kernel(model, path)
        assert factor * mean[0] == pytest.approx(wanted_mean[0], rel=1e-5, abs=1e-6)
        assert factor**2 * covariance[0, 0] + variance == pytest.approx(wanted[0, 0], rel=1e-5)


@pytest.mark.parametrize("process", PROCESSES)
def test_renoised_samples_have_the_marginal_and_renoised_estimates_have_not(process: Process) -> None:
    """From exact samples of a middle level, a short hop: alpha x0 + sigma z of the clean estimate loses Var(x0 | x)."""
    model, count = GaussianModel(TWO, process), 200_000
    start, to = (12, 11) if process == "ve" else (9, 8)  # where the noise is comparable to the data's spread
    sampler = main_sampler(model)
    alpha, sigma = sampler.schedule.alpha, sampler.schedule.sigma
    random = torch.Generator().manual_seed(5)
    x0 = torch.from_numpy(TWO.sample(count, np.random.default_rng(5))).float()
    x = alpha[start] * x0 + sigma[start] * torch.randn(count, 2, generator=random)
    noise = torch.randn(count, 2, generator=random)
    wanted = TWO.moments(alpha[to], sigma[to])
    assert within(sampler.renoise(x, [False] * count, [start] * count, [to] * count, noise), *wanted)
    estimate, _ = TWO.denoise(x, alpha[start], sigma[start])
    assert not within(sampler.add_noise(estimate.float(), [to] * count, noise), *wanted, errors=20.0)
    assert within(sampler.add_noise(x0, [to] * count, noise), *wanted)


# The exact solver ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("path", [(0, 6), (0, 2, 5, 6), (0, 1, 2, 3, 4, 5, 6)])
def test_exact_solver_samples_the_data_s_law_in_any_number_of_steps(process: Process, path: tuple[int, ...]) -> None:
    count, mixture = (
        20_000,
        Mixture([0.5, 0.3, 0.15, 0.05], [(0.0, 2.0), (2.0, 0.0), (-2.0, 0.0), (0.0, -2.0)], [0.3, 0.2, 0.3, 0.2]),
    )
    model = GaussianModel(mixture, process)
    info = model.solver("exact")
    sampler = model.sampler(model.schedule(info, 6, None), info)
    schedule, random = sampler.schedule, torch.Generator().manual_seed(1)
    rows = model.encode([Condition()], guided=False)[0].rows * count
    x0 = torch.from_numpy(mixture.sample(count, np.random.default_rng(1))).float()
    state = StepState(schedule.alpha[0] * x0 + schedule.sigma[0] * torch.randn(count, 2, generator=random))
    for level, to in itertools.pairwise(path):
        output = sampler.evaluate(state.latents, [level] * count, rows)
        state = sampler.advance(state, 0, [level] * count, [to] * count, output, torch.randn(2, count, 2, generator=random))
    nearest = mixture.posterior(state.latents, 1.0, 0.01).log_weights.argmax(1)
    counts, wanted = torch.bincount(nearest, minlength=4).double(), count * torch.tensor(mixture.weights, dtype=torch.float64)
    assert float(((counts - wanted) ** 2 / wanted).sum()) < 21.1  # chi-square, 3 degrees of freedom: one in 10,000
    assert within(state.latents, *mixture.moments())
    for k in range(4):
        assert within(state.latents[nearest == k], *mixture.component(k).moments())


def test_exact_solver_from_pure_noise_draws_what_its_noise_says() -> None:
    """At flow's t = 1 the transition to clean data is the data law: component by the uniform, place by the Gaussian."""
    model = GaussianModel(TWO, "flow")
    info = model.solver("exact")
    sampler = model.sampler(model.schedule(info, 4, None), info)
    uniform = torch.tensor([0.1, 0.69, 0.71, 0.99], dtype=torch.float64)
    noise = torch.stack((torch.tensor([[1.0, 0.0]] * 4), torch.special.ndtri(uniform).float().unsqueeze(1).expand(4, 2)))
    rows = model.encode([Condition()], guided=False)[0].rows * 4
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    end = sampler.advance(StepState(x), 0, [0] * 4, [4] * 4, sampler.evaluate(x, [0] * 4, rows), noise).latents
    torch.testing.assert_close(end, torch.tensor([[-0.6, 0.5], [-0.6, 0.5], [1.8, 0.0], [1.8, 0.0]]))


def test_exact_solver_refuses_a_class_and_a_missing_noise() -> None:
    model = GaussianModel(TWO)
    info = model.solver("exact")
    sampler = model.sampler(model.schedule(info, 3, None), info)
    rows = model.encode([Condition(class_label=1)], guided=False)[0].rows
    with pytest.raises(UsageError, match="whole mixture"):
        sampler.evaluate(torch.zeros(1, 2), [0], rows)
    with pytest.raises(ValueError, match="two noises"):
        sampler.advance(StepState(torch.zeros(1, 2)), 0, [0], [1], torch.zeros(1, 2), None)


# Rows and schedules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("process", "solver"), [("vp", "exact"), ("vp", "ddim(eta=1)"), ("ve", "exact"), ("flow", "exact"), ("flow", "flow-sde")]
)
def test_a_whole_run_s_bits_do_not_depend_on_the_batch(process: Process, solver: str) -> None:
    model, steps, count = GaussianModel(TWO, process), 8, 13
    num_noise = model.solver(solver).num_noise
    streams = [derive(7, "draw", index) for index in range(count)]
    initial = torch.stack([torch.from_numpy(initial_noise(stream, (2,))) for stream in streams])
    noises = [
        torch.stack([torch.from_numpy(step_noise(stream, level + 1, (2,), num_noise)) for stream in streams], dim=1)
        for level in range(steps)
    ]
    together = run(model, solver, steps, initial, noises)
    alone = [run(model, solver, steps, initial[i : i + 1], [noise[:, i : i + 1] for noise in noises]) for i in range(count)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("process", PROCESSES)
def test_samplers_take_schedules_of_other_solvers_of_the_kind_and_tails(process: Process) -> None:
    model = GaussianModel(TWO, process)
    schedule = model.schedule(model.solver("exact"), 10, None)
    ode = model.solver(MAIN[process])
    assert model.schedule(ode, 10, None) == schedule
    tail = schedule.tail(3).tail(2)
    sampler = GaussianModel(TWO, process).sampler(tail, ode)  # a model of its own: tables follow from the schedule
    assert sampler.schedule == tail
    with pytest.raises(ValueError, match="was not made by"):
        GaussianModel(TWO, "ve" if process != "ve" else "vp").sampler(schedule, ode)
