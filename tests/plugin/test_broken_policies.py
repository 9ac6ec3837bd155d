"""Every mistake fails the one check that is made for it, and no other."""

from __future__ import annotations

import inspect
import itertools

import broken_choices
import broken_spending
import pytest
from broken_spending import ChecksNothing
from sound_policies import Sound

from tsdiff.plugin import build
from tsdiff.plugin.conformance import PolicyConformance

MADE_FOR = broken_choices.MADE_FOR | broken_spending.MADE_FOR


class Checks(PolicyConformance):
    """Its tests are called by hand."""

    __test__ = False
    steps = 4
    examples = 3
    most_requests = 100

    def situations(self, policy):
        """Three of them: the built-in policies are tried in all."""
        return itertools.islice(super().situations(policy), 3)


CHECKS = [name.removeprefix("test_") for name, _ in inspect.getmembers(Checks, inspect.isfunction) if name.startswith("test_")]


def failures(kind):
    """Names of the checks that a policy fails."""
    failed = set()
    for name in CHECKS:
        kind.count = kind.running = 0
        kind.latest = None
        kind.begun = set()
        try:
            getattr(Checks(), f"test_{name}")(kind())
        except pytest.skip.Exception:
            continue
        except (Exception, pytest.fail.Exception):
            failed.add(name)
    return failed


def test_a_sound_policy_fails_none():
    assert failures(Sound) == set()


@pytest.mark.parametrize("kind", MADE_FOR, ids=lambda kind: kind.__name__)
def test_a_mistake_fails_its_check_and_no_other(kind):
    assert failures(kind) == {MADE_FOR[kind]}


def test_every_check_is_there_for_a_mistake():
    assert set(CHECKS) == set(MADE_FOR.values())


def test_the_broken_are_otherwise_sound():
    for kind in MADE_FOR:
        assert kind().search
        assert kind is ChecksNothing or build(kind, {"n": "3"}).n == 3
