"""`tsdiff grid`: answers side by side, on the command line."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from viewer_runs import STEPS, node, write_run

from tsdiff.viewer.figures import paper


@pytest.fixture
def runs(tmp_path):
    """Three prompts by two policies without one, as folders of a folder."""
    for number, (prompt, policy) in enumerate((prompt, policy) for prompt in ("a cat", "a dog", "<b>") for policy in ("beam", "smc")):
        if number == 5:
            continue
        nodes = [node(0, None, 0, kind="draw"), node(1, 0, STEPS, score=number / 2)]
        folder = write_run(tmp_path / "runs" / f"run-{number:04d}", nodes, prompt=prompt, best_png=True)
        facts = json.loads((folder / "run.json").read_text())
        facts["options"]["policy"]["name"] = policy
        (folder / "run.json").write_text(json.dumps(facts))
    return tmp_path / "runs"


def test_a_grid_of_prompts_and_policies(tsdiff, runs, tmp_path):
    result = tsdiff("grid", "runs")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "grid.png\n", "5 runs: 3 rows by 2 columns\n"), result.output
    with Image.open(tmp_path / "grid.png") as picture:
        first = picture.size
    told = json.loads(tsdiff("grid", "runs/run-0000", "runs", "--cols", "prompt", "--rows", "policy", "-o", "g.webp", "--json").stdout)
    assert (told["row_values"], told["col_values"], told["pages"]) == (["beam", "smc"], ["a cat", "a dog", "<b>"], 1)
    assert told["cells"] == [["runs/run-0000", "runs/run-0002", "runs/run-0004"], ["runs/run-0001", "runs/run-0003", None]]
    with Image.open(tmp_path / "g.webp") as picture:
        assert picture.format == "WEBP"
        assert (picture.width > first[0]) or (picture.height < first[1])


def test_large_grids_have_pages(tsdiff, tmp_path):
    for number in range(13):
        write_run(tmp_path / "runs" / f"run-{number:04d}", [node(0, None, 0), node(1, 0, STEPS, score=1.0)], prompt=f"prompt {number}", best_png=True)
    first = tsdiff("grid", "runs")
    assert first.stderr.splitlines()[1] == "page 1 of 2: rows 1 to 12 of 13, columns 1 to 1 of 1; --page shows another"
    told = json.loads(tsdiff("grid", "runs", "--page", "2", "-o", "second.png", "--json").stdout)
    assert told["cells"] == [["runs/run-0012"]]
    assert tsdiff("grid", "runs", "--page", "3", "-o", "third.png").stderr == "error: there is no page 3; the grid has 2 pages\n"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ((), "Missing argument 'RUN...'"),
        (("nowhere",), "there is no folder 'nowhere'"),
        (("empty",), "there is no run to show in 'empty'"),
        (("runs", "--rows", "policy"), "rows and columns are both 'policy'"),
        (("runs", "--rows", "color"), "'color' is not one of 'prompt', 'policy'"),
        (("runs", "--page", "0"), "--page"),
        (("runs", "-o", "grid.svg"), "ends in .svg; known are .png, .jpg, .webp"),
        (("runs", "-o", "away/grid.png"), "there is no folder 'away'"),
        (("runs", "-o", "there.png"), "is there already"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tsdiff, runs, tmp_path, arguments, hint):
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.png").write_text("mine")
    result = tsdiff("grid", *arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = result.stderr.splitlines()
    assert hint in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "runs", "there.png"]
    assert (tmp_path / "there.png").read_text() == "mine"


def test_a_run_that_cannot_be_read_is_left_out_and_said(tsdiff, runs):
    (runs / "run-0000" / "run.json").write_text("{")
    (runs / "run-0000" / "tree.json").write_text("{")
    result = tsdiff("grid", "runs", "--force")
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: left out: nothing of the run 'runs/run-0000' can be read")
    assert "4 runs" in result.stderr


def test_without_matplotlib_one_line_says_what_to_install(tsdiff, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "find_spec", lambda name: None)
    for command in (("grid", "runs"), ("plot", "runs"), ("export", "runs/run-0000", "tree.svg")):
        result = tsdiff(*command)
        assert (result.exit_code, result.stderr) == (2, "error: pictures need matplotlib, which is not installed; run: pip install 'tsdiff[plots]'\n")
    assert tsdiff("export", "runs/run-0000", "tree.csv").exit_code == 0
