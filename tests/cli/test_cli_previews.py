"""`--previews` and `--no-metadata` of `tsdiff search` and `tsdiff resume`."""

import json

import pytest

from tsdiff.treesearch.picturefiles import read_metadata
from tsdiff.treesearch.previewfile import PREVIEWS, read_previews

QUICK = ("--steps", "4", "-P", "width=2", "-P", "branch=2", "--verifier", "luminance", "--quiet", "--json")


def record(tmp_path, run):
    return json.loads((tmp_path / run / "run.json").read_text())


def test_pictures_and_history_are_there_unless_they_are_not_wanted(tsdiff, tmp_path):
    (told, plain, bare) = (json.loads(tsdiff("search", *QUICK, *more).stdout) for more in ((), ("--previews", "none"), ("--previews", "all", "--no-metadata")))
    assert len(read_previews(tmp_path / told["run"])) == len(read_previews(tmp_path / bare["run"])) == told["decodes"] + 1
    assert not (tmp_path / plain["run"] / PREVIEWS).exists()
    assert told["decodes"] == plain["decodes"] == bare["decodes"]
    history = read_metadata(tmp_path / told["image"])
    assert history["parameters"].startswith(told["prompt"] + "\nNegative prompt: \nSteps: 4, Sampler: DDIM, ")
    assert history["tsdiff"]["arguments"]["policy_options"] == {"width": "2", "branch": "2"}
    assert history["tsdiff"]["run"] == "run-0001"
    assert read_metadata(tmp_path / bare["image"]) is None
    assert read_metadata((tmp_path / bare["run"]) / "baseline.png") is None
    assert (tmp_path / plain["image"]).read_bytes() != (tmp_path / bare["image"]).read_bytes()
    options = [record(tmp_path, run["run"])["options"] for run in (told, plain, bare)]
    assert [(one["previews"], one["metadata"]) for one in options] == [("kept", True), ("none", True), ("all", False)]
    assert options[2]["typed"]["metadata"] is False


def test_a_plan_takes_them_and_an_unknown_choice_is_one_line(tsdiff):
    assert tsdiff("plan", "--previews", "all", "--no-metadata").exit_code == 0
    result = tsdiff("search", "--previews", "some")
    assert result.exit_code == 2
    assert "'some' is not one of 'kept', 'all', 'none'" in result.stderr


def test_a_config_file_says_them_too(tsdiff, tmp_path):
    (tmp_path / "my.toml").write_text('previews = "none"\nmetadata = false\n')
    run = json.loads(tsdiff("search", *QUICK, "--config", "my.toml").stdout)
    assert not (tmp_path / run["run"] / PREVIEWS).exists()
    assert read_metadata(tmp_path / run["image"]) is None


@pytest.mark.parametrize("way", ["resume", "search"])
def test_both_may_change_when_a_search_goes_on(tsdiff, tmp_path, monkeypatch, way):
    from tsdiff.treesearch import search as search_module

    execute = search_module.execute
    left = iter(range(6))
    with monkeypatch.context() as patch:
        patch.setattr(search_module, "execute", lambda plan, **options: execute(plan, **options | {"stop": lambda: next(left, None) is None}))
        assert tsdiff("search", *QUICK).exit_code == 130
    early = len(read_previews(tmp_path / "runs/run-0001"))
    changed = ("--previews", "none", "--no-metadata")
    command = ("resume", "runs/run-0001", "--quiet", "--json", *changed) if way == "resume" else ("search", *QUICK, *changed)
    run = json.loads(tsdiff(*command).stdout)
    assert run["run"] == "runs/run-0001"
    assert read_metadata(tmp_path / run["image"]) is None
    assert len(read_previews(tmp_path / run["run"])) == early < run["decodes"]
    options = record(tmp_path, run["run"])["options"]
    assert (options["previews"], options["metadata"]) == ("none", False)


def test_what_cannot_be_written_is_one_line(tsdiff, tmp_path, monkeypatch):
    from tsdiff.treesearch import previews

    def full(path, disk):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(previews, "PreviewFile", full)
    result = tsdiff("search", *[word for word in QUICK if word != "--quiet"])
    assert result.exit_code == 0
    (line,) = [line for line in result.stderr.splitlines() if "previews" in line]
    assert line.strip() == "previews are missing, the search went on without: 'runs/run-0001/previews.pack' cannot be written (No space left on device)"
