"""A third party's package: installed without network, found through its entry points, conforming by its own tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tsdiff.treesearch import registry

PACKAGE = Path(__file__).parents[2] / "examples/tsdiff-example-plugin"


def python(*arguments: object, **environment: str) -> str:
    """What a Python process prints."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the package: building it writes into its folder."""
    return Path(shutil.copytree(PACKAGE, tmp_path_factory.mktemp("example") / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__", ".*")))


@pytest.fixture(scope="module")
def path(source, tmp_path_factory):
    """PYTHONPATH with a folder that the package is installed in, beside this environment and not in it."""
    folder = tmp_path_factory.mktemp("installed")
    options = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--no-compile", "--quiet")
    python("-m", "pip", "install", *options, "--target", folder, source)
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def test_it_is_not_installed_here():
    assert "successive-halving" not in registry.policies
    assert "rms-contrast" not in registry.verifiers


def test_it_conforms(source, path):
    shown = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", source, "-c", source / "pyproject.toml", source / "tests", PYTHONPATH=path)
    counted = re.search(r"^(\d+) passed in", shown, re.MULTILINE)
    assert counted, shown
    assert int(counted[1]) >= 30


def test_the_command_line_knows_it_without_importing_torch(path):
    program = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from tsdiff.cli.app import cli\n"
        "for words in (['list', 'policies'], ['list', 'verifiers'], ['describe', 'successive-halving'], ['describe', 'rms-contrast']):\n"
        "    result = CliRunner().invoke(cli, words)\n"
        "    assert result.exit_code == 0, result.output\n"
        "    print(result.output)\n"
        "assert 'torch' not in sys.modules\n"
    )
    shown = python("-c", program, PYTHONPATH=path)
    assert "successive-halving" in shown
    assert "Best-of-n that stops looking" in shown
    assert "how often the worse half is given up" in shown
    assert "rms-contrast" in shown
