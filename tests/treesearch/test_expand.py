"""A saved tree goes on from any of its nodes: what its children follow, what they cost, and that nothing is lost."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from expansions import AllMoves, begin, derived, empty_tree, expand, latents, rebuilt_as, tree_of
from fakes import Judge

import tsdiff
from tsdiff.policies.svdd import SVDD
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.expansion import Asked, planned_expansion
from tsdiff.treesearch.journal import JournalReader
from tsdiff.treesearch.lines import write_first
from tsdiff.treesearch.noise import derive, normals
from tsdiff.treesearch.rebuild import rebuild
from tsdiff.treesearch.requests import Denoise, Draw, Release, Score
from tsdiff.treesearch.runfile import JOURNAL
from tsdiff.worlds.gaussian.mixture import Mixture
from tsdiff.worlds.gaussian.model import GaussianModel
from tsdiff.worlds.gaussian.presets import preset

BEAM = {"policy": "beam", "policy_options": {"width": 2, "branch": 2}}
SDE = {"solver": "dpm++2m-sde", **BEAM}


def own(folder: Path, driver: int) -> list[dict]:
    """The nodes that a driver made."""
    return [node for node in tree_of(folder)["nodes"] if node.get("driver", 0) == driver]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs that are done, by what they were; copy them to change them."""
    out = tmp_path_factory.mktemp("runs")
    made = {"plain": {}, "beam": BEAM, "sde": SDE, "none": {**SDE, "keep": "none"}, "eta": {**BEAM, "eta": 1.0}}
    return {name: begin(out / name, **options) for name, options in made.items()}


@pytest.fixture
def copied(runs, tmp_path):
    """A copy of one of the runs."""
    return lambda name, to="copy": Path(shutil.copytree(runs[name], tmp_path / to))


# The law ----------------------------------------------------------------------------------------------------------------


def test_children_follow_the_forward_kernel_and_the_exact_transition(tmp_path):
    """Of a Gaussian law everything is linear: re-noised copies of x are N(r x, s^2), their completions N(m + k (r x - a m), k^2 s^2 + v)."""
    mean, std, count = torch.tensor([1.0, -0.5]), 0.7, 1500
    model = GaussianModel(Mixture([1.0], [mean.tolist()], [std]))
    folder = begin(tmp_path, model=model, solver="exact", steps=5, verifiers="gaussian-target", max_batch=64)
    to = 2
    result = expand(folder, "best", children=count, to_level=to, model=model, max_batch=500)
    schedule, kept = result.tree.schedule, latents(folder)
    start = kept[result.drivers[-1]["node"]].double()
    first = torch.stack([kept[node["index"]] for node in own(folder, 1) if node["level"] == to]).double()
    leaves = torch.stack([kept[node["index"]] for node in own(folder, 1) if node["level"] == schedule.last]).double()
    assert len(first) == len(leaves) == count
    (clean_alpha, clean_sigma), (alpha, sigma) = schedule.arrival[-1], (schedule.alpha[to], schedule.sigma[to])
    ratio = alpha / clean_alpha
    spread = math.sqrt(sigma**2 - (ratio * clean_sigma) ** 2)
    marginal = (alpha * std) ** 2 + sigma**2
    gain = alpha * std**2 / marginal
    rest = math.sqrt(std**2 * sigma**2 / marginal)
    laws = [(first, ratio * start, spread), (leaves, mean + gain * (ratio * start - alpha * mean), math.hypot(gain * spread, rest))]
    for sample, centre, scale in laws:
        error = 6.0 * scale / math.sqrt(count)  # six standard errors, under fixed seeds
        assert (sample.mean(0) - centre).abs().max() < error
        assert (sample.std(0) - scale).abs().max() < error / math.sqrt(2.0)
    noise = (first - ratio * start) / spread
    assert abs(float((noise[:, 0] * noise[:, 1]).mean())) < 6.0 / math.sqrt(count)
    stay = expand(folder, own(folder, 1)[0]["index"], children=count, renoise=0.0, model=model, max_batch=500)
    assert stay.drivers[-1]["nfe"] == 1 + count * (schedule.last - to - 1), "continuations of a node share its prediction"
    x = kept[own(folder, 1)[0]["index"]].double()
    kept = latents(folder)
    further = torch.stack([kept[node["index"]] for node in own(folder, 2)]).double()
    assert (further.mean(0) - (mean + gain * (x - alpha * mean))).abs().max() < 6.0 * rest / math.sqrt(count)
    assert (further.std(0) - rest).abs().max() < 6.0 * rest / math.sqrt(2.0 * count)


