"""Previews beside a search: they show what was decoded, cost no work, survive interruptions, and never stop anything."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from fakes import PROMPT, Hooked, Judge
from test_resume import BEAM, QUICK, begin, derived, go_on, halfway

import tsdiff
from tsdiff.policies.beam import Beam
from tsdiff.treesearch import previews as previews_module
from tsdiff.treesearch.durable import status
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.previewfile import PREVIEWS, PreviewFile, compress, read_previews
from tsdiff.treesearch.results import to_pil
from tsdiff.treesearch.runfolder import read_tree
from tsdiff.treesearch.search import execute, prepare

LOOKED = {**BEAM, "verifiers": "luminance"}
"""A search whose verifier looks at pictures, so that they are decoded."""


class Witness(Judge):
    """A verifier that keeps every picture that it was shown."""

    def __init__(self, **options):
        self.seen = {}
        super().__init__("witness", self._look, needs=["images", "x0"], **options)

    def _look(self, candidates):
        from fakes import closeness

        self.seen.update(zip(candidates.node_ids, candidates.images, strict=True))
        return closeness(candidates)


def decoded(tree, kind="x0"):
    """Indices of the nodes of a tree whose pictures a verifier was shown: their own, or their look-ahead leaves'."""
    valued = [node for node in tree.nodes if any(("@" in key) == (kind == "lookahead") for key in node.values)]
    return {node.index for node in valued}


# What is shown -------------------------------------------------------------------------------------------------------


def test_previews_are_the_pictures_that_were_judged(tmp_path):
    witness = Witness()
    result = tsdiff.search(Hooked(), PROMPT, policy=Beam(width=2, branch=2), verifier=witness, steps=6, out=tmp_path)
    previews = read_previews(result.path)
    assert {node for tree, node in previews if tree == "search"} == decoded(result.tree)
    assert {node for tree, node in previews if tree == "baseline"} == {result.baseline.node.index}
    for tree, line in ((result.tree, "search"), (result.baseline.tree, "baseline")):
        for node in tree.nodes:
            if (line, node.index) in previews:
                preview = previews[line, node.index]
                assert preview.id == f"{node.id:032x}"
                assert np.array_equal(np.asarray(preview.image()), np.asarray(to_pil(witness.seen[preview.id])))
    best = previews["search", result.node.index].image()
    assert np.array_equal(np.asarray(best), np.asarray(result.image))


def test_previews_of_large_pictures_are_close(tmp_path):
    (result,) = begin(tmp_path, **LOOKED)
    preview = read_previews(result.path)["search", result.node.index]
    assert (preview.width, preview.height) == preview.image().size == result.image.size == (128, 128)
    error = np.mean((np.asarray(preview.image(), float) - np.asarray(result.image, float)) ** 2)
    assert 10 * np.log10(255**2 / error) > 36
    assert preview.media_type == "image/jpeg"
    assert len(preview.read()) < 4096


def test_a_pipelines_images_are_shown(tmp_path):
    from tiny_sd import tiny_stable_diffusion

    result = tsdiff.search(tiny_stable_diffusion(), "a red cube", policy=Beam(width=2, branch=2), verifier="sharpness", steps=4, guidance_scale=3.0, out=tmp_path)
    previews = read_previews(result.path)
    assert {node for tree, node in previews if tree == "search"} == decoded(result.tree)
    assert np.array_equal(np.asarray(previews["search", result.node.index].image()), np.asarray(result.image))


@pytest.mark.parametrize("verifier", ["gaussian-target", "luminance"])
def test_nothing_is_decoded_or_evaluated_for_them(tmp_path, verifier):
    found = {}
    for show in ("none", "kept", "all"):
        results = begin(tmp_path / show, verifiers=verifier, previews=show, **BEAM)
        (result,) = results
        engine = results.engine
        found[show] = (result.ledger, result.baseline.ledger, engine.rows, engine.padding, engine.probe, engine.retried, engine.batches, read_tree(result.path))
        assert (result.path / PREVIEWS).exists() == (show != "none")
        number = len([key for key in read_previews(result.path) if key[0] == "search"])
        assert number == (result.ledger.decodes if show != "none" else 0)
        assert ("previews" in engine.seconds) == (result.ledger.decodes > 0)
    assert found["none"] == found["kept"] == found["all"]
    files = [derived(tmp_path / show / "run-0001") for show in ("none", "kept", "all")]
    assert files[0] == files[1] == files[2]


