"""Hyperparameters: ranges, choices, and text as typed on a command line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsdiff.policies.beam import Beam
from tsdiff.policies.mcts import MCTS
from tsdiff.treesearch.errors import UsageError, unknown_name
from tsdiff.treesearch.parameters import build, check, describe, parameter, parse


@dataclass(frozen=True, kw_only=True)
class Options:
    name: ClassVar[str] = "demo"

    count: int = parameter(4, low=1, high=9, symbol="N", help="how many")
    share: float = parameter(0.5, above=0.0, below=1.0)
    levels: tuple[float, ...] = parameter((0.5,), above=0.0, below=1.0)
    mode: Literal["x0", "final"] = parameter("x0", help="what to score")
    limit: int | None = parameter(None, low=2)
    flag: bool = parameter(False)
    label: str = parameter("a")

    def __post_init__(self):
        check(self)


@pytest.mark.parametrize(
    ("text", "value"),
    [({"count": "7"}, 7), ({"share": "0.25"}, 0.25), ({"levels": "0.2, 0.4"}, (0.2, 0.4)), ({"levels": 0.3}, (0.3,)), ({"levels": [0.1, 0.2]}, (0.1, 0.2)), ({"mode": "final"}, "final"),
     ({"limit": "3"}, 3), ({"limit": "none"}, None), ({"limit": None}, None), ({"flag": "true"}, True), ({"flag": "No"}, False), ({"label": "7"}, "7"), ({"count": 3.0}, 3), ({"share": 1e-9}, 1e-9)],
)  # fmt: skip
def test_text_becomes_values(text, value):
    ((name, _),) = text.items()
    built = getattr(build(Options, text), name)
    assert built == value
    assert type(built) is type(value)


@pytest.mark.parametrize(
    ("bad", "message"),
    [({"count": "x"}, "demo: count is 'x' but must be a whole number"), ({"count": "1.5"}, "whole number"), ({"count": 1.5}, "whole number"), ({"count": 0}, "at least 1 and at most 9"),
     ({"count": 10}, "at most 9"), ({"share": "0"}, "above 0 and below 1"), ({"share": "1"}, "below 1"), ({"share": "nan"}, "share is nan"), ({"share": "a"}, "a number"), ({"levels": "0.5,1.0"}, "below 1"),
     ({"mode": "x1"}, "'x0', 'final'"), ({"limit": 1}, "at least 2"), ({"flag": "perhaps"}, "true or false"), ({"cuont": 3}, "did you mean 'count'")],
)  # fmt: skip
def test_what_does_not_fit_is_refused(bad, message):
    with pytest.raises(UsageError, match="demo") as told:
        build(Options, bad)
    assert message in str(told.value)


@given(st.integers(-5, 15))
def test_ranges_are_exact(count):
    if 1 <= count <= 9:
        assert Options(count=count).count == count
    else:
        with pytest.raises(UsageError):
            Options(count=count)


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_open_ranges_are_open(share):
    if 0.0 < share < 1.0:
        assert Options(share=share).share == share
    else:
        with pytest.raises(UsageError):
            Options(share=share)


def test_everything_is_described():
    rows = {row["name"]: row for row in describe(Options)}
    assert list(rows) == ["count", "share", "levels", "mode", "limit", "flag", "label"]
    assert rows["count"] == {"name": "count", "type": "int", "default": 4, "range": "at least 1 and at most 9", "symbol": "N", "help": "how many"}
    assert rows["mode"]["type"] == "choice"
    assert rows["mode"]["range"] == "x0 or final"
    assert rows["share"]["range"] == "above 0 and below 1"
    assert {row["name"] for row in describe(Beam)} >= {"width", "branch", "levels"}
    assert all(row["help"] for row in describe(Beam))


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_infinity_is_no_number(number):
    """Neither as a number nor as text, of whatever type, and not for a parameter without that bound either."""
    for value in (number, str(number)):
        for name in ("count", "share", "levels", "limit"):
            with pytest.raises(UsageError, match=f"demo: {name} is '?{number}'? but must be"):
                build(Options, {name: value})
        with pytest.raises(UsageError, match=f"mcts: exploration is {number} but must be"):
            build(MCTS, {"exploration": value})


def test_the_last_of_several_types_tells_the_mistake():
    assert parse("x", "3", int | float) == 3
    assert parse("x", "3.5", int | float) == 3.5
    with pytest.raises(UsageError, match="x is 'a' but must be a number"):
        parse("x", "a", int | float)


def test_names_that_are_near_are_suggested():
    assert "did you mean 'beam'?" in str(unknown_name("policy", "baem", ["beam", "best-of-n"]))
    assert "known are: a, b." in str(unknown_name("policy", "zzzz", ["b", "a"]))
    assert "20 are known" in str(unknown_name("policy", "zzzz", [f"p{i}" for i in range(20)]))
    assert "known are: none." in str(unknown_name("policy", "zzzz", []))
