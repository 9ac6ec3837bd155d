"""Hacking reports: the closed-form testbed (a proxy is the gold score with an error), records of runs, warnings."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import integrate, stats

import tsdiff
from tsdiff.bench.answers import Sample, Search, load_searches, pixels
from tsdiff.bench.diversity import feature_function
from tsdiff.bench.hacking import hacking_report
from tsdiff.bench.hacking_table import best_of_k
from tsdiff.bench.statistics import mean_distance, vendi_score
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Condition, Scores
from tsdiff.worlds.gaussian.mixture import Mixture
from tsdiff.worlds.gaussian.model import GaussianModel


def largest(count):
    """The expected maximum of `count` standard normal numbers."""
    return integrate.quad(lambda x: x * count * stats.norm.pdf(x) * stats.norm.cdf(x) ** (count - 1), -10, 10)[0]


def test_expected_maxima_are_the_tabulated_ones():
    assert [largest(count) for count in (2, 4, 8, 16, 64)] == pytest.approx([0.5642, 1.0294, 1.4236, 1.7660, 2.3437], abs=1e-4)


def record(prompt, searched, held_out, seed=0):
    """A run of best-of-n with these scores."""
    samples = tuple(Sample(10, {"proxy": float(p), "gold": float(g)}) for p, g in zip(searched, held_out, strict=True))
    answer = Sample(10 * len(samples), samples[int(np.argmax(searched))].scores)
    return Search("here", Condition(prompt), seed, "m", "best-of-n", "proxy", 10 * len(samples), answer, samples[0], samples)


def bed(prompts, count, error, seed=0):
    """Gold g ~ N(0, 1) of each candidate, proxy p = g + error(random numbers)."""
    rng = np.random.default_rng(seed)
    records = []
    for number in range(prompts):
        gold = rng.normal(size=count)
        records.append(record(f"p{number:03d}", gold + error(rng, count), gold))
    return records


# The closed-form testbed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("s", [0.5, 2.0])
def test_gaussian_errors_give_the_known_gains_and_a_constant_index(s):
    """E[proxy gain] = sqrt(1 + s^2) m_N, E[gold gain] = m_N / sqrt(1 + s^2); their ratio in standard deviations is the correlation."""
    prompts = 200
    report = hacking_report(bed(prompts, 64, lambda rng, n: s * rng.normal(size=n)), held_out="gold", within=True, resamples=100)
    (curve,) = report.curves
    assert [point.budget for point in curve.points] == [10 * k for k in (1, 2, 4, 8, 16, 32, 64)]
    for point in curve.points:
        count = round(point.budget / 10)
        # The maximum of N normal numbers has a standard deviation below 1, the gold score beside it too: 5 standard errors.
        gain = largest(count) if count > 1 else 0.0
        assert point.scores["searched"] == pytest.approx(math.sqrt(1 + s**2) * gain, abs=5 * math.sqrt((1 + s**2) / prompts))
        assert point.scores["held_out"] == pytest.approx(gain / math.sqrt(1 + s**2), abs=5 / math.sqrt(prompts))
        if count > 1:
            assert point.index == pytest.approx(1 / math.sqrt(1 + s**2), abs=0.15)
    assert report.warnings == ()
    assert curve.peak == 640


def heavy(rng, count):
    return 2.0 * rng.standard_t(2, size=count)


def heavy_gold(count):
    """The expected gold score of the best of `count` by proxy g + 2 t_2, by quadrature over (gold, error)."""
    gold = np.linspace(-5, 5, 41)
    tail = np.sinh(np.linspace(-8, 8, 1001))  # the error: fine at 0, out to thousands
    weight = np.gradient(tail) * stats.t.pdf(tail, 2)
    weight /= weight.sum()
    cumulative = np.cumsum(weight) - weight / 2
    masses = stats.norm.pdf(gold) / stats.norm.pdf(gold).sum()

    def below(proxy):  # the distribution function of the proxy
        return sum(mass * np.interp((proxy - g) / 2, tail, cumulative) for g, mass in zip(gold, masses, strict=True))

    top = np.stack([count * below(g + 2 * tail) ** (count - 1) for g in gold])  # density of being the best, over the proxy's own
    joint = masses[:, None] * weight[None, :] * top
    return float((joint * gold[:, None]).sum() / joint.sum())


def test_heavy_tailed_errors_are_hacking_and_are_warned_of():
    """The gold gain first rises, then falls towards 0, while the proxy's grows without end."""
    prompts = 250
    report = hacking_report(bed(prompts, 256, heavy), held_out="gold", within=True, resamples=500)
    (curve,) = report.curves
    gold = [point.scores["held_out"] for point in curve.points]
    proxy = [point.scores["searched"] for point in curve.points]
    for point, value in zip(curve.points, gold, strict=True):
        count = round(point.budget / 10)
        assert value == pytest.approx(heavy_gold(count) if count > 1 else 0.0, abs=5 / math.sqrt(prompts))
    assert proxy == sorted(proxy)
    assert 40 <= curve.peak <= 320
    assert gold[-1] < max(gold) - 0.1
    (warning,) = report.warnings
    assert warning == curve.warning
    for word in ("best-of-n hacks proxy", "held-out gold falls", "2560 NFE", f"from {curve.peak:g}"):
        assert word in warning
    # The index tells it, too: falling from the correlation of honest errors towards 0.
    assert curve.points[-1].index < 0.5 * curve.points[1].index


