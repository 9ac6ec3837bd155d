"""The algebra of the sampler: re-noising, perturbing, landing, history, and independence of rows from their batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsdiff.diffusion.sampler import TableSampler
from tsdiff.diffusion.solvers import SOLVERS, solver_info
from tsdiff.diffusion.steps import forward_kernel
from tsdiff.diffusion.tables import Tables, plain_tables, scheduler_tables
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import StepState

STABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
CONFIGS: dict[str, tuple[dict[str, Any], str | None]] = {
    "ddim": ({**STABLE, "steps_offset": 1, "set_alpha_to_one": False}, None),
    "euler": (STABLE, None),
    "dpm": (STABLE, None),
    "flow": ({"shift": 3.0}, "FlowMatchEulerDiscreteScheduler"),
}
NAMES = [*SOLVERS, "ddim(eta=0.7)"]


class Network:
    """A model whose outputs are given, or a fixed function of the row."""

    device = "cpu"

    def __init__(self, prediction_type: str) -> None:
        self.prediction_type = prediction_type
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, rows: Sequence[Any]) -> torch.Tensor:
        self.seen.append((latents, timesteps))
        return latents / (1.0 + latents * latents)


def make(name: str, steps: int = 12, spacing: str | None = None) -> TableSampler:
    solver = solver_info(name, None, (name.split("(")[0],))
    config, cls = CONFIGS[solver.kind]
    config = config if spacing is None else {**config, "timestep_spacing": spacing, "steps_offset": 0}
    return TableSampler(
        Network("flow" if solver.kind == "flow" else "epsilon"), scheduler_tables(config, cls, solver, steps), solver
    )


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def noise_for(sampler: TableSampler, shape: Sequence[int], seed: int = 9) -> torch.Tensor | None:
    return randn(1, *shape, seed=seed) if sampler.solver.stochastic else None


# Re-noising ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddim", "euler", "dpm++2m", "flow-euler"])
def test_two_hops_have_the_mean_and_variance_of_one(name: str) -> None:
    schedule = make(name).schedule
    scales = list(zip(schedule.alpha, schedule.sigma, strict=True))
    for low, mid, high in [(0, 1, 12), (0, 5, 11), (2, 3, 4), (1, 7, 12)]:
        ratio_a, std_a = forward_kernel(scales[high], scales[mid])
        ratio_b, std_b = forward_kernel(scales[mid], scales[low])
        ratio, std = forward_kernel(scales[high], scales[low])
        assert ratio_a * ratio_b == pytest.approx(ratio, rel=1e-12)
        assert (ratio_b * std_a) ** 2 + std_b**2 == pytest.approx(std**2, rel=1e-9)


@given(
    source=st.tuples(st.floats(0.05, 1.0), st.floats(0.0, 1.0)),
    shrink=st.floats(0.0, 1.0),
    extra=st.floats(0.0, 5.0),
)
def test_forward_kernel_maps_marginals(source: tuple[float, float], shrink: float, extra: float) -> None:
    """Clean signal alpha_s scales to alpha_t, and the noise adds up to sigma_t."""
    target = (source[0] * shrink, math.hypot(shrink * source[1], extra))
    ratio, std = forward_kernel(source, target)
    assert ratio * source[0] == pytest.approx(target[0], abs=1e-12)
    assert math.hypot(ratio * source[1], std) == pytest.approx(target[1], abs=1e-7)


def test_rounding_never_gives_a_negative_variance() -> None:
    assert forward_kernel((0.9, 0.4), (0.9, math.nextafter(0.4, 0.0)))[1] == 0.0


@pytest.mark.parametrize("name", ["ddim", "euler", "dpm++2m", "flow-euler"])
def test_renoise_by_no_level_changes_nothing(name: str) -> None:
    sampler = make(name, spacing="linspace" if name == "ddim" else None)
    levels = [0, 3, 11, 12]
    latents = randn(4, 2, 3)
    for arrived in (True, False):
        assert torch.equal(sampler.renoise(latents, [arrived] * 4, levels, levels, randn(4, 2, 3, seed=1)), latents)


def test_renoise_of_a_clean_latent_is_add_noise() -> None:
    sampler = TableSampler(Network("epsilon"), plain_tables("vp", SOLVERS["ddim"], 10), SOLVERS["ddim"])
    x0, noise = randn(3, 4), randn(3, 4, seed=1)
    again = sampler.renoise(x0, [True] * 3, [10] * 3, [0, 4, 9], noise)
    assert torch.allclose(again, sampler.add_noise(x0, [0, 4, 9], noise), atol=1e-6)


def test_renoise_starts_where_the_denoise_landed() -> None:
    """DDIM with linspace spacing lands off the grid (at t - T // N); the noise that is added must make up for it."""
    sampler = make("ddim", steps=12, spacing="linspace")
    schedule = sampler.schedule
    assert any(abs(a[1] / s - 1.0) > 0.05 for a, s in zip(schedule.arrival[1:-1], schedule.sigma[1:-1], strict=True))
    ones, zeros = torch.ones(2, 1), torch.zeros(2, 1)
    ratio = sampler.renoise(ones, [True, False], [6, 6], [2, 2], zeros)[:, 0]
    std = sampler.renoise(zeros, [True, False], [6, 6], [2, 2], ones)[:, 0]
    for row, (alpha, sigma) in enumerate([schedule.arrival[6], (schedule.alpha[6], schedule.sigma[6])]):
        assert float(ratio[row]) * alpha == pytest.approx(schedule.alpha[2], rel=1e-6)
        assert math.hypot(float(ratio[row]) * sigma, float(std[row])) == pytest.approx(schedule.sigma[2], rel=1e-6)


def test_renoise_to_a_cleaner_level_is_refused() -> None:
    with pytest.raises(UsageError, match="cleaner"):
        make("ddim").renoise(randn(1, 2), [False], [3], [4], randn(1, 2))


# Perturbing and drawing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddim", "euler", "dpm++2m", "flow-euler"])
def test_perturb_keeps_the_level(name: str) -> None:
    sampler = make(name)
    alpha, sigma = sampler.schedule.alpha[5], sampler.schedule.sigma[5]
    x0, e, z = randn(4, 3), randn(4, 3, seed=1), randn(4, 3, seed=2)
    latents = alpha * x0 + sigma * e
    share = [0.0, 0.3, 0.8, 1.0]
    got = sampler.perturb(latents, x0, [False] * 4, [5] * 4, share, z)
    for row, scale in enumerate(share):
        want = alpha * x0[row] + sigma * (math.sqrt(1.0 - scale**2) * e[row] + scale * z[row])
        assert torch.allclose(got[row], want, atol=1e-4 * sigma)


def test_perturb_refuses_what_has_no_meaning() -> None:
    sampler = make("euler")
    x = randn(1, 2)
    with pytest.raises(UsageError, match=r"\[0, 1\]"):
        sampler.perturb(x, x, [False], [3], [1.5], x)
    with pytest.raises(UsageError, match="no noise"):
        sampler.perturb(x, x, [False], [12], [0.5], x)


@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpm++2m", "flow-euler"])
@pytest.mark.parametrize("start", [0, 4, 11])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_tail_draws_like_image_to_image(name: str, start: int) -> None:
    """The tail's level 0 is diffusers' add_noise at the timestep that image-to-image starts from, bit for bit."""
    import diffusers

    from tsdiff.diffusion.tables import _SCHEDULERS

    sampler = make(name)
    tail = TableSampler(sampler.model, sampler.tables.tail(start), sampler.solver)
    config, _ = CONFIGS[sampler.solver.kind]
    scheduler = getattr(diffusers, _SCHEDULERS[name]).from_config(config)
    scheduler.set_timesteps(12)
    timestep = scheduler.timesteps[start * sampler.solver.stages :][:1]
    assert float(timestep) == tail.schedule.timesteps[0]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start * sampler.solver.stages)
    image, noise = randn(1, 4, 3), randn(1, 4, 3, seed=3)
    want = (
        scheduler.scale_noise(image, timestep, noise) if name == "flow-euler" else scheduler.add_noise(image, noise, timestep)
    )
    assert torch.equal(tail.draw(noise, image), want)


