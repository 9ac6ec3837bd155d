"""`tsdiff convert`, and searching what it wrote by class."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from sit_reference import HEADS, checkpoint, tiny_vae_folder
from tiny_dit import tiny_dit

from tsdiff.diffusion.sit_checkpoint import convert
from tsdiff.treesearch import registry


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, sit.pt, and an autoencoder, vae."""
    folder = tmp_path_factory.mktemp("parts")
    torch.save({"ema": checkpoint()}, folder / "sit.pt")
    tiny_vae_folder(folder / "vae")
    return folder


@pytest.fixture
def formats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.converters._added, "sit", convert)


def test_the_format_is_registered() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["tsdiff.converters"] == {"sit": "tsdiff.diffusion.sit_checkpoint:convert"}


def test_a_checkpoint_becomes_a_model_that_is_searched_by_class(tsdiff: Any, parts: Path, formats: None) -> None:
    done = tsdiff("convert", "sit", parts / "sit.pt", "models/sit", "--vae", parts / "vae", "--heads", HEADS)
    assert (done.exit_code, done.stderr) == (0, "")
    facts = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    facts = {name: value.strip() for name, value in facts.items()}
    assert facts["latents"] == "4 x 8 x 8"
    assert facts["weights"] == "averaged (ema)"
    assert facts["use"] == "--model models/sit"
    index = json.loads(Path("models/sit/model_index.json").read_text())
    index["id2label"] = {"3": "tiger shark, Galeocerdo cuvieri", "7": "cock"}
    Path("models/sit/model_index.json").write_text(json.dumps(index))
    common = ("--model", "models/sit", "--verifier", "luminance", "--steps", "3", "--policy", "best-of-n", "-P", "n=2", "--device", "cpu", "--json")
    scores = []
    for label in ("3", "Galeocerdo cuvieri", "7"):
        found = tsdiff("search", "--class", label, *common)
        assert found.exit_code == 0, found.output
        scores.append(json.loads(found.stdout)["score"])
    assert scores[0] == scores[1] != scores[2]
    planned = tsdiff("plan", "--class", "hen", *common)
    assert planned.exit_code == 2
    assert "unknown class of 'models/sit' 'hen'" in planned.stderr
    assert "--class" in tsdiff("plan", "a prompt", *common).stderr


def test_json(tsdiff: Any, parts: Path, formats: None) -> None:
    done = tsdiff("convert", "sit", parts / "sit.pt", "out", "--heads", HEADS, "--json")
    facts = json.loads(done.stdout)
    assert (facts["classes"], facts["latents"], facts["autoencoder"]) == (10, [4, 8, 8], None)
    assert "put the AutoencoderKL" in facts["missing"]


def test_dit_is_searched_by_name(tsdiff: Any, tmp_path: Path) -> None:
    tiny_dit(tmp_path / "dit")
    index = json.loads((tmp_path / "dit/model_index.json").read_text())
    (tmp_path / "dit/model_index.json").write_text(json.dumps(index | {"id2label": {"207": "golden retriever"}}))
    found = tsdiff("search", "--model", "dit", "--class", "golden retriever", "--verifier", "luminance", "--steps", "3", "--policy", "best-of-n", "-P", "n=2", "--device", "cpu")
    assert found.exit_code == 0, found.output
    near = tsdiff("plan", "--model", "dit", "--class", "golden retreiver", "--verifier", "luminance", "--nfe", "30")
    assert near.exit_code == 2
    assert "did you mean 'golden retriever'" in near.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("sti", "a", "b"), "unknown checkpoint format 'sti'; did you mean 'sit'"),
        (("sit", "nowhere.pt", "out"), "checkpoint 'nowhere.pt' is not there"),
        (("sit", "nowhere.pt"), "Missing argument 'OUT'"),
        (("sit", "nowhere.pt", "out", "--heads", "0"), "--heads"),
    ],
)
def test_wrong_arguments_are_one_line(tsdiff: Any, formats: None, arguments: tuple[str, ...], says: str) -> None:
    result = tsdiff("convert", *arguments)
    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_the_help_names_the_formats(tsdiff: Any) -> None:
    text = tsdiff("convert", "--help").stdout
    assert all(f"FORMAT {name}:" in text for name in registry.converters.names())
    assert "tsdiff convert sit SiT-XL-2-256.pt" in text
