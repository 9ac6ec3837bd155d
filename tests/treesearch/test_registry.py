"""Plug-ins by name: found without importing, loaded when asked for, and one warning for a broken one."""

from __future__ import annotations

import warnings
from importlib.metadata import EntryPoint

import pytest

from tsdiff.treesearch import registry
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.registry import PluginWarning, Registry, split_options, split_reference


@pytest.fixture
def plugins(monkeypatch):
    """A registry that sees three installed plug-ins, two of them broken."""
    points = {
        "good": EntryPoint("good", "collections:OrderedDict", "tsdiff.things"),
        "broken": EntryPoint("broken", "a_package_that_is_not_there:Thing", "tsdiff.things"),
        "gone": EntryPoint("gone", "collections:NotThere", "tsdiff.things"),
    }
    monkeypatch.setattr(registry, "_entry_points", lambda group: points if group == "tsdiff.things" else {})
    return Registry("thing", "things")


def test_names_need_no_import(plugins):
    assert plugins.names() == list(plugins) == ["broken", "gone", "good"]
    assert "broken" in plugins
    assert "other" not in plugins


def test_a_broken_plugin_is_one_warning(plugins):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = dict(plugins.loaded())
    assert list(loaded) == ["good"]
    assert [warning.category for warning in caught] == [PluginWarning, PluginWarning]
    assert ["'broken'" in str(caught[0].message), "'gone'" in str(caught[1].message)] == [True, True]
    assert "mend or uninstall" in str(caught[0].message)


def test_asking_for_a_broken_plugin_is_a_usage_error(plugins):
    with pytest.raises(UsageError, match=r"'broken'.*cannot be loaded \(ModuleNotFoundError"):
        plugins.load("broken")
    with pytest.raises(UsageError, match=r"did you mean 'good'\?.*tsdiff list things"):
        plugins.load("goood")


def test_what_is_added_hides_what_is_installed(plugins):
    plugins.add("broken", 1)
    plugins.add("new", 2)
    assert plugins.load("broken") == 1
    assert plugins.names() == ["broken", "gone", "good", "new"]


@pytest.mark.parametrize("name", ["", "a:b", "a=b", "a,b", "a b", "a\tb"])
def test_names_that_a_command_line_could_not_say_are_refused(plugins, name):
    with pytest.raises(UsageError, match="name"):
        plugins.add(name, 1)


def test_all_that_is_installed_loads():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in (registry.policies, registry.verifiers, registry.models, registry.suites, registry.converters):
            loaded = dict(kind.loaded())
            assert list(loaded) == kind.names()
            assert loaded
    assert {"beam", "best-of-n"} <= set(registry.policies)
    assert "gaussian" in registry.models


def test_references_and_options_are_split():
    assert split_reference("name") == ("name", "")
    assert split_reference("name:a=1:2") == ("name", "a=1:2")
    assert split_options("a=1,b=x=y,c=0.2,0.4") == {"a": "1", "b": "x=y", "c": "0.2,0.4"}
    assert split_options("") == {}
    assert split_options(" a = 1 , b = 2 ") == {"a": "1", "b": "2"}
    with pytest.raises(UsageError, match="key=value"):
        split_options("1,a=2")