@pytest.mark.parametrize("name", NAMES)
def test_tail_steps_like_the_whole(name: str) -> None:
    """Renumbering changes no step, also where a solver's options depend on the number of steps of the full grid."""
    sampler = make(name, steps=20)
    tail = TableSampler(sampler.model, sampler.tables.tail(8), sampler.solver)
    x, output, old = randn(3, 2), randn(3, 2, seed=1), randn(3, 2, seed=2)
    history = (old,) if sampler.solver.kind == "dpm" else ()
    noise = noise_for(sampler, x.shape)
    levels, nexts, before = [9, 15, 19], [10, 16, 20], [8, 13, 18]
    whole = sampler.advance(StepState(x, history, before), 0, levels, nexts, output, noise)
    shifted = [[level - 8 for level in group] for group in (levels, nexts, before)]
    part = tail.advance(StepState(x, history, shifted[2]), 0, shifted[0], shifted[1], output, noise)
    assert torch.equal(part.latents, whole.latents)


# Steps ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "ddim",
        "ddim(eta=0.7)",
        "ddim(eta=1)",
        "ddpm",
        "euler",
        "euler-ancestral",
        "dpm++2m",
        "dpm++2m-sde",
        "flow-euler",
        "flow-ancestral",
        "flow-ancestral(eta=0.4)",
    ],
)
@pytest.mark.parametrize("jump", [1, 4])
def test_one_formula_for_all_families(name: str, jump: int) -> None:
    """x_s = alpha_s x0 + sqrt(sigma_s^2 - tau^2) eps + tau z with tau = eta sigma_s sqrt(1 - SNR_t / SNR_s)."""
    sampler = make(name, spacing="leading" if name.startswith("dd") else None)
    schedule = sampler.schedule
    shares = {"ddpm": 1.0, "euler-ancestral": 1.0, "dpm++2m-sde": 1.0}
    eta = shares.get(sampler.solver.name, sampler.solver.eta)
    x, output = randn(8, 5).double(), randn(8, 5, seed=1).double()
    z = randn(1, 8, 5, seed=2)
    for level in (0, 3, 7, 12 - jump):
        to = level + jump
        got = sampler.advance(
            StepState(x.float()), 0, [level] * 8, [to] * 8, output.float(), z if sampler.solver.stochastic else None
        ).latents
        a, s, a_to, s_to = schedule.alpha[level], schedule.sigma[level], schedule.alpha[to], schedule.sigma[to]
        x0, e = (x - s * output, x + a * output) if sampler.solver.kind == "flow" else ((x - s * output) / a, output)
        tau = eta * s_to * math.sqrt(max(0.0, 1.0 - (a * s_to / (s * a_to)) ** 2))
        want = a_to * x0 + math.sqrt(max(0.0, s_to**2 - tau**2)) * e + tau * z[0]
        assert torch.allclose(got.double(), want, rtol=2e-4, atol=2e-4 * max(1.0, s_to)), (level, (got - want).abs().max())


