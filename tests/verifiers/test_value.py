"""Learned values: held against the exact value of the analytic world, their folders, their manners, whole searches."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from value_runs import candidates, save_runs, synthetic

import tsdiff
from tsdiff.cli.value_examples import find_runs, read_examples
from tsdiff.plugin.conformance import ExampleCandidates, VerifierConformance
from tsdiff.treesearch import registry
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Condition
from tsdiff.treesearch.references import resolve_verifier
from tsdiff.treesearch.schedule import Schedule
from tsdiff.verifiers import value_fit
from tsdiff.verifiers.value import NOISIER, NOT_FINITE, Value
from tsdiff.verifiers.value_fit import fit, spearman
from tsdiff.verifiers.value_folder import ValueConfig, read_config
from tsdiff.verifiers.value_network import prompt_features, unit_latents, words_of
from tsdiff.worlds.gaussian.model import GaussianModel
from tsdiff.worlds.gaussian.presets import preset
from tsdiff.worlds.gaussian.verifiers import SoftValue

STEPS = 120
LAST = 6


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Runs to fit to, and others with seeds of their own."""
    root = tmp_path_factory.mktemp("value")
    save_runs(root / "runs", seeds=range(12))
    save_runs(root / "fresh", seeds=range(1000, 1003))
    return root


@pytest.fixture(scope="module")
def fits(home):
    """For each input the examples, the fit, and the folder that it was written to."""
    runs = find_runs([home / "runs"])
    made = {}
    for kind in ("x0", "latent"):
        examples = read_examples(runs, verifier="gaussian-target", target="mean", input=kind)
        done = fit(examples, steps=STEPS, width=32)
        done.write(home / kind)
        made[kind] = examples, done, home / kind
    return made


@pytest.fixture(scope="module")
def folders(fits):
    """A fitted value for each input."""
    return {kind: folder for kind, (_, _, folder) in fits.items()}


@pytest.fixture(scope="module")
def fresh(home):
    """Nodes of trees that no fit has seen."""
    runs = find_runs([home / "fresh"])
    read = {kind: read_examples(runs, verifier="gaussian-target", target="mean", input=kind) for kind in ("x0", "latent")}
    assert read["x0"].places == read["latent"].places
    return candidates([run.tree for run in runs], read["x0"].places, read["x0"].levels, x0=read["x0"].inputs, latents=read["latent"].inputs)


def prepared(folder, **options):
    verifier = Value(path=str(folder), **options)
    verifier.prepare("cpu")
    return verifier


def some(batch, rows):
    rows = list(rows)
    lists = {name: [getattr(batch, name)[row] for row in rows] for name in ("levels", "schedules", "conditions")}
    return SimpleNamespace(x0=batch.x0[rows], latents=batch.latents[rows], **lists)


def mixed(count=24):
    """Rows of all levels, two prompts and a class, on the schedule of the fits."""
    model = GaussianModel(preset("rare-mode").mixture)
    schedule = model.schedule(model.solver("exact"), LAST, None)
    generator = torch.Generator().manual_seed(5)
    conditions = [Condition("near (3, 2.4)"), Condition("near (1, -2) somewhere"), Condition("", class_label=2)]
    x0, latents = (torch.randn((count, 2), generator=generator) for _ in range(2))
    return SimpleNamespace(
        x0=x0, latents=latents, levels=[row % (LAST + 1) for row in range(count)], schedules=[schedule] * count,
        conditions=[conditions[row % 3] for row in range(count)],
    )  # fmt: skip


# Right values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["x0", "latent"])
def test_it_ranks_nodes_of_unseen_trees_like_the_exact_value(folders, fresh, kind):
    """E[r(x0) | x] is known in closed form; at every level from pure noise to clean the ranks agree to 0.95 and more.

    A fit to one continuation of each node knows only a noisy target: its own rank correlation with that at the third level
    is below 0.7, and the exact value's is no better.
    """
    exact = SoftValue(temperature=0.0).score(fresh).values.tolist()
    learned = prepared(folders[kind]).score(fresh).values.tolist()
    for level in range(LAST + 1):
        rows = [row for row, own in enumerate(fresh.levels) if own == level]
        assert len(rows) == 72
        assert spearman([learned[row] for row in rows], [exact[row] for row in rows]) > 0.95, level


