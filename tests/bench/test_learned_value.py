"""`benchmarks/learned_value.py` measures what it says, on the world that needs no network."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def report(tmp_path, monkeypatch, capsys):
    words = ["--prompts", "8", "--seeds", "2", "--samples", "4", "--steps", "8", "--fit-steps", "10", "--device", "cpu", "--json", "--save", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["learned_value.py", *words])
    runpy.run_path(str(FOLDER / "learned_value.py"), run_name="__main__")
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "learned_value.json").read_text(encoding="utf-8")) == printed
    assert "| gaussian-target | unseen prompts | 2 |" in (tmp_path / "learned_value.md").read_text(encoding="utf-8")
    return printed


def test_half_way_the_exact_estimate_ranks_well_and_a_value_fitted_for_ten_steps_fails(report):
    assert report["prompts"] == {"fitted": 6, "unseen": 2}
    entry = report["verifiers"]["gaussian-target"]
    for name in ("fitted prompts", "unseen prompts"):
        assert entry[name]["verifier"]["estimate"] > 0.5
        assert entry[name]["difference"]["estimate"] == pytest.approx(entry[name]["learned"]["estimate"] - entry[name]["verifier"]["estimate"])
    assert report["success"] is False
    assert entry["nodes"] == 6 * 2 * 4 * 9  # every level of every trajectory
