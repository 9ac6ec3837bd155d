"""What every test relies on: no network, one thread, repeatable examples."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any library of the hub is imported

import pytest
import torch
from hypothesis import settings

from tsdiff.treesearch import plan, registry

torch.set_num_threads(1)
settings.register_profile("tsdiff", deadline=None, derandomize=True)
settings.load_profile("tsdiff")


@pytest.fixture(autouse=True)
def the_analytic_world_is_the_default(monkeypatch):
    """A search in this process that names no model takes the one that costs nothing; processes of their own take the user's default."""
    monkeypatch.setattr(plan, "DEFAULT_MODEL", "gaussian")


@pytest.fixture(autouse=True)
def names_do_not_leak():
    """What a test registers is gone after it."""
    registries = (registry.policies, registry.verifiers, registry.models, registry.suites, registry.converters)
    before = [dict(one._added) for one in registries]
    yield
    for one, names in zip(registries, before, strict=True):
        one._added.clear()
        one._added.update(names)