def test_a_search_without_a_folder_makes_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(previews_module, "shrink", None)
    tsdiff.search("gaussian", PROMPT, verifier="luminance", steps=4, **BEAM)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keep", ["all", "path", "leaves", "none"])
def test_pictures_are_kept_where_latents_are(tmp_path, keep):
    (result,) = begin(tmp_path, keep=keep, **LOOKED)
    (everything,) = begin(tmp_path / "everything", keep=keep, previews="all", **LOOKED)
    looked = decoded(result.tree)
    path = {node.index for node in result.node.path()}
    expected = {"all": looked, "path": looked & path, "leaves": {index for index in looked if result.tree.nodes[index].level == 5}, "none": set()}
    assert {node for tree, node in read_previews(result.path) if tree == "search"} == expected[keep]
    assert {node for tree, node in read_previews(everything.path) if tree == "search"} == looked
    assert len(expected["path"]) > 1
    assert derived(result.path) == derived(everything.path)


def test_look_ahead_leaves_belong_to_the_node_that_looks_ahead(tmp_path):
    policy = {"policy": "beam", "policy_options": {"width": 2, "branch": 2, "value": "lookahead", "lookahead_steps": 2}, "verifiers": "luminance"}
    for keep in ("all", "path", "leaves"):
        (result,) = begin(tmp_path / keep, keep=keep, **policy)
        nodes = result.tree.nodes
        shown = {node for tree, node in read_previews(result.path) if tree == "search"}
        drafts = {node.index for node in nodes if node.draft}
        path = {node.index for node in result.node.path()}
        assert drafts
        if keep == "all":
            assert shown >= drafts
        elif keep == "path":
            assert shown & drafts
            assert {nodes[index].parent.index if nodes[index].draft else index for index in shown} <= path
        else:
            assert not shown & drafts
            assert all(nodes[index].level == 5 for index in shown)


def test_what_is_no_choice_is_told(tmp_path):
    with pytest.raises(UsageError, match="previews is 'some' but must be one of kept, all, none"):
        prepare("gaussian", PROMPT, previews="some")


def test_several_runs_have_a_file_each_and_one_thread_writes_them(tmp_path):
    before = threading.active_count()
    most = [0]

    def count(progress):
        most[0] = max(most[0], threading.active_count())

    results = tsdiff.search("gaussian", [PROMPT, "near (0, 0)"], seed=[0, 1], policy="best-of-n", policy_options={"n": 3}, verifier="luminance", steps=4, out=tmp_path, callback=count)
    for result in results:
        assert len(read_previews(result.path)) == 3 + 1
    assert most[0] == before + 1
    assert threading.active_count() == before


# Interruptions -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """(an interrupted search's folder, what it would have come to, and its previews); do not write there."""
    out = tmp_path_factory.mktemp("half")
    folder, expected = halfway(out, **LOOKED)
    assert status(folder) == "running"
    whole = out / "whole" / "run-0001"
    return folder, expected, {key: (preview.id, preview.read()) for key, preview in read_previews(whole).items()}


def copied(half, tmp_path):
    return Path(shutil.copytree(half[0], tmp_path / "copy"))


def pictures(folder):
    return {key: (preview.id, preview.read()) for key, preview in read_previews(folder).items()}


def test_an_interrupted_search_goes_on_to_the_same_bytes_and_pictures(half, tmp_path):
    copy = copied(half, tmp_path)
    early = pictures(copy)
    assert 0 < len(early) < len(half[2])
    go_on(copy)
    assert derived(copy) == half[1]
    assert pictures(copy) == half[2]
    assert early.items() <= half[2].items()


