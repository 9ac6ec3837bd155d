"""`tsdiff expand`, and `tsdiff resume` where an expansion was interrupted."""

import json
import shutil

import pytest

from tsdiff.treesearch import expand as expand_module
from tsdiff.treesearch.expand import carry_out

QUICK = ("--steps", "6", "--policy", "best-of-n", "-P", "n=2", "--deterministic")


@pytest.fixture
def run(tsdiff):
    """A run that is done, in the current folder."""
    assert tsdiff("search", *QUICK, "--quiet").exit_code == 0
    return "runs/run-0001"


@pytest.fixture
def interrupt(tsdiff, monkeypatch):
    """Run an expansion that is interrupted after some batches; what it says."""

    def interrupted(*arguments, batches=1):
        left = iter(range(batches))
        with monkeypatch.context() as patch:
            patch.setattr(expand_module, "carry_out", lambda expansion, **options: carry_out(expansion, **options | {"stop": lambda: next(left, None) is None}))
            result = tsdiff("expand", *arguments)
        assert result.exit_code == 130, result.output
        return result.stderr.splitlines()[-1]

    return interrupted


def test_it_says_what_it_costs_before_and_what_it_found_after(tsdiff, run, tmp_path):
    result = tsdiff("expand", run, "best", "--children", "3", "--renoise", "0.5")
    assert result.exit_code == 0, result.output
    facts = json.loads((tmp_path / run / "run.json").read_text())
    node = facts["drivers"][1]["node"]
    assert f"expanding {run} from node {node} (level 6 of 6), re-noised to level 3: 3 children, 9 NFE; 9 network rows in all" in result.stderr
    assert "NFE             9 (21 with all before)" in result.stdout
    assert f"node {facts['drivers'][1]['best']}" in result.stdout
    assert "(before " in result.stdout
    assert tsdiff("expand", run, "--quiet").stderr == "", "the answer and eight children are the default"
    assert json.loads((tmp_path / run / "run.json").read_text())["drivers"][2]["policy"]["count"] == 8


def test_a_policy_and_its_options(tsdiff, run):
    result = tsdiff("expand", run, "best", "--policy", "beam", "-P", "width=2", "-P", "branch=2", "--renoise", "1", "--json", "--max-batch", "4")
    assert result.exit_code == 0, result.output
    line = json.loads(result.stdout)
    assert line["driver"]["policy"]["width"] == 2
    assert line["driver"]["to"] == 0
    assert line["nfe"] == line["driver"]["nfe"] + 12
    assert "re-noised to level 0: beam, " in result.stderr
    fitted = json.loads(tsdiff("expand", run, "best", "--to-level", "0", "--policy", "beam", "--nfe", "50", "--json").stdout)
    assert 45 <= fitted["driver"]["nfe"] <= 50


def test_an_interrupted_expansion_is_continued_by_either_command(tsdiff, interrupt, run, tmp_path):
    for name in ("whole", "again"):
        shutil.copytree(tmp_path / run, tmp_path / name)
    tsdiff("expand", "whole", "--children", "9")
    trees = []
    for folder, command in ((run, ("resume", run)), ("again", ("expand", "again", "--children", "9"))):
        assert interrupt(folder, "--children", "9").endswith(f"continue with: tsdiff resume {folder}")
        assert json.loads((tmp_path / folder / "run.json").read_text())["status"] == "interrupted"
        other = tsdiff("expand", folder, "--children", "8")
        assert other.exit_code == 2
        assert f"was interrupted; finish it first: tsdiff resume {folder}" in other.stderr
        result = tsdiff(*command)
        assert result.exit_code == 0, result.output
        assert f"continuing the expansion of {folder} from node" in result.stderr
        trees.append((tmp_path / folder / "tree.json").read_bytes())
    assert trees == [(tmp_path / "whole/tree.json").read_bytes()] * 2


def test_searching_the_same_again_does_not_continue_an_expansion(tsdiff, interrupt, run):
    interrupt(run, "--children", "9")
    result = tsdiff("search", *QUICK)
    assert "continuing" not in result.stderr
    assert "run-0002" in result.stdout


def test_a_folder_of_runs_goes_on_with_what_is_being_expanded(tsdiff, interrupt, tmp_path):
    tsdiff("search", "near (1, 2)", "near (0, 0)", *QUICK, "--quiet")
    part = sorted(path for path in (tmp_path / "runs/run-0001").iterdir() if path.is_dir())[0]
    interrupt(part, "--children", "9")
    result = tsdiff("resume", "runs/run-0001", "--json")
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(line["prompt"], "driver" in line) for line in lines] == [("near (0, 0)", False), ("near (1, 2)", True)]
    assert json.loads((part / "run.json").read_text())["status"] == "done"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("nowhere",), "'nowhere' is not the folder of a run"),
        ((".",), "'.' is not a run folder, but holds some: name one of them, such as 'runs/run-0001'"),
        (("{run}", "12"), "node 12 does not exist; the tree's nodes are 0 to 3"),
        (("{run}", "-1"), "unknown option"),
        (("{run}", "bset"), "node is 'bset' but must be a node's index, or 'best'"),
        (("{run}", "best", "--renoise", "2"), "2.0 is not in the range 0.0<=x<=1.0"),
        (("{run}", "best", "--renoise", "0"), "is finished, so that there is nothing to denoise"),
        (("{run}", "best", "--children", "0"), "0 is not in the range x>=1"),
        (("{run}", "best", "--policy", "baem"), "unknown policy 'baem'; did you mean"),
        (("{run}", "best", "--policy", "beam", "-P", "wdith=2"), "wdith"),
        (("{run}", "best", "--policy", "beam", "--children", "2"), "children=2 was given beside a policy"),
        (("{run}", "best", "--nfe", "1"), "nfe is 1 but one sample from there costs 3"),
        (("{run}", "best", "--verifier", "lumniance"), "unknown verifier 'lumniance'"),
        (("{run}", "best", "--to-level", "7"), "to_level is 7 but node"),
    ],
)
def test_what_cannot_be_done_is_one_line(tsdiff, run, tmp_path, arguments, hint):
    before = {path: path.read_bytes() for path in (tmp_path / run).iterdir() if path.name != "lock"}
    result = tsdiff("expand", *(argument.format(run=run) for argument in arguments))
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert hint in line
    assert {path: path.read_bytes() for path in before} == before