@pytest.mark.parametrize("spacing", ["linspace", "trailing", "leading"])
def test_neighbours_land_on_arrival_and_longer_steps_on_the_grid(spacing: str) -> None:
    """The deterministic step carries (x0, eps) = (1, 0) to alpha and (0, 1) to sigma of where it lands."""
    sampler = make("ddim", steps=12, spacing=spacing)
    schedule = sampler.schedule
    for level, to in [(0, 1), (4, 5), (11, 12), (0, 2), (3, 9), (5, 12)]:
        a, s = schedule.alpha[level], schedule.sigma[level]
        x, output = torch.tensor([[a], [s]]), torch.tensor([[0.0], [1.0]])
        got = sampler.advance(StepState(x), 0, [level] * 2, [to] * 2, output, None).latents[:, 0].tolist()
        want = schedule.arrival[to] if to == level + 1 else (schedule.alpha[to], schedule.sigma[to])
        assert got == pytest.approx(list(want), abs=2e-6)


@pytest.mark.parametrize("base", list(SOLVERS))
def test_solvers_of_a_kind_share_a_schedule(base: str) -> None:
    """Whatever the solver, a perfect prediction keeps a row on its scales: the base's end is where all of them end."""
    tables = make(base).tables
    schedule, z = tables.schedule, randn(1, 2000, 1, seed=5)
    for other in SOLVERS.values():
        if other.kind != schedule.kind or other.name == "flow-sde":  # first order in the step only
            continue
        if other.name == "lcm" != base:  # lets a trace of x through at timesteps smaller than its own
            continue
        sampler = TableSampler(Network("flow" if other.kind == "flow" else "epsilon"), tables, other)
        for level, to in [(5, 6), (11, 12)]:
            e = randn(2000, 1)
            x = schedule.alpha[level] * 2.0 + schedule.sigma[level] * e
            output = e - 2.0 if other.kind == "flow" else e
            got = sampler.advance(StepState(x), 0, [level] * 2000, [to] * 2000, output, z if other.stochastic else None).latents
            assert float(got.mean()) == pytest.approx(2.0 * schedule.alpha[to], abs=0.1 * schedule.sigma[to] + 1e-4)
            assert float(got.std()) == pytest.approx(schedule.sigma[to], rel=0.06, abs=2e-4)


