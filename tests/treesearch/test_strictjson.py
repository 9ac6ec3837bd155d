"""Any record survives strict JSON."""

from __future__ import annotations

import json
import math
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.strictjson import decode, encode

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=8) | st.sampled_from(
    ["$float", "$$", "$", "nan", "$text:00", "\ud83d\ude00", "\U0001f600", "\ud800", "\0", "\u2028\x85\n\r", "日本", "\ufeff", "\uffff", '"$x"']
)
RECORDS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=12,
)


def exactly(record):
    """A record in a form that tells -0.0 from 0.0, True from 1, a list from a tuple, and finds NaN equal to itself."""
    if isinstance(record, float):
        return ("float", "nan" if math.isnan(record) else struct.pack("<d", record))
    if isinstance(record, dict):
        return ("dict", [(key, exactly(value)) for key, value in record.items()])
    if isinstance(record, list):
        return ("list", [exactly(value) for value in record])
    return (type(record).__name__, record)


def strictly(text: bytes):
    def refuse(name):
        raise AssertionError(f"{name} is not strict JSON")

    return json.loads(text.decode("utf-8"), parse_constant=refuse)


@given(RECORDS)
@example({"$float": "nan"})
@example([{"$text": "00"}, {"$float": "inf"}, {"$$float": 1}, {"$text:": 1}, {"$float": math.nan}])
@example({"\ud800": -math.inf, "$text:eda080": [math.inf]})
def test_records_survive(record):
    text = encode(record)
    assert b"\n" not in text
    strictly(text)
    assert exactly(decode(text)) == exactly(record)
    assert encode(decode(text)) == text


@given(RECORDS)
def test_plain_records_are_plain_json(record):
    if all(mark not in json.dumps(record) for mark in ("NaN", "Infinity", "$", "\\ud")):
        assert exactly(strictly(encode(record))) == exactly(record)


def test_no_surrogate_reaches_a_file():
    text = encode({"a\udc80": "b\udfff\ud800c"})
    assert text == b'{"$text:61edb280":{"$text":"62edbfbfeda08063"}}'
    assert decode(text) == {"a\udc80": "b\udfff\ud800c"}


def test_python_becomes_json_as_json_does_it():
    record = {1: (2, 3), False: None, None: 1.5, 2.5: "x"}
    assert decode(encode(record)) == json.loads(json.dumps(record))
    marked = record | {"bad": math.inf}  # the same rule where something has to be marked
    assert decode(encode(marked)) == json.loads(json.dumps(record)) | {"bad": math.inf}


def endless():
    loop: list = []
    loop.append(loop)
    return loop


@pytest.mark.parametrize("record", [{"x": object()}, {(1, 2): 3}, {1, 2}, b"bytes", [math.nan, object()], {(1,): math.nan}, endless()])
def test_what_is_not_json_is_refused(record):
    with pytest.raises(UsageError, match="cannot be written as strict JSON"):
        encode(record)


@pytest.mark.parametrize("text", [b"", b"{", b"NaN", b"[Infinity]", b'"\xff"', b'{"$new":1}', b'{"$float":"huge"}', b'{"$text":"0"}', b'{"$text":"ff"}', b"[" * 100_000])
def test_what_is_not_strict_json_is_not_read(text):
    with pytest.raises(ValueError):  # noqa: PT011 - the parser's own words
        decode(text)
