"""docs/policies.md says what the program says: names, files, tests, papers, costs, parameters, measured results."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from fake_driver import setting

from tsdiff.cli.describe import describe
from tsdiff.treesearch import registry
from tsdiff.treesearch.ledger import Cost, Spend
from tsdiff.treesearch.parameters import build

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/policies.md").read_text(encoding="utf-8")
RESULTS = json.loads((ROOT / "docs/results/policies.json").read_text(encoding="utf-8"))
HOMES = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]["tsdiff.policies"]


def script(path: str) -> ModuleType:
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = script("docs/make_policy_reference.py")
report = script("benchmarks/policies_report.py")
benchmark = script("benchmarks/policies.py")  # imports the report by its name
flights = script("benchmarks/mcts_parallel.py")
ENTRIES = reference.entries(PAGE)
each_policy = pytest.mark.parametrize("name", sorted(HOMES))


# The page ------------------------------------------------------------------------------------------------------------


def test_every_policy_has_an_entry_and_a_line_to_choose_it_by():
    assert set(ENTRIES) == set(HOMES)
    assert re.findall(r"^\| \[`([\w-]+)`\]\(#\1\)", PAGE, re.MULTILINE) == list(ENTRIES)


def test_generated_blocks_are_up_to_date():
    assert reference.filled_in(PAGE, RESULTS) == PAGE, "run `python docs/make_policy_reference.py`"
    assert re.findall(r"<!-- generated: ([\w-]+) -->", PAGE) == list(ENTRIES)


@each_policy
def test_files_tests_and_papers_are_there(name):
    entry = ENTRIES[name]
    assert HOMES[name].partition(":")[0].replace(".", "/") + ".py" == entry.files[0]
    assert all((ROOT / path).is_file() for path in entry.files)
    assert entry.tests
    for test, path in entry.tests:
        assert re.search(rf"^(    )?def {test}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), f"{test} is not in {path}"
    cited = set(re.findall(r"arXiv\s+(\d{4}\.\d{5})", registry.policies.load(name).__doc__))
    assert set(entry.papers) <= cited
    assert bool(entry.papers) == bool(cited)


# Costs ---------------------------------------------------------------------------------------------------------------

CONFIGURATIONS = {
    "adaptive": [{}, {"pilot": 9}, {"pilot": 40}],
    "beam": [{}, {"width": 2, "branch": 5, "extra": 7}, {"levels": (0.5,), "jump": 0.3}, {"levels": ()}],
    "best-of-n": [{}, {"n": 9}],
    "dts": [{}, {"simulations": 1}, {"simulations": 20}, {"levels": (0.5,), "widening": 1.0, "exponent": 0.5}],
    "dts-star": [{}, {"simulations": 1}, {"simulations": 20}, {"levels": (0.5,), "widening": 1.0, "exponent": 0.5}],
    "hierarchical": [{}, {"width": 12}, {"width": 1}],
    "mcts": [
        {}, {"simulations": 60}, {"simulations": 20, "value": "rollout"}, {"value": "lookahead"}, {"widening": 1.0, "exponent": 0.5},
        {"selection": "puct", "value": "rollout"}, {"selection": "gumbel", "value": "lookahead", "simulations": 40}, {"jump": 1.0, "width": 1, "branch": 2},
    ],
    "paths": [{}, {"width": 3, "branch": 5, "num_steps": 4}, {"sigma": 0.5, "forward": 0.3, "backward": 0.6}],
    "smc": [{}, {"particles": 7, "interval": 0.01, "t_start": 0.0, "t_end": 1.0}],
    "svdd": [{}, {"candidates": 3}],
    "zero-order": [{}, {"neighbours": 3, "rounds": 5, "extra": 2}, {"rounds": 0}],
}  # fmt: skip


@each_policy
def test_formulas_hold_and_are_tight(name):
    """In every configuration and schedule the program's cost is what the page says; bounds are reached somewhere."""
    formulas = ENTRIES[name].formulas
    assert {formula.what for formula in formulas} >= {"nfe"}
    cls = registry.policies.load(name)
    gaps = {formula: [] for formula in formulas}
    for options in CONFIGURATIONS[name]:
        for steps in (10, 20, 50):
            policy, where = cls(**options), setting(steps)
            cost, symbols = reference.cost_of(policy, where), reference.symbols(policy, where)
            for formula in formulas:
                said = formula.value(symbols)
                assert formula.holds(cost, symbols), f"{formula} is {said} but {options} at {steps} steps costs {cost}"
                gaps[formula].append(said - getattr(cost.lower if formula.bound == "at least" else cost.upper, formula.what))
    for formula, several in gaps.items():
        assert 0 in several, f"{formula} is never reached"


