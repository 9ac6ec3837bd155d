"""`tsdiff plot`: curves and paths of saved runs, on the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from viewer_runs import STEPS, VERIFIER, Going, node

import tsdiff as package


@pytest.fixture
def runs(tmp_path):
    """Two runs of one search under two seeds, each with its journal: samples of known scores after a known number of evaluations."""
    for seed, scores in enumerate(((0.2, 0.1, 0.6), (0.4, 0.8, 0.3))):
        going = Going(tmp_path / "runs" / f"run-{seed:04d}", seed=seed)
        going.add(node(0, None, 0, kind="draw"), nfe=0)
        for number, score in enumerate(scores, 1):
            going.add(node(number, 0, STEPS, score=score), nfe=10)
        going.write("interrupted")
        going.close()
    return tmp_path / "runs"


def test_progress_is_what_the_journals_say(tsdiff, runs, tmp_path):
    result = tsdiff("plot", "runs", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    (curve,) = told.pop("curves")
    assert told == {"out": "plot.png", "kind": "progress", "runs": 2, "x": "nfe", "verifier": VERIFIER, "notices": []}
    assert (curve["label"], curve["units"], curve["unit"], curve["x"]) == ("beam", 2, "seeds", [10.0, 20.0, 30.0])
    assert curve["mean"] == pytest.approx([0.3, 0.5, 0.7])
    assert all(low <= mean <= high for low, mean, high in zip(curve["low"], curve["mean"], curve["high"], strict=True))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads(tsdiff("plot", "runs", "--x", "rows", "-o", "r.pdf", "--json").stdout)
    assert rows["curves"] == [curve]  # this search spends a row an evaluation
    assert (tmp_path / "r.pdf").read_bytes().startswith(b"%PDF")
    result = tsdiff("plot", "runs", "-o", "p.svg")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "p.svg\n", "2 runs\n")
    ElementTree.parse(tmp_path / "p.svg")


def test_scores_by_level(tsdiff, runs):
    told = json.loads(tsdiff("plot", "runs", "--kind", "levels", "--json").stdout)
    assert told["x"] == "level"
    assert told["curves"][0]["x"] == [STEPS]
    assert told["curves"][0]["mean"] == pytest.approx([0.4])  # of 0.3 and 0.5


def test_paths_over_the_density_that_the_run_has_kept(tsdiff, tmp_path):
    package.search("gaussian", "near (3, 2.4)", policy="best-of-n", policy_options={"n": 2}, steps=3, out=tmp_path / "runs")
    result = tsdiff("plot", "runs", "--kind", "trajectories")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "plot.png\n", "1 run\n"), result.output


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("nowhere",), "there is no folder 'nowhere'"),
        (("runs", "--kind", "pie"), "'pie' is not one of 'progress', 'levels', 'trajectories'"),
        (("runs", "--x", "days"), "'days' is not one of 'nfe', 'rows', 'seconds'"),
        (("runs", "--kind", "levels", "--x", "nfe"), "--x is for --kind progress"),
        (("runs", "--kind", "trajectories", "--verifier", "v"), "--verifier is for"),
        (("runs", "--verifier", "nobody"), f"no node has a score by 'nobody'; there are scores by {VERIFIER}"),
        (("runs", "--x", "seconds"), "its wall time is known when it is done"),
        (("runs", "--kind", "trajectories"), "has kept no latents"),
        (("runs", "-o", "plot.gif"), "ends in .gif; known are .png, .svg, .pdf"),
        (("runs", "-o", "there.png"), "is there already"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tsdiff, runs, tmp_path, arguments, hint):
    (tmp_path / "there.png").write_text("mine")
    result = tsdiff("plot", *arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = result.stderr.splitlines()
    assert hint in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "there.png"]


def test_importing_the_commands_and_their_help_is_light():
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from tsdiff.cli.app import cli\n"
        "for name in ('grid', 'plot', 'export'):\n"
        "    assert CliRunner().invoke(cli, [name, '--help']).exit_code == 0\n"
        "print([name for name in ('torch', 'numpy', 'scipy', 'matplotlib', 'PIL') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
