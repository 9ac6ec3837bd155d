"""`--ensemble RULE`, and what a search by parts prints and leaves behind."""

import json
import re

import pytest

from tsdiff.treesearch import registry
from tsdiff.verifiers.compositional import Compositional
from tsdiff.verifiers.ensemble import Ensemble

TWO = ("--verifier", "gaussian-target", "--verifier", "gaussian-log-density")
SMALL = ("near (3, 2.4)", "--policy", "best-of-n", "-P", "n=3", "--steps", "5")


@pytest.fixture(autouse=True)
def registered(tmp_path, monkeypatch):
    """The verifiers under their names, whether or not the installed package lists them, and an empty cache."""
    registry.verifiers.add("ensemble", Ensemble)
    registry.verifiers.add("compositional", Compositional)
    monkeypatch.setenv("TSDIFF_CACHE", str(tmp_path / "cache"))


def facts(shown):
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in shown.splitlines())


def test_members_scores_are_shown_beside_the_baselines(tsdiff, tmp_path):
    result = tsdiff("search", *SMALL, *TWO, "--ensemble", "rank")
    assert result.exit_code == 0, result.stderr
    shown = facts(result.stdout)
    assert re.fullmatch(r"[01](\.\d+)? \(relative to this search's samples\)", shown["score"]), "no baseline: its rank says nothing"
    for member in ("- gaussian-target", "- gaussian-log-density"):
        assert re.fullmatch(r"-?[\d.e+-]+ \(baseline -?[\d.e+-]+\)", shown[member])
    tree = json.loads((tmp_path / shown["run"] / "tree.json").read_text())
    parts = [value["parts"] for node in tree["nodes"] for value in node["values"].values()]
    assert len(parts) == 3
    assert all({"gaussian-target", "gaussian-log-density"} <= set(part) for part in parts)
    typed = json.loads((tmp_path / shown["run"] / "run.json").read_text())["options"]["typed"]
    assert typed["ensemble"] == "rank"


def test_a_table_is_announced_made_counted_and_found_again(tsdiff, tmp_path):
    arguments = ("search", *SMALL, *TWO, "--ensemble", "quantile:samples=8")
    first, second = tsdiff(*arguments), tsdiff(*arguments)
    assert first.exit_code == second.exit_code == 0, first.stderr
    notice = r"compares with plain samples: unless their scores are in \S+/calibration, 8 samples are made first and scored at 6 of 6 levels \(40 NFE"
    assert re.search(notice, first.stderr)
    assert re.fullmatch(r"40 NFE for 8 plain samples, in \S+\.json", facts(first.stdout)["calibration"])
    assert re.fullmatch(r"8 plain samples, in \S+\.json", facts(second.stdout)["calibration"])
    assert facts(first.stdout)["NFE"] == facts(second.stdout)["NFE"] == "15 + 5 for the baseline", "the search's own"
    assert facts(first.stdout)["score"] == facts(second.stdout)["score"]
    assert len(list((tmp_path / "cache/calibration").iterdir())) == 1


def test_the_plan_tells_what_a_table_costs_and_makes_none(tsdiff, tmp_path):
    shown = facts(tsdiff("plan", *SMALL, *TWO, "--ensemble", "zscore:samples=8").stdout)
    assert shown["calibration"] == "40 NFE once, unless cached"
    assert shown["verifiers"] == "zscore(gaussian-target+gaussian-log-density)"
    assert not (tmp_path / "cache").exists()
    assert "calibration" not in facts(tsdiff("plan", *SMALL, *TWO, "--ensemble", "rank").stdout)


def test_a_config_file_names_the_rule(tsdiff, tmp_path):
    (tmp_path / "c.toml").write_text('verifier = ["gaussian-target", "gaussian-log-density"]\nensemble = "weighted:weights=2,1"\n')
    plan = json.loads(tsdiff("plan", *SMALL, "--config", "c.toml", "--json").stdout)
    assert plan["verifiers"] == ["weighted(gaussian-target+gaussian-log-density)"]
    assert plan["calibration_cost"] is None


def test_facts_of_a_prompt_are_shown(tsdiff, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "near (3, 2.4)", "questions": ["bright?", "dark?"]}) + "\n")
    asked = "compositional:question=[target-color:color=navy],aggregate=minimum"
    result = tsdiff("search", "--prompts", "p.jsonl", "--policy", "best-of-n", "-P", "n=2", "--steps", "5", "--verifier", asked)
    assert result.exit_code == 0, result.stderr
    assert {"- bright?", "- dark?"} <= set(facts(result.stdout))


def test_describe_explains_the_rules(tsdiff):
    shown = tsdiff("describe", "ensemble").stdout
    for word in ("rank", "pareto", "zscore", "quantile", "2501.09732", "members", "cache folder"):
        assert word in shown
    assert "GenEval" in tsdiff("describe", "compositional").stdout


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ([*TWO, "--ensemble", "rnak"], "unknown ensemble rule 'rnak'; did you mean 'rank'"),
        ([*TWO, "--ensemble", "rank:weights=1,2,3"], "3 weights were given for 2 members"),
        ([*TWO[:2], "--ensemble", "rank"], "1 were given without a role; give at least two"),
        ([*TWO, "--ensemble", "rank", "--policy", "smc"], "policy smc compares scores across sets, but verifier rank(gaussian-target+gaussian-log-density)"),
        (["--verifier", "ensemble:members=[gaussian-target:rho=1"], "opens a bracket that it does not close"),
        (["--verifier", "compositional"], "give either question"),
    ],
)
def test_mistakes_are_one_line_and_status_two(tsdiff, arguments, hint):
    result = tsdiff("search", "near (3, 2.4)", "--steps", "5", "--solver", "ddpm", *arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert hint in result.stderr.splitlines()[-1]