def test_history_of_a_sub_grid_uses_its_own_level() -> None:
    """DPM-Solver++ 2M (Lu et al. 2022, eq. for M=2) with the true ratio r of log-SNR distances, in float64."""
    sampler = make("dpm++2m", steps=30)
    schedule = sampler.schedule
    lam = [0.5 * schedule.log_snr(level) for level in range(30)]
    x, output, old = randn(3, 4), randn(3, 4, seed=1), randn(3, 4, seed=2)
    levels, nexts, before = [10, 10, 10], [15, 15, 11], [5, 9, 9]
    got = sampler.advance(StepState(x, (old,), before), 0, levels, nexts, output, None).latents
    x0 = sampler.x0(x, levels, output).double()
    for row in range(3):
        h = lam[nexts[row]] - lam[10]
        r = (lam[10] - lam[before[row]]) / h
        d = (1.0 + 0.5 / r) * x0[row] - 0.5 / r * old[row].double()
        want = schedule.sigma[nexts[row]] / schedule.sigma[10] * x[row] - schedule.alpha[nexts[row]] * math.expm1(-h) * d
        assert torch.allclose(got[row].double(), want, atol=1e-5)
    assert not torch.allclose(got[0], got[1], atol=1e-4)


@pytest.mark.parametrize("name", ["dpm++2m", "dpm++2m-sde"])
def test_rows_without_history_are_first_order(name: str) -> None:
    """Whatever stands in for the history of such a row, and also on the last step, has no influence."""
    sampler = make(name)
    x, output = randn(4, 3), randn(4, 3, seed=1)
    levels, nexts = [0, 5, 5, 11], [1, 6, 6, 12]
    noise = noise_for(sampler, x.shape)
    alone = sampler.advance(StepState(x), 0, levels, nexts, output, noise)
    mixed = sampler.advance(StepState(x, (torch.full_like(x, 3e38),), [-1, -1, 4, 10]), 0, levels, nexts, output, noise)
    for row in (0, 1, 3):
        assert torch.equal(mixed.latents[row], alone.latents[row])
    assert not torch.equal(mixed.latents[2], alone.latents[2])
    assert torch.equal(alone.history[0], sampler.x0(x, levels, output))
    assert list(alone.history_levels) == levels


