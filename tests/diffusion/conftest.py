"""Fixtures shared by the tests of tsdiff.diffusion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_sd import tiny_stable_diffusion


@pytest.fixture(scope="session")
def tiny_pipe() -> Any:
    """A tiny Stable Diffusion pipeline; tests must not change it (and prove that we do not)."""
    return tiny_stable_diffusion()


@pytest.fixture(scope="session")
def _saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "saved"
    tiny_stable_diffusion(folder)
    return folder


@pytest.fixture
def tiny_folder(_saved: Path, tmp_path: Path) -> Path:
    """A saved tiny pipeline that a test may damage."""
    import shutil

    return Path(shutil.copytree(_saved, tmp_path / "model"))
