"""Folders of every family are read from disk alone, and nothing in them is run."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from family_folders import FOLDERS, asked, condition, guidance, kept_in

import tsdiff
from tsdiff.diffusion.loading import load_model, outline
from tsdiff.policies import BestOfN
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import LoadOptions


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Saved pipelines by family; tests must not change them."""
    return kept_in(tmp_path_factory.mktemp("families"))


@pytest.fixture
def copies(folders: Any, tmp_path: Path) -> Any:
    """Makes a copy of a family's folder that a test may damage."""
    return lambda family: Path(shutil.copytree(folders(family), tmp_path / "model"))


@pytest.mark.parametrize("family", FOLDERS)
def test_nothing_is_downloaded(folders: Any, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    def refused(*args: Any, **kwargs: Any) -> Any:
        pytest.fail("something was to be downloaded")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # so that it would be tried
    result = tsdiff.search(folders(family), condition(family), policy=BestOfN(n=1), verifier="luminance", steps=2, baseline=False, device="cpu", **asked(family), **guidance(family))
    assert result.image is not None


@pytest.mark.parametrize("entry", [["diffusers", "VQModel"], ["my_code", "MyScheduler"]], ids=lambda entry: entry[1])
@pytest.mark.parametrize("family", FOLDERS)
def test_a_scheduler_that_is_none_is_not_replaced(copies: Any, family: str, entry: list[str]) -> None:
    folder = copies(family)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": entry}))
    with pytest.raises(UsageError, match=f"the scheduler of .* is the class {entry[1]} of '{entry[0]}', which is no scheduler of diffusers") as caught:
        outline(str(folder), LoadOptions())
    assert "\n" not in str(caught.value)


class Trap:
    """Unpickling one makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.path,)


def weights_of(folder: Path) -> Iterator[tuple[Path, str]]:
    """The weight files of a pipeline's folder, and how a pickle in their place is called."""
    for path in sorted(folder.glob("*/*.safetensors")):
        yield path, "diffusion_pytorch_model.bin" if path.stem == "diffusion_pytorch_model" else "pytorch_model.bin"


@pytest.mark.parametrize("family", FOLDERS)
def test_files_that_could_run_code_are_one_clear_line_and_run_none(copies: Any, tmp_path: Path, family: str) -> None:
    folder = copies(family)
    for path, pickled in list(weights_of(folder)):
        kept = path.read_bytes()
        path.unlink()
        for name, says in ((pickled, "cannot be loaded"), ("model.ckpt", "holds no weights"), ("weights.pt", "holds no weights")):
            torch.save({"weight": torch.zeros(1), "trap": Trap(tmp_path / "ran")}, path.with_name(name))
            with pytest.raises(UsageError, match=says) as caught:
                load_model(folder, device="cpu")
            assert "\n" not in str(caught.value)
            assert not (tmp_path / "ran").exists()
            path.with_name(name).unlink()
        path.write_bytes(kept)
    single = tmp_path / "single.ckpt"
    shutil.copy(path, single)
    with pytest.raises(UsageError, match="is a file; give the folder"):
        load_model(single, device="cpu")
