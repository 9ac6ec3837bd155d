"""The store against a plain dictionary, with so little memory that almost everything goes to disk and comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsdiff.treesearch import store as module
from tsdiff.treesearch.store import Store

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]


def tensor(number: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    values = torch.arange(1, 1 + int(torch.Size(shape).numel())).reshape(shape) * 37 + number
    return (values % 2 == 0) if dtype == torch.bool else (values % 100).to(dtype)


KEYS = st.integers(0, 5)
SHAPES = st.lists(st.integers(1, 3), max_size=3).map(tuple)
TENSORS = st.dictionaries(st.sampled_from(["latent", "history0", "cond"]), st.builds(tensor, st.integers(0, 1000), st.sampled_from(DTYPES), SHAPES), max_size=3)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), KEYS, TENSORS),
        st.tuples(st.just("get"), KEYS, st.none()),
        st.tuples(st.just("drop"), KEYS, st.none()),
        st.tuples(st.just("spill"), KEYS, st.none()),
    ),
    max_size=30,
)


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)


@settings(max_examples=60)
@given(OPERATIONS, st.sampled_from([1, 40, 200, 10**9]), st.sampled_from([16, 100, 10**9]))
def test_behaves_like_a_dictionary_whatever_its_limits(operations, limit, segment):
    kept = Store("cpu", host_limit=limit)
    before, module.SEGMENT_BYTES = module.SEGMENT_BYTES, segment
    model: dict[int, dict[str, torch.Tensor]] = {}
    try:
        for kind, key, tensors in operations:
            if kind == "put":
                kept.put(key, tensors)
                model[key] = {name: value.clone() for name, value in tensors.items()}
            elif kind == "drop":
                kept.drop(key)
                model.pop(key, None)
            elif kind == "spill":
                kept.spill(key)
            elif key in model:
                assert same(kept.get(key), model[key])
            else:
                with pytest.raises(KeyError):
                    kept.get(key)
            assert {k for k in range(6) if k in kept} == set(model)
            # In memory: what fits, and at most the one entry in use beyond it.
            sizes = [sum(t.nbytes for t in entry.values()) for entry in kept._entries.values()]
            assert kept._bytes["host"] == sum(sizes)
            assert sum(sizes) <= limit or sum(sizes[:-1]) == 0
        for key, tensors in model.items():
            assert same(kept.get(key), tensors)
    finally:
        module.SEGMENT_BYTES = before
        kept.close()


def test_the_least_recently_used_goes_first():
    kept = Store("cpu", host_limit=24)
    for key in "abc":
        kept.put(key, {"x": torch.zeros(2)})
    kept.get("a")
    kept.put("d", {"x": torch.zeros(2)})
    assert set(kept._entries) == {"a", "c", "d"}
    assert kept.spilled_bytes == 8
    kept.close()


def test_peak_follows_the_limit_not_the_contents():
    kept = Store("cpu", host_limit=400)
    for key in range(1000):
        kept.put(key, {"x": torch.zeros(10)})
    assert kept.peak == {"host": 440, "device": 0}  # the limit, and the entry that pushes another out
    assert len(kept._entries) == 10
    kept.close()


def test_scratch_is_made_at_the_first_spill_and_removed_at_the_end(tmp_path: Path):
    folder = tmp_path / "not" / "there"
    kept = Store("cpu", host_limit=8, folder=folder)
    kept.put("a", {"x": torch.zeros(2)})
    assert not folder.exists()
    kept.put("b", {"x": torch.ones(2)})
    (scratch,) = folder.iterdir()
    assert scratch.name.startswith("tsdiff-latents-")
    assert sum(file.stat().st_size for file in scratch.iterdir()) == 8
    kept.close()
    assert list(folder.iterdir()) == []
    assert "a" not in kept
    assert "b" not in kept


def test_disk_does_not_grow_with_what_has_been_forgotten(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(module, "SEGMENT_BYTES", 80)
    kept = Store("cpu", host_limit=1, folder=tmp_path)
    for key in range(200):
        kept.put(key, {"x": torch.zeros(10)})
        kept.drop(key - 3)
    (scratch,) = tmp_path.iterdir()
    assert kept.spilled_bytes == 199 * 40
    assert sum(file.stat().st_size for file in scratch.iterdir()) <= 5 * 80
    kept.close()


def test_segments_that_empty_before_they_are_full_are_removed(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(module, "SEGMENT_BYTES", 80)
    kept = Store("cpu", folder=tmp_path)
    for key in range(200):
        kept.put(key, {"x": torch.zeros(10)})
        kept.spill(key)
        kept.drop(key)
    (scratch,) = tmp_path.iterdir()
    assert sum(file.stat().st_size for file in scratch.iterdir()) <= 2 * 80
    kept.close()


def test_a_row_does_not_keep_its_batch_alive():
    kept = Store("cpu")
    batch = torch.randn(100, 4)
    kept.put("row", {"x": batch[3]})
    row = kept.get("row")["x"]
    assert torch.equal(row, batch[3])
    assert row.untyped_storage().nbytes() == 16
    batch[3] = 0.0
    assert kept.get("row")["x"].abs().sum() > 0
    kept.close()


def test_an_empty_tensor_survives_the_disk():
    kept = Store("cpu")
    kept.put("a", {"x": torch.zeros(0, 3)})
    kept.spill("a")
    assert kept.get("a")["x"].shape == (0, 3)
    kept.close()


def test_a_damaged_scratch_file_is_told(tmp_path: Path):
    kept = Store("cpu", folder=tmp_path)
    kept.put("a", {"x": torch.zeros(10)})
    kept.spill("a")
    next(next(tmp_path.iterdir()).iterdir()).write_bytes(b"123")
    with pytest.raises(OSError, match="cut short"):
        kept.get("a")
    kept.close()


def test_what_is_only_read_stays_where_it_is(tmp_path: Path):
    kept = Store("cpu", host_limit=8, folder=tmp_path)
    kept.put("a", {"x": torch.zeros(2)})
    kept.put("b", {"x": torch.ones(2)})
    assert (list(kept._entries), list(kept._disk)) == (["b"], ["a"])
    for _ in range(2):
        assert kept.read("a")["x"].tolist() == [0.0, 0.0]
        assert kept.read("b")["x"].tolist() == [1.0, 1.0]
    assert (list(kept._entries), list(kept._disk)) == (["b"], ["a"])
    with pytest.raises(KeyError):
        kept.read("c")
    kept.close()


def test_scratch_of_a_process_that_was_killed_can_be_removed(tmp_path: Path):
    killed = Store("cpu", host_limit=1, folder=tmp_path)
    killed.put("a", {"x": torch.zeros(2)})
    killed.put("b", {"x": torch.zeros(2)})
    (tmp_path / "tree.json").touch()
    assert len(list(tmp_path.iterdir())) == 2
    module.remove_scratch(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tree.json"]