def test_held_out_correlations_are_what_scoring_the_held_out_trees_gives(fits):
    """The report is honest: the written folder gives the same numbers for the trees that the split left out."""
    examples, done, folder = fits["x0"]
    held_out = read_config(folder).held_out
    assert (done.split, done.counts) == ("tree", {"fitted": 8, "stopping": 2, "held_out": 2})
    assert [(row["level"], row["of"], row["nodes"], row["prompts"]) for row in held_out] == [(level, LAST, 48, 1) for level in range(LAST + 1)]
    assert held_out[-1]["within"] > 0.97, "of a finished sample the score is a function"
    assert held_out[0]["within"] < held_out[-1]["within"]
    _, parts = value_fit._split(examples, 0)
    rows = [row for row in parts["held_out"].tolist() if examples.levels[row] == 4]
    batch = candidates(examples.trees, [examples.places[row] for row in rows], [4] * len(rows), x0=examples.inputs[rows], latents=None)
    rank = spearman(prepared(folder).score(batch).values.tolist(), [examples.scores[row] for row in rows])
    assert rank == pytest.approx(held_out[4]["pooled"], abs=1e-3)
    assert rank == pytest.approx(held_out[4]["within"], abs=1e-3), "one prompt: the same nodes"


def test_no_tree_is_in_two_parts_and_prompts_are_held_out_where_there_are_enough():
    prompts = [f"near ({i}, {i})" for i in range(6)]
    examples = synthetic((2,), 24, prompts, lambda latents, prompt: latents[0])
    split, parts = value_fit._split(examples, 3)
    assert split == "prompt"
    conditions = [{examples.trees[examples.places[row]].condition.prompt for row in rows.tolist()} for rows in parts.values()]
    assert sum(map(len, conditions)) == len(set().union(*conditions)) == 6
    few = synthetic((2,), 24, prompts[:2], lambda latents, prompt: latents[0])
    for tree in few.trees:
        tree.seed //= 4  # trees of one prompt and seed share their noise
    split, parts = value_fit._split(few, 3)
    assert split == "tree"
    seeds = [{(few.trees[few.places[row]].condition.prompt, few.trees[few.places[row]].seed) for row in rows.tolist()} for rows in parts.values()]
    assert sum(map(len, seeds)) == len(set().union(*seeds))
    assert sorted(row for rows in parts.values() for row in rows.tolist()) == list(range(24 * 8))


def halves(count=200):
    """Noisy pictures whose two halves have a brightness each; a prompt names the half whose brightness is the score."""
    examples = synthetic((2, 4, 4), count, ["bright on the left", "bright on the right"], lambda latents, prompt: 0.0)
    brightness = torch.randn((count * 8, 2), generator=torch.Generator().manual_seed(9))
    examples.inputs = 0.5 * examples.inputs
    examples.inputs[:, 0] += brightness.repeat_interleave(2, 1)[:, None]
    examples.scores = [float(brightness[row, place % 2]) for row, place in enumerate(examples.places)]
    return examples


def test_images_and_prompts(tmp_path):
    """Place and words are both learned, as trees that were held out show; the other prompt's value is another."""
    examples = halves()
    done = fit(examples, steps=150, width=16)
    assert {"left", "right", "the left"} <= set(done.config.words)
    assert [row["prompts"] for row in done.config.held_out] == [2, 2]
    assert all(row["within"] > 0.85 for row in done.config.held_out), done.config.held_out
    done.write(tmp_path / "v")
    verifier, places, levels = prepared(tmp_path / "v"), examples.places[:24], examples.levels[:24]

    def values(rows, shift=0):
        batch = candidates(examples.trees, [places[row] + shift for row in rows], [levels[row] for row in rows], x0=examples.inputs[rows], latents=None)
        return verifier.score(batch).values

    together = values(range(24))
    assert torch.allclose(together, torch.cat([values([row]) for row in range(24)]), atol=1e-5, rtol=0)
    other = [examples.scores[row] for row in range(24)]
    assert spearman(values(range(24), shift=1).tolist(), other) < 0.7, "the prompt decides which half"


# Rows, gradients, bad numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["x0", "latent"])
def test_a_value_does_not_depend_on_its_batch(folders, kind):
    verifier, batch = prepared(folders[kind]), mixed()
    together = verifier.score(batch).values
    assert together.isfinite().all()
    alone = torch.cat([verifier.score(some(batch, [row])).values for row in range(24)])
    scale = float(verifier._network.score_std)
    assert torch.allclose(together / scale, alone / scale, atol=1e-5, rtol=0)
    backwards = verifier.score(some(batch, range(23, -1, -1))).values.flip(0)
    assert torch.allclose(together / scale, backwards / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["x0", "latent"])