@pytest.mark.parametrize("loss", ["gone", "cut", "spoiled", "rubbish", "folder", "newer"])
def test_whatever_becomes_of_the_file_the_search_ends_in_the_same_bytes(half, tmp_path, loss, monkeypatch):
    copy = copied(half, tmp_path)
    path = copy / PREVIEWS
    text = path.read_bytes()
    if loss in ("gone", "folder", "newer"):
        path.unlink()
    if loss == "folder":
        path.mkdir()
    elif loss == "newer":
        from tsdiff.treesearch import segmentfile

        with monkeypatch.context() as patch:
            patch.setattr(segmentfile, "VERSION", 2)
            file = PreviewFile(path)
            file.append({}, b"")
            file.close()
    elif loss == "cut":
        path.write_bytes(text[: random.Random(0).randrange(len(text))])
    elif loss == "spoiled":
        path.write_bytes(bytes(byte ^ (i % 500 == 99) for i, byte in enumerate(text)))
    elif loss == "rubbish":
        path.write_bytes(random.Random(1).randbytes(len(text)))
    results = go_on(copy)
    assert derived(copy) == half[1]
    if loss in ("folder", "newer"):
        (notice,) = results.notices
        assert notice.startswith("previews are missing, the search went on without: ")
        assert {"folder": "cannot be written (Is a directory)", "newer": "has format 2"}[loss] in notice
        assert "\n" not in notice
    else:
        assert results.notices == ()
        late = {node.index for node in results[0].tree.nodes} - {node for _, node in read_previews(half[0])}
        readable = {}
        for key, preview in read_previews(copy).items():
            try:
                readable[key] = (preview.id, preview.read())
            except UsageError as damaged:
                assert loss == "spoiled" and "is lost" in str(damaged)  # noqa: PT017, PT018
        assert readable.items() <= half[2].items()
        assert {key for key in half[2] if key[1] in late} <= readable.keys()


def test_a_stale_picture_does_not_pass_for_another_nodes(half, tmp_path):
    copy = copied(half, tmp_path)
    file = PreviewFile(copy / PREVIEWS)
    for node in range(200):
        file.append({"tree": "search", "node": node, "id": "0" * 32, "media_type": "image/webp", "width": 1, "height": 1}, b"stale")
    file.close()
    (result,) = go_on(copy)
    assert derived(copy) == half[1]
    previews = read_previews(copy)
    ids = {node.index: f"{node.id:032x}" for node in result.tree.nodes}
    right = [key for key in previews if ids.get(key[1]) == previews[key].id]
    assert right
    assert all(previews[key].read() == half[2][key][1] for key in right)


def test_the_choice_may_change_when_a_run_goes_on(half, tmp_path):
    copy = copied(half, tmp_path)
    early = pictures(copy)
    go_on(copy, previews="none")
    assert derived(copy) == half[1]
    assert pictures(copy) == early
    assert json.loads((copy / "run.json").read_text())["options"]["previews"] == "none"


def test_what_is_dropped_at_the_end_is_dropped_after_an_interruption_too(tmp_path):
    options = {**LOOKED, "keep": "path"}
    folder, _ = halfway(tmp_path, **options)
    early = pictures(folder)
    go_on(folder)
    assert pictures(folder) == pictures(tmp_path / "whole" / "run-0001")
    assert early.keys() - pictures(folder).keys()


def test_what_is_done_is_not_written_again(tmp_path):
    for keep in ("all", "path"):
        (result,) = begin(tmp_path / keep, **LOOKED, keep=keep)
        before = (result.path / PREVIEWS).stat()
        tsdiff.resume(result.path)
        after = (result.path / PREVIEWS).stat()
        assert (after.st_ino, after.st_mtime_ns, after.st_size) == (before.st_ino, before.st_mtime_ns, before.st_size)