def test_wrong_formulas_are_found():
    cost, symbols = Cost(Spend(nfe=60), Spend(nfe=80)), {"n": 4, "S": 20}
    formula = reference.Formula
    assert [formula("nfe", bound, "n * S").holds(cost, symbols) for bound in ("exactly", "at most", "at least")] == [False, True, False]
    assert formula("nfe", "at least", "3 * S").holds(cost, symbols)
    assert formula("nfe", "exactly", "n * S").holds(Cost.exactly(Spend(nfe=80)), symbols)
    assert not formula("nfe", "exactly", "n * S + 1").holds(Cost.exactly(Spend(nfe=80)), symbols)
    with pytest.raises(NameError):
        formula("nfe", "exactly", "N * S").value(symbols)
    with pytest.raises(NameError):
        formula("nfe", "exactly", "open").value(symbols)


@pytest.mark.parametrize(("name", "options"), [("mcts", {"value": "rollout"}), ("dts", {}), ("dts-star", {})])
def test_the_default_widening_begins_with_36_samples(name, options):
    """As the page says: so many simulations are best-of-n, and one more is not."""
    cls, where = registry.policies.load(name), setting(20)
    assert cls(simulations=36, **options).cost(where) == registry.policies.load("best-of-n")(n=36).cost(where)
    assert cls(simulations=37, **options, levels=(0.5,)).cost(where).lower.nfe < 37 * where.sample_cost
    assert len(re.findall(r"\b36 (simulations|samples)\b", PAGE)) == 2


# Parameters ----------------------------------------------------------------------------------------------------------


@each_policy
def test_describe_shows_every_parameter_as_it_is(name):
    """Shown defaults, typed after -P, make the default policy; symbols are the fields'; numbers have a range."""
    cls = registry.policies.load(name)
    rows = describe("policies", name)["parameters"]
    known = {field.name: field for field in dataclasses.fields(cls)}
    assert [row["name"] for row in rows] == list(known)
    assert build(cls, {row["name"]: row["default"] for row in rows}) == cls()
    for row in rows:
        assert row["symbol"] == known[row["name"]].metadata["symbol"]
        assert row["help"]
        if any(kind in row["type"] for kind in ("int", "float", "choice", "bool")):
            assert row["range"], row
        for bound in ("low", "high", "above", "below"):
            if bound in known[row["name"]].metadata:
                assert f"{known[row['name']].metadata[bound]:g}" in row["range"]


def test_ranges_are_told_in_full():
    """Of each element of a list, and whether there may be none; types by their short names."""
    rows = {row["name"]: row for row in describe("policies", "beam")["parameters"]}
    assert rows["levels"]["range"] == "each above 0 and below 1"
    assert rows["max_children"]["range"] == "at least 1, or none"
    assert rows["branch_by"]["range"] == "renoise or step"
    stages = describe("policies", "hierarchical")["parameters"][-1]
    assert stages["type"] == "str | Path | tuple[Stage, ...] | None"


# Measured results ----------------------------------------------------------------------------------------------------


