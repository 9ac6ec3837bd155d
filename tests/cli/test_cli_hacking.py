"""`tsdiff hacking-report` on saved runs of the analytic world."""

import json
import re
from importlib.util import find_spec

import pytest

from tsdiff.bench.answers import load_searches
from tsdiff.bench.hacking import hacking_report
from tsdiff.treesearch import plan


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Best-of-4 and best-of-8 of two prompts under two seeds, in run-0001 and run-0002."""
    import tsdiff

    folder = tmp_path_factory.mktemp("runs")
    for n in (4, 8):
        tsdiff.search(
            "gaussian", ["near (3, 2.4)", "near (1, 1)"], policy="best-of-n", policy_options={"n": n}, nfe=n * 3 + 1, steps=3, seed=(0, 1),
            verifier=["gaussian-target", "gaussian-log-density"], out=folder,
        )  # fmt: skip
    return folder


def test_table_has_a_row_for_each_budget(tsdiff, saved):
    result = tsdiff("hacking-report", saved, "--held-out", "gaussian-log-density", "--oracle", "luminance", "--plot", "plot.png")
    assert result.exit_code == 0, result.output
    header, *lines = result.stdout.splitlines()
    assert header.split() == ["policy", "NFE", "searched", "held-out", "oracle", "index", "distance", "vendi", "searches"]
    rows = [re.split(r"\s{2,}", line) for line in lines[:3]]
    assert [row[1] for row in rows] == ["3", "12", "24"]
    assert [row[-1] for row in rows] == ["4", "4", "4"]
    facts = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in lines[3:])
    assert facts["searched"] == "gaussian-target"
    assert facts["oracle"] == "luminance"
    assert facts["held-out peak"].endswith("(2 prompts, 2 seeds)")
    assert facts["held-out peak"].split()[0] in [row[1] for row in rows], "the NFE that the table shows, not the budget, which was one more"
    assert "too few to warn" in result.stderr
    assert "the plot is plot.png" in result.stderr


def test_the_example_of_the_help_can_be_searched(tsdiff, monkeypatch):
    monkeypatch.setattr(plan, "DEFAULT_MODEL", "shapes")  # as users have it
    (example,) = re.findall(r"^ +tsdiff (search .*)$", tsdiff("hacking-report", "--help").stdout, re.MULTILINE)
    result = tsdiff("plan", *example.split()[1:])
    assert result.exit_code == 0, result.output


def test_json_is_the_report(tsdiff, saved):
    result = tsdiff("hacking-report", saved / "run-0001", saved / "run-0002", "--held-out", "gaussian-log-density", "--json", "--quiet")
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout) == hacking_report([saved], held_out="gaussian-log-density").to_json()


def test_within_a_run_the_largest_k_is_its_answer(tsdiff, saved):
    report = json.loads(tsdiff("hacking-report", saved / "run-0002", "--held-out", "gaussian-log-density", "--within", "--json").stdout)
    (curve,) = report["curves"]
    assert [point["nfe"] for point in curve["points"]] == [3, 6, 12, 24]
    answers = [one.answer.scores["gaussian-target"] for one in load_searches([saved / "run-0002"])]
    assert curve["points"][-1]["scores"]["searched"] == pytest.approx(sum(answers) / len(answers))
    searched = [point["scores"]["searched"] for point in curve["points"]]
    assert searched == sorted(searched)


def test_hacking_is_warned_of_on_stderr(tsdiff, tmp_path):
    """The searched score is minus the held-out one."""
    import tsdiff as package

    class Opposite:
        needs = frozenset({"x0"})
        scope, latency, judges, differentiable = "row", "immediate", "any", True

        def __init__(self, name, sign):
            self.name, self.sign = name, sign

        def prepare(self, device):
            pass

        def check(self, condition):
            pass

        def score(self, candidates):
            from tsdiff.treesearch.protocols import Scores

            return Scores(self.sign * candidates.x0[:, 0])

    package.search(
        "gaussian", "near (0, 0)", policy="best-of-n", policy_options={"n": 8}, verifier=[Opposite("left", -1.0), Opposite("right", 1.0)],
        steps=3, seed=range(10), out=tmp_path / "runs",
    )  # fmt: skip
    result = tsdiff("hacking-report", "runs", "--held-out", "right", "--within", "--quiet")
    assert result.exit_code == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("warning: policy best-of-n hacks left: from 3 to 24 NFE it rises by ")
    assert "the held-out right falls by" in line
    assert "-1.00" in result.stdout  # the index of opposites


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("hacking-report", "--held-out", "luminance"), "RUN"),
        (("hacking-report", "SAVED"), "--held-out"),
        (("hacking-report", ".", "--held-out", "luminance"), "no run folder"),
        (("hacking-report", "SAVED", "--held-out", "gaussian-target"), "hold one out"),
        (("hacking-report", "SAVED", "--held-out", "luminence"), "luminance"),
        (("hacking-report", "SAVED", "--held-out", "gaussian-value"), "reads latents of a search"),
        (("hacking-report", "SAVED", "--held-out", "luminance", "--features", "luminance"), "has no features"),
        (("hacking-report", "SAVED", "--held-out", "luminance", "--within"), "has not scored the samples"),
        (("hacking-report", "SAVED", "--held-out", "luminance", "--plot", "a.gif"), ".png, .pdf, .svg"),
    ],
)
def test_wrong_report_usage_is_one_line(tsdiff, saved, arguments, complaint):
    result = tsdiff(*(saved if argument == "SAVED" else argument for argument in arguments))
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert complaint in line


def test_report_without_matplotlib_has_no_plot_only(tsdiff, saved, monkeypatch):
    from tsdiff.bench import plots

    monkeypatch.setattr(plots, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    assert tsdiff("hacking-report", saved, "--held-out", "luminance").exit_code == 0
    result = tsdiff("hacking-report", saved, "--held-out", "luminance", "--plot", "a.png")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "pip install 'tsdiff[plots]'" in result.stderr