def test_gradients_are_those_of_finite_differences(folders, kind):
    verifier, batch = prepared(folders[kind]), mixed(7)
    verifier._network.double()
    name = "x0" if kind == "x0" else "latents"
    points = getattr(batch, name).double().requires_grad_()
    setattr(batch, name, points)
    (gradient,) = torch.autograd.grad(verifier.score(batch).values.sum(), points)
    step = 1e-6
    for axis in range(2):
        shift = torch.zeros(2, dtype=torch.float64)
        shift[axis] = step
        sides = []
        for sign in (1.0, -1.0):
            setattr(batch, name, points.detach() + sign * shift)
            sides.append(verifier.score(batch).values)
        assert torch.allclose((sides[0] - sides[1]) / (2.0 * step), gradient[:, axis], rtol=1e-5, atol=1e-5)
    assert gradient.abs().min() > 0.0


def test_rows_that_cannot_be_valued_fail_alone(folders):
    verifier, batch = prepared(folders["x0"]), mixed(4)
    fine = verifier.score(batch).values
    batch.x0[1, 0] = math.nan
    batch.x0[2, 1] = math.inf
    scores = verifier.score(batch)
    assert scores.values.isnan().tolist() == [False, True, True, False]
    assert torch.allclose(scores.values[[0, 3]], fine[[0, 3]])
    assert scores.reasons == {1: NOT_FINITE, 2: NOT_FINITE}


def test_a_level_noisier_than_the_fit_has_no_value(folders):
    verifier, batch = prepared(folders["x0"]), mixed(3)
    alpha, sigma = (1e-3, *batch.schedules[0].alpha[1:]), (1.0, *batch.schedules[0].sigma[1:])
    batch.schedules = [dataclasses.replace(batch.schedules[0], alpha=alpha, sigma=sigma)] * 3
    scores = verifier.score(batch)
    assert scores.reasons == {0: NOISIER}
    assert scores.values.isnan().tolist() == [True, False, False]


def test_unknown_words_say_nothing_and_numbers_count(folders):
    verifier, batch = prepared(folders["x0"]), mixed(3)
    batch.x0 = batch.x0[:1].expand(3, 2)
    batch.levels = [3, 3, 3]
    batch.conditions = [Condition("near (3, 2.4)"), Condition("near (3, 2.4) unheardof"), Condition("near (9, 9)")]
    values = verifier.score(batch).values.tolist()
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert words_of(Condition("A red Cube", "red", 7)) == ["a", "red", "cube", "a red", "red cube", "-red", "class:7"]
    features = prompt_features([Condition("red 3 -2.5e1 cube"), Condition("")], ["cube", "red", "red cube"])
    root = 3**-0.5
    assert features.tolist() == [pytest.approx([root, root, root, 3.0, -25.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]), [0.0] * 11]


def test_latents_are_scaled_by_their_levels():
    schedule = Schedule("euler", "ve", (1.0,), (1.0, 1.0), (7.0, 0.0), ((1.0, 7.0), (1.0, 0.0)), 1.0)
    latents = torch.ones(2, 3)
    assert torch.allclose(unit_latents(latents, [schedule] * 2, [0, 1]), torch.tensor([[50.0**-0.5], [1.0]]).expand(2, 3))


class TestConformance(VerifierConformance):
    """What every verifier keeps to."""

    @pytest.fixture
    def verifier(self, folders):
        return Value(path=str(folders["latent"]))

    @pytest.fixture
    def candidates(self):
        return ExampleCandidates.random(["near (3, 2.4)", "near (0, 0)", "", "elsewhere"], latent_shape=(2,))


# Folders -------------------------------------------------------------------------------------------------------------


def made(seed=0, **options):
    return fit(synthetic((2,), 8, ["near (1, 1)"], lambda latents, prompt: latents[0]), steps=20, width=8, seed=seed, **options)


