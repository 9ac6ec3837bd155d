"""`tsdiff resume`, and `tsdiff search` where the same search was interrupted."""

import json
import os

import pytest

from tsdiff.treesearch import search as search_module
from tsdiff.treesearch.lock import Lock
from tsdiff.treesearch.search import execute

QUICK = ("--steps", "6", "-P", "width=2", "-P", "branch=2", "--deterministic")


@pytest.fixture
def interrupt(tsdiff, monkeypatch, tmp_path):
    """Run a search that is interrupted after some batches; the folder it says."""

    def interrupted(*arguments, batches=6):
        left = iter(range(batches))

        def execute_some(plan, **options):
            return execute(plan, **options | {"stop": lambda: next(left, None) is None})

        with monkeypatch.context() as patch:
            patch.setattr(search_module, "execute", execute_some)
            result = tsdiff("search", *arguments)
        assert result.exit_code == 130, result.output
        return result.stderr.splitlines()[-1].rpartition("tsdiff resume ")[2]

    return interrupted


def trees(tmp_path, folder):
    return {path.name: path.read_bytes() for path in sorted((tmp_path / folder).rglob("tree.json"))}


def test_an_interrupted_search_is_continued_and_says_the_same(tsdiff, interrupt, tmp_path):
    whole = json.loads(tsdiff("search", *QUICK, "--json", "--out", "whole").stdout)
    folder = interrupt(*QUICK, "--out", "cut")
    assert folder == "cut/run-0001"
    assert json.loads((tmp_path / folder / "run.json").read_text())["status"] == "interrupted"
    result = tsdiff("resume", folder, "--json")
    assert result.exit_code == 0, result.output
    assert "continuing cut/run-0001: 1 prompt x 1 seed, beam" in result.stderr
    again = json.loads(result.stdout)
    assert {name: again[name] for name in again if name not in ("seconds", "run", "image")} == {name: whole[name] for name in whole if name not in ("seconds", "run", "image")}
    assert trees(tmp_path, "cut") == trees(tmp_path, "whole")
    assert json.loads((tmp_path / folder / "run.json").read_text())["status"] == "done"


def test_the_same_command_goes_on_and_another_begins_anew(tsdiff, interrupt, tmp_path):
    interrupt(*QUICK)
    other = tsdiff("search", *QUICK, "--seed", "1")
    assert "run-0002" in other.stdout
    same = tsdiff("search", *QUICK, "--max-batch", "4")
    assert "continuing runs/run-0001, which was interrupted (--fresh begins anew)" in same.stderr
    assert "run-0001" in same.stdout
    assert "run-0003" in tsdiff("search", *QUICK).stdout, "what is done is not overwritten"
    interrupt(*QUICK)
    fresh = tsdiff("search", *QUICK, "--fresh")
    assert "continuing" not in fresh.stderr
    assert "run-0005" in fresh.stdout


def test_several_prompts_go_on_together_or_alone(tsdiff, interrupt, tmp_path):
    command = ("near (1, 2)", "near (0, 0)", "near (2, 2)", *QUICK)
    tsdiff("search", *command, "--out", "whole")
    folder = interrupt(*command, "--out", "cut", batches=12)
    one = sorted(path for path in (tmp_path / folder).iterdir() if path.is_dir())[1]
    assert tsdiff("resume", one, "--quiet").exit_code == 0
    assert json.loads((one / "run.json").read_text())["status"] == "done"
    result = tsdiff("resume", folder, "--json", "--quiet")
    assert [json.loads(line)["prompt"] for line in result.stdout.splitlines()] == ["near (1, 2)", "near (0, 0)", "near (2, 2)"]
    for path in (tmp_path / folder).glob("*/tree.json"):
        assert path.read_bytes() == (tmp_path / "whole/run-0001" / path.parent.name / "tree.json").read_bytes()


@pytest.mark.parametrize(
    ("folder", "hint"),
    [("nowhere", "'nowhere' is not the folder of a run"), (".", "'.' is not a run folder, but holds some: name one of them, such as 'broken' (2 in all)"), ("old", "does not say what was searched"), ("broken", "cannot be read"), ("empty", "it holds nothing. If a search made it, that was stopped before it began"), ("other", "it has no run.json")],
)
def test_what_is_no_run_is_one_line(tsdiff, tmp_path, folder, hint):
    for name, text in (("old", '{"format": 1, "status": "done"}'), ("broken", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(text)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/lock").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").touch()
    result = tsdiff("resume", folder)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert hint in line


def test_resuming_what_is_done_changes_nothing(tsdiff, tmp_path):
    tsdiff("search", *QUICK)
    before = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.name != "lock" and path.is_file()}
    result = tsdiff("resume", "runs/run-0001")
    assert result.exit_code == 0
    assert result.stderr.splitlines()[-1] == "runs/run-0001 is done, and nothing is left to do"
    assert "runs/run-0001" in result.stdout
    assert {path: path.read_bytes() for path in before} == before
    assert not (tmp_path / "runs/run-0001/latents").exists()


def test_a_search_that_somebody_else_is_doing_is_told_and_left_alone(tsdiff, interrupt, tmp_path):
    folder = interrupt(*QUICK)
    before = {path: path.read_bytes() for path in (tmp_path / folder).rglob("*") if path.is_file() and path.name != "lock"}
    with Lock(tmp_path / folder / "lock"):
        result = tsdiff("search", *QUICK)
        (line,) = (line for line in result.stderr.splitlines() if "same search" in line)
        assert line == f"runs/run-0001 is the same search, which process {os.getpid()} is doing now; this is another one"
        assert "run-0002" in result.stdout
        assert "same search" not in tsdiff("search", *QUICK, "--seed", "1").stderr
    assert {path: path.read_bytes() for path in before} == before


def test_what_was_damaged_is_told_kept_and_done_again(tsdiff, interrupt, tmp_path):
    folder = tmp_path / interrupt(*QUICK)
    data = (folder / "journal.jsonl").read_bytes()
    at = data.index(b'"price"')
    (folder / "journal.jsonl").write_bytes(data[:at] + b'"Price"' + data[at + 7 :])
    result = tsdiff("resume", folder)
    assert result.exit_code == 0
    (line,) = (line for line in result.stderr.splitlines() if "is damaged" in line)
    assert "is damaged (its checksum is wrong)" in line
    assert line.endswith("journal.jsonl.damaged-1 keeps them, and what they told is done again")
    assert data.endswith((folder / "journal.jsonl.damaged-1").read_bytes()[-200:])


def test_the_second_ctrl_c_stops_at_once():
    import signal

    from tsdiff.cli.interrupt import first_finishes_the_batch

    with first_finishes_the_batch() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
