"""`tsdiff view` serves until it is interrupted, and says in one line what it cannot do."""

from __future__ import annotations

import signal
import subprocess
import sys
import webbrowser

import pytest
from click.testing import CliRunner
from viewer_runs import grown, write_run
from viewer_server import ask

from tsdiff.cli.app import cli
from tsdiff.viewer.commands import quoted


@pytest.mark.parametrize("text", ["a cat", "it's", "", "a\nb", "\x1b[2J", "é", "a'b\\c\n'", "$HOME `ls` \"x\"", "\x9b31m"])
def test_a_quoted_word_is_that_word_in_a_shell(text):
    word = quoted(text)
    assert word.isprintable()
    assert subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, check=True).stdout.decode() == text


def test_the_command_serves_until_ctrl_c(tmp_path):
    write_run(tmp_path / "run", grown(20))
    words = [sys.executable, "-W", "error", "-m", "tsdiff", "view", str(tmp_path), "--no-open"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        address = process.stdout.readline().strip()
        head, _, token = address.partition("/#token=")
        port = int(head.removeprefix("http://127.0.0.1:"))
        assert len(token) > 40
        assert ask(port, "/api/runs")[0] == 200
        assert ask(port, "/api/runs/run/stop", method="POST", body=b"{}", headers={"X-Tsdiff-Token": token, "Origin": head, "Content-Type": "application/json"})[0] != 403
        taken = CliRunner().invoke(cli, ["view", str(tmp_path), "--no-open", "--port", str(port)])
        assert taken.exit_code == 2
        assert taken.stderr == f"error: port {port} is in use; choose another with --port, or leave it out for a free one\n"
        process.send_signal(signal.SIGINT)
        rest, told = process.communicate(timeout=20)
    assert process.returncode == 0
    assert rest == ""
    assert told == f"showing {tmp_path}; Ctrl-C ends it\n"


def test_what_cannot_be_viewed_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for what in ("file", "nothing"):
        answer = CliRunner().invoke(cli, ["view", str(tmp_path / what), "--no-open"])
        assert answer.exit_code == 2
        assert len(answer.stderr.splitlines()) == 1
        assert f"there is no folder '{tmp_path / what}'" in answer.stderr


def test_a_missing_extra_is_told_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("tsdiff.cli.view.find_spec", lambda name: None if name == "uvicorn" else name)
    answer = CliRunner().invoke(cli, ["view", str(tmp_path)])
    assert answer.exit_code == 2
    assert answer.stderr == "error: `tsdiff view` needs uvicorn, which is not installed; run: pip install 'tsdiff[viewer]'\n"


def test_the_browser_is_opened_unless_it_is_not_wanted(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(webbrowser, "open", lambda address: opened.append(address) or False)
    monkeypatch.setattr("tsdiff.viewer.server.serve", lambda app, socket, ready: ready())
    answer = CliRunner().invoke(cli, ["view", str(tmp_path)])
    assert (answer.exit_code, opened) == (0, [answer.stdout.strip()])
    assert "no browser could be opened; copy the address" in answer.stderr
    assert CliRunner().invoke(cli, ["view", str(tmp_path), "--no-open"]).exit_code == 0
    assert len(opened) == 1


def test_help_imports_no_viewer_and_the_documents_no_server():
    code = (
        "import sys\n"
        "from tsdiff.cli.app import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "def loaded(*names): return [one for one in names if one in sys.modules]\n"
        "assert not loaded('tsdiff.viewer', 'starlette', 'uvicorn', 'torch', 'PIL')\n"
        "import tsdiff.viewer.documents, tsdiff.viewer.watched, tsdiff.viewer.pictures, tsdiff.viewer.library, tsdiff.viewer.steering\n"
        "assert not loaded('starlette', 'uvicorn', 'torch', 'PIL')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "  view " in done.stdout