def test_equal_seeds_give_equal_bytes(tmp_path):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    made().write(tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    torch.rand(3)
    made().write(tmp_path / "b")
    made(seed=1).write(tmp_path / "c")
    for name in ("value.json", "value.safetensors"):
        first, second, third = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert first == second
        assert first != third
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["value.json", "value.safetensors"]


def test_the_folder_says_what_it_is(folders):
    config = read_config(folders["latent"])
    model = GaussianModel(preset("rare-mode").mixture)
    schedule = model.schedule(model.solver("exact"), LAST, None)
    assert (config.input, config.target, config.verifier, config.model) == ("latent", "mean", "gaussian-target", "gaussian")
    assert (config.fingerprint, config.latent_shape, config.schedule_kind) == (model.fingerprint, (2,), "ddim")
    assert config.levels == {schedule.key: tuple(range(LAST + 1))}
    assert config.log_snr == pytest.approx((schedule.log_snr(0), 15.0))
    assert json.loads((folders["latent"] / "value.json").read_text()) == json.loads(json.dumps(config.to_json()))
    verifier = Value(path=str(folders["latent"]))
    assert verifier.name == "value(gaussian-target)"
    assert verifier.needs == {"latents", "levels", "conditions"}
    assert Value(path=str(folders["x0"])).needs == {"x0", "levels", "conditions"}


def test_it_is_made_without_torch(folders):
    code = f"import sys; from tsdiff.verifiers import value; v = value.Value(path={str(folders['x0'])!r}); print(v.name, 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "value(gaussian-target) False"


def test_references(folders, monkeypatch):
    monkeypatch.setitem(registry.verifiers._added, "value", Value)
    assert resolve_verifier(f"value:{folders['x0']}") == Value(path=str(folders["x0"]))
    assert resolve_verifier(f"value:path={folders['x0']},name=early").name == "early"
    with pytest.raises(UsageError, match="the folder is missing"):
        resolve_verifier("value")
    with pytest.raises(UsageError, match="holds no learned value"):
        resolve_verifier("value:nowhere")


def test_another_model_shape_or_kind_is_refused_by_name(folders):
    verifier, batch = prepared(folders["x0"]), mixed(2)
    own = verifier.config
    verifier.require_model(own.fingerprint, (2,), "ddim")
    for given, hint in [
        (("other", (2,), "ddim"), r"value\(gaussian-target\) was fitted to the model 'gaussian' .*other weights \(other\)"),
        ((own.fingerprint, (4, 8, 8), "ddim"), r"latents of shape \(2,\), but these are \(4, 8, 8\)"),
        ((own.fingerprint, (2,), "flow"), "a schedule of kind ddim, but these are flow"),
    ]:
        with pytest.raises(UsageError, match=hint):
            verifier.require_model(*given)
    batch.schedules = [dataclasses.replace(batch.schedules[0], kind="flow")] * 2
    with pytest.raises(UsageError, match="a schedule of kind ddim, but these are flow"):
        verifier.score(batch)
    batch.x0 = torch.zeros(2, 4, 8, 8)
    with pytest.raises(UsageError, match=r"latents of shape \(2,\), but these are \(4, 8, 8\)"):
        verifier.score(batch)


def broken(change):
    def apply(folder):
        data = json.loads((folder / "value.json").read_text())
        change(data)
        (folder / "value.json").write_text(json.dumps(data))

    return apply


@pytest.mark.parametrize(
    ("damage", "hint"),
    [
        (lambda folder: (folder / "value.json").unlink(), "there is no value.json"),
        (lambda folder: (folder / "value.safetensors").unlink(), "there is no value.safetensors"),
        (lambda folder: (folder / "value.json").write_text("{"), "not strict JSON"),
        (lambda folder: (folder / "value.json").write_text('{"format": NaN}'), "NaN is not allowed"),
        (lambda folder: (folder / "value.json").write_text("[]"), "no JSON object"),
        (broken(lambda data: data.update(format=2)), "has format 2, but this tsdiff reads format 1"),
        (broken(lambda data: data.update(extra=1)), "unknown: extra"),
        (broken(lambda data: data.pop("words")), "missing: words"),
        (broken(lambda data: data.update(input="pixels")), "input is 'pixels'"),
        (broken(lambda data: data.update(latent_shape=[2, 2])), "out of range"),
        (broken(lambda data: data.update(width="64")), "width is '64'"),
    ],
)
def test_damaged_folders_are_refused_when_the_verifier_is_made(tmp_path, damage, hint):
    made().write(tmp_path / "v")
    damage(tmp_path / "v")
    with pytest.raises(UsageError, match=hint):
        Value(path=str(tmp_path / "v"))


def test_weights_of_another_value_are_refused_when_they_load(tmp_path):
    made().write(tmp_path / "v")
    made(seed=1).write(tmp_path / "w")
    (tmp_path / "v/value.safetensors").write_bytes((tmp_path / "w/value.safetensors").read_bytes())
    with pytest.raises(UsageError, match="belongs to another value"):
        prepared(tmp_path / "v")
    broken(lambda data: data.update(width=16))(tmp_path / "w")
    with pytest.raises(UsageError, match="are not those of this network"):
        prepared(tmp_path / "w")
    with pytest.raises(UsageError, match="is not empty; nothing is ever overwritten"):
        made().write(tmp_path / "v")


def test_a_config_survives_the_disk(tmp_path):
    config = made().write(tmp_path / "v")
    assert read_config(tmp_path / "v") == config
    assert {field.name for field in dataclasses.fields(ValueConfig)} | {"format"} == set(json.loads((tmp_path / "v/value.json").read_text()))


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"scores": [1.0] * 64}, "all scores under made are 1, so there is nothing to learn"),
        ({"places": [0] * 64}, "only one tree has scored samples"),
        ({"scores": [math.inf, *range(63)]}, "a score is not finite"),
        ({"inputs": torch.full((64, 2), math.nan)}, "not finite"),
        ({"places": [], "levels": [], "scores": [], "inputs": torch.zeros(0, 2)}, "nothing to fit a value to"),
    ],
)
def test_examples_that_cannot_be_fitted_to(change, hint):
    examples = synthetic((2,), 8, ["near (1, 1)"], lambda latents, prompt: latents[0])
    vars(examples).update(change)
    with pytest.raises(UsageError, match=hint):
        fit(examples, steps=2, width=8)