def test_noises_follow_from_the_node_and_the_drivers_number(copied):
    folder = copied("plain")
    result = expand(folder, "best", children=3, renoise=0.5)
    start = result.tree.nodes[result.drivers[-1]["node"]]
    salted = derive(start.stream, "driver", 1)
    kept, (alpha, sigma) = latents(folder), (result.tree.schedule.alpha[3], result.tree.schedule.sigma[3])
    landed = result.tree.schedule.arrival[-1]
    for i, node in enumerate(own(folder, 1)[:3]):
        stream = derive(salted, "draw", i)
        assert node["stream"] == f"{stream:032x}"
        assert node["parent"] == start.index
        assert node["move"] == {"kind": "renoise", "levels": [6, 3], "copy": i, "noise": {"kind": "fresh", "index": i}, "source": "latent"}
        noise = torch.from_numpy(normals(derive(stream, "initial"), 2))
        expected = alpha / landed[0] * kept[start.index] + math.sqrt(sigma**2 - (alpha / landed[0] * landed[1]) ** 2) * noise
        assert torch.allclose(kept[node["index"]], expected, atol=1e-6)


# Drivers ----------------------------------------------------------------------------------------------------------------


def test_the_same_expansion_again_gives_other_children_and_in_a_copy_the_same_bytes(copied):
    one, other = copied("beam"), copied("beam", "other")
    for folder in (one, other):
        for _ in range(2):
            expand(folder, "best", children=2)
    assert derived(one) == derived(other)
    nodes = tree_of(one)["nodes"]
    assert len({node["id"] for node in nodes}) == len(nodes)
    first, second = ([(node["stream"], latents(one)[node["index"]].tolist()) for node in own(one, driver)] for driver in (1, 2))
    assert not {stream for stream, _ in first} & {stream for stream, _ in second}
    assert all(a != b for (_, a), (_, b) in zip(first, second, strict=True))
    assert not {node["stream"] for node in own(one, 0)} & {stream for stream, _ in first + second}


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_the_rows_of_a_call_do_not_matter(copied, rows):
    one, other = copied("sde"), copied("sde", "other")
    for folder, most in ((one, 4), (other, rows)):
        expand(folder, "best", renoise=0.5, policy="beam", policy_options={"width": 2, "branch": 2}, max_batch=most)
    assert derived(one) == derived(other)


def test_several_expansions_in_a_row_add_up(copied):
    folder = copied("beam")
    before = tree_of(folder)
    plain = (folder / "baseline.json").read_bytes(), (folder / "baseline.png").read_bytes()
    expand(folder, "best", children=2, renoise=0.3)
    grown = own(folder, 1)[-1]["index"]
    expand(folder, grown, children=2, renoise=1.0)
    result = expand(folder, own(folder, 2)[-1]["index"], policy="mcts", policy_options={"simulations": 3})
    tree = tree_of(folder)
    assert tree["nodes"][: len(before["nodes"])] == before["nodes"], "what was there stays as it was"
    assert [node["move"]["levels"][-1] for node in own(folder, 2)[:2]] == [0, 0]
    assert sum(node["nfe"] for node in tree["nodes"]) == tree["ledger"]["nfe"] == result.ledger.nfe
    assert [driver["number"] for driver in result.drivers] == [0, 1, 2, 3]
    for name in ("nfe", "rows", "decodes"):
        assert sum(driver[name] for driver in result.drivers) == tree["ledger"][name]
    assert sum(driver["nodes"] for driver in result.drivers) == len(tree["nodes"])
    facts = json.loads((folder / "run.json").read_text())
    assert facts["drivers"] == result.drivers
    assert facts["status"] == "done"
    assert facts["result"]["score"] == max(driver["score"] for driver in result.drivers) == result.score
    assert facts["result"]["node"] == result.node.index
    assert plain == ((folder / "baseline.json").read_bytes(), (folder / "baseline.png").read_bytes())
    assert not (folder / "latents").exists()
    index = json.loads((folder / "index.json").read_text())
    assert index["runs"][0]["nfe"] == result.ledger.nfe
    assert index["engine"]["rows"] == result.ledger.rows + result.baseline.ledger.rows
    assert index["engine"]["lost"] == 0
    again = tsdiff.resume(folder)
    assert (again.score, again.ledger, again.node.index, again.drivers) == (result.score, result.ledger, result.node.index, result.drivers)
    assert json.loads(json.dumps(again.tree.to_json())) == tree