def test_a_real_kill(tmp_path):
    script = """
import sys, time, tsdiff
options = {"policy": "beam", "policy_options": {"width": 2, "branch": 2}, "steps": 30, "deterministic": True, "verifier": "luminance"}
tsdiff.search("gaussian", sys.argv[2], out=sys.argv[1], callback=lambda progress: time.sleep(0.005), **options)
"""
    folder = tmp_path / "cut" / "run-0001"
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "cut"), PROMPT])
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None and len(read_previews(folder)) < 8:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    early = pictures(folder)
    assert len(early) >= 8
    go_on(folder)
    begin(tmp_path / "whole", **{**LOOKED, "steps": 30, "max_batch": None})
    whole = tmp_path / "whole" / "run-0001"
    assert derived(folder) == derived(whole)
    now, all_of_them = pictures(folder), pictures(whole)
    assert early.items() <= now.items() <= all_of_them.items()
    assert len(now) >= len(all_of_them) - previews_module.WAITING


# Faults --------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full device")
def test_a_full_disk_is_one_line_and_the_search_goes_on(tmp_path):
    plan = prepare("gaussian", PROMPT, verifiers="luminance", out=tmp_path, steps=5, deterministic=True, max_batch=4, **BEAM)
    results = execute(plan, disk=QUICK, begun=lambda folder: (folder / PREVIEWS).symlink_to("/dev/full"))
    (notice,) = results.notices
    assert notice.endswith("cannot be written (No space left on device)")
    begin(tmp_path / "whole", **LOOKED)
    assert derived(results[0].path) == derived(tmp_path / "whole" / "run-0001")


def test_the_file_size_limit_of_a_process_is_one_line_and_the_rest_is_whole(tmp_path):
    """The limit is above the largest other file of the run, and below its previews."""
    script = """
import resource, sys, tsdiff
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
options = {"policy": "best-of-n", "policy_options": {"n": 60}, "steps": 2, "verifier": "luminance", "baseline": False}
results = tsdiff.search("gaussian", [sys.argv[2]], out=sys.argv[1], **options)
print(len(results), *results.notices)
"""
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path), PROMPT], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("\n") == 1
    assert run.stdout.startswith("1 previews are missing, the search went on without: ")
    assert "cannot be written (File too large)" in run.stdout
    folder = tmp_path / "run-0001"
    assert 10 <= len(pictures(folder)) < 60
    assert status(folder) == "done"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_file_is_one_line(half, tmp_path):
    copy = copied(half, tmp_path)
    (copy / PREVIEWS).chmod(0o400)
    results = go_on(copy)
    assert derived(copy) == half[1]
    (notice,) = results.notices
    assert notice.endswith("cannot be written (Permission denied)")


def test_an_error_in_the_thread_never_leaves_it(tmp_path, monkeypatch):
    calls = []

    def broken(pixels):
        calls.append(threading.current_thread().name)
        if len(calls) == 3:
            raise RuntimeError("no\nencoder")
        return compress(pixels)

    monkeypatch.setattr(previews_module, "compress", broken)
    results = begin(tmp_path, **LOOKED)
    assert results.notices == (f"previews are missing, the search went on without: '{results[0].path / PREVIEWS}' cannot be written (RuntimeError: no encoder)",)
    assert calls == ["previews"] * 3, "in a thread of their own, and no more after an error"
    assert len(read_previews(results[0].path)) == 2


def test_a_slow_disk_delays_the_search_and_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(previews_module, "WAITING", 2)
    waiting = []

    def slow(pixels):
        time.sleep(0.002)
        waiting.append(threading.active_count())
        return compress(pixels)

    monkeypatch.setattr(previews_module, "compress", slow)
    (result,) = begin(tmp_path, **LOOKED)
    assert len(read_previews(result.path)) == result.ledger.decodes + 1 == len(waiting)


def test_a_model_that_cannot_decode_a_row_has_no_picture_of_it(tmp_path):
    model = Hooked()

    def blind(latents):
        if len(model.decodes) == 2:
            raise RuntimeError("blind")

    model.blind = blind
    result = tsdiff.search(model, PROMPT, policy="best-of-n", policy_options={"n": 4}, verifier=Judge(needs=["images", "x0"]), steps=3, max_batch=1, baseline=False, out=tmp_path)
    unseen = {node.index for node in result.tree.nodes if (value := node.values.get("judge")) and "blind" in (value.reason or "")}
    assert len(unseen) == 1
    assert {node for _, node in read_previews(result.path)} == decoded(result.tree) - unseen
