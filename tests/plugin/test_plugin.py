"""The module that third parties import: complete, sorted, and registering in every way it says."""

from __future__ import annotations

import uuid

import pytest

import tsdiff.plugin as plugin
from tsdiff.treesearch import protocols, registry, requests

KINDS = [
    (plugin.register_policy, registry.policies),
    (plugin.register_verifier, registry.verifiers),
    (plugin.register_model, registry.models),
    (plugin.register_suite, registry.suites),
]


@pytest.fixture
def name():
    """A name that no other test has registered."""
    return f"test-{uuid.uuid4().hex}"


def test_all_names_exist_and_are_sorted():
    assert all(hasattr(plugin, exported) for exported in plugin.__all__)
    assert len(set(plugin.__all__)) == len(plugin.__all__)
    assert sorted(plugin.__all__, key=lambda exported: (not exported.isupper(), exported[0].islower(), exported)) == plugin.__all__


def test_every_request_and_protocol_is_there():
    kinds = [kind.__name__ for kind in requests.Request.__args__]
    assert set(kinds) <= set(plugin.__all__)
    assert {"Policy", "Verifier", "ModelOutline", "DiffusionModel", "Sampler", "TreeView"} <= set(plugin.__all__)
    assert plugin.PROTOCOL_VERSION == protocols.PROTOCOL_VERSION


@pytest.mark.parametrize(("register", "where"), KINDS, ids=lambda value: getattr(value, "__name__", ""))
def test_registering_four_ways(register, where, name):
    class Named:
        pass

    Named.name = name
    assert register(Named) is Named
    assert where.load(name) is Named
    assert name in where.names()

    @register(f"{name}-decorated")
    class Decorated:
        pass

    assert where.load(f"{name}-decorated") is Decorated
    assert register(Decorated, f"{name}-called") is Decorated
    assert where.load(f"{name}-called") is Decorated
    assert register(Named, f"{name}-renamed") is Named, "a given name wins over the class's own"
    assert where.load(f"{name}-renamed") is Named


@pytest.mark.parametrize(("register", "where"), KINDS, ids=lambda value: getattr(value, "__name__", ""))
def test_what_cannot_be_registered(register, where, name):
    class Nameless:
        pass

    with pytest.raises(plugin.UsageError, match="Nameless has no name"):
        register(Nameless)
    with pytest.raises(plugin.UsageError, match="must not be empty or contain"):
        register(Nameless, "a:b")
    with pytest.raises(plugin.UsageError, match="first and its name second"):
        register(name, "other")
    assert name not in where