def test_the_results_page_is_made_of_its_numbers():
    page = (ROOT / "docs/results/policies.md").read_text(encoding="utf-8")
    assert page == report.markdown(RESULTS)
    assert benchmark.merged({}, RESULTS["worlds"]) == RESULTS
    assert set(RESULTS["nfe_ratio_to_best_of_64"]["gaussian"]) == set(HOMES)


def test_nfe_ratios_by_hand():
    """Log-linear between budgets, at most the smallest one's, infinite beyond the largest."""
    budgets = [4.0, 16.0, 64.0]
    assert report.needed(budgets, [0.0, 1.0, 2.0], 0.5) == pytest.approx(8.0)
    assert report.needed(budgets, [0.0, 1.0, 2.0], 2.0) == pytest.approx(64.0)
    assert report.needed(budgets, [0.0, 1.0, 2.0], -1.0) == 4.0
    assert report.needed(budgets, [0.0, 1.0, 0.5], 0.75) == pytest.approx(4.0 * 4.0**0.75), "the first time that it is reached"
    assert report.needed(budgets, [0.0, 1.0, 2.0], 2.1) == math.inf


def test_intervals_and_verdicts_tell_what_differs():
    """Units that follow a known law: the interval is about 1.96 standard errors, and its verdict is right."""
    rng = np.random.default_rng(0)
    draws = rng.integers(400, size=(1000, 400))
    noise = rng.normal(size=400)
    noise = (noise - noise.mean()) / noise.std()
    bounds = report.interval(noise, draws)
    assert bounds["mean"] == pytest.approx(0.0, abs=1e-4)
    assert bounds["high"] - bounds["low"] == pytest.approx(2 * 1.96 / 20, rel=0.1)
    for shift, word in ((0.2, "better"), (-0.2, "worse"), (0.02, "unclear")):
        assert report.verdict(noise + shift, report.interval(noise + shift, draws)) == word
    assert report.verdict(0.0 * noise, report.interval(0.0 * noise, draws)) == "same"

    nfe, scores = np.tile([4.0, 16.0, 64.0], (400, 1)), np.stack([noise, noise + 1.0, noise + 2.0], axis=1)
    same = report.nfe_ratio(nfe, scores, noise + 2.0, 64.0, draws)
    assert same == {"ratio": 1.0, "low": 1.0, "high": 1.0, "reached": 1.0, "at_most": False}, "paired: no error at all"
    assert report.nfe_ratio(nfe, scores, noise + 1.5, 64.0, draws)["ratio"] == pytest.approx(0.5)
    never = report.nfe_ratio(nfe, scores, noise + 3.0, 64.0, draws)
    assert (never["ratio"], never["high"], never["reached"]) == (None, None, 0.0)
    assert report.nfe_ratio(nfe, scores, noise - 1.0, 64.0, draws)["at_most"]


def test_what_does_not_beat_best_of_n_is_said():
    for world in RESULTS["worlds"].values():
        beaten = {row["policy"] for row in world["rows"] if all(cell["verdict"] != "better" for cell in row["budgets"].values())} - {"best-of-n"}
        last = report.plain_words(world)[-1]
        assert set(re.findall(r"[\w-]+", last.partition(":")[2])) - {"none"} == beaten


def test_eight_simulations_in_flight_reach_what_one_after_the_other_does():
    """As measured: within the sequential search's interval, in batches that are mostly full; the page is made of the numbers."""
    measured = json.loads((ROOT / "docs/results/mcts_parallel.json").read_text(encoding="utf-8"))
    assert (ROOT / "docs/results/mcts_parallel.md").read_text(encoding="utf-8") == flights.markdown(measured)
    assert measured["rows"] == 8
    assert set(measured["searches"]) == set(flights.SEARCHES)
    for rows in measured["searches"].values():
        alone = rows.pop("sequential")
        assert set(rows) == set(flights.FLIGHTS) - {"sequential"}
        for row in rows.values():
            assert row["value"]["mean"] >= alone["value"]["low"]
            assert row["batch_fill"] > 0.5 > 3 * alone["batch_fill"]