def test_the_best_image_is_that_of_the_best_of_all(copied):
    folder = copied("plain")
    best, image = json.loads((folder / "run.json").read_text())["result"]["score"], (folder / "best.png").read_bytes()
    outcomes = []
    for _ in range(5):
        result = expand(folder, "best", children=1, renoise=1.0)
        outcomes.append(result.drivers[-1]["score"] > best)
        assert result.score == max(best, result.drivers[-1]["score"])
        assert ((folder / "best.png").read_bytes() != image) == outcomes[-1]
        best, image = result.score, (folder / "best.png").read_bytes()
    assert set(outcomes) == {True, False}


POLICIES = {
    "beam": ("beam", {"width": 2, "branch": 2}),
    "mcts": ("mcts", {"simulations": 4}),
    "mcts by steps": ("mcts", {"simulations": 4, "branch_by": "step"}),
    "zero-order": ("zero-order", {"neighbours": 2, "rounds": 2}),
    "paths": ("paths", {"width": 2}),
    "smc": ("smc", {"particles": 3}),
    "dts": ("dts", {"simulations": 3}),
    "an object": (SVDD(), {}),
}


@pytest.mark.parametrize("name", POLICIES)
def test_any_policy_searches_from_a_node_and_costs_what_it_says(copied, name):
    policy, options = POLICIES[name]
    folder = copied("eta")
    how = {"policy": policy, "policy_options": options, "renoise": 0.7}
    with planned_expansion(folder, Asked("best", **how), policy=policy) as expansion:
        cost, start, to = expansion.cost, expansion.node.index, expansion.launch.level
    result = expand(folder, "best", **how)
    spent = result.drivers[-1]
    for count in ("nfe", "decodes"):
        assert getattr(cost.lower, count) <= spent[count] <= getattr(cost.upper, count)
    assert cost.lower.verifier_calls <= sum(spent["verifier_calls"].values()) <= cost.upper.verifier_calls
    assert spent["nfe"] == sum(node["nfe"] for node in own(folder, 1))
    assert spent["error"] is spent["truncated"] is None
    nodes = {node["index"]: node for node in own(folder, 1)}
    assert all(node["level"] >= to for node in nodes.values())
    assert {node["parent"] for node in nodes.values()} - set(nodes) == {start}
    assert nodes[spent["best"]]["level"] == 6
    assert rebuilt_as(folder, eta=1.0)


@pytest.mark.parametrize(("solver", "node", "how", "nfe"), [
    ("ddim", "best", {"children": 5, "renoise": 0.5}, 15),
    ("ddim", "best", {"children": 5, "to_level": 0}, 30),
    ("heun", "best", {"children": 3, "to_level": 2}, 3 * 7),
    ("ddpm", "best", {"children": 2, "renoise": 0.01}, 2),
    ("ddpm", 0, {"children": 4, "renoise": 0.0}, 1 + 4 * 5),
    ("ddim", "best", {"nfe": 14, "renoise": 0.5}, 12),
    ("ddpm", 0, {"nfe": 14, "renoise": 0.0}, 11),
])  # fmt: skip
def test_children_cost_exactly_what_is_said_before(tmp_path, solver, node, how, nfe):
    folder = begin(tmp_path, model="gaussian:process=ve" if solver == "heun" else "gaussian", solver=solver)
    with planned_expansion(folder, Asked(node, **how)) as expansion:
        assert expansion.cost.exact
        cost = expansion.cost.upper
    spent = expand(folder, node, **how).drivers[-1]
    assert (spent["nfe"], spent["decodes"], sum(spent["verifier_calls"].values())) == (cost.nfe, cost.decodes, cost.verifier_calls)
    assert spent["nfe"] == nfe


