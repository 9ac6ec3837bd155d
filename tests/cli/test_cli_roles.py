"""`--verifier ROLE=NAME`: on the command line, in a config file, and in what a run leaves behind."""

import json
from pathlib import Path

import pytest

from tsdiff.policies.hierarchical import Hierarchical
from tsdiff.treesearch import registry
from tsdiff.treesearch.parameters import build

STAGES = Path(__file__).parents[2] / "examples/stages.toml"
ROLES = ("--verifier", "layout=gaussian-log-density", "--verifier", "final=gaussian-target")


@pytest.fixture(autouse=True)
def hierarchical():
    """The policy under its name, whether or not the installed package lists it."""
    registry.policies.add("hierarchical", Hierarchical)


def test_a_search_by_roles_ends_in_a_run_that_names_them(tsdiff, tmp_path):
    result = tsdiff("search", "near (3, 2.4)", "--policy", "hierarchical", "-P", "width=2", *ROLES, "--steps", "6", "--json")
    assert result.exit_code == 0, result.stderr
    run = json.loads(result.stdout)
    record = json.loads((tmp_path / run["run"] / "run.json").read_text())
    assert record["options"]["verifiers"] == ["gaussian-target", "gaussian-log-density"], "the one that steers first"
    assert record["options"]["roles"] == {"final": "gaussian-target", "layout": "gaussian-log-density"}
    assert record["options"]["typed"]["verifiers"] == ["layout=gaussian-log-density", "final=gaussian-target"]
    tree = json.loads((tmp_path / run["run"] / "tree.json").read_text())
    first = [node for node in tree["nodes"] if "gaussian-log-density@lookahead4" in node["values"]]
    assert len(first) == 2
    assert not any("gaussian-target" in key for node in first for key in node["values"])
    notes = [note for note in tree["notes"] if "stage" in note]
    assert [note["verifier"] for note in notes] == ["layout", "final", "final", "final"]


def test_the_plan_shows_who_judges_what(tsdiff):
    shown = tsdiff("plan", "--policy", "hierarchical", *ROLES).stdout
    assert "gaussian-target (final), gaussian-log-density (layout)" in shown
    plain = tsdiff("plan", "--policy", "hierarchical", "--verifier", "gaussian-target").stdout
    assert "gaussian-target\n" in plain


def test_stages_come_from_a_file_and_a_budget_is_filled(tsdiff):
    plan = json.loads(tsdiff("plan", "--policy", "hierarchical", "-P", f"stages={STAGES}", *ROLES, "--nfe", "400", "--json").stdout)
    assert 360 <= plan["cost"]["upper"]["nfe"] <= 400
    assert plan["cost"]["exact"]
    options = {key: value for key, value in plan["policy"].items() if key != "name"}
    assert build(Hierarchical, options) == Hierarchical(nfe=400), "a run's record makes the policy again, without the file"


def test_a_config_file_names_roles_as_the_command_line_does(tsdiff, tmp_path):
    (tmp_path / "c.toml").write_text(
        f'verifier = ["layout=gaussian-log-density", "final=gaussian-target"]\n[policy]\nname = "hierarchical"\nstages = "{STAGES}"\n'
    )
    result = tsdiff("plan", "--config", "c.toml", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["roles"] == {"final": "gaussian-target", "layout": "gaussian-log-density"}


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--policy", "beam", *ROLES], "policy beam has no verifier role 'layout'; its roles are: final"),
        (["--policy", "hierarchical", "--verifier", "texture=gaussian-target"], "has no verifier role 'texture'; its roles are: final, layout"),
        (["--policy", "hierarchical", "--verifier", "layout=gaussian-target"], "none for final, which steers the answer; add final=NAME"),
        (["--policy", "hierarchical", "--verifier", "final=gausian-target"], "did you mean 'gaussian-target'"),
        (["--policy", "hierarchical", "-P", "stages=nowhere.toml"], "stages file nowhere.toml cannot be read"),
        (["--policy", "hierarchical", "-P", "stages=bad.toml"], "bad.toml: stage 1: keep is 0 but must be at least 1"),
        (["--policy", "hierarchical", "--nfe", "25"], "budget of 25 NFE is too small for 4 stages"),
    ],
)
def test_mistakes_are_one_line_and_status_two(tsdiff, tmp_path, arguments, hint):
    (tmp_path / "bad.toml").write_text("[[stages]]\nlevels = [0, 1]\nkeep = 0\n")
    result = tsdiff("search", *arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert hint in result.stderr.splitlines()[-1]
    assert result.stderr.count("error:") == 1


def test_describe_explains_stages_and_their_roles(tsdiff):
    shown = tsdiff("describe", "hierarchical").stdout
    for word in ("stages", "[[stages]]", "--verifier layout=NAME", "Spearman", "2501.19252"):
        assert word in shown
