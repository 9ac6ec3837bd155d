"""The group, `list`, `describe`, `doctor`, and manners that only a real process shows."""

import inspect
import json
import os
import pty
import signal
import subprocess
import sys
import time
from importlib.metadata import EntryPoint, PackageNotFoundError

import pytest

from tsdiff.cli import catalogue, doctor
from tsdiff.cli.app import COMMANDS, cli
from tsdiff.cli.output import one_line
from tsdiff.treesearch import registry

PROGRAM = (sys.executable, "-c", "from tsdiff.cli import main; main()")
ESCAPE = "\x1b["


def environment(**extra):
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "TERM")}
    return kept | {"OMP_NUM_THREADS": "1"} | extra


def run(*arguments, **extra):
    return subprocess.run((*PROGRAM, *arguments), capture_output=True, text=True, env=environment(**extra), check=False)


def on_a_terminal(*arguments, **extra):
    """Everything a process prints when all its streams are a terminal."""
    leader, follower = pty.openpty()
    process = subprocess.Popen((*PROGRAM, *arguments), stdin=follower, stdout=follower, stderr=follower, env=environment(TERM="xterm", COLUMNS="100", **extra))
    os.close(follower)
    printed = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # how Linux tells that the other end is closed
            break
        if not chunk:
            break
        printed += chunk
    os.close(leader)
    assert process.wait() == 0
    return printed.decode()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_starts_with_the_line_that_the_group_shows(tsdiff, name):
    result = tsdiff(name, "--help")
    assert result.exit_code == 0
    assert f"\n  {COMMANDS[name]}\n" in result.stdout
    assert f"tsdiff {name}" in result.stdout.split("Try:")[1]
    assert cli.get_command(None, name).get_short_help_str(200) == COMMANDS[name]


def test_help_of_the_group_lists_every_command(tsdiff):
    result = tsdiff("--help")
    assert result.exit_code == 0
    assert all(name in result.stdout and line in result.stdout for name, line in COMMANDS.items())


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        (["--help"], ["torch", "diffusers", "transformers", "numpy", "rich", "networkx", "PIL", "tsdiff.cli.search"]),
        (["search", "--help"], ["torch", "diffusers", "transformers", "numpy", "rich"]),
        (["list"], ["torch", "diffusers", "transformers"]),
        (["describe", "beam"], ["torch", "diffusers", "transformers"]),
        (["plan", "--model", "gaussian"], ["diffusers", "transformers"]),
    ],
)
def test_light_commands_import_nothing_heavy(tmp_path, arguments, absent):
    code = f"""
import sys
from tsdiff.cli import main
try:
    main({arguments!r})
except SystemExit as ended:
    assert ended.code == 0, ended.code
print([name for name in {absent!r} if name in sys.modules], file=sys.stderr)
"""
    result = subprocess.run((sys.executable, "-c", code), capture_output=True, text=True, env=environment(), cwd=tmp_path, check=True)
    assert result.stderr.splitlines()[-1] == "[]"


def test_unknown_commands_and_missing_arguments_are_wrong_usage(tsdiff):
    assert (tsdiff("serch").exit_code, tsdiff("describe").exit_code, tsdiff("list", "polices").exit_code, tsdiff().exit_code) == (2, 2, 2, 2)
    assert tsdiff("serch").stderr == "error: unknown command 'serch'; did you mean 'search'? `tsdiff --help` lists all.\n"
    assert "policies" in tsdiff("list", "polices").stderr


def test_version_is_the_distributions(tsdiff):
    from importlib.metadata import version

    assert tsdiff("--version").stdout.split()[-1] == version("tsdiff")


@pytest.mark.parametrize("kind", catalogue.KINDS)
def test_list_names_everything_with_a_line_each(tsdiff, kind):
    result = tsdiff("list", kind)
    assert (result.exit_code, result.stderr) == (0, "")
    listed = json.loads(tsdiff("list", kind, "--json").stdout)[kind]
    assert sorted(listed) == catalogue.names(kind)
    assert listed
    assert all(listed.values())
    assert all(name in result.stdout for name in listed)


def test_list_without_a_kind_lists_all(tsdiff):
    assert list(json.loads(tsdiff("list", "--json").stdout)) == list(catalogue.KINDS)


def test_a_broken_plugin_is_one_warning(tsdiff, monkeypatch):
    points = {"broken": EntryPoint("broken", "no_such_module:Policy", "tsdiff.policies")}
    real = registry._entry_points
    monkeypatch.setattr(registry, "_entry_points", lambda group: real(group) | points if group == "tsdiff.policies" else real(group))
    result = tsdiff("list", "policies")
    assert result.exit_code == 0
    assert "beam" in result.stdout
    (warning,) = result.stderr.splitlines()
    assert warning.startswith("warning: policy 'broken'")
    assert tsdiff("describe", "broken").exit_code == 2


