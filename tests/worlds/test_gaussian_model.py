"""The analytic model: its options, its rows, its predictions and its pictures."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from gaussian_cases import mixtures
from hypothesis import given, settings
from hypothesis import strategies as st

from tsdiff.treesearch.errors import SetupError, UsageError
from tsdiff.treesearch.protocols import Condition, LoadOptions
from tsdiff.worlds.gaussian.mixture import Mixture
from tsdiff.worlds.gaussian.model import SOLVERS, GaussianModel, outline
from tsdiff.worlds.gaussian.pictures import limits
from tsdiff.worlds.gaussian.presets import parse_target, preset

RARE = preset("rare-mode")


@pytest.mark.parametrize("module", ["model", "verifiers", "suites", "mixture", "presets", "pictures"])
def test_importing_the_world_imports_nothing_heavy(module: str) -> None:
    heavy = "torch", "diffusers", "transformers", "scipy", "matplotlib", "numpy"
    code = f"import sys, tsdiff.worlds.gaussian.{module}; print([name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_computing_imports_no_other_framework() -> None:
    code = (
        "import sys, torch; from tsdiff.worlds.gaussian.model import outline; from tsdiff.treesearch.protocols import *\n"
        "model = outline('gaussian', LoadOptions()).load(); rows = model.encode([Condition()], guided=False)[0].rows\n"
        "solver = model.solver(); sampler = model.sampler(model.schedule(solver, 4, None), solver)\n"
        "model.decode(sampler.x0(torch.zeros(1, 2), [0], sampler.evaluate(torch.zeros(1, 2), [0], rows)))\n"
        "print([name for name in ('diffusers', 'transformers', 'scipy', 'matplotlib') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("reference", "process"),
    [("gaussian", "vp"), ("gaussian:process=ve", "ve"), ("gaussian:preset=rare-mode,process=flow", "flow")],
)
def test_references_name_a_process(reference: str, process: str) -> None:
    model = outline(reference, LoadOptions())
    assert (model.name, model.process, model.mixture) == (reference, process, RARE.mixture)
    assert model.solvers == SOLVERS[process]
    assert model.latent_shape(model.size(None, None)) == (2,)
    assert model.load() is model


@pytest.mark.parametrize(
    ("reference", "options", "message"),
    [
        ("gaussian:proces=vp", LoadOptions(), "did you mean 'process'"),
        ("gaussian:process=flows", LoadOptions(), "did you mean 'flow'"),
        ("gaussian:preset=rare_mode", LoadOptions(), "did you mean 'rare-mode'"),
        ("gaussian:vp", LoadOptions(), "key=value"),
        ("gaussian", LoadOptions(dtype="float16"), "float32"),
        ("gaussian", LoadOptions(device="mps"), "float64"),
    ],
)
def test_wrong_references_and_options_are_usage_errors(reference: str, options: LoadOptions, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        outline(reference, options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks the message of a machine without CUDA")
def test_a_missing_device_is_a_setup_error() -> None:
    with pytest.raises(SetupError, match="cuda"):
        outline("gaussian", LoadOptions(device="cuda")).load()


def test_a_size_is_refused() -> None:
    with pytest.raises(UsageError, match="height and width"):
        outline("gaussian", LoadOptions()).size(64, None)


def test_demo_points_at_the_rare_mode() -> None:
    demo = outline("gaussian", LoadOptions()).demo
    assert demo is not None
    assert parse_target(demo.prompt, 2) == RARE.mixture.means[RARE.good]
    assert RARE.mixture.weights[RARE.good] == min(RARE.mixture.weights) < 0.03


@pytest.mark.parametrize("prompt", ["near (1, 2)", "near(1,2)", "  near ( 1.0 , 2e0 ) "])
def test_prompts_that_name_a_point(prompt: str) -> None:
    outline("gaussian", LoadOptions()).check(Condition(prompt=prompt))
    assert parse_target(prompt, 2) == (1.0, 2.0)


@pytest.mark.parametrize(
    "prompt",
    ["a cat", "near 1, 2", "near (1)", "near (1, 2, 3)", "near (1, x)", "near (nan, 1)", "near ()", "near (1, 2) please"],
)
def test_other_prompts_are_refused_with_an_example(prompt: str) -> None:
    with pytest.raises(UsageError, match=r'for example "near \(3, 2\.4\)"'):
        outline("gaussian", LoadOptions()).check(Condition(prompt=prompt))


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (Condition(class_label=9), "0 to 8"),
        (Condition(class_label="rar"), "did you mean 'rare'"),
        (Condition(class_label="17"), "0 to 8"),
        (Condition(negative_prompt="blurry"), "negative prompt"),
        (Condition(extra={"clip_skip": 1}), "clip_skip"),
    ],
)
def test_conditions_without_meaning_are_refused(condition: Condition, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        outline("gaussian", LoadOptions()).check(condition)


@pytest.mark.parametrize("label", [8, "8", "rare"])
def test_classes_are_rows_that_single_out_a_component(label: int | str) -> None:
    model = outline("gaussian", LoadOptions())
    (encoded,) = model.encode([Condition(class_label=label)], guided=True)
    conditional, unconditional = (row["log_weights"].exp() for row in encoded.rows)
    assert conditional.tolist() == [0.0] * 8 + [1.0]
    torch.testing.assert_close(unconditional, torch.tensor(RARE.mixture.weights, dtype=torch.float64))


def test_guidance_without_a_class_is_refused() -> None:
    model = outline("gaussian", LoadOptions())
    model.check(Condition())
    model.check(Condition(class_label=0), guided=True)
    with pytest.raises(UsageError, match="guidance needs a class"):
        model.check(Condition(prompt="near (0, 0)"), guided=True)


@settings(max_examples=30, deadline=None)
@given(mixtures(dim=2), st.floats(0.0, 1.0), st.sampled_from(["vp", "flow"]))
def test_forward_is_the_posterior_mean_of_what_the_type_says(mixture: Mixture, share: float, process: str) -> None:
    model = GaussianModel(mixture, process)  # type: ignore[arg-type]
    rows = model.encode([Condition()], guided=False)[0].rows * 3
    x = torch.tensor([[0.0, 0.5], [2.0, -1.0], [-0.3, 0.1]])
    time = share if process == "flow" else (math.inf if share == 1.0 else share / (1.0 - share))
    output = model.forward(x, torch.full((3,), time), rows)
    assert output.dtype == torch.float32
    norm = 1.0 if process == "flow" else math.hypot(1.0 - share, share)
    alpha, sigma = (1.0 - share) / norm, share / norm
    x0, eps = mixture.denoise(x, alpha, sigma)
    torch.testing.assert_close(output.double(), eps - x0 if process == "flow" else eps, rtol=1e-5, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 70), st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 3, 17]))
def test_a_row_s_bits_do_not_depend_on_its_batch(count: int, seed: int, dim: int) -> None:
    random = torch.Generator().manual_seed(seed)
    means = [tuple(torch.randn(dim, generator=random).tolist()) for _ in range(7)]
    model = GaussianModel(Mixture([1.0, 2.0, 3.0, 4.0, 3.0, 2.0, 1.0], means, [0.3] * 7))
    x, times = torch.randn(count, dim, generator=random), torch.rand(count, generator=random) * 10.0 + 0.01
    encoded = model.encode([Condition(class_label=k % 7 if k % 2 else None) for k in range(count)], guided=False)
    rows = [one.rows[0] for one in encoded]
    together = model.forward(x, times, rows)
    alone = torch.cat([model.forward(x[i : i + 1], times[i : i + 1], rows[i : i + 1]) for i in range(count)])
    assert torch.equal(together, alone)
    order = torch.randperm(count, generator=random)
    assert torch.equal(model.forward(x[order], times[order], [rows[i] for i in order.tolist()]), together[order])


def test_fingerprints_tell_models_apart() -> None:
    one, other = Mixture([1.0], [(0.0,)], [1.0]), Mixture([1.0], [(0.0,)], [1.1])
    prints = [GaussianModel(one).fingerprint, GaussianModel(other).fingerprint, GaussianModel(one, "ve").fingerprint]
    assert len(set(prints)) == 3
    assert GaussianModel(one, name="other").fingerprint == prints[0]


def test_pictures_show_the_sample_where_it_is() -> None:
    model = outline("gaussian", LoadOptions())
    points = torch.tensor([[3.0, 2.4], [0.0, 0.0], [-2.0, 0.0]])
    pixels = model.decode(points).pixels
    assert pixels.shape == (3, 3, 128, 128)
    assert pixels.dtype == torch.float32
    assert 0.0 <= float(pixels.min()) <= float(pixels.max()) <= 1.0
    (x, y), half = limits(RARE.mixture)
    brightest = pixels.amin(1).flatten(1).argmax(1)  # white is bright in every channel
    seen = torch.stack(((brightest % 128 + 0.5) / 64.0 - 1.0, 1.0 - (brightest // 128 + 0.5) / 64.0), dim=1) * half
    assert ((seen + torch.tensor([x, y]) - points).abs() < 0.2).all()
    assert torch.equal(pixels, torch.cat([model.decode(point.unsqueeze(0)).pixels for point in points]))


def test_pictures_show_every_mode() -> None:
    (x, y), half = limits(RARE.mixture)
    for mean, std in zip(RARE.mixture.means, RARE.mixture.stds, strict=True):
        assert abs(mean[0] - x) + 2.0 * std < half
        assert abs(mean[1] - y) + 2.0 * std < half


def test_only_the_plane_has_pictures() -> None:
    model = outline("gaussian:preset=two-modes", LoadOptions())
    assert model.media is None
    with pytest.raises(UsageError, match="only two can be drawn"):
        model.decode(torch.zeros(1, 1))
    with pytest.raises(UsageError, match="cannot start from an image"):
        model.encode_images(torch.zeros(1, 3, 8, 8), torch.zeros(1, 1))


@pytest.mark.parametrize("process", ["vp", "ve", "flow"])
def test_solvers_of_a_process_are_named_with_their_kind(process: str) -> None:
    model = GaussianModel(RARE.mixture, process)  # type: ignore[arg-type]
    for name in model.solvers:
        solver = model.solver(name)
        assert solver.name == name
        assert model.solver(solver.ode).stochastic is False
        assert model.solver(solver.ode).kind == solver.kind
        assert model.schedule(solver, 7, None).last == 7
    assert model.solver().name == model.solvers[0]
    assert replace(model.solver("exact"), ode="") == replace(
        model.solver("exact"), ode="", eta=0.0, num_noise=2, stochastic=True
    )
    with pytest.raises(UsageError, match="eta"):
        model.solver("exact", 0.5)
    with pytest.raises(UsageError, match="solver"):
        model.solver("exakt")
