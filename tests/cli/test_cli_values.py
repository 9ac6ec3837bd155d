"""Seeds, intervals, sizes and prompt files: what is accepted, and how the rest is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsdiff.cli.prompts import read_prompts
from tsdiff.cli.values import parse_bytes, parse_class, parse_device, parse_interval, parse_seeds
from tsdiff.treesearch.errors import UsageError


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20, unique=True))
def test_listed_seeds_come_back_in_their_order(seeds):
    assert parse_seeds(",".join(map(str, seeds))) == tuple(seeds)


@given(st.integers(0, 10**6), st.integers(0, 200))
def test_a_range_of_seeds_holds_both_ends(first, length):
    assert parse_seeds(f"{first}-{first + length}") == tuple(range(first, first + length + 1))


def test_seed_ranges_and_numbers_mix():
    assert parse_seeds("0-3, 7") == (0, 1, 2, 3, 7)


@pytest.mark.parametrize(
    ("text", "hint"),
    [("", "whole numbers"), ("a", "whole numbers"), ("-1", "whole numbers"), ("1.5", "whole numbers"), ("3-1", "write 1-3"), ("0-3,2", "seed 2 appears twice"), ("0-99999999", "more than")],
)
def test_bad_seeds_are_refused_with_what_to_write(text, hint):
    with pytest.raises(ValueError, match=hint):
        parse_seeds(text)


@pytest.mark.parametrize(("text", "count"), [("2GB", 2 * 10**9), ("1GiB", 2**30), ("1.5 kb", 1500), ("77", 77)])
def test_sizes_have_decimal_and_binary_units(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "2XB", "-1", "0", "0.1B"])
def test_bad_sizes_are_refused(text):
    with pytest.raises(ValueError, match=r"bytes|byte"):
        parse_bytes(text)


def test_intervals_are_ordered_pairs():
    assert parse_interval("0.3,inf") == (0.3, float("inf"))
    for text in ("1", "2,1", "-1,2", "a,b", "nan,1", "1,2,3"):
        with pytest.raises(ValueError, match=r"LOW"):
            parse_interval(text)


def test_devices_are_spelled_as_torch_spells_them():
    assert [parse_device(text) for text in ("auto", "cpu", "mps", "cuda", "cuda:11")] == ["auto", "cpu", "mps", "cuda", "cuda:11"]
    for text in ("gpu", "cuda:", "cuda:x", "CPU"):
        with pytest.raises(ValueError, match="not one of"):
            parse_device(text)


def test_a_class_is_an_id_or_a_name():
    assert parse_class("207") == 207
    assert parse_class("golden retriever") == "golden retriever"


def test_text_files_hold_a_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff# a comment\n\n  a réd cube \r\na blue\u2028sphere\n".encode())
    conditions = read_prompts(path, negative_prompt="blur", class_label=3)
    assert [condition.prompt for condition in conditions] == ["a réd cube", "a blue\u2028sphere"]
    assert {(condition.negative_prompt, condition.class_label) for condition in conditions} == {("blur", 3)}


def test_json_lines_carry_options_and_facts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a", "negative_prompt": "b", "class": "c", "tag": "two", "include": [{"count": 2}]}, {"class": 7}, {"prompt": "# no comment"}]
    path.write_text("\n".join(map(json.dumps, lines)))
    first, second, third = read_prompts(path, negative_prompt="d", class_label=1)
    assert (first.prompt, first.negative_prompt, first.class_label) == ("a", "b", "c")
    assert first.metadata == {"tag": "two", "include": [{"count": 2}]}
    assert (second.prompt, second.negative_prompt, second.class_label, second.metadata) == ("", "d", 7, {})
    assert (third.prompt, third.class_label) == ("# no comment", 1)


@given(st.lists(st.text().filter(lambda text: text.strip()), min_size=1, max_size=5))
def test_any_prompt_survives_json_lines(tmp_path_factory, prompts):
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts), encoding="utf-8")
    assert [condition.prompt for condition in read_prompts(path)] == prompts


@pytest.mark.parametrize(
    ("name", "content", "hints"),
    [
        ("p.txt", b"", ["holds no prompt"]),
        ("p.txt", b"\n# only this\n", ["holds no prompt"]),
        ("p.txt", b"fine\ncaf\xe9\n", ["line 2", "0xe9", "UTF-8"]),
        ("p.jsonl", b"\n\n", ["holds no prompt", "JSON object"]),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": ', ["line 2", "not JSON"]),
        ("p.jsonl", b'["a"]', ["line 1", "list instead of an object"]),
        ("p.jsonl", b'{"text": "a"}', ["line 1", "neither"]),
        ("p.jsonl", b'{"prompt": 3}', ["line 1", '"prompt" is 3', "string"]),
        ("p.jsonl", b'{"class": true}', ["line 1", '"class" is true']),
        ("p.jsonl", b'{"prompt": "a", "weight": NaN}', ["line 1", "NaN"]),
    ],
)
def test_bad_prompt_files_name_file_and_line(tmp_path, name, content, hints):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_prompts(path)
    assert all(hint in str(caught.value) for hint in [str(path), *hints])


def test_a_missing_prompt_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere\.txt cannot be read"):
        read_prompts(tmp_path / "nowhere.txt")
    with pytest.raises(UsageError, match="cannot be read"):
        read_prompts(tmp_path)