def test_plain_children_are_a_search_for_the_best_of_n(copied):
    one, other = copied("plain"), copied("plain", "other")
    expand(one, "best", children=3)
    expand(other, "best", policy="best-of-n", policy_options={"n": 3}, renoise=0.5)
    assert [{**node, "status": ""} for node in own(one, 1)] == [{**node, "status": ""} for node in own(other, 1)]


def test_a_policys_recipes_count_the_drivers_own_first_noises(copied):
    folder = copied("plain")
    result = expand(folder, "best", policy="zero-order", policy_options={"neighbours": 3, "rounds": 1, "cosine": 0.8}, to_level=2)
    schedule, kept = result.tree.schedule, latents(folder)
    ratio = schedule.alpha[2] / schedule.arrival[-1][0]
    start = kept[result.drivers[-1]["node"]]
    first = [node for node in own(folder, 1) if node["level"] == 2]
    noises = [kept[node["index"]] - ratio * start for node in first]
    assert [node["move"]["noise"]["kind"] for node in first] == ["fresh", "rotate", "rotate", "rotate"]
    for node, noise in list(zip(first, noises, strict=True))[1:]:
        assert node["move"]["noise"]["base"] == 0
        assert float(torch.dot(noise, noises[0]) / (noise.norm() * noises[0].norm())) == pytest.approx(0.8, abs=1e-5)
        assert float(noise.norm() / noises[0].norm()) == pytest.approx(1.0, abs=1e-5)


def test_a_pipeline_with_guidance_and_an_initial_image(tmp_path):
    from PIL import Image
    from tiny_sd import tiny_stable_diffusion

    pipe = tiny_stable_diffusion()
    options = {"model": pipe, "verifiers": ["sharpness", "luminance"], "guidance_scale": 3.0, "init_image": Image.new("RGB", (64, 64), "red"), "strength": 0.8, "steps": 5, "policy_options": {"n": 1}}
    whole, bare = begin(tmp_path / "all", "a red cube", keep="all", **options), begin(tmp_path / "none", "a red cube", keep="none", **options)
    one, other = expand(whole, "best", children=2, model=pipe), expand(bare, "best", children=2, model=pipe)
    assert one.tree.schedule.last == 4
    assert one.drivers[-1]["nfe"] == 4
    assert one.drivers[-1]["rows"] == 8
    assert other.drivers[-1]["nfe"] == 8
    assert [node["values"] for node in own(whole, 1)] == [node["values"] for node in own(bare, 1)]
    assert one.image.tobytes() == other.image.tobytes()
    assert set(own(whole, 1)[-1]["values"]) == {"sharpness", "luminance"}


def test_a_budget_is_kept_and_always_ends_in_a_sample(copied):
    folder = copied("eta")
    spent = expand(folder, "best", policy="beam", nfe=31, renoise=1.0).drivers[-1]
    assert 28 <= spent["nfe"] <= 31
    spent = expand(folder, "best", policy="beam", policy_options={"width": 4, "branch": 4}, nfe=20, renoise=1.0).drivers[-1]
    assert spent["nfe"] <= 20
    assert "costs" in spent["truncated"]
    assert own(folder, 2)[-1]["level"] == 6, "the reserve has finished one of its own"
    assert spent["best"] is not None


# The journal ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    BEAM,
    {"policy": "mcts", "policy_options": {"simulations": 5}, "solver": "dpm++2m"},
    {"policy": "beam", "policy_options": {"width": 2, "branch": 2, "value": "lookahead"}, "eta": 1.0, "keep": "none"},
    {"policy": "smc", "policy_options": {"particles": 3}, "eta": 1.0},
    {"policy": "best-of-n", "policy_options": {"n": 4}, "nfe": 13},
    {"policy": AllMoves()},
])  # fmt: skip
def test_a_journal_alone_gives_the_tree(tmp_path, options):
    folder = begin(tmp_path, **options)
    assert rebuilt_as(folder, **{name: value for name, value in options.items() if name in ("solver", "eta")})
    before = rebuild(folder, empty_tree(), most=1)
    assert not before.more
    assert all(node.status in ("closed", "failed") for node in before.tree.nodes)