def test_heun_keeps_nothing_after_its_step() -> None:
    sampler = make("heun")
    x, output = randn(2, 3), randn(2, 3, seed=1)
    half = sampler.advance(StepState(x), 0, [3, 11], [4, 12], output, None)
    assert torch.equal(half.history[0], x)
    assert list(half.history_levels) == [3, -1]  # the second row ends at sigma 0 and is finished
    done = sampler.advance(
        StepState(half.latents[:1], tuple(part[:1] for part in half.history), [3]), 1, [3], [4], output[:1], None
    )
    assert done.history == ()
    assert sampler.advance(StepState(x), 0, [11, 11], [12, 12], output, None).history == ()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_row_does_not_depend_on_its_batch(name: str, data: st.DataObject) -> None:
    """Permuting or shrinking a batch changes no bit of any row: steps, re-noising, guidance, evaluation."""
    sampler = make(name)
    size, rows = 7, data.draw(st.permutations(range(7)))
    rows = rows[: data.draw(st.integers(1, 7))]
    shape = (size, data.draw(st.integers(1, 3)), data.draw(st.integers(1, 7)))
    levels = data.draw(st.lists(st.integers(0, 11), min_size=size, max_size=size))
    nexts = [data.draw(st.integers(level + 1, 12)) for level in levels]
    before = [data.draw(st.integers(-1, level - 1)) for level in levels]
    x, output, old, noise = (randn(*shape, seed=seed) for seed in range(4))
    scale, rescale = [1.5 + row for row in range(size)], [0.0, 0.7, 0.3, 0.0, 1.0, 0.5, 0.0]

    def run(pick: list[int]) -> list[torch.Tensor]:
        here, there = [levels[i] for i in pick], [nexts[i] for i in pick]
        state = StepState(x[pick], (old[pick],), [before[i] for i in pick])
        extra = noise[pick][None] if sampler.solver.stochastic else None
        return [
            sampler.advance(state, 0, here, there, output[pick], extra).latents,
            sampler.evaluate(x[pick], here, [{}] * len(pick)),
            sampler.renoise(x[pick], [i % 2 == 0 for i in pick], there, here, noise[pick]),
            sampler.perturb(x[pick], old[pick], [False] * len(pick), here, [0.1 * i for i in pick], noise[pick]),
            sampler.guide(
                x[pick], old[pick], [scale[i] for i in pick], [rescale[i] if x[0].numel() > 1 else 0.0 for i in pick]
            ),
        ]

    for whole, part in zip(run(list(range(size))), run(list(rows)), strict=True):
        assert torch.equal(part, whole[list(rows)])


# Network -------------------------------------------------------------------------------------------------------------


def test_guidance() -> None:
    sampler = make("ddim")
    cond, uncond = randn(3, 4, 8, 8), randn(3, 4, 8, 8, seed=1)
    kept = cond.clone(), uncond.clone()
    got = sampler.guide(cond, uncond, [7.5, 2.0, 7.5], [0.0, 0.7, 0.0])
    assert torch.equal(got[0], uncond[0] + 7.5 * (cond[0] - uncond[0]))
    plain = uncond[1:2] + 2.0 * (cond[1:2] - uncond[1:2])
    # Lin et al. 2023, eq. 15 and 16, and diffusers' rescale_noise_cfg (not imported: that takes seconds).
    rescaled = plain * (cond[1].std() / plain.std())
    assert torch.allclose(got[1:2], 0.7 * rescaled + 0.3 * plain, atol=1e-6)
    assert torch.equal(cond, kept[0])
    assert torch.equal(uncond, kept[1])


def test_half_precision_outputs_leave_float32_latents() -> None:
    for name in NAMES:
        sampler = make(name)
        x, output = randn(2, 3), randn(2, 3, seed=1).half()
        state = sampler.advance(StepState(x), 0, [2, 5], [3, 6], output, noise_for(sampler, x.shape))
        assert state.latents.dtype == torch.float32
        assert sampler.guide(output, output, [3.0, 3.0], [0.0, 0.5]).dtype == torch.float32


def test_evaluate_tells_each_row_its_own_timestep_and_scales_ve_latents() -> None:
    for name in ("ddim", "euler"):
        sampler = make(name)
        x = randn(3, 2)
        sampler.evaluate(x, [0, 5, 11], [{}] * 3)
        seen, told = sampler.model.seen[-1]  # type: ignore[attr-defined]
        assert told.tolist() == [sampler.schedule.timesteps[level] for level in (0, 5, 11)]
        sigma = torch.tensor([sampler.schedule.sigma[level] for level in (0, 5, 11)])[:, None]
        assert torch.allclose(seen, x / (sigma**2 + 1).sqrt() if name == "euler" else x, rtol=1e-6)


@pytest.mark.parametrize(("process", "name"), [("vp", "ddim"), ("vp", "dpm++2m"), ("ve", "euler"), ("flow", "flow-euler")])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow"])
def test_x0_of_every_prediction(process: Any, name: str, prediction: str) -> None:
    """An exact prediction gives back x0, whatever its kind; VE v-predictions belong to the VP-scaled input."""
    tables = plain_tables(process, SOLVERS[name], 10)
    fitting = ("flow", "sample") if process == "flow" else ("epsilon", "v_prediction", "sample")
    if prediction not in fitting:
        with pytest.raises(UsageError, match="predict"):
            TableSampler(Network(prediction), tables, SOLVERS[name])
        return
    sampler = TableSampler(Network(prediction), tables, SOLVERS[name])
    x0, e = randn(3, 4), randn(3, 4, seed=1)
    levels = [1, 5, 9]
    ratio = torch.tensor([tables.schedule.sigma[level] / tables.schedule.alpha[level] for level in levels])[:, None]
    alpha = 1.0 / (1.0 + ratio**2).sqrt()
    output = {"epsilon": e, "sample": x0, "flow": e - x0, "v_prediction": alpha * e - alpha * ratio * x0}[prediction]
    assert torch.allclose(sampler.x0(sampler.add_noise(x0, levels, e), levels, output), x0, atol=2e-4)


