"""Fixtures shared by the tests of tsdiff.diffusion."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES
from family import Family, Shelf


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """The tiny pipelines, folders and models of all families; tests must not change them (and prove that we do not)."""
    return Shelf(tmp_path_factory.mktemp("families"))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    """Each family in turn."""
    return FAMILIES[request.param]


@pytest.fixture
def folder(shelf: Shelf, family: Family, tmp_path: Path) -> Path:
    """A saved pipeline of the family, that a test may damage. A test of one family says `family` itself."""
    return Path(shutil.copytree(shelf.folder(family), tmp_path / "model"))


@pytest.fixture
def loaded(shelf: Shelf, family: Family) -> Any:
    """A model of the family, loaded from its folder."""
    return shelf.loaded(family)


@pytest.fixture(scope="session")
def tiny_pipe(shelf: Shelf) -> Any:
    """A tiny Stable Diffusion pipeline; tests must not change it (and prove that we do not)."""
    return shelf.pipe(FAMILIES["sd"])


@pytest.fixture
def tiny_folder(shelf: Shelf, tmp_path: Path) -> Path:
    """A saved tiny Stable Diffusion pipeline that a test may damage."""
    return Path(shutil.copytree(shelf.folder(FAMILIES["sd"]), tmp_path / "model"))


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading weights is a failure."""
    import diffusers
    import transformers

    for reader in (diffusers.DiffusionPipeline, diffusers.ModelMixin, transformers.PreTrainedModel):
        monkeypatch.setattr(reader, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights were read"))
