"""Expansions that are stopped, that fail, or that cannot be: each says why, and leaves the run as it was."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from expansions import PROMPT, AllMoves, begin, derived, expand, rebuilt_as, tree_of

import tsdiff
from tsdiff.treesearch.durable import status
from tsdiff.treesearch.errors import SearchFailed, UsageError
from tsdiff.treesearch.expansion import Asked, planned_expansion
from tsdiff.treesearch.plan import prepare
from tsdiff.treesearch.runfile import JOURNAL
from tsdiff.worlds.gaussian.mixture import Mixture
from tsdiff.worlds.gaussian.model import GaussianModel


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run that is done; copy it to change it."""
    return begin(tmp_path_factory.mktemp("runs") / "plain")


@pytest.fixture
def copied(plain, tmp_path):
    """A copy of that run."""
    return lambda to="copy": Path(shutil.copytree(plain, tmp_path / to))


def test_it_tells_how_far_it_is_and_stops_when_told(copied):
    folder, seen = copied(), []
    whole = copied("whole")
    before = tree_of(folder)
    left = iter(range(2))
    with pytest.raises(KeyboardInterrupt):
        tsdiff.expand(folder, children=6, max_batch=4, callback=seen.append, stop=lambda: next(left, None) is None)
    assert status(folder) == "interrupted"
    assert [progress.nfe for progress in seen] == [3, 7]  # the first call of deterministic mode keeps a place free
    assert seen[-1].nfe_total == 18
    assert tree_of(folder) == before
    with pytest.raises(UsageError, match=r"another expansion of .*from node .* was interrupted; finish it first: tsdiff resume"):
        tsdiff.expand(folder, children=7)
    result = tsdiff.expand(folder, children=6, max_batch=4)
    expand(whole, children=6)
    assert derived(folder) == derived(whole)
    assert len(result.drivers) == 2


def test_an_expansion_without_a_sample_leaves_the_run_as_it_was(copied, monkeypatch):
    folder = copied()
    facts = json.loads((folder / "run.json").read_text())
    with monkeypatch.context() as patch:
        patch.setattr(GaussianModel, "forward", lambda self, latents, timesteps, rows: torch.full_like(latents, math.nan))
        with pytest.raises(SearchFailed, match=r"no sample could be finished: nodes .* not finite"):
            expand(folder, "best", children=2)
    after = json.loads((folder / "run.json").read_text())
    assert (after["status"], after["result"]["node"], after["result"]["score"]) == ("done", facts["result"]["node"], facts["result"]["score"])
    assert "no sample could be finished" in after["drivers"][-1]["error"]
    assert rebuilt_as(folder)
    assert expand(folder, "best", children=2).drivers[-1]["number"] == 2


def test_one_of_several_prompts_is_expanded_by_itself(tmp_path):
    folder = begin(tmp_path, [PROMPT, "near (0, 0)"], policy="adaptive", total_nfe=40, steps=4)
    with pytest.raises(UsageError, match=r"holds the runs of several prompts or seeds; name one of them: 0000-near"):
        expand(folder, "best")
    part = sorted(path for path in folder.iterdir() if path.is_dir())[1]
    others = {name: data for name, data in derived(folder).items() if not name.startswith(part.name)}
    result = expand(part, "best", children=2)
    assert {name: data for name, data in derived(folder).items() if not name.startswith(part.name)} == others
    index = json.loads((folder / "index.json").read_text())
    assert [one["nfe"] for one in index["runs"]][1] == result.ledger.nfe
    left = iter(range(1))
    with pytest.raises(KeyboardInterrupt):
        expand(part, "best", children=8, stop=lambda: next(left, None) is None)
    results = tsdiff.resume(folder)
    assert [len(one.drivers) for one in results] == [0, 3]
    assert results[1].score == json.loads((part / "run.json").read_text())["result"]["score"]
    assert status(part) == "done"
    again = tsdiff.resume(folder)
    assert [one.ledger.nfe for one in again] == [one.ledger.nfe for one in results]


def test_a_part_that_is_being_expanded_is_not_searched_again(tmp_path):
    from tsdiff.treesearch.durable import unfinished

    options = {"steps": 4, "policy_options": {"n": 1}}
    folder = begin(tmp_path, **options)
    left = iter(range(1))
    with pytest.raises(KeyboardInterrupt):
        expand(folder, "best", children=8, stop=lambda: next(left, None) is None)
    assert unfinished(prepare("gaussian", PROMPT, out=tmp_path, deterministic=True, max_batch=4, policy="best-of-n", **options)) is None