def test_a_journal_of_the_version_before_is_brought_up_to_date(copied):
    folder = copied("plain")
    data = (folder / JOURNAL).read_bytes()
    about = JournalReader(folder / JOURNAL).about
    old = write_first(1, about) + data.partition(b"\n")[2]
    (folder / JOURNAL).write_bytes(old)
    assert rebuilt_as(folder)
    result = expand(folder, "best", children=2)
    assert result.drivers[-1]["nodes"] == 4
    assert (folder / f"{JOURNAL}.version-1-1").read_bytes() == old
    assert (folder / JOURNAL).read_bytes().startswith(data)
    assert rebuilt_as(folder)


# Latents that were not kept ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["ddim", "dpm++2m-sde", "exact", "ddpm"])
def test_what_was_not_kept_is_computed_again_to_the_same_bytes_and_counted(tmp_path, solver):
    """Every kind of path, whose latents one run has kept and the other has not."""
    options = {"policy": AllMoves(), "solver": solver}
    whole, bare = begin(tmp_path / "all", keep="all", **options), begin(tmp_path / "none", keep="none", **options)
    assert not latents(bare)
    nodes = tree_of(whole)["nodes"]
    leaves = [node["index"] for node in nodes if node["level"] == 6 and not node["draft"]]
    levels = [node["index"] for node in nodes if node["move"]["kind"] == "denoise" and node["level"] == 4]
    for number, start in enumerate([leaves[0], leaves[-1], leaves[-2], leaves[2], levels[0]], 1):
        kept, again = expand(whole, start, children=2), expand(bare, start, children=2)
        path = kept.tree.nodes[start].path()
        assert kept.drivers[-1]["restored"] == []
        assert again.drivers[-1]["restored"] == [node.index for node in path]
        assert [node["values"] for node in own(whole, number)] == [node["values"] for node in own(bare, number)]
        steps = sum(len(node.move.levels) - 1 for node in path if node.move.kind == "denoise")
        estimates = sum(node.move.kind == "perturb" or node.move.source == "x0" for node in path)
        assert again.drivers[-1]["nfe"] - kept.drivers[-1]["nfe"] == steps + estimates
        assert sum(node["nfe"] for node in tree_of(bare)["nodes"]) == again.ledger.nfe
    kinds = {node.move.kind for start in leaves for node in kept.tree.nodes[start].path()}
    assert kinds == {"draw", "denoise", "renoise", "perturb"}


@dataclass(frozen=True, kw_only=True)
class Fork(AllMoves):
    """Two ways on from one node; the answer is at the end of the first."""

    stop: int = 3

    def search(self, tree):
        (root,) = yield Draw()
        (middle,) = yield Denoise(root, to=self.stop)
        (leaf,) = yield Denoise(middle, to=tree.schedule.last)
        yield Score(leaf)
        (aside,) = yield Denoise(middle, to=5)
        yield Release([aside])
        return leaf


@pytest.mark.parametrize(("solver", "again"), [("ddim", [3]), ("dpm++2m", [1, 3])])
def test_it_is_computed_from_the_nearest_node_that_is_all_there(tmp_path, solver, again):
    """A kept latent is enough, unless a multistep solver's history belonged to it."""
    folder = begin(tmp_path, solver=solver, keep="path", policy=Fork())
    whole = begin(tmp_path / "whole", solver=solver, keep="all", policy=Fork())
    assert sorted(latents(folder)) == [0, 1, 2]
    result = expand(folder, 3, children=1, renoise=0.1)
    assert result.drivers[-1]["restored"] == again
    assert own(folder, 1)[-1]["values"] == (expand(whole, 3, children=1, renoise=0.1), own(whole, 1)[-1]["values"])[1]