def test_prompts_are_spread_over_kinds():
    world = benchmark.gaussian()
    for count in (2, 6, 9):
        kinds = [world.kind(condition) for condition in world.chosen(count)]
        assert len(kinds) == count
        assert 0 <= 2 * kinds.count("rare mode") - count <= 1
    assert len({condition.prompt for condition in world.chosen(6)}) == 6


# Seconds -------------------------------------------------------------------------------------------------------------


def test_ratios_of_seconds_are_paired():
    """The geometric mean and Student's interval, by hand; a drift that hits both sides of every pair alike is no error."""
    own, base = [2.0, 8.0, 4.0], [1.0, 2.0, 2.0]  # ratios 2, 4, 2
    half = 4.302653 * math.log(2.0) / 3.0  # t of two degrees of freedom, times the standard error of the logarithms
    middle = math.log(2.0) * 4.0 / 3.0
    said = report.paired_ratio(own, base)
    assert [said[key] for key in ("low", "ratio", "high")] == pytest.approx([math.exp(middle + side * half) for side in (-1, 0, 1)], abs=1e-3)
    assert report.paired_ratio([3.0, 30.0, 300.0], [2.0, 20.0, 200.0]) == {"ratio": 1.5, "low": 1.5, "high": 1.5}


def test_seconds_are_added_to_the_scores_of_a_world(tmp_path, monkeypatch, capsys):
    """A file of scores alone is taken as it is; its scores stay, and the page gets one more table."""
    calls = []

    def search(world, conditions, policy, solver, samples, seed, options):
        calls.append((policy, samples, seed))
        return {"seconds": {"best-of-n": 2.0, "beam": 6.0}[policy] * samples * (1 + seed) * len(conditions)}

    monkeypatch.setattr(benchmark, "search", search)
    timed = ["--world", "gaussian", "--timed", "--policies", "beam", "--budgets", "4", "16", "--seeds", "2", "--save", str(tmp_path)]
    with pytest.raises(SystemExit):
        benchmark.main(timed)
    assert "has none of gaussian; measure them first" in capsys.readouterr().err
    file = tmp_path / "policies.json"
    alone = json.loads(json.dumps(RESULTS))
    alone["worlds"]["gaussian"].pop("seconds", None)
    file.write_text(json.dumps(alone), encoding="utf-8")
    benchmark.main(timed)
    capsys.readouterr()
    written = json.loads(file.read_text(encoding="utf-8"))
    seconds = written["worlds"]["gaussian"].pop("seconds")
    assert written == alone, "nothing else has changed"
    assert seconds["command"] == "python benchmarks/policies.py --world gaussian --policies beam --budgets 4 16 --prompts 3 --seeds 2 --timed"
    assert (seconds["prompts"], seconds["repeats"], seconds["budgets"]) == (3, 2, [4, 16])
    assert [row["policy"] for row in seconds["rows"]] == ["best-of-n", "beam"]
    assert calls[2:] == [(policy, samples, seed) for seed in (0, 1) for samples in (4, 16) for policy in (["best-of-n", "beam"], ["beam", "best-of-n"])[seed]]
    table = "| best-of-n | ddim | 12 s | 48 s |\n| beam | ddim | 3.00 (3.00 to 3.00) | 3.00 (3.00 to 3.00) |\n"
    page = (tmp_path / "policies.md").read_text(encoding="utf-8")
    assert report.timed_page(seconds).endswith(table)
    assert page.replace(report.timed_page(seconds), "").split() == report.markdown(alone).split(), "the table, and nothing else"
    assert len(page) > len(report.markdown(alone))


@pytest.mark.parametrize("words", [["--timed", "--seeds", "1"], ["--seeds", "1"], ["--world", "shapes", "--prompts", "1"]], ids=" ".join)
def test_one_measurement_has_no_interval(words, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(words)
    assert "an interval needs at least two" in capsys.readouterr().err