def test_false_alarms_are_rare():
    """The held-out score does not depend on the searched one: it rises or falls by chance."""

    def report(run):
        rng = np.random.default_rng(run)
        return hacking_report([record(f"{i}", *rng.normal(size=(2, 8))) for i in range(12)], held_out="gold", within=True, resamples=400)

    alarms = sum(bool(report(run).warnings) for run in range(60))
    assert alarms <= 6  # nominal 1.5 (one of two sides of 5 %), and percentile intervals of 12 units are somewhat narrow


def test_testbed_in_a_real_search():
    """The gaussian world with gold = x and proxy = x + s y of N(0, I): the engine's own best-of-n obeys the formulas."""

    class Coordinate:
        needs = frozenset({"x0"})
        scope, latency, judges, differentiable = "row", "immediate", "any", True

        def __init__(self, name, weights):
            self.name, self.weights = name, weights

        def prepare(self, device):
            pass

        def check(self, condition):
            pass

        def score(self, candidates):
            return Scores(candidates.x0.double() @ candidates.x0.new_tensor(self.weights).double())

    s, seeds, count = 1.5, 24, 32
    model = GaussianModel(Mixture([1.0], [(0.0, 0.0)], [1.0]))
    results = tsdiff.search(
        model, "near (0, 0)", policy="best-of-n", policy_options={"n": count}, verifier=[Coordinate("proxy", (1.0, s)), Coordinate("gold", (1.0, 0.0))],
        solver="exact", steps=2, seed=range(seeds), max_batch=256,
    )  # fmt: skip
    report = hacking_report(results, held_out="gold", within=True, resamples=200)
    (curve,) = report.curves
    assert (curve.prompts, curve.seeds) == (1, seeds)
    for point in curve.points:
        k = round(point.budget / 2)
        assert point.nfe == 2 * k  # two steps, one evaluation each
        gain = largest(k) if k > 1 else 0.0
        assert point.scores["searched"] == pytest.approx(math.sqrt(1 + s**2) * gain, abs=5 * math.sqrt((1 + s**2) / seeds))
        assert point.scores["held_out"] == pytest.approx(gain / math.sqrt(1 + s**2), abs=5 / math.sqrt(seeds))
    assert curve.points[-1].index == pytest.approx(1 / math.sqrt(1 + s**2), abs=0.25)
    assert report.warnings == ()
    assert curve.points[-1].pictures == curve.points[0].pictures == seeds
    across = hacking_report(results, held_out="gold", resamples=200)
    [base, full] = across.curves[0].points
    assert (base.nfe, full.nfe) == (2, 2 * count)
    assert full.scores == pytest.approx(curve.points[-1].scores)  # best-of-n of all n is the run's own answer


