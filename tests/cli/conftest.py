"""Running the command line in this process, in an empty folder."""

import pytest
from click.testing import CliRunner

from tsdiff.cli.app import cli


@pytest.fixture
def tsdiff(tmp_path, monkeypatch):
    """`tsdiff("plan", "--nfe", "100")` -> click's result; the current folder is `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    runner = CliRunner()
    return lambda *arguments: runner.invoke(cli, [str(argument) for argument in arguments])
