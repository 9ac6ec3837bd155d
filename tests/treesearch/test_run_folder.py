"""Saved runs: strict JSON, safetensors and PNG, complete, and never written over."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import PROMPT, Hooked, Judge
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from tsdiff.policies.beam import Beam
from tsdiff.policies.best_of_n import BestOfN
from tsdiff.treesearch import runfolder
from tsdiff.treesearch.errors import SearchFailed, UsageError
from tsdiff.treesearch.node import Move, Node
from tsdiff.treesearch.results import to_pil
from tsdiff.treesearch.runfolder import claim_folder, read_json, read_tree, slug, write_json, write_latents
from tsdiff.treesearch.search import execute, prepare, search
from tsdiff.treesearch.strictjson import decode, encode, in_pieces


def strict(path: Path):
    def constant(name):
        raise AssertionError(f"{name} is not strict JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=constant)


def run(out, prompts=PROMPT, **options):
    options = {"policy": Beam(width=2, branch=2), "verifier": Judge(needs=["images", "x0"]), "steps": 6} | options
    return search(Hooked(), prompts, out=out, **options)


def test_a_run_has_all_its_files(tmp_path):
    result = run(tmp_path / "out")
    assert result.path == tmp_path / "out" / "run-0001"
    assert {file.name for file in result.path.iterdir()} == {
        "run.json", "journal.jsonl", "lock", "tree.json", "baseline.json", "best.png", "baseline.png", "latents.safetensors", "previews.pack", "index.json", "summary.csv",
    }  # fmt: skip
    for name in ("run.json", "tree.json", "baseline.json", "index.json"):
        strict(result.path / name)


def test_the_tree_is_the_tree(tmp_path):
    result = run(tmp_path)
    saved = strict(result.path / "tree.json")
    assert saved == result.tree.to_json() == read_tree(result.path)
    assert strict(result.path / "baseline.json") == result.baseline.tree.to_json()
    assert [node["parent"] for node in saved["nodes"]] == [None if node.parent is None else node.parent.index for node in result.tree.nodes]
    assert [Move.from_json(node["move"]) for node in saved["nodes"]] == [node.move for node in result.tree.nodes]
    assert all(node["status"] != "open" for node in saved["nodes"])
    assert saved["ledger"]["nfe"] == sum(node["nfe"] for node in saved["nodes"])


def test_the_run_says_what_was_asked_and_found(tmp_path):
    result = run(tmp_path, nfe=60, seed=5)
    saved = strict(result.path / "run.json")
    assert saved["format"] == 1
    assert saved["result"] == result.to_json()
    assert saved["result"]["score"] == result.score == result.node.score("judge")
    assert saved["result"]["nfe"] == result.ledger.nfe <= 60
    assert saved["options"]["nfe_budget"] == 60
    assert saved["options"]["environment"]["threads"] == torch.get_num_threads()
    assert saved["options"]["policy"]["width"] == 2


def test_latents_are_those_of_the_nodes(tmp_path):
    result = run(tmp_path, policy=BestOfN(n=3))
    saved = load_file(result.path / "latents.safetensors")
    assert set(saved) == {f"node/{node.index}" for node in result.tree.nodes}
    memory = search(Hooked(), PROMPT, policy=BestOfN(n=3), verifier=Judge(needs=["images", "x0"]), steps=6)
    for index, latent in memory.latents.items():
        assert torch.equal(saved[f"node/{index}"], latent)
    best = saved[f"node/{result.node.index}"]
    assert float(-(best - torch.tensor([3.0, 2.4])).norm()) == pytest.approx(result.score, abs=1e-6)


def test_latents_of_dropped_nodes_are_kept_under_a_memory_limit(tmp_path):
    result = run(tmp_path, memory_limit=1)
    saved = load_file(result.path / "latents.safetensors")
    assert set(saved) == {f"node/{node.index}" for node in result.tree.nodes if not node.draft}
    assert not any(entry.name.startswith("tsdiff-latents") for entry in result.path.iterdir())


def test_pictures_are_the_answers(tmp_path):
    result = run(tmp_path)
    for path, one in ((result.path / "best.png", result), (result.path / "baseline.png", result.baseline)):
        assert one.picture is None  # on disk, not in memory
        with Image.open(path) as image:
            assert np.array_equal(np.asarray(image), np.asarray(one.image))
    plain = search(Hooked(), PROMPT, policy=Beam(width=2, branch=2), verifier=Judge(needs=["images", "x0"]), steps=6)
    assert np.array_equal(np.asarray(plain.image), np.asarray(result.image))
    expected = to_pil(Hooked().decode(load_file(result.path / "latents.safetensors")[f"node/{result.node.index}"][None]).pixels[0])
    assert np.array_equal(np.asarray(result.image), np.asarray(expected))


def test_pixels_are_rounded_not_cut():
    pixels = torch.tensor([0.0, 0.5, 1.0, 127.6 / 255, -0.1, 1.1]).reshape(1, 2, 3).expand(3, 2, 3)
    assert np.asarray(to_pil(pixels))[:, :, 0].tolist() == [[0, 128, 255], [128, 0, 255]]


def test_nothing_is_ever_overwritten(tmp_path):
    first, second = run(tmp_path), run(tmp_path, seed=1)
    assert [first.path.name, second.path.name] == ["run-0001", "run-0002"]
    (tmp_path / "run-0007").mkdir()
    (tmp_path / "run-0100.txt").touch()
    assert claim_folder(tmp_path).name == "run-0008"


def test_two_searches_at_once_do_not_share_a_folder(tmp_path, monkeypatch):
    original = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(()) if self == tmp_path else original(self))  # both saw an empty folder
    assert {claim_folder(tmp_path).name for _ in range(3)} == {"run-0001", "run-0002", "run-0003"}


def test_several_prompts_make_a_folder_of_runs(tmp_path):
    results = run(tmp_path, [PROMPT, "near (0, 0)"], seed=[0, 3], policy=BestOfN(n=2))
    assert results.path == tmp_path / "run-0001"
    index = strict(results.path / "index.json")
    assert index["status"] == "done"
    assert [(entry["prompt"], entry["seed"]) for entry in index["runs"]] == [(PROMPT, 0), (PROMPT, 3), ("near (0, 0)", 0), ("near (0, 0)", 3)]
    assert index["engine"]["rows"] == sum(result.ledger.rows + result.baseline_ledger.rows for result in results)
    for entry, result in zip(index["runs"], results, strict=True):
        assert Path(entry["run"]) == result.path
        assert read_tree(result.path)["seed"] == result.seed
    assert len({result.path for result in results}) == 4


def test_prompts_that_make_the_same_slug_have_their_own_folders(tmp_path):
    results = run(tmp_path, ["near (1, 1)", "near(1,1)", "near ( 1 , 1 )"], policy=BestOfN(n=1))
    assert len({result.path for result in results}) == 3


def test_failures_are_in_the_index(tmp_path):
    from test_failures import bad_root, nan_at

    model = Hooked()
    model.spoil = nan_at(bad_root(0, seed=1))
    plan = prepare(model, PROMPT, policy=BestOfN(n=1), verifiers=[Judge()], seed=[0, 1], steps=4, out=tmp_path)
    results = execute(plan)
    index = strict(results.path / "index.json")
    assert index["status"] == "incomplete"
    assert [entry["seed"] for entry in index["runs"]] == [0]
    assert [entry["seed"] for entry in index["failures"]] == [1]
    assert "not finite" in index["failures"][0]["error"]
    model.spoil = lambda latents, timesteps, outputs: outputs * torch.nan
    with pytest.raises(SearchFailed):
        search(model, PROMPT, verifier=Judge(), steps=4, out=tmp_path / "alone")
    assert strict(tmp_path / "alone" / "run-0001" / "index.json")["status"] == "incomplete"


def test_a_result_can_be_saved_later(tmp_path):
    result = search(Hooked(), PROMPT, policy=BestOfN(n=2), verifier=Judge(), steps=4)
    folder = result.save(tmp_path / "deep" / "down")
    assert {file.name for file in folder.iterdir()} == {"run.json", "tree.json", "baseline.json", "best.png", "baseline.png", "latents.safetensors"}
    assert set(load_file(folder / "latents.safetensors")) == {f"node/{node.index}" for node in result.node.path()}
    assert read_tree(folder) == result.tree.to_json()
    with pytest.raises(FileExistsError, match="not empty"):
        result.save(folder)


def test_a_place_that_cannot_be_written_to_is_told_before_the_search(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("x")
    model = Hooked()
    for out in (blocked, blocked / "below"):
        with pytest.raises(UsageError, match="cannot write to the output folder"):
            search(model, PROMPT, verifier=Judge(), steps=4, out=out)
    assert model.seen == 0


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_told_before_the_search(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="cannot write"):
        search(Hooked(), PROMPT, verifier=Judge(), steps=4, out=tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_safetensors_are_safetensors(tmp_path, dtype):
    tensors = {"a": torch.randn(2, 3).to(dtype), "b": torch.randn(()).to(dtype), "c": torch.zeros(0, 4, dtype=dtype)}
    write_latents(tmp_path / "x.safetensors", tensors, tensors.__getitem__)
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(loaded[name].dtype == dtype and torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_files_are_whole_or_not_there(tmp_path):
    with pytest.raises(UsageError, match="cannot be written as strict JSON"):
        write_json(tmp_path / "x.json", {"x": object()})
    write_json(tmp_path / "x.json", {"format": 1, "x": "é"})
    with pytest.raises(UsageError, match="cannot be written as strict JSON"):
        write_json(tmp_path / "x.json", {"x": object()})
    assert strict(tmp_path / "x.json") == {"format": 1, "x": "é"}

    def read(name):
        if name == "bad":
            raise OSError("gone")
        return torch.zeros(2)

    with pytest.raises(OSError, match="gone"):
        write_latents(tmp_path / "l.safetensors", ["good", "bad"], read)
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


@settings(max_examples=40)
@given(st.text().filter(lambda text: text != "format"), st.floats(allow_nan=False))
def test_json_files_hold_any_text_and_number(tmp_path_factory, text, number):
    """What JSON cannot say, such as half a surrogate pair, is marked, and comes back as it was."""
    path = tmp_path_factory.getbasetemp() / "any.json"
    write_json(path, {"format": 1, text: [text, number, "\udce9"]})
    strict(path)
    assert read_json(path)[text] == [text, number, "\udce9"]


def test_slugs_are_safe_file_names():
    assert slug("../../etc/passwd") == "etc-passwd"
    assert slug("日本") == slug("") == "sample"
    assert len(slug("a" * 500)) == 40


@pytest.mark.parametrize(("text", "message"), [(None, "no tree.json"), ("{", "cannot be read"), ('{"format": 99}', "format 99"), ("[]", "cannot be read")])
def test_what_is_not_a_run_is_told(tmp_path, text, message):
    if text is not None:
        (tmp_path / "tree.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_tree(tmp_path)


def test_moves_and_nodes_survive_json():
    from tsdiff.treesearch.node import Value
    from tsdiff.treesearch.noise import Rotate

    for move in (Move("draw", (0,), noise=Rotate(0, 0.5, 1)), Move("denoise", (0, 3, 6), 2, solver="ddim", model="m"), Move("renoise", (4, 1), source="x0"), Move("start", (3,), scale=0.5)):
        assert Move.from_json(json.loads(json.dumps(move.to_json(), allow_nan=False))) == move
    node = Node(3, 2**127, 5, None, Move("draw", (0,)), 0, values={"a": Value(None, reason="x")}, note={"k": [1]})
    data = json.loads(json.dumps(node.to_json(), allow_nan=False))
    assert int(data["id"], 16) == 2**127
    assert data["values"] == {"a": {"score": None, "reason": "x"}}


def test_a_tree_is_a_networkx_graph():
    import networkx as nx

    result = search(Hooked(), PROMPT, verifier=Judge(), policy=Beam(width=2, branch=2), steps=6)
    graph = result.tree.to_networkx()
    assert nx.is_forest(graph.to_undirected())
    assert graph.number_of_edges() == len(result.tree.nodes) - len(result.tree.roots)
    assert nx.shortest_path(graph, result.node.path()[0].index, result.node.index) == [node.index for node in result.node.path()]
    assert graph.nodes[result.node.index]["level"] == 6


def test_scratch_files_do_not_stay(tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    search(Hooked(), PROMPT, verifier=Judge(), steps=6, memory_limit=1)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt):
        search(Hooked(), PROMPT, verifier=Judge(), steps=6, memory_limit=1, callback=_interrupt)
    assert list(tmp_path.iterdir()) == []


def _interrupt(progress):
    if progress.nfe > 20:
        raise KeyboardInterrupt


def test_format_is_named_once():
    assert runfolder.FORMAT == 1


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(st.text(max_size=3) | st.integers() | st.booleans() | st.none(), inner, max_size=3),
    max_leaves=8,
)


TEXT = st.text(st.characters(exclude_categories=[]), max_size=3)
UNLIKE_JSON = st.recursive(TEXT | st.floats(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6)


@given(ANYTHING)
def test_json_over_many_lines_is_the_json_of_the_library(value):
    expected = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False)
    assume('"$' not in expected)  # would be marked
    assert encode(value, spread=True).decode() == expected


@given(st.dictionaries(TEXT, ANYTHING | UNLIKE_JSON, max_size=4), st.lists(ANYTHING | UNLIKE_JSON, max_size=3))
def test_json_in_pieces_is_the_json_of_the_whole(data, items):
    assert b"".join(in_pieces(data)) == encode(data, spread=True)
    assert b"".join(in_pieces({**data, "items": iter(items)})) == encode({**data, "items": items}, spread=True)
    assert decode(b"".join(in_pieces({"x": iter([{"$y": float("-inf")}]), "$z": "\udce9"}))) == {"x": [{"$y": float("-inf")}], "$z": "\udce9"}


def test_json_in_pieces_refuses_what_json_cannot_say():
    for bad in ({"x": object()}, {"x": {(1, 2): 3}}, {"x": {b"y": 3}}, {"x": iter([object()])}):
        with pytest.raises(UsageError, match="cannot be written as strict JSON"):
            list(in_pieces(bad))


@pytest.mark.parametrize("last", [torch.ones(2), torch.ones(3), torch.ones(2, dtype=torch.float64)], ids=["alike", "another shape", "another type"])
def test_latents_that_should_be_alike_are_written_as_they_are(tmp_path, last):
    tensors = {"a": torch.zeros(2), "b": torch.full((2,), 0.5), 'c"': last}
    reads = []
    write_latents(tmp_path / "alike.safetensors", tensors, lambda name: reads.append(name) or tensors[name], alike=True)
    write_latents(tmp_path / "any.safetensors", tensors, tensors.__getitem__)
    assert (tmp_path / "alike.safetensors").read_bytes() == (tmp_path / "any.safetensors").read_bytes()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(tmp_path / "alike.safetensors").items())
    if last.shape == (2,) and last.dtype == torch.float32:
        assert reads == ["a", "a", "b", 'c"'], "the first says what all are like"
    write_latents(tmp_path / "none.safetensors", [], tensors.__getitem__, alike=True)
    assert load_file(tmp_path / "none.safetensors") == {}