# Best of k -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-5, 5)), min_size=1, max_size=7), st.integers(1, 7))
def test_best_of_k_is_the_mean_over_all_subsets(samples, k):
    searched, other = map(list, zip(*samples, strict=True))
    if k > len(samples):
        with pytest.raises(UsageError, match="between 1"):
            best_of_k(searched, other, k)
        return
    wins = []
    for subset in itertools.combinations(range(len(samples)), k):
        top = max(searched[i] for i in subset)
        wins.append(np.mean([other[i] for i in subset if searched[i] == top]))
    # Equal scores: each of the group wins equally often over all subsets, though not within one.
    assert best_of_k(searched, other, k) == pytest.approx(np.mean(wins), abs=1e-9)


# Across runs ---------------------------------------------------------------------------------------------------------


def answered(prompt, budget, proxy, gold, seed=0, policy="beam", plain=(0.0, 0.0), picture=None, **more):
    scores = {"proxy": float(proxy), "gold": float(gold)}
    base = None if plain is None else Sample(10, dict(zip(("proxy", "gold"), plain, strict=True)))
    fields = {"model": "m", "verifier": "proxy"} | more
    return Search(f"{prompt}/{budget}", Condition(prompt), seed, policy=policy, budget=budget, answer=Sample(budget - 1, scores, picture), plain=base, **fields)


def rising_and_falling(prompts, seeds=1):
    rng = np.random.default_rng(0)
    return [
        answered(f"p{p}", budget, math.log2(budget) + rng.normal() / 5, gold + rng.normal() / 5, seed, plain=tuple(rng.normal(size=2)))
        for p in range(prompts) for seed in range(seeds) for budget, gold in ((40, 2.0), (160, 3.0), (640, 1.0))
    ]  # fmt: skip


def test_fall_from_the_peak_is_warned_of_with_its_size():
    report = hacking_report(rising_and_falling(10), held_out="gold")
    (curve,) = report.curves
    assert [point.budget for point in curve.points] == [10, 40, 160, 640]
    assert [round(point.nfe) for point in curve.points] == [10, 39, 159, 639]
    assert curve.peak == 160
    assert curve.warning.startswith("policy beam hacks proxy: from 160 to 640 NFE it rises by ")
    assert float(curve.warning.split("falls by ")[1].split()[0]) == pytest.approx(2.0, abs=0.4)
    assert curve.points[1].index is None  # one plain sample of each prompt has no spread
    for point in curve.points:
        for role, interval in point.intervals.items():
            assert interval.low <= point.scores[role] <= interval.high


def test_too_few_prompts_warn_of_nothing_and_say_so():
    report = hacking_report(rising_and_falling(4), held_out="gold")
    assert report.warnings == ()
    assert any("too few to warn" in line for line in report.notices)
    single = hacking_report(rising_and_falling(1), held_out="gold")
    assert single.curves[0].points[0].intervals == {}
    assert any("nothing to resample" in line for line in single.notices)
    seeded = hacking_report(rising_and_falling(1, seeds=9), held_out="gold")
    assert len(seeded.warnings) == 1
    assert seeded.curves[0].points[1].index is not None


def test_policies_have_curves_of_their_own():
    honest = [answered(f"p{p}", 100, 1.0, 1.0, policy="smc") for p in range(8)]
    report = hacking_report(rising_and_falling(8) + honest, held_out="gold")
    assert [curve.policy for curve in report.curves] == ["beam", "smc"]
    assert [curve.warning is None for curve in report.curves] == [False, True]
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["curves"][1]["points"][1]["scores"] == {"searched": 1.0, "held_out": 1.0}


