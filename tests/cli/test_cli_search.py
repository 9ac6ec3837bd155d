"""`tsdiff search` and `tsdiff plan` on the analytic world: real runs, and what is shown of odd results."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_sd import tiny_stable_diffusion

from tsdiff.cli import progress as progress_module
from tsdiff.cli.progress import lines
from tsdiff.treesearch import plan
from tsdiff.treesearch import search as search_module
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.results import Failure, Results

USUAL_MODEL = plan.DEFAULT_MODEL  # before a test sets another

QUICK = ("--steps", "4", "-P", "width=2", "-P", "branch=2")


def test_the_demonstration_needs_no_options_and_says_what_it_is(tsdiff, tmp_path):
    result = tsdiff("search", "--policy", "beam")
    assert result.exit_code == 0, result.output
    for word in ("'gaussian'", "demonstration prompt", "NFE each", "network rows"):
        assert word in result.stderr
    facts = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in result.stdout.splitlines())
    assert set(facts) == {"image", "score", "- distance", "NFE", "rows", "verifier calls", "seconds", "run"}
    assert (tmp_path / facts["image"]).is_file()
    assert "baseline" in facts["score"]
    record = json.loads((tmp_path / facts["run"] / "run.json").read_text())
    assert facts["NFE"].startswith(f"{record['result']['nfe']:,} ")
    assert record["options"]["typed"] == {"policy": "beam"}


def test_without_a_model_named_the_embedded_one_is_searched(tsdiff, monkeypatch):
    """What `make demo` does, at its smallest: the learned verifier steers, the checker judges beside the baseline."""
    monkeypatch.setattr(plan, "DEFAULT_MODEL", USUAL_MODEL)
    result = tsdiff("search", "--policy", "best-of-n", "-P", "n=2", "--steps", "2", "--json")
    assert result.exit_code == 0, result.output
    run = json.loads(result.stdout)
    assert run["model"] == "shapes"
    assert run["verifier"] == "shapes-clip"
    assert set(run["scores"]) == set(run["first_scores"]) == {"shapes-clip", "shapes-oracle"}


def test_json_is_one_object_for_each_run(tsdiff, tmp_path):
    result = tsdiff("search", "near (1, 2)", "near (0, 0)", "--seed", "0-1", "--json", *QUICK)
    runs = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(run["prompt"], run["seed"]) for run in runs] == [("near (1, 2)", 0), ("near (1, 2)", 1), ("near (0, 0)", 0), ("near (0, 0)", 1)]
    for run in runs:
        assert {"image", "score", "first_score", "nfe", "rows", "seconds", "run"} <= set(run)
        assert run["nfe"] == run["rows"] > 0
        assert (tmp_path / run["image"]).is_file()


def test_the_plan_is_what_the_search_spends(tsdiff):
    plan = json.loads(tsdiff("plan", "--json", *QUICK).stdout)
    run = json.loads(tsdiff("search", "--json", *QUICK).stdout)
    assert plan["cost"]["exact"]
    assert plan["cost"]["upper"]["nfe"] == run["nfe"]
    assert plan["rows_upper"] == run["nfe"] + run["baseline_nfe"]


def test_a_plan_writes_nothing(tsdiff, tmp_path):
    result = tsdiff("plan", "--nfe", "200")
    assert result.exit_code == 0
    assert "(exact)" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_several_runs_print_a_table_with_whole_paths(tsdiff, tmp_path):
    result = tsdiff("search", "--seed", "0-2", "--quiet", "--no-baseline", "--out", "a folder with a rather long name", *QUICK)
    header, *rows = result.stdout.splitlines()
    assert header.split() == ["prompt", "seed", "score", "baseline", "NFE", "rows", "calls", "seconds"]
    assert len(rows) == 3
    for row in rows:
        assert (tmp_path / row[row.index("a folder") :]).is_file()
    assert result.stderr == ""


def test_quiet_and_json_leave_stderr_empty(tsdiff):
    result = tsdiff("search", "--quiet", "--json", *QUICK)
    assert (result.exit_code, result.stderr) == (0, "")


def test_prompts_come_from_a_file(tsdiff, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "near (1, 1)"}\n{"prompt": "near (2, 2)"}\n')
    plan = json.loads(tsdiff("plan", "--prompts", "p.jsonl", "--json").stdout)
    assert plan["prompts"] == ["near (1, 1)", "near (2, 2)"]


BROKEN_MODEL = "broken"


@pytest.mark.parametrize(
    ("arguments", "hints"),
    [
        (["--policy", "beem"], ["'beem'", "'beam'", "tsdiff list policies"]),
        (["--verifier", "luminence"], ["'luminence'", "'luminance'"]),
        (["--model", "gausian"], ["'gausian'", "'gaussian'"]),
        (["--model", BROKEN_MODEL], [BROKEN_MODEL, "model_index.json"]),
        (["--solver", "dimm"], ["'dimm'", "'ddim'"]),
        (["--polcy", "beam"], ["'--polcy'", "'--policy'"]),
        (["-P", "widht=3"], ["'widht'", "'width'"]),
        (["-P", "width"], ["'width'", "KEY=VALUE"]),
        (["-P", "width=0"], ["width is 0", "at least 1"]),
        (["--nfe", "3"], ["nfe is 3", "smallest budget is 20"]),
        (["--nfe", "0"], ["--nfe", "x>=1"]),
        (["--nfe", "many"], ["--nfe", "many"]),
        (["--device", "gpu"], ["gpu", "cuda:N"]),
        (["--dtype", "int8"], ["int8", "bfloat16"]),
        (["--seed", "5-2"], ["--seed", "2-5"]),
        (["--prompts", "empty.txt"], ["empty.txt", "holds no prompt"]),
        (["--prompts", "latin.txt"], ["latin.txt", "line 1", "UTF-8"]),
        (["--prompts", "nowhere.txt"], ["nowhere.txt", "cannot be read"]),
        (["a prompt", "--prompts", "empty.txt"], ["--prompts", "one of them"]),
        (["--init-image", "nowhere.png"], ["nowhere.png"]),
        (["--strength", "0.5"], ["strength", "image"]),
        (["--config", "nowhere.toml"], ["nowhere.toml", "cannot be read"]),
        (["--guidance-rescale", "2"], ["--guidance-rescale", "0.0<=x<=1.0"]),
        (["--guidance-interval", "5,1"], ["--guidance-interval", "LOW <= HIGH"]),
        (["near (1, 1) \udcff"], ["UTF-8"]),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_written(tsdiff, tmp_path, arguments, hints):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / BROKEN_MODEL).mkdir()
    before = sorted(tmp_path.iterdir())
    result = tsdiff("search", *arguments, "--policy", "beam") if "--policy" not in arguments else tsdiff("search", *arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert result.stderr.count("error:") == 1
    assert all(hint in last for hint in hints), last
    assert sorted(tmp_path.iterdir()) == before


def test_a_device_that_is_not_there_is_wrong_usage(tsdiff):
    result = tsdiff("search", "--device", "cuda:77")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "cuda:77" in result.stderr.splitlines()[-1]
    assert result.stderr.splitlines()[-1].startswith("error: device")


def test_an_out_folder_that_cannot_be_written_fails_before_the_search(tsdiff, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(search_module, "execute", lambda *_, **__: pytest.fail("the search was started"))
    result = tsdiff("search", "--out", "file")
    assert result.exit_code == 2
    assert "--out file cannot be written" in result.stderr
    assert (tmp_path / "file").read_text() == "in the way"


def replace_execute(monkeypatch, change):
    """Let `execute` run, then change its results."""
    execute = search_module.execute
    monkeypatch.setattr(search_module, "execute", lambda plan, **options: change(execute(plan, **options)))


def with_failure(results: Results, *, keep: bool) -> Results:
    failure = Failure("near (9, 9)", 5, UsageError("scoring\nfailed everywhere"))
    return Results(results.results if keep else [], results.engine, [failure])


def test_some_failures_make_an_incomplete_search(tsdiff, monkeypatch):
    replace_execute(monkeypatch, lambda results: with_failure(results, keep=True))
    result = tsdiff("search", "--json", *QUICK)
    assert result.exit_code == 3
    good, bad = map(json.loads, result.stdout.splitlines())
    assert good["complete"]
    assert (bad["seed"], bad["image"], bad["score"], bad["error"]) == (5, None, None, "scoring failed everywhere")
    assert "failed: 'near (9, 9)', seed 5: scoring failed everywhere" in result.stderr


def test_only_failures_make_a_failed_search(tsdiff, monkeypatch):
    replace_execute(monkeypatch, lambda results: with_failure(results, keep=False))
    result = tsdiff("search", *QUICK)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "Traceback" not in result.stderr
    assert "UsageError" in tsdiff("search", "--debug", *QUICK).stderr


def test_an_answer_without_score_is_incomplete_and_said_so(tsdiff, monkeypatch):
    def forget(results):
        (result,) = results
        result.node.values.clear()
        return results

    replace_execute(monkeypatch, forget)
    result = tsdiff("search", *QUICK)
    assert result.exit_code == 3
    assert "none: scoring failed" in result.stdout
    assert "1 run incomplete" in result.stderr


def test_an_interruption_exits_130_and_names_what_is_kept(tsdiff, monkeypatch):
    def interrupt(*_, begun, **__):
        begun(Path("kept/run 1"))
        raise KeyboardInterrupt

    monkeypatch.setattr(search_module, "execute", interrupt)
    result = tsdiff("search", "--out", "kept")
    assert result.exit_code == 130
    assert "interrupted: what was done is kept; continue with: tsdiff resume 'kept/run 1'" in result.stderr


def test_a_bug_is_one_line_and_a_traceback_only_with_debug(tsdiff, monkeypatch):
    def fail(*_, **__):
        raise KeyError("oops")

    monkeypatch.setattr(search_module, "execute", fail)
    plain, debug = tsdiff("search", "--quiet"), tsdiff("search", "--quiet", "--debug")
    assert plain.exit_code == debug.exit_code == 1
    assert plain.stderr.splitlines() == ["error: unexpected KeyError: 'oops'; --debug shows where"]
    assert "Traceback" in debug.stderr
    assert "in fail" in debug.stderr


def test_progress_lines_come_at_most_every_ten_seconds(capsys):
    times = iter([0.0, 1.0, 9.9, *[10.0] * 2, 15.0, *[25.0] * 2])
    update = lines(lambda: next(times))
    for nfe in range(5):
        update(SimpleNamespace(nfe=nfe, nfe_total=10, runs_done=0, runs_total=2, best_score=0.5 if nfe else None))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == ["2 of 10 NFE (20%), 0 of 2 runs, best 0.5", "4 of 10 NFE (40%), 0 of 2 runs, best 0.5"]


def test_redirected_progress_of_a_real_search_counts_every_evaluation(tsdiff, monkeypatch):
    monkeypatch.setattr(progress_module, "SECONDS_BETWEEN_LINES", 0.0)
    plan = json.loads(tsdiff("plan", "--json", *QUICK).stdout)
    result = tsdiff("search", *QUICK)
    assert f"{plan['nfe_upper']} of {plan['nfe_upper']} NFE (100%)" in result.stderr
    assert "\x1b" not in result.output


def test_a_prompt_that_is_cut_is_told_and_quiet_is_quiet(tsdiff, tmp_path):
    tiny_stable_diffusion(tmp_path / "model")
    options = ("--model", str(tmp_path / "model"), "--verifier", "luminance", "--policy", "best-of-n", "-P", "n=1", "--steps", "2", "--out", str(tmp_path / "out"))
    told, quiet = tsdiff("search", "a cat " * 100, *options), tsdiff("search", "a cat " * 100, *options, "--quiet")
    assert told.exit_code == quiet.exit_code == 0
    assert sum("token" in line for line in told.stderr.splitlines()) == 1
    assert quiet.stderr == ""
