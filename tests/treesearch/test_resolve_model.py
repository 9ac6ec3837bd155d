"""From what a model is called to its outline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.models import resolve_model, saved_options
from tsdiff.treesearch.protocols import LoadOptions
from tsdiff.treesearch.registry import models


class FakeOutline:
    """Remembers what it was made from."""

    def __init__(self, reference: Any, options: LoadOptions) -> None:
        self.reference, self.options = reference, options

    def schedule(self) -> None: ...
    def latent_shape(self) -> None: ...
    def load(self) -> None: ...


class Pipelines(FakeOutline):
    """The same, from the entry for folders and hub ids."""


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_added", {"toy": FakeOutline, "diffusers": Pipelines})


def test_a_registered_name_wins_over_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    options = LoadOptions(dtype="float16")
    found: Any = resolve_model("toy", options)
    assert type(found) is FakeOutline
    assert (found.reference, found.options) == ("toy", options)
    assert type(resolve_model("mine")) is Pipelines
    assert type(resolve_model(Path("toy"))) is Pipelines


def test_paths_and_hub_ids_go_to_the_pipelines(tmp_path: Path) -> None:
    for reference in (tmp_path, str(tmp_path), "org/some-model_v1.5"):
        found: Any = resolve_model(reference)
        assert type(found) is Pipelines
        assert found.reference == str(reference)


def test_a_loaded_model_is_taken_as_it_is() -> None:
    model = FakeOutline(None, LoadOptions())
    assert resolve_model(model) is model
    with pytest.raises(UsageError, match="keeps its device"):
        resolve_model(model, LoadOptions(device="cpu"))


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("toi", "did you mean 'toy'"),
        ("diffusers", "unknown model"),
        ("", "unknown model"),
        ("./missing/folder", "does not exist"),
        ("/missing", "does not exist"),
        ("a/b/c", "does not exist"),
        (Path("missing"), "does not exist"),
        (3, "an int|a int"),
    ],
)
def test_what_is_no_model_is_refused(reference: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        resolve_model(reference)


def test_a_saved_run_is_loaded_again_as_it_was_wherever_it_runs_now() -> None:
    arguments = {"lora": ["a.safetensors:0.5"], "revision": "main", "dtype": "bf16", "vae_tiling": True, "x0_decoder": "tiny", "device": "cuda:3", "offload": True, "compile": True, "steps": 3}
    assert saved_options(arguments, "cpu") == LoadOptions(device="cpu", dtype="bfloat16", revision="main", lora=("a.safetensors:0.5",), vae_tiling=True, x0_decoder="tiny")


@pytest.mark.parametrize("options", [{"lora": ("a:1",)}, {"offload": True}, {"x0_decoder": "tiny"}, {"latent_dtype": "model"}], ids=str)
def test_what_is_for_pipelines_is_refused_by_name_elsewhere(options: dict[str, Any]) -> None:
    (name,) = options
    for reference, whose in (("toy", "model 'toy'"), (FakeOutline(None, LoadOptions()), "a loaded model")):
        with pytest.raises(UsageError, match=f"{name} .* but {whose} takes none; {name} is for folders and hub ids"):
            resolve_model(reference, LoadOptions(**options))
    assert resolve_model("org/some-model", LoadOptions(**options)).options == LoadOptions(**options)