def test_incomplete_pairs_are_left_out_and_counted():
    runs = rising_and_falling(9)
    report = hacking_report(runs[:-1], held_out="gold")
    assert report.curves[0].prompts == 8
    assert any("1 of 9 prompts and seeds" in line for line in report.notices)


def test_without_baselines_the_curve_begins_at_the_smallest_budget():
    runs = [answered(f"p{p}", budget, budget, 1.0, plain=None) for p in range(8) for budget in (20, 40)]
    report = hacking_report(runs, held_out="gold")
    assert [point.budget for point in report.curves[0].points] == [20, 40]
    assert any("no baseline" in line for line in report.notices)


def test_what_does_not_compare_is_refused():
    one = answered("p", 20, 1.0, 1.0)
    for complaint, runs in (
        ("different models", [one, answered("q", 20, 1.0, 1.0, model="other")]),
        ("different verifiers", [one, answered("q", 20, 1.0, 1.0, verifier="gold")]),
        ("two runs", [one, one]),
        ("no runs", []),
    ):
        with pytest.raises(UsageError, match=complaint):
            hacking_report(runs, held_out="gold")
    with pytest.raises(UsageError, match="hold one out"):
        hacking_report([one], held_out="proxy")
    with pytest.raises(UsageError, match="no picture of its answer"):
        hacking_report([one], held_out="luminance")
    with pytest.raises(UsageError, match="independent samples"):
        hacking_report([one], held_out="gold", within=True)
    with pytest.raises(UsageError, match="only answers have pictures"):
        hacking_report([record("p", [1, 2], [1, 2])], held_out="luminance", within=True)
    with pytest.raises(UsageError, match="fewer than two samples"):
        hacking_report([record("p", [1], [1])], held_out="gold", within=True)
    with pytest.raises(UsageError, match="confidence"):
        hacking_report([one], held_out="gold", confidence=0.0)


# Pictures ------------------------------------------------------------------------------------------------------------


def plain_picture(shade, size=8):
    from PIL import Image

    return Image.new("RGB", (size, size), (shade, shade, shade))


def test_a_verifier_of_pictures_scores_what_the_runs_did_not(tmp_path):
    """Luminance of a plain grey is its shade: answers from memory and from files, of different sizes, in several batches."""
    from tsdiff.treesearch.references import resolve_verifier

    shades = [int(shade) for shade in np.linspace(0, 255, 20)]
    runs = []
    for number, shade in enumerate(shades):
        picture = plain_picture(shade, 8 + number % 2)
        if number % 3 == 0:
            picture.save(tmp_path / f"{number}.png")
            picture = tmp_path / f"{number}.png"
        runs.append(answered(f"p{number:02d}", 40, 1.0, 1.0, picture=picture, plain=None))
    report = hacking_report(runs, held_out="luminance", oracle=resolve_verifier("target-color:color=black"))
    assert report.verifiers == {"searched": "proxy", "held_out": "luminance", "oracle": "target-color"}
    (point,) = report.curves[0].points
    assert point.scores["held_out"] == pytest.approx(np.mean(shades) / 255, abs=1e-6)
    assert point.scores["oracle"] == pytest.approx(-np.mean(np.square(np.array(shades) / 255)), abs=1e-6)
    with pytest.raises(UsageError, match=r"gaussian-value reads latents of a search.* name it with --verifier"):
        hacking_report(runs, held_out="gaussian-value")


def test_pictures_that_cannot_be_scored_are_counted():
    class Fussy:
        name, needs, scope, latency, judges, differentiable = "fussy", frozenset({"images"}), "row", "immediate", "any", False

        def prepare(self, device):
            pass

        def check(self, condition):
            pass

        def score(self, candidates):
            means = candidates.images.mean((1, 2, 3))
            return Scores([float(mean) if mean > 0.5 else math.nan for mean in means], reasons={i: "too dark" for i, mean in enumerate(means) if mean <= 0.5})

    runs = [answered(f"p{shade}", 40, 1.0, 1.0, picture=plain_picture(shade), plain=None) for shade in (0, 51, 204, 255)]
    report = hacking_report(runs, held_out=Fussy())
    (point,) = report.curves[0].points
    assert point.searches == 2
    assert point.scores["held_out"] == pytest.approx(0.9)
    assert any("fussy could not score 2 of 4 pictures: too dark" in line for line in report.notices)