def test_describe_tells_every_parameter(tsdiff):
    from tsdiff.policies.beam import Beam

    (described,) = json.loads(tsdiff("describe", "beam", "--json").stdout)
    assert described["kind"] == "policy"
    assert {row["name"] for row in described["parameters"]} == set(inspect.signature(Beam).parameters)
    assert {row["name"]: row["default"] for row in described["parameters"]}["levels"] == "0.2,0.4,0.6,0.8"
    text = tsdiff("describe", "beam").stdout
    for row in described["parameters"]:
        assert row["name"] in text
        assert row["help"] in text


def test_describe_finds_names_of_every_kind(tsdiff):
    for kind in catalogue.KINDS:
        for name in catalogue.names(kind):
            found = json.loads(tsdiff("describe", name, "--json").stdout)
            assert catalogue.SINGULAR[kind] in {description["kind"] for description in found}


def test_describe_shows_all_of_a_shared_name(tsdiff, monkeypatch):
    monkeypatch.setitem(registry.verifiers._added, "beam", dict)
    assert [found["kind"] for found in json.loads(tsdiff("describe", "beam", "--json").stdout)] == ["policy", "verifier"]


def test_describe_names_the_nearest(tsdiff):
    result = tsdiff("describe", "beem")
    assert result.exit_code == 2
    assert "'beam'" in result.stderr


def test_doctor_is_content_with_this_installation(tsdiff):
    result = tsdiff("doctor", "--json")
    report = json.loads(result.stdout)
    assert (result.exit_code, report["ok"]) == (0, True)
    found = {finding["what"]: finding["status"] for finding in report["findings"]}
    assert {"Python", "torch", "devices", "torchvision", "memory", "out folder", "downloads", "policies", "solvers"} <= set(found)
    assert tsdiff("doctor").exit_code == 0


def test_doctor_fails_on_what_is_missing_or_too_old():
    def installed(name):
        if name == "gone":
            raise PackageNotFoundError(name)
        return "2.10.0+cpu"

    wanted = ["gone>=1", "old>=2.11", "new>=2.9", "same>=2.10", 'optional>=1 ; extra == "plots"', "plain"]
    findings = {finding.what: finding.status for finding in doctor.packages(wanted, installed)}
    assert findings == {"gone": "missing", "old": "missing", "new": "ok", "same": "ok", "plain": "ok"}


def test_doctor_exits_1_when_something_essential_is_missing(tsdiff, monkeypatch):
    monkeypatch.setattr(doctor, "requires", lambda _: ["surely-not-installed>=1"])
    result = tsdiff("doctor")
    assert result.exit_code == 1
    assert "pip install 'surely-not-installed>=1'" in result.stdout


def test_redirected_output_has_no_escape_codes(tmp_path):
    for arguments in (["describe", "beam"], ["search", "--model", "gaussian", "--out", str(tmp_path)], ["serch"]):
        result = run(*arguments)
        assert ESCAPE not in result.stdout + result.stderr


def test_a_terminal_gets_colour_unless_no_color():
    assert ESCAPE in on_a_terminal("list", "policies")
    assert ESCAPE not in on_a_terminal("list", "policies", NO_COLOR="1")
    assert ESCAPE in run("list", "policies", FORCE_COLOR="1").stdout
    assert ESCAPE not in run("list", "policies", FORCE_COLOR="1", NO_COLOR="1").stdout


def test_a_terminal_shows_a_bar_of_evaluations(tmp_path):
    shown = on_a_terminal("search", "--model", "gaussian", "--out", str(tmp_path), "--seed", "0-3")
    assert "\x1b[?25l" in shown  # the cursor is hidden while a bar is drawn
    assert "NFE" in shown


def test_no_prompt_can_steer_a_terminal():
    assert one_line("a\x1b[31mred\x07\ncube\t!") == "a [31mred cube !"
    assert one_line("abcdef", 4) == "abc…"


def test_output_that_a_terminal_cannot_show_is_escaped(tmp_path):
    result = run("search", "--model", "gaussian", "--out", str(tmp_path / "日"), "--quiet", PYTHONIOENCODING="latin-1")
    assert result.returncode == 0, result.stderr
    assert f"{tmp_path}/\\u65e5/run-0001" in result.stdout


def test_a_reader_that_leaves_early_gets_no_traceback():
    process = subprocess.Popen((*PROGRAM, "list"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 1


def test_ctrl_c_stops_a_search_with_130_and_the_same_command_goes_on(tmp_path):
    command = ("search", "--model", "gaussian", "--seed", "0-9", "--out", str(tmp_path), "--policy", "best-of-n", "-P", "n=4", "--no-baseline")
    process = subprocess.Popen((*PROGRAM, *command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(tmp_path.glob("run-*/*/best.png")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    folder = tmp_path / "run-0001"
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == f"interrupted: what was done is kept; continue with: tsdiff resume {folder}"
    assert "finishing the batch" in err
    assert "Traceback" not in err
    assert json.loads((folder / "index.json").read_text())["status"] == "interrupted"
    again = run(*command, "--json")
    assert f"continuing {folder}, which was interrupted" in again.stderr
    assert len(again.stdout.splitlines()) == 10
    assert [path.name for path in tmp_path.iterdir()] == ["run-0001"]
