"""`tsdiff rescore` on saved runs of the analytic world."""

import json
import re
from pathlib import Path

import pytest

import tsdiff as library
from tsdiff.treesearch import registry
from tsdiff.treesearch.callables import CallableVerifier


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Best-of-4 of two prompts."""
    folder = tmp_path_factory.mktemp("saved")
    library.search("gaussian", ["near (3, 2.4)", "near (1, 1)"], policy="best-of-n", policy_options={"n": 4}, steps=3, verifier=["gaussian-target", "luminance"], out=folder)
    return folder / "run-0001"


def run_of(saved, number=0):
    return sorted(path for path in saved.iterdir() if path.is_dir())[number]


def test_a_table_tells_old_and_new_scores_ranks_and_the_correlation(tsdiff, saved):
    run = run_of(saved)
    result = tsdiff("rescore", run, "--verifier", "gaussian-log-density", "--verifier", "gaussian-target")
    assert result.exit_code == 0, result.output
    first, second = result.stdout.split("\n\n")
    title, header, *lines = first.splitlines()
    assert title == f"{run}: 'near (3, 2.4)' seed 0"
    assert re.split(r"\s{2,}", header.strip()) == ["node", "level", "gaussian-target", "gaussian-log-density", "rank", "change"]
    rows = [line.split() for line in lines[:4]]
    assert [row[4] for row in rows] == ["1", "2", "3", "4"]
    new = [float(row[3]) for row in rows]
    assert new == sorted(new, reverse=True)
    old = [float(row[2]) for row in rows]
    changes = [int(row[5]) for row in rows]
    assert [sorted(old, reverse=True).index(score) - place for place, score in enumerate(old)] == changes
    assert sum("answer" in line for line in lines) == 1
    assert any(re.fullmatch(r"rank correlation\s+-?[01]\.\d{3}", line) for line in lines)
    assert f"{run}/rescored/gaussian-log-density.json" in first
    assert "gaussian-target, now" in second
    assert re.search(r"rank correlation\s+1\.000", second)


def test_several_trees_and_the_mean_over_them(tsdiff, saved):
    result = tsdiff("rescore", saved, "--verifier", "luminance", "--top", "2", "--quiet")
    assert (result.exit_code, result.stderr) == (0, "")
    assert len(re.findall(r"shown +2 of 4 scored nodes \(--top 0 shows all\)", result.stdout)) == 2
    assert re.search(r"rank correlation of luminance +-?[01]\.\d{3} \[-?[01]\.\d{3}, -?[01]\.\d{3}\], mean of 2 trees", result.stdout)


def test_json_is_one_object_for_each_tree_and_verifier(tsdiff, saved):
    result = tsdiff("rescore", saved, "--verifier", "luminance", "--verifier", "sharpness", "--at", "x0", "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(line["prompt"], line["verifier"]) for line in lines] == [(prompt, name) for prompt in ("near (3, 2.4)", "near (1, 1)") for name in ("luminance", "sharpness")]
    for line in lines:
        assert json.loads(Path(line["file"]).read_text())["values"] == line["values"]
        assert len(line["values"]) == 4
        assert sum(line["skipped"].values()) == 4, "the first noises"


def test_nodes_without_a_score_make_it_incomplete(tsdiff, saved, monkeypatch):
    def moody(images, prompts):
        return [None if row == 0 else 1.0 for row in range(len(images))]

    monkeypatch.setitem(registry.verifiers._added, "moody", lambda: CallableVerifier(moody))
    result = tsdiff("rescore", run_of(saved), "--verifier", "moody")
    assert result.exit_code == 3
    assert "failed: " in result.stderr
    assert "moody gave no score for 1 node: moody gave nan" in result.stderr
    assert "rank correlation  - (one of them is constant)" in result.stdout


def test_a_single_sample_has_no_rank_correlation_and_says_why(tsdiff, tmp_path):
    assert tsdiff("search", "--model", "gaussian", "--policy", "best-of-n", "-P", "n=1", "--steps", "3", "--quiet", "--out", "one").exit_code == 0
    assert "rank correlation  - (1 node with both scores)" in tsdiff("rescore", "one", "--verifier", "luminance").stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nowhere", "--verifier", "luminance"], "is not the folder of a run"),
        (["RUN"], "Missing option '--verifier'"),
        (["RUN", "--verifier", "luminace"], "luminance"),
        (["RUN", "--verifier", "human"], "verifier human answers later"),
        (["RUN", "--verifier", "ensemble:rule=rank,members=luminance,sharpness"], "scores relative to a whole set"),
        (["RUN", "--verifier", "luminance", "--at", "lookahead"], "'lookahead' is not one of 'final', 'x0'"),
    ],
)
def test_mistakes_are_one_line_and_status_two(tsdiff, saved, arguments, complaint):
    result = tsdiff("rescore", *(str(run_of(saved)) if argument == "RUN" else argument for argument in arguments))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert complaint in result.stderr
    assert len(result.stderr.splitlines()) == 1