def test_a_solver_of_another_kind_is_refused() -> None:
    with pytest.raises(UsageError, match="kind"):
        TableSampler(Network("epsilon"), plain_tables("vp", SOLVERS["ddim"], 4), SOLVERS["euler"])


def test_a_stochastic_solver_needs_noise() -> None:
    with pytest.raises(ValueError, match="noise"):
        make("ddpm").advance(StepState(randn(1, 2)), 0, [0], [1], randn(1, 2), None)


# Flow SDEs -----------------------------------------------------------------------------------------------------------


def final_std(name: str, steps: int, mean: float = 1.5, std: float = 0.5) -> float:
    """Standard deviation of samples of 1-D data N(1.5, 0.5^2) with the exact velocity: the steps are affine, so no sampling."""
    solver = solver_info(name, None, (name.split("(")[0],))
    sigmas = [1.0 - step / steps for step in range(steps)]
    sampler = TableSampler(Network("flow"), scheduler_tables(*CONFIGS["flow"], solver, steps, sigmas=sigmas), solver)
    variance = 1.0
    for level in range(steps):
        t = sampler.schedule.sigma[level]
        a = 1.0 - t
        x = torch.tensor([[0.0], [1.0], [0.0]])
        x0 = mean + a * std**2 / (a**2 * std**2 + t**2) * (x - a * mean)
        noise = torch.tensor([[[0.0], [0.0], [1.0]]]) if sampler.solver.stochastic else None
        y = sampler.advance(StepState(x), 0, [level] * 3, [level + 1] * 3, (x - x0) / t, noise).latents[:, 0]
        variance = float(y[1] - y[0]) ** 2 * variance + float(y[2] - y[0]) ** 2
    return math.sqrt(variance)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("flow-euler", (0.370, 0.446, 0.486)),
        ("flow-ancestral(eta=1)", (0.330, 0.403, 0.467)),
        ("flow-ancestral(eta=0.5)", (0.362, 0.438, 0.483)),
    ],
)
def test_spread_of_gaussian_data(name: str, expected: tuple[float, float, float]) -> None:
    """Spreads at 10, 25 and 100 steps with shift 3, found by simulation elsewhere."""
    assert [final_std(name, steps) for steps in (10, 25, 100)] == pytest.approx(expected, abs=0.0015)


@pytest.mark.parametrize("name", ["flow-euler", "flow-ancestral(eta=1)", "flow-sde(eta=0.7)", "flow-sde(eta=1.2)"])
def test_flow_solvers_converge_to_the_data(name: str) -> None:
    """At least first order in the step: the error of the spread halves with it."""
    errors = [0.5 - final_std(name, steps) for steps in (100, 200, 400)]
    assert 0.0 < errors[2] < 0.56 * errors[1] < 0.56**2 * errors[0] < 0.02
    if name.startswith("flow-sde"):
        assert errors[0] < 0.5 - final_std("flow-euler", 100)


def test_flow_sde_is_stable_on_sub_grids() -> None:
    """Steps that are long beside the distance to the pole at t = 1 must not blow up."""
    sampler = make("flow-sde(eta=1.4)", steps=50)
    x, u = torch.zeros(1, 1), torch.ones(1, 1)  # x0 = -t, eps = 1 - t
    for to in (3, 10, 30, 49):
        moved = sampler.advance(StepState(x), 0, [1], [to], u, torch.ones(1, 1, 1)).latents
        assert abs(float(moved)) < 3.0


def tables_of(name: str) -> Tables:
    return make(name).tables


def test_tables_are_values() -> None:
    assert tables_of("ddim") == tables_of("ddim")
    assert len({tables_of("ddim"), tables_of("ddim"), tables_of("euler")}) == 2
