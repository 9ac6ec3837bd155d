"""`tsdiff predict-curve` on the analytic world."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tsdiff.treesearch import plan

QUICK = ("predict-curve", "--verifier", "gaussian-target", "--solver", "exact", "--steps", "6", "--samples", "8")


def test_the_demonstration_prints_a_curve_and_what_follows(tsdiff):
    result = tsdiff(*QUICK)
    assert result.exit_code == 0, result.output
    header, *lines = result.stdout.splitlines()
    assert re.split(r"\s{2,}", header) == ["level", "sigma/alpha", "NFE", "Spearman", "low", "high", "Kendall", "gain kept", "prompts"]
    rows = [line.split() for line in lines[:7]]
    assert [row[0] for row in rows] == ["0", "1", "2", "3", "4", "5", "6"]
    assert rows[-1][3:] == ["1.000", "1.000", "1.000", "1.000", "1.000", "1"]
    for row in rows:
        low, middle, high = float(row[4]), float(row[3]), float(row[5])
        assert low <= middle <= high
    facts = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in lines[7:])
    assert facts["NFE"] == "48 for 1 prompt x 8 samples"
    assert re.match(r"from level \d of 6|on no level", facts["branching pays"])
    assert "1 prompt: 48 NFE" in result.stderr


def test_json_is_one_object_with_the_same_numbers(tsdiff, tmp_path):
    (tmp_path / "prompts.txt").write_text("near (3, 2.4)\nnear (0, 2)\n")
    result = tsdiff(*QUICK, "--prompts", "prompts.txt", "--levels", "3", "--seed", "4", "--threshold", "-0.99", "--json", "--quiet")
    assert (result.exit_code, result.stderr) == (0, "")
    curve = json.loads(result.stdout)
    assert curve["prompts"] == ["near (3, 2.4)", "near (0, 2)"]
    assert [point["level"] for point in curve["levels"]] == [0, 3, 6]
    assert (curve["nfe"], curve["seed"], curve["samples"]) == (2 * 8 * 6, 4, 8)
    assert curve["branch_level"] in (0, 3)
    again = tsdiff(*QUICK, "--prompts", "prompts.txt", "--levels", "3", "--seed", "4", "--threshold", "-0.99", "--json", "--quiet")
    assert again.stdout == result.stdout


def test_another_verifier_and_a_plot(tsdiff, tmp_path):
    result = tsdiff(*QUICK, "near (1, 1)", "--against", "gaussian-log-density", "--plot", "curve.svg")
    assert result.exit_code == 0, result.output
    assert "gaussian-target against the final gaussian-log-density" in result.stdout
    assert "the plot is curve.svg" in result.stderr
    assert (tmp_path / "curve.svg").read_text(encoding="utf-8").startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("predict-curve",), "--verifier"),
        ((*QUICK, "--plot", "curve.gif"), ".png, .pdf, .svg"),
        ((*QUICK, "--plot", "nowhere/curve.png"), "'nowhere' does not exist"),
        ((*QUICK, "--samples", "2"), "--samples"),
        ((*QUICK, "--levels", "1"), "--levels"),
        ((*QUICK, "--threshold", "1"), "--threshold"),
        ((*QUICK, "near (1, 1)", "--prompts", "prompts.txt"), "use one of them"),
        ((*QUICK, "near (1, 1)", "near (1, 1)"), "given twice"),
        ((*QUICK, "--verifier", "gaussian-targt"), "gaussian-target"),
    ],
)
def test_wrong_usage_is_one_line_before_anything_is_sampled(tsdiff, arguments, complaint):
    result = tsdiff(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert complaint in line


def test_the_example_of_the_help_gives_a_curve(tsdiff, monkeypatch):
    monkeypatch.setattr(plan, "DEFAULT_MODEL", "shapes")  # as users have it
    example = re.search(r"^ +tsdiff (predict-curve .*)$", tsdiff("predict-curve", "--help").stdout, re.MULTILINE)[1]
    result = tsdiff(*example.split(), "--steps", "4", "--samples", "8")
    assert result.exit_code == 0, result.output
    assert "branching pays" in result.stdout


def test_without_matplotlib_only_a_plot_is_refused(tsdiff, monkeypatch):
    from tsdiff.bench import plots

    monkeypatch.setattr(plots, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    assert tsdiff(*QUICK).exit_code == 0
    result = tsdiff(*QUICK, "--plot", "curve.png")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "pip install 'tsdiff[plots]'" in result.stderr


def test_a_prompt_that_fails_makes_the_curve_incomplete(tsdiff, monkeypatch):
    from tsdiff.treesearch import search
    from tsdiff.treesearch.errors import UsageError
    from tsdiff.treesearch.results import Failure

    execute = search.execute

    def failing(plan, callback=None):
        results = execute(plan, callback=callback)
        results.failures.append(Failure("near (9, 9)", 0, UsageError("scoring failed everywhere")))
        return results

    monkeypatch.setattr(search, "execute", failing)
    result = tsdiff(*QUICK)
    assert result.exit_code == 3
    assert "failed: 'near (9, 9)': scoring failed everywhere" in result.stderr


def test_importing_the_commands_and_the_help_is_light():
    code = (
        "import sys, tsdiff.bench, tsdiff.cli.predict_curve, tsdiff.cli.hacking_report\n"
        "from click.testing import CliRunner\n"
        "from tsdiff.cli.app import cli\n"
        "for arguments in (['--help'], ['predict-curve', '--help'], ['hacking-report', '--help']):\n"
        "    assert CliRunner().invoke(cli, arguments).exit_code == 0\n"
        "print([name for name in ('torch', 'diffusers', 'numpy', 'scipy', 'matplotlib', 'PIL') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