def test_trees_of_one_prompt_and_seed_cannot_be_held_out():
    examples = synthetic((2,), 8, ["near (1, 1)"], lambda latents, prompt: latents[0])
    for tree in examples.trees:
        tree.seed = 0
    with pytest.raises(UsageError, match="one prompt and one seed"):
        fit(examples, steps=2, width=8)
    with pytest.raises(UsageError, match="multiple of 8"):
        fit(examples, width=12)


# Whole searches ------------------------------------------------------------------------------------------------------


def test_a_search_steered_by_it_decodes_nothing_before_the_end(folders):
    """The one decode is the answer's picture; the real verifier agrees that the search has helped."""
    value = Value(path=str(folders["x0"]))
    results = tsdiff.search("gaussian", ["near (3, 2.4)"], policy="beam", verifier=[value, "gaussian-target"], steps=LAST, seed=range(50, 58))
    for result in results:
        assert result.ledger.decodes == 1
        assert result.complete
        scored = [node for node in result.tree.nodes if value.name in node.values]
        assert result.ledger.verifier_calls[value.name] == len(scored) > 4
        assert any(node.level < LAST for node in scored), "nodes on the way"
        assert all(node.score(value.name) is not None for node in scored)
    gains = [result.node.score("gaussian-target") - result.baseline.node.score("gaussian-target") for result in results]
    assert sum(gain > 0.0 for gain in gains) >= 7


def test_a_search_with_another_latent_shape_is_refused(tmp_path):
    """A value of pictures, asked about points."""
    fit(synthetic((1, 8, 8), 8, ["near (1, 1)"], lambda latents, prompt: latents.mean()), steps=2, width=8).write(tmp_path / "v")
    with pytest.raises(UsageError, match=r"was fitted to latents of shape \(1, 8, 8\), but these are \(2,\)"):
        tsdiff.search("gaussian", "near (3, 2.4)", policy="best-of-n", policy_options={"n": 2}, verifier=Value(path=str(tmp_path / "v")), steps=3)


def test_a_search_of_another_model_is_refused(folders, tmp_path):
    """The engine asks before anything is denoised or written, in an ensemble too; the shape of latents alone would not tell."""
    from tsdiff.worlds.gaussian.mixture import Mixture

    folder = folders["x0"]
    other = GaussianModel(Mixture(weights=(1.0,), means=((0.0, 0.0),), stds=(1.0,)))
    for verifiers, ensemble in ((f"value:{folder}", None), ([f"value:{folder}", "gaussian-target"], "weighted")):
        with pytest.raises(UsageError, match="other weights"):
            tsdiff.search(other, "near (1, 1)", policy="best-of-n", verifier=verifiers, ensemble=ensemble, steps=4, out=tmp_path / "runs")
        assert not (tmp_path / "runs").exists()
    (tmp_path / "runs").mkdir()
    with pytest.raises(UsageError, match="other weights"):
        tsdiff.search(other, "near (1, 1)", policy="best-of-n", verifier=f"value:{folder}", steps=4, out=tmp_path / "runs")
    assert list(tmp_path.iterdir()) == [tmp_path / "runs"], "a folder that was there stays, and nothing is in it"
    assert not list((tmp_path / "runs").iterdir())