def test_diversity_is_that_of_the_pictures_of_one_prompt():
    shades = {0: 10, 1: 10, 2: 250}
    runs = [answered(f"p{p}", 40, 1.0, 1.0, seed, picture=plain_picture(shade), plain=None) for p in range(3) for seed, shade in shades.items()]
    (point,) = hacking_report(runs, held_out="gold").curves[0].points
    # In [-1, 1] the shades point one way, and the other way: cosines 1, -1, -1.
    assert point.distance == pytest.approx(mean_distance([[-1.0], [-1.0], [1.0]])) == pytest.approx(4 / 3)
    assert point.vendi == pytest.approx(vendi_score([[-1.0], [-1.0], [1.0]])) == pytest.approx(1.0)
    assert point.pictures == 3
    assert {"distance", "vendi"} <= set(point.intervals)
    # Any function of images will do, and objects with a feature network.

    class Network:
        def image_features(self, images):
            dark = (images.mean((1, 2, 3)) < 0.5).double()
            import torch

            return torch.stack([dark, 1 - dark], dim=1)

    class Holder:
        name = "holder"
        network = Network()

    report = hacking_report(runs, held_out="gold", features=Holder())
    assert report.features == "holder"
    assert report.curves[0].points[0].distance == pytest.approx(2 / 3)
    assert report.curves[0].points[0].vendi == pytest.approx(3 / 4 ** (1 / 3))  # shares 2/3 and 1/3


def test_features_are_asked_of_what_has_them():
    assert feature_function("pixels", "cpu")[0] == "pixels"
    assert feature_function(len, "cpu")[0] == "len"
    for name in ("luminance", "human", "gaussian-target"):  # and nobody is asked whether there is a terminal
        with pytest.raises(UsageError, match=f"{name} has no features"):
            feature_function(name, "cpu")


FEATURES = [
    "clip:model={clip}",
    "clip:model={open_clip}",
    "clip:model={siglip}",
    "aesthetic:model={quick},head={head}",
    "clip-zero-shot:model={clip},classes=a,b,templates=a {{}}",
    "dino-classifier:model={classes}",
    "self-supervised:model={dino}",
    "path-stability:model={clip},features=clip",
]


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A checkpoint of each kind, and a head."""
    import tiny_clip
    import tiny_dino
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("networks")
    save_file({"weight": torch.ones(1, 16), "bias": torch.zeros(1)}, root / "head.safetensors")
    quick = tiny_clip.config(quick_gelu=True)
    return {
        "clip": tiny_clip.save_clip(root / "clip"),
        "open_clip": tiny_clip.save_open_clip(root / "open", tiny_clip.open_clip_module(tiny_clip.OPEN_CLIP), tiny_clip.OPEN_CLIP),
        "quick": tiny_clip.save_open_clip(root / "quick", tiny_clip.open_clip_module(quick), quick),
        "siglip": tiny_clip.save_siglip(root / "siglip"),
        "dino": tiny_dino.save_dino(root / "dino"),
        "classes": tiny_dino.save_dino(root / "classes", ("a", "b")),
        "head": root / "head.safetensors",
    }


@pytest.mark.parametrize("reference", FEATURES, ids=[reference.replace(":model=", "-").partition(",")[0] for reference in FEATURES])
def test_diversity_is_measured_by_any_verifier_with_features(networks, reference):
    """The distance is one minus the mean cosine of the network's own features, which tell pictures apart."""
    reference = reference.format(**networks)
    name, function = feature_function(reference, "cpu")
    assert name == reference.partition(":")[0]
    shades = {0: (250, 30, 30), 1: (20, 30, 250), 2: (40, 220, 60)}
    pictures = {seed: Image.new("RGB", (40, 32), colour) for seed, colour in shades.items()}
    runs = [answered(f"p{p}", 40, 1.0, 1.0, seed, picture=picture, plain=None) for p in range(2) for seed, picture in pictures.items()]
    (point,) = hacking_report(runs, held_out="gold", features=reference).curves[0].points
    features = function(torch.stack([pixels(picture) for picture in pictures.values()]))
    assert torch.allclose(features.norm(dim=1), torch.ones(3), atol=1e-5)
    cosines = features @ features.T
    expected = 1.0 - (cosines.sum() - 3.0).item() / 6.0
    assert expected > 1e-4, "or the network sees no colours and this test shows nothing"
    assert point.distance == pytest.approx(expected, abs=1e-5)
    assert 1.0 < point.vendi <= 3.0 + 1e-6


