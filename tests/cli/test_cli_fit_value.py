"""`tsdiff fit-value`: from saved runs to a verifier, what it prints and draws, and what it refuses."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from value_runs import Trajectories, save_runs

import tsdiff
from tsdiff.bench import plots
from tsdiff.cli import value_examples
from tsdiff.cli.value_examples import find_runs, outcomes, read_examples
from tsdiff.treesearch import registry
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import LoadOptions, Scores
from tsdiff.treesearch.savedtree import SavedTree
from tsdiff.verifiers.value import Value

FEW = ("--steps", "30", "--width", "8")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The verifier under its name, whether or not the installed package lists it."""
    monkeypatch.setitem(registry.verifiers._added, "value", Value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two prompts under two seeds, with two verifiers."""
    folder = tmp_path_factory.mktemp("saved") / "runs"
    save_runs(folder, prompts=("near (3, 2.4)", "near (0, 0)"), seeds=range(2), n=6, steps=3, verifier=["gaussian-target", "gaussian-log-density"])
    return folder


@pytest.fixture
def runs(saved, tmp_path):
    """A copy that may be damaged."""
    shutil.copytree(saved, tmp_path / "runs")
    return tmp_path / "runs"


def facts(shown):
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in shown.split("\n\n")[0].splitlines())


def folders(runs):
    return sorted(file.parent for file in runs.rglob("tree.json"))


# What it makes -------------------------------------------------------------------------------------------------------


def test_a_value_is_fitted_printed_drawn_and_used(tsdiff, runs, tmp_path):
    result = tsdiff("fit-value", runs, "--out", "early", "--plot", "ranks.png", *FEW)
    assert result.exit_code == 0, result.stderr
    shown = facts(result.stdout)
    assert shown["use"] == "--verifier value:early"
    assert shown["learned"] == "mean gaussian-target from x0, 96 nodes"
    assert re.fullmatch(r"2 fitted to, 1 to stop by, 1 held out \(by tree\)", shown["trees"])
    table = result.stdout.split("\n\n")[1].splitlines()
    assert table[1].split() == ["level", "of", "log-SNR", "nodes", "prompts", "within", "prompts", "pooled"]
    assert [line.split()[:2] for line in table[2:]] == [[str(level), "3"] for level in range(4)]
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
    searched = tsdiff("search", "near (2, 2)", "--policy", "beam", "--steps", "3", "--verifier", "value:early", "--verifier", "gaussian-target", "--json", "--quiet")
    assert searched.exit_code == 0, searched.stderr
    answer = json.loads(searched.stdout)
    assert answer["verifier"] == "value(gaussian-target)"
    assert answer["decodes"] == 1, "the answer's"
    assert set(answer["scores"]) == {"value(gaussian-target)", "gaussian-target"}


def test_json_tells_the_same(tsdiff, runs, tmp_path):
    arguments = ("fit-value", runs, "--input", "latent", "--target", "best", "--target-verifier", "gaussian-log-density", "--seed", "4", "--json", *FEW)
    result = tsdiff(*arguments)
    assert (result.exit_code, result.stderr) == (0, ""), result.stderr
    document = json.loads(result.stdout)
    config = json.loads((tmp_path / "value/value.json").read_text())
    for name in ("verifier", "target", "input", "model", "fingerprint", "held_out"):
        assert document[name] == config[name]
    assert (document["verifier"], document["target"], document["input"], config["seed"]) == ("gaussian-log-density", "best", "latent", 4)
    assert document["trees"] == {"fitted": 2, "stopping": 1, "held_out": 1}
    again = tsdiff(*arguments, "--out", "again")
    assert json.loads(again.stdout) == document | {"value": "again"}
    assert (tmp_path / "again/value.safetensors").read_bytes() == (tmp_path / "value/value.safetensors").read_bytes()


def test_a_run_that_is_named_twice_counts_once(saved):
    runs = find_runs([saved, *folders(saved), saved / "run-0001"])
    assert len(runs) == 4
    assert [(run.prompt, run.seed) for run in runs] == [(prompt, seed) for prompt in ("near (3, 2.4)", "near (0, 0)") for seed in (0, 1)]


# From trees to examples ----------------------------------------------------------------------------------------------


class Witness:
    """Keeps what the engine shows of every node."""

    name, scope, latency, judges, differentiable = "witness", "row", "immediate", "any", False
    needs = frozenset({"x0", "latents", "levels", "node_ids"})

    def __init__(self):
        self.x0, self.latents = {}, {}

    def prepare(self, device):
        pass

    def check(self, condition):
        pass

    def score(self, candidates):
        for row, name in enumerate(candidates.node_ids):
            self.x0[name], self.latents[name] = candidates.x0[row].clone(), candidates.latents[row].clone()
        return Scores(candidates.x0.sum(1))


class Watched(Trajectories):
    """Every node is scored, the ones on the way too."""

    def search(self, tree):
        inner = super().search(tree)
        reply = None
        try:
            while True:
                reply = yield inner.send(reply)
                from tsdiff.treesearch.requests import Score

                if isinstance(reply, list) and reply and hasattr(reply[0], "level"):
                    yield Score([node for node in tree.nodes if node.status == "open"])
        except StopIteration as ended:
            return ended.value


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("gaussian", {"solver": "ddpm"}),
        ("gaussian:process=flow", {"solver": "flow-euler"}),
        ("gaussian", {"solver": "ddim", "eta": 0.5, "class_label": 1, "guidance_scale": 3.0, "guidance_rescale": 0.4, "guidance_interval": (0.5, 4.0)}),
    ],
)
def test_clean_estimates_are_the_ones_that_the_search_had(tmp_path, model, options):
    """Solver, class, guidance, its interval and its rescaling included."""
    witness = Witness()
    tsdiff.search(model, "near (3, 2.4)", policy=Watched(n=5), verifier=witness, steps=4, out=tmp_path / "runs", baseline=False, **options)
    runs = find_runs([tmp_path / "runs"])
    for kind, seen in (("x0", witness.x0), ("latent", witness.latents)):
        examples = read_examples(runs, verifier="witness", target="mean", input=kind)
        assert examples.inputs.shape == (25, 2)
        ids = [f"{node.id:032x}" for node in runs[0].nodes]
        assert torch.allclose(examples.inputs, torch.stack([seen[name] for name in ids]).float(), atol=1e-6)


def test_the_model_is_loaded_as_it_was_for_the_runs(tmp_path, monkeypatch):
    for name, options in (("one", {"dtype": "fp32"}), ("two", {"dtype": "fp32"}), ("other", {"revision": "main"})):
        tsdiff.search("gaussian", "near (3, 2.4)", verifier="gaussian-target", policy="best-of-n", policy_options={"n": 2}, steps=3, out=tmp_path / name, **options)
    asked = []
    resolve = value_examples.resolve_model
    monkeypatch.setattr(value_examples, "resolve_model", lambda name, options: asked.append(options) or resolve(name, options))
    read_examples(find_runs([tmp_path / "one", tmp_path / "two"]), verifier="gaussian-target", target="mean", input="latent", device="cpu")
    assert asked == [LoadOptions(device="cpu", dtype="float32")]
    with pytest.raises(UsageError, match="made with different weights or number formats"):
        read_examples(find_runs([tmp_path / "one", tmp_path / "other"]), verifier="gaussian-target", target="mean", input="latent", device="cpu")


def tree(*nodes):
    """(parent, move, level, score), in the order of their indices; the last level is 4."""
    made = SavedTree({"verifier": "v"}, last=4)
    for i, (parent, kind, level, score) in enumerate(nodes):
        data = {"index": i, "id": "0", "stream": "0", "parent": parent, "move": {"kind": kind, "levels": [level], "copy": 0}, "level": level, "draft": False}
        valued = [] if score is None else [{"effect": "valued", "node": i, "key": "v", "value": {"score": score}}]
        made.apply({"request": {}, "nodes": [data], "effects": valued, "ledger": made.ledger})
    return made


def test_outcomes_of_a_tree():
    """Means and bests over what came of a node; a clean sample keeps its own; neighbours and scores on the way do not count."""
    searched = tree(
        (None, "draw", 0, None),
        (0, "denoise", 2, 99.0),  # 1: the score of an estimate
        (1, "denoise", 4, 1.0),  # 2
        (1, "renoise", 1, None),  # 3: a copy, re-noised
        (3, "denoise", 4, 4.0),  # 4
        (4, "renoise", 2, None),  # 5: from a clean sample
        (5, "denoise", 4, 7.0),  # 6
        (0, "perturb", 0, None),  # 7: a neighbour
        (7, "denoise", 4, 9.0),  # 8
        (0, "denoise", 4, None),  # 9: without a score
    )
    assert outcomes(searched, "v", "mean") == {0: 2.5, 1: 2.5, 2: 1.0, 3: 4.0, 4: 4.0, 5: 7.0, 6: 7.0, 7: 9.0, 8: 9.0}
    assert outcomes(searched, "v", "best") == {0: 4.0, 1: 4.0, 2: 1.0, 3: 4.0, 4: 4.0, 5: 7.0, 6: 7.0, 7: 9.0, 8: 9.0}
    searched.nodes[4].draft = True
    searched.nodes[8].status = "failed"
    assert outcomes(searched, "v", "mean") == {0: 1.0, 1: 1.0, 2: 1.0, 5: 7.0, 6: 7.0}


# What it refuses -----------------------------------------------------------------------------------------------------


def edit(folder, name, change):
    data = json.loads((folder / name).read_text())
    change(data)
    (folder / name).write_text(json.dumps(data))


def unscored(data):
    for node in data["nodes"]:
        node["values"] = {}


def infinite(data):
    data["nodes"][-1]["values"] = {"gaussian-target": {"score": float("inf")}}


def reshape(folder, make):
    latents = load_file(folder / "latents.safetensors")
    save_file({name: make(name, tensor) for name, tensor in latents.items()}, folder / "latents.safetensors")


def only_one(runs):
    for folder in folders(runs)[1:]:
        shutil.rmtree(folder)


def of_one_seed(runs):
    for folder in folders(runs):
        edit(folder, "tree.json", lambda data: data.update(seed=0, prompt="near (0, 0)"))


@pytest.mark.parametrize(
    ("damage", "arguments", "hint"),
    [
        (lambda runs: shutil.rmtree(runs), (), "'runs' holds no saved tree (tree.json)"),
        (lambda runs: [edit(folder, "tree.json", unscored) for folder in folders(runs)], (), "no finished sample of 4 trees has a score"),
        (only_one, (), "only one tree has scored samples"),
        (of_one_seed, (), "all trees are of one prompt and one seed"),
        (lambda runs: reshape(folders(runs)[2], lambda name, tensor: torch.zeros(3)), ("--input", "latent"), "has latents of shape (3,), the runs before it (2,)"),
        (lambda runs: reshape(folders(runs)[1], lambda name, tensor: tensor * float("nan")), (), "holds numbers that are not finite; leave that run out"),
        (lambda runs: reshape(folders(runs)[1], lambda name, tensor: tensor.new_zeros(2 + (name == "node/3"))), (), "holds latents of different shapes"),
        (lambda runs: (folders(runs)[0] / "latents.safetensors").unlink(), (), "has no latents.safetensors"),
        (lambda runs: (folders(runs)[0] / "latents.safetensors").write_bytes(b"no"), (), "latents.safetensors' cannot be read"),
        (lambda runs: (folders(runs)[0] / "run.json").unlink(), (), "run.json is missing"),
        (lambda runs: (folders(runs)[0] / "tree.json").write_text("{"), (), "cannot be read"),
        (lambda runs: edit(folders(runs)[0], "tree.json", lambda data: data.pop("schedule")), (), "cannot be read (KeyError"),
        (lambda runs: edit(folders(runs)[0], "tree.json", infinite), (), "Infinity is not strict JSON"),
        (lambda runs: edit(folders(runs)[0], "run.json", lambda data: data["options"].update(model="gaussian:process=ve")), (), "the runs are of the models gaussian and gaussian:process=ve"),
        (lambda runs: edit(folders(runs)[0], "tree.json", lambda data: data["schedule"].update(kind="flow")), (), "schedules of the kinds ddim and flow"),
        (lambda runs: edit(folders(runs)[0], "tree.json", lambda data: data["schedule"].update(key="other")), (), "has another schedule than the run"),
        (lambda runs: edit(folders(runs)[0], "tree.json", lambda data: data.update(verifier="other")), (), "steered by gaussian-target and other; say which"),
        (lambda runs: None, ("--target-verifier", "luminance"), "no finished sample has a score under 'luminance'; --target-verifier may be gaussian-log-density or gaussian-target"),
        (lambda runs: None, ("--out", "runs"), "--out runs is there already; nothing is ever overwritten"),
        (lambda runs: None, ("--width", "12"), "--width is 12 but must be a multiple of 8"),
        (lambda runs: None, ("--plot", "ranks.doc"), "plot 'ranks.doc' must end in .png, .pdf, .svg"),
        (lambda runs: None, ("--plot", "nowhere/ranks.png"), "the folder 'nowhere' does not exist; make it first"),
        (lambda runs: None, ("--target", "worst"), "'worst' is not one of"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tsdiff, runs, tmp_path, damage, arguments, hint):
    damage(runs)
    result = tsdiff("fit-value", "runs", "--steps", "2", *(("--width", "8") if "--width" not in arguments else ()), *arguments)
    assert result.exit_code == 2, result.output
    assert (result.stdout, len(result.stderr.splitlines())) == ("", 1)
    assert hint in result.stderr
    assert {entry.name for entry in tmp_path.iterdir()} <= {"runs"}


def test_matplotlib_is_asked_for_only_to_draw(tsdiff, runs, monkeypatch):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    refused = tsdiff("fit-value", "runs", "--plot", "ranks.png", *FEW)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "plots need matplotlib, which is not installed" in refused.stderr
    assert tsdiff("fit-value", "runs", *FEW).exit_code == 0