def test_more_kept_latents_follow_keep(tmp_path):
    for keep in ("all", "path", "leaves", "none"):
        folder = begin(tmp_path / keep, keep=keep, **BEAM)
        before = set(latents(folder))
        expand(folder, "best", children=2)
        nodes, after = {node["index"]: node for node in own(folder, 1)}, set(latents(folder))
        assert before <= after
        best = json.loads((folder / "run.json").read_text())["drivers"][1]["best"]
        expected = {
            "all": set(nodes),
            "path": {best, nodes[best]["parent"]},
            "leaves": {index for index, node in nodes.items() if node["level"] == 6},
            "none": set(),
        }
        assert (after - before) & set(nodes) == expected[keep]


# Verifiers --------------------------------------------------------------------------------------------------------------


def test_another_verifier_steers_and_the_runs_own_judge_what_is_finished(copied):
    folder = copied("plain")
    result = expand(folder, "best", children=3, verifiers=["luminance"])
    leaves = [node for node in own(folder, 1) if node["level"] == 6]
    assert all(set(node["values"]) == {"luminance", "gaussian-target"} for node in leaves)
    brightest = max(leaves, key=lambda node: node["values"]["luminance"]["score"])
    assert result.drivers[-1]["best"] == brightest["index"]
    assert result.drivers[-1]["score"] == brightest["values"]["gaussian-target"]["score"]
    assert tree_of(folder)["verifier"] == "gaussian-target"
    assert result.score == max(driver["score"] for driver in result.drivers)


def test_where_samples_are_ranked_as_a_set_all_of_them_are_ranked_again(tmp_path):
    folder = begin(tmp_path, verifiers=["luminance", "sharpness"], ensemble="rank", policy_options={"n": 3})
    with planned_expansion(folder, Asked("best", children=3)) as expansion:
        cost = expansion.cost.upper
    result = expand(folder, "best", children=3)
    driver = result.drivers[-1]
    assert result.relative
    assert (driver["nfe"], driver["decodes"], sum(driver["verifier_calls"].values())) == (cost.nfe, cost.decodes, cost.verifier_calls)
    leaves = [node for node in tree_of(folder)["nodes"] if node["level"] == 6]
    scores = {node["index"]: node["values"][result.tree.verifier]["score"] for node in leaves}
    assert len(scores) == 6
    assert result.node.index == max(scores, key=lambda index: (scores[index], -index))
    assert result.score == max(scores.values())
    again = tsdiff.resume(folder)
    assert (again.node.index, again.score) == (result.node.index, result.score)
    bare = begin(tmp_path / "bare", verifiers=["luminance", "sharpness"], ensemble="rank", keep="path", policy_options={"n": 3})
    with pytest.raises(UsageError, match="has not kept the latents of 2 of them"):
        expand(bare, "best")


class Drift(Judge):
    """How far the estimate has moved since an earlier level."""

    def __init__(self, ratio: float) -> None:
        super().__init__("drift", lambda candidates: -(candidates.x0 - candidates.ancestor_x0(ratio)).norm(dim=1), needs=["x0", f"ancestor_x0@{ratio!r}"])


def test_what_an_ancestor_looked_like_is_inherited(tmp_path):
    """The estimate that a path has captured belongs to what is re-noised past it, though it is kept with no latent."""
    schedule = empty_tree().schedule
    drift = Drift(schedule.sigma[2] / schedule.alpha[2])
    folder = begin(tmp_path, verifiers=drift, policy=Fork(stop=2))
    middle = latents(folder)[1].double()
    seen = preset("rare-mode").mixture.denoise(middle[None], schedule.alpha[2], schedule.sigma[2])[0][0]
    past = expand(folder, "best", children=2, to_level=4, verifiers=drift)
    assert past.drivers[-1]["restored"] == [2], "from where it was captured"
    before = expand(folder, "best", children=2, to_level=1, verifiers=drift)
    assert before.drivers[-1]["restored"] == [], "re-noised to above it, there is a new one to come"
    kept = latents(folder)
    for driver, same in ((1, True), (2, False)):
        for leaf in (node for node in own(folder, driver) if node["level"] == 6):
            distance = float((kept[leaf["index"]].double() - seen).norm())
            assert (abs(leaf["values"]["drift"]["score"] + distance) < 1e-4) == same
