"""The examples run as they are typed, and show what they say."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tsdiff.plugin.conformance import PolicyConformance

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, folder: Path, *arguments: str) -> str:
    """The standard output of an example, run in a folder of its own."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "MPLCONFIGDIR": str(folder / "matplotlib")}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(EXAMPLES / name), *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"quickstart.py", "custom_policy.py", "custom_verifier.py", "mixture_trajectories.py"}


def test_quickstart(tmp_path: Path) -> None:
    assert len((EXAMPLES / "quickstart.py").read_text(encoding="utf-8").splitlines()) <= 25
    shown = run("quickstart.py", tmp_path, str(tmp_path / "out"))
    searched, single = (float(re.search(rf"^{label}\s+(\S+)", shown, re.MULTILINE)[1]) for label in ("searched", "one sample"))
    assert single < searched <= 0.0
    assert (tmp_path / "out/run-0001/tree.json").exists()
    assert not (tmp_path / "runs").exists()


def test_custom_policy_beats_best_of_n_within_its_budget(tmp_path: Path) -> None:
    shown = run("custom_policy.py", tmp_path)
    means = {name: float(mean) for name, mean in re.findall(r"^(\S+)\s+mean score\s+(\S+)", shown, re.MULTILINE)}
    assert set(means) == {"best-of-n", "go-back"}
    assert means["best-of-n"] < means["go-back"] <= 0.0
    assert all(int(spent) <= 400 for spent in re.findall(r"at most (\d+) NFE", shown))


class TestGoBack(PolicyConformance):
    """The example passes the tests that plug-ins inherit."""

    @pytest.fixture
    def policy(self) -> Any:
        return runpy.run_path(str(EXAMPLES / "custom_policy.py"))["GoBack"](rounds=2, copies=2)


def test_custom_verifier(tmp_path: Path) -> None:
    shown = run("custom_verifier.py", tmp_path)
    ring, radius, single = (float(re.search(pattern, shown, re.MULTILINE)[1]) for pattern in (r"^ring\s+([^\s,]+)", r"radius (\S+)", r"^one sample\s+(\S+)"))
    assert ring == pytest.approx(-((radius - 2.8) ** 2), abs=5e-3)
    assert ring > single
    assert 0.0 <= float(re.search(r"^brightness\s+(\S+)", shown, re.MULTILINE)[1]) <= 1.0


def test_mixture_trajectories(tmp_path: Path) -> None:
    shown = run("mixture_trajectories.py", tmp_path, str(tmp_path / "out"))
    with Image.open(shown.strip()) as picture:
        assert picture.width >= 900
        # Something of every colour that the legend names is in it.
        colors = {color for count, color in picture.convert("RGB").getcolors(1 << 24) if count > 50}
    assert {(0xF0, 0xE4, 0x42), (0x56, 0xB4, 0xE9), (0xF2, 0xF4, 0xFA), (0x0B, 0x10, 0x20)} <= colors
    assert len(list((tmp_path / "out").glob("run-*"))) == 4