# Saved runs ----------------------------------------------------------------------------------------------------------


def test_run_folders_and_results_in_memory_are_the_same_records(tmp_path):
    options = {"policy": "best-of-n", "policy_options": {"n": 3}, "verifier": ["gaussian-target", "gaussian-log-density"], "steps": 3, "seed": (0, 1)}
    kept = tsdiff.search("gaussian", "near (1, 1)", **options)
    saved = tsdiff.search("gaussian", "near (1, 1)", out=tmp_path, **options)
    memory, disk, files = load_searches(kept), load_searches([tmp_path]), load_searches([result.path for result in saved])
    assert [one.source for one in disk] == [one.source for one in files]
    for one, other, result in zip(memory, disk, kept, strict=True):
        assert (one.condition.prompt, one.seed, one.model, one.policy, one.verifier, one.budget) == (
            other.condition.prompt, other.seed, other.model, other.policy, other.verifier, other.budget,
        )  # fmt: skip
        assert one.samples == other.samples
        assert len(one.samples) == 3
        assert sum(sample.nfe for sample in one.samples) == one.answer.nfe == result.ledger.nfe
        assert one.answer.scores == other.answer.scores == {name: value.score for name, value in result.scores.items()}
        assert one.plain.scores == other.plain.scores == one.samples[0].scores
        assert other.answer.picture.name == "best.png"
        assert other.plain.picture.name == "baseline.png"


def test_searches_that_choose_on_the_way_are_no_independent_samples():
    options = {"verifier": "gaussian-target", "steps": 4, "solver": "ddpm", "baseline": False}
    for policy, own in (("beam", {"width": 2, "branch": 2}), ("zero-order", {})):
        (one,) = load_searches([tsdiff.search("gaussian", "near (1, 1)", policy=policy, policy_options=own, **options)])
        assert one.samples == ()
        assert one.plain is None


def test_what_holds_no_run_is_named(tmp_path):
    with pytest.raises(UsageError, match="no run folder"):
        load_searches([tmp_path])
    result = tsdiff.search("gaussian", "near (1, 1)", policy="best-of-n", verifier="gaussian-target", steps=2, out=tmp_path)
    (result.path / "run.json").unlink()
    with pytest.raises(UsageError, match=r"is not a finished run: run\.json is missing"):
        load_searches([tmp_path])


def test_relative_scores_are_refused():
    class Ranks:
        name, needs, scope, latency, judges, differentiable = "ranks", frozenset({"x0"}), "set", "immediate", "any", False

        def prepare(self, device):
            pass

        def check(self, condition):
            pass

        def score(self, candidates):
            return Scores([float(row) for row in range(len(candidates))])

    result = tsdiff.search("gaussian", "near (1, 1)", policy="best-of-n", verifier=Ranks(), steps=2, baseline=False)
    with pytest.raises(UsageError, match="relative"):
        load_searches([result])


def test_hacking_plot_is_a_picture(tmp_path):
    from PIL import Image

    report = hacking_report(rising_and_falling(8), held_out="gold")
    with Image.open(report.plot(tmp_path / "plot.png")) as picture:
        assert picture.size == (1020, 510)