def test_objects_have_to_be_passed_again_and_weights_must_be_the_same(tmp_path):
    model = GaussianModel(Mixture([1.0], [[1.0, 1.0]], [0.5]))
    other = GaussianModel(Mixture([1.0], [[1.0, 1.0]], [0.6]))

    def brightness(images, prompts):
        return images.mean(dim=(1, 2, 3))

    folder = begin(tmp_path, model=model, verifiers=brightness, policy=AllMoves())
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}
    with pytest.raises(UsageError, match=r"objects that no file holds: model \(GaussianModel.*verifiers \(function brightness\); expand it from Python: tsdiff.expand\(.*model=..., verifier=...\)"):
        tsdiff.expand(folder)
    with pytest.raises(UsageError, match=r"fingerprint was 'gaussian-.*' and is 'gaussian-"):
        tsdiff.expand(folder, model=other, verifier=brightness)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"} == before
    left = iter(range(1))
    with pytest.raises(KeyboardInterrupt):
        tsdiff.expand(folder, children=3, model=model, verifier=brightness, stop=lambda: next(left, None) is None)
    with pytest.raises(UsageError, match="objects that no file holds"):
        tsdiff.resume(folder)
    result = tsdiff.resume(folder, model, verifier=brightness)
    assert result.drivers[-1]["nodes"] == 6
    left = iter(range(3))
    with pytest.raises(KeyboardInterrupt):
        tsdiff.expand(folder, policy=AllMoves(), renoise=1.0, model=model, verifier=brightness, stop=lambda: next(left, None) is None)
    with pytest.raises(UsageError, match=r"is being expanded with objects that no file holds: policy \(AllMoves all-moves\)"):
        tsdiff.resume(folder, model, verifier=brightness)
    assert tsdiff.resume(folder, model, verifier=brightness, policy=AllMoves()).drivers[-1]["number"] == 2


BAD = {
    "no node": (99, {}, "node 99 does not exist; the tree's nodes are 0 to 3"),
    "no index": (1.5, {}, "node is 1.5 but must be a node's index, or 'best'"),
    "a share above 1": ("best", {"renoise": 1.5}, r"renoise is 1.5 but must lie in \[0, 1\]"),
    "two ways back": ("best", {"renoise": 0.5, "to_level": 2}, "both say how far to go back"),
    "a level beyond": (0, {"to_level": 3}, "to_level is 3 but node 0 stands at level 0"),
    "nothing to do": ("best", {"renoise": 0.0}, "is finished, so that there is nothing to denoise"),
    "pure noise": (0, {}, "node 0 is pure noise, .*solver ddim is deterministic: all children would be equal"),
    "no children": ("best", {"children": 0}, "children is 0 but must be at least 1"),
    "children and a policy": ("best", {"children": 2, "policy": "beam"}, "children=2 was given beside a policy"),
    "options alone": ("best", {"policy_options": {"width": 2}}, "policy options width were given without a policy"),
    "an unknown policy": ("best", {"policy": "baem"}, "unknown policy 'baem'; did you mean"),
    "an allocator": ("best", {"policy": "adaptive"}, "shares a budget among many searches"),
    "a policy that needs noise": ("best", {"policy": "smc"}, "policy smc .*solver ddim is deterministic"),
    "a small budget": ("best", {"nfe": 2}, "nfe is 2 but one sample from there costs 3; the smallest budget is 3"),
    "too many for a budget": ("best", {"nfe": 7, "children": 3}, "3 children cost 9 NFE but nfe is 7"),
    "an unknown verifier": ("best", {"verifiers": "lumniance"}, "unknown verifier 'lumniance'; did you mean 'luminance'"),
    "a role that plain children have not": ("best", {"verifiers": "layout=luminance"}, "has no verifier role 'layout'"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_done_is_one_line_and_changes_nothing(plain, name):
    node, how, message = BAD[name]
    folder = plain
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}
    with pytest.raises(UsageError, match=message) as error:
        expand(folder, node, **how)
    assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"} == before


def test_runs_that_cannot_be_expanded_say_why(copied, tmp_path):
    with pytest.raises(UsageError, match="is not the folder of a run"):
        expand(tmp_path / "nowhere")
    tsdiff.search("gaussian", PROMPT, steps=3, policy="best-of-n").save(tmp_path / "saved")
    with pytest.raises(UsageError, match=r"its run.json does not say what was searched"):
        expand(tmp_path / "saved")
    left = iter(range(1))
    with pytest.raises(KeyboardInterrupt):
        tsdiff.treesearch.search.execute(prepare("gaussian", PROMPT, out=tmp_path / "half"), stop=lambda: next(left, None) is None)
    with pytest.raises(UsageError, match="is not done; continue it first: tsdiff resume"):
        expand(tmp_path / "half" / "run-0001")
    locked = copied("locked")
    with planned_expansion(locked, Asked("best")), pytest.raises(UsageError, match="is being written by process"):
        expand(locked)
    for size, why in ((0.5, "line .* was never finished|line .* is damaged"), (0.01, "the first line|checksum|not the journal|never finished|damaged")):
        cut = copied(f"cut-{size}")
        data = (cut / JOURNAL).read_bytes()
        (cut / JOURNAL).write_bytes(data[: int(size * len(data))])
        with pytest.raises(UsageError, match=why):
            expand(cut)
        assert (cut / JOURNAL).read_bytes() == data[: int(size * len(data))]
    (copied("spoilt") / "latents.safetensors").write_bytes(b"12345678")
    with pytest.raises(UsageError, match=r"latents.safetensors.* cannot be read"):
        expand(tmp_path / "spoilt")
    moved = copied("other machine")
    facts = json.loads((moved / "run.json").read_text())
    facts["options"]["environment"]["packages"]["torch"] = "1.0"
    (moved / "run.json").write_text(json.dumps(facts))
    with pytest.raises(UsageError, match=r"deterministic and can be continued only where it was begun: packages.torch was '1.0'"):
        expand(moved)


def test_a_node_that_failed_or_only_looked_ahead_is_refused(tmp_path):
    folder = begin(tmp_path, policy=AllMoves())
    draft = next(node for node in tree_of(folder)["nodes"] if node["draft"])
    with pytest.raises(UsageError, match=f"node {draft['index']} was made only to look ahead; expand node {draft['parent']}"):
        expand(folder, draft["index"])
