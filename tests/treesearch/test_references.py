"""Verifiers by reference, and names that stand for another verifier with some of its parameters set."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.registry import reference, split_options, split_reference, verifiers
from tsdiff.treesearch.resolve import resolve_verifier
from tsdiff.verifiers import JpegSize, TargetColor


def blue(**options: str) -> str:
    """Closeness to blue."""
    return reference("target-color", **{"color": "blue"} | options)


def test_a_function_may_return_the_reference_of_another_verifier():
    verifiers.add("blue", blue)
    assert resolve_verifier("blue") == TargetColor(color="blue")
    assert resolve_verifier("blue:color=navy") == TargetColor(color="navy"), "what is said wins"


def test_a_reference_may_lead_through_several_names_or_end_in_an_object():
    verifiers.add("blue", blue)
    verifiers.add("azure", lambda: "blue:color=#007fff")
    verifiers.add("object", lambda: JpegSize(quality=7))
    verifiers.add("to-object", lambda: "object")
    assert resolve_verifier("azure") == TargetColor(color="#007fff")
    assert resolve_verifier("to-object") == JpegSize(quality=7)


def test_options_that_neither_takes_are_refused():
    verifiers.add("blue", blue)
    verifiers.add("plain-blue", lambda: "blue")
    with pytest.raises(UsageError, match="unknown parameter of target-color 'colour'; did you mean 'color'"):
        resolve_verifier("blue:colour=red")
    with pytest.raises(UsageError, match=r"'plain-blue:color=red'.*unexpected keyword argument"):
        resolve_verifier("plain-blue:color=red")


def test_a_name_that_stands_for_itself_is_refused():
    verifiers.add("one", lambda: "two")
    verifiers.add("two", lambda: "one:")
    with pytest.raises(UsageError, match=r"'one' stands for itself.*one -> two -> one"):
        resolve_verifier("one")


def test_a_name_that_stands_for_nothing_is_refused():
    verifiers.add("lost", lambda: "target-colour")
    with pytest.raises(UsageError, match="unknown verifier 'target-colour'; did you mean 'target-color'"):
        resolve_verifier("lost")


_KEY = st.text(st.sampled_from("abcxyz_-"), min_size=1)
_VALUE = st.text(st.sampled_from("ab/.: =1,#~\\"), max_size=8)


@given(options=st.dictionaries(_KEY, _VALUE, max_size=3))
def test_a_reference_says_what_it_was_given_or_is_refused(options):
    if any("," in value or value != value.strip() for value in options.values()):  # only these may be beyond words
        with contextlib.suppress(UsageError):
            assert taken_apart(reference("name", **options)) == ("name", options)
    else:
        assert taken_apart(reference("name", **options)) == ("name", options)


def taken_apart(written):
    name, rest = split_reference(written)
    return name, split_options(rest)


@pytest.mark.parametrize("value", [" a", "a ", "/x,y=z", ",=,1", "a,,b"])
def test_what_a_reference_cannot_say_is_refused(value):
    with pytest.raises(UsageError, match="cannot be written as key=value"):
        reference("name", model=value)


def test_numbers_are_written_as_one_would_type_them():
    assert reference("name") == "name"
    assert reference("name", model="/a b/c:d", n=3, x=0.5) == "name:model=/a b/c:d,n=3,x=0.5"
