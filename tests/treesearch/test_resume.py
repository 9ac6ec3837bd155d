"""Searches that are interrupted anywhere and continued end in the same bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from fakes import Jury
from faulty_disk import FaultyDisk, Killed, QuickDisk
from real_faults import derived

import tsdiff
from tsdiff.bench.rescore import rescore
from tsdiff.policies.dts import DTS
from tsdiff.treesearch import plan
from tsdiff.treesearch.durable import status, unfinished
from tsdiff.treesearch.errors import SetupError, UsageError
from tsdiff.treesearch.journal import JournalReader
from tsdiff.treesearch.requests import Draw
from tsdiff.treesearch.resume import planned
from tsdiff.treesearch.runfile import JOURNAL, RunFile
from tsdiff.treesearch.search import execute, prepare
from tsdiff.worlds.gaussian.model import GaussianModel
from tsdiff.worlds.gaussian.presets import preset

PROMPT = "near (3, 2.4)"
QUICK = QuickDisk()
STEP = int(os.environ.get("TSDIFF_DRILL_STEP", "0"))
"""1 interrupts drills at every change of their files, which takes minutes; by default they are sampled."""


def begin(out, disk=QUICK, prompts=PROMPT, *, stop=lambda: False, sync_seconds=0.0, **options):
    """Search, recorded in `out/run-0001`."""
    options = {"deterministic": True, "steps": 5, "max_batch": 4} | options
    return execute(prepare("gaussian", prompts, out=out, **options), disk=disk, sync_seconds=sync_seconds, stop=stop)


def go_on(folder, disk=QUICK, **given):
    """Continue it."""
    with planned(folder, disk=disk, **given) as (plan, into):
        return execute(plan, into=into, disk=disk, sync_seconds=0.0)


def interrupted(out, at, fault="killed", **options):
    """A search that is interrupted at a change of its files; its folder, or None if it came to its end."""
    disk = FaultyDisk(at, fault, seed=at)
    try:
        begin(out, disk, **options)
    except (Killed, SetupError):
        assert disk.failed
        return out / "run-0001"
    return None


def halfway(tmp_path, **options):
    """(a search's folder, interrupted after half of the changes of its files, at a sync so that none is torn; what it would have come to)."""
    log = FaultyDisk(-1, "killed")
    begin(tmp_path / "whole", log, **options)
    return interrupted(tmp_path / "cut", log.log.index("sync", len(log.log) // 2), **options), derived(tmp_path / "whole" / "run-0001")


def drill(tmp_path, step, fault="killed", **options):
    """Interrupt a search at every `step`-th change of its files, and continue it."""
    begin(tmp_path / "whole", **options)
    whole = derived(tmp_path / "whole" / "run-0001")
    given = {} if isinstance(options["policy"], str) else {"policy": options["policy"]}
    assert {Path(name).name for name in whole} >= {"tree.json", "latents.safetensors"}
    done = 0
    for at in count(random.Random(len(whole)).randrange(step), step):
        folder = interrupted(tmp_path / "cut", at, fault, **options)
        if folder is None:
            break
        if (folder / "run.json").exists() or (folder / "index.json").exists():
            go_on(folder, **given)
            assert derived(folder) == whole, at
            assert not list(folder.rglob("latents")), "the tensors of a run that is done are in its latents.safetensors"
            done += 1
        else:
            with pytest.raises(UsageError, match="not a run folder"):
                go_on(folder)
        shutil.rmtree(tmp_path / "cut")
    assert done > 1
    return done


SEARCHES = {
    "best-of-n, ddim": {"policy": "best-of-n", "policy_options": {"n": 3}},
    "beam, sde with history": {"policy": "beam", "policy_options": {"width": 2, "branch": 2}, "solver": "dpm++2m-sde"},
    "beam, ode with history": {"policy": "beam", "policy_options": {"width": 2, "branch": 2}, "solver": "dpm++2m", "keep": "none"},
    "zero-order, exact": {"policy": "zero-order", "policy_options": {"neighbours": 2, "rounds": 2}, "solver": "exact"},
    "smc, guided": {"policy": "smc", "policy_options": {"particles": 3}, "eta": 1.0, "class_label": "rare", "guidance_scale": 2.0},
    "dts": {"policy": DTS(simulations=3), "eta": 1.0, "keep": "leaves"},
    "best-of-n, out of budget": {"policy": "best-of-n", "policy_options": {"n": 4}, "nfe": 12, "keep": "path"},
    "two prompts": {"policy": "best-of-n", "policy_options": {"n": 2}, "prompts": [PROMPT, "near (0, 0)"], "steps": 3},
    "adaptive": {"policy": "adaptive", "total_nfe": 40, "prompts": [PROMPT, "near (0, 0)"], "steps": 4},
}


@pytest.mark.parametrize("name", SEARCHES)
def test_killed_at_changes_of_its_files_a_search_goes_on_to_the_same_bytes(tmp_path, name):
    drill(tmp_path, STEP or 11, **SEARCHES[name])


@pytest.mark.parametrize("fault", ["power", "full"])
def test_after_a_power_cut_or_a_full_disk_too(tmp_path, fault):
    drill(tmp_path, STEP or 13, fault, policy="beam", policy_options={"width": 2, "branch": 2}, solver="dpm++2m")


def test_groups_that_were_not_synced_may_go_but_not_wrong(tmp_path):
    options = {"policy": "beam", "policy_options": {"width": 2, "branch": 2}, "sync_seconds": 1e9}
    drill(tmp_path, STEP or 11, "power", **options)
    drill(tmp_path / "killed", STEP or 17, "killed", **options)


BEAM = {"policy": "beam", "policy_options": {"width": 2, "branch": 2}}
RARE = preset("rare-mode").mixture
OTHER = GaussianModel(replace(RARE, stds=[2.0 * std for std in RARE.stds]))


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """(an interrupted search's folder, what it would have come to); do not write there."""
    folder, whole = halfway(tmp_path_factory.mktemp("half"), **BEAM)
    assert status(folder) == "running"
    return folder, whole


def copied(half, tmp_path):
    return Path(shutil.copytree(half[0], tmp_path / "copy"))


def test_a_journal_cut_anywhere_goes_on(half, tmp_path):
    folder, whole = half
    text = (folder / JOURNAL).read_bytes()
    ends = [i + 1 for i, byte in enumerate(text) if byte == 10]
    chosen = random.Random(0)
    for at in [*ends[::4], *(chosen.randrange(len(text)) for _ in range(6))]:
        copy = copied(half, tmp_path)
        (copy / JOURNAL).write_bytes(text[:at])
        go_on(copy)
        assert derived(copy) == whole, at
        shutil.rmtree(copy)


def test_a_flipped_bit_is_never_believed(half, tmp_path):
    folder, whole = half
    text = bytearray((folder / JOURNAL).read_bytes())
    chosen = random.Random(1)
    for _ in range(8):
        at = chosen.randrange(len(text))
        copy = copied(half, tmp_path)
        text[at] ^= 1 << chosen.randrange(8)
        (copy / JOURNAL).write_bytes(text)
        go_on(copy)
        assert derived(copy) == whole, at
        shutil.rmtree(copy)
        text = bytearray((folder / JOURNAL).read_bytes())


def test_only_what_was_lost_is_computed_again(half, tmp_path):
    copy = copied(half, tmp_path)
    recorded = [line for group in JournalReader(copy / JOURNAL) for line in group.records]
    before = {line["tree"]: line["ledger"]["rows"] for line in recorded if "ledger" in line}
    known = recorded[-1]["engine"]
    (result,) = results = go_on(copy)
    ledger = results.engine
    assert ledger.rows == result.ledger.rows + result.baseline_ledger.rows
    assert ledger.lost == known["rows"] - sum(before.values())
    assert ledger.padding >= known["padding"]
    assert 0 < sum(before.values()) < ledger.rows


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_the_rows_of_a_call_may_change(half, tmp_path, rows):
    copy = copied(half, tmp_path)
    go_on(copy, max_batch=rows)
    assert derived(copy) == half[1]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"steps": 6}, "steps was 5 and is 6 now"),
        ({"policy_options": {"width": 3, "branch": 2}}, "policy.width was 2 and is 3 now"),
        ({"nfe": 500}, "nfe_budget was None and is 500 now"),
        ({"solver": "dpm++2m"}, "solver was 'ddim' and is 'dpm[+][+]2m' now"),
        ({"deterministic": False}, "deterministic was True and is False now"),
        ({"prompts": "near (1, 1)"}, "prompt was .*near \\(3, 2.4\\).* and is 'near \\(1, 1\\)' now"),
        ({"model": OTHER, "verifier": "gaussian-target"}, "fingerprint was 'gaussian-.*' and is 'gaussian-"),
    ],
)
def test_changed_options_are_named_and_refused(half, tmp_path, given, named):
    copy = copied(half, tmp_path)
    before = (copy / JOURNAL).read_bytes()
    with pytest.raises(UsageError, match=named):
        tsdiff.resume(copy, **given)
    assert (copy / JOURNAL).read_bytes() == before
    go_on(copy)
    assert derived(copy) == half[1]


def test_another_machine_is_named_and_refused(half, tmp_path):
    copy = copied(half, tmp_path)
    facts = json.loads((copy / "run.json").read_text())
    facts["options"]["environment"]["packages"]["torch"] = "1.0"
    facts["options"]["environment"]["cpu_capability"] = "abacus"
    (copy / "run.json").write_text(json.dumps(facts))
    with pytest.raises(UsageError, match=r"packages.torch was '1.0' and is .*cpu_capability was 'abacus'"):
        tsdiff.resume(copy)


def test_arguments_changed_by_hand_do_not_continue_another_run(half, tmp_path):
    copy = copied(half, tmp_path)
    facts = json.loads((copy / "run.json").read_text())
    facts["arguments"]["class_label"] = "rare"
    (copy / "run.json").write_text(json.dumps(facts))
    with pytest.raises(UsageError, match="inputs was"):
        tsdiff.resume(copy)
    (copy / "run.json").write_text("{")
    with pytest.raises(UsageError, match=r"run.json.* cannot be read"):
        tsdiff.resume(copy)
    with pytest.raises(UsageError, match="is not the folder of a run"):
        tsdiff.resume(copy / "nowhere")


def test_a_policy_that_goes_another_way_is_named_and_harms_nothing(half, tmp_path, monkeypatch):
    from tsdiff.policies.beam import Beam

    def another_way(self, tree):
        yield Draw(5)

    copy = copied(half, tmp_path)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.name != "lock"}
    with monkeypatch.context() as patch:
        patch.setattr(Beam, "search", another_way)
        with pytest.raises(UsageError, match=r'policy beam asks \{"kind":"Draw","count":5\} where it asked \{"kind":"Draw","count":2\} before \(line 2 of '):
            tsdiff.resume(copy)
    assert (copy / JOURNAL).read_bytes().startswith(before[copy / JOURNAL])
    assert status(copy) == "running"
    go_on(copy)
    assert derived(copy) == half[1]


def test_a_damaged_tensor_is_named_and_never_used(half, tmp_path):
    copy = copied(half, tmp_path)
    (segment,) = (copy / "latents").iterdir()
    data = bytearray(segment.read_bytes())
    for at in range(64, len(data), 64):
        data[at] ^= 1
    segment.write_bytes(data)
    journal = (copy / JOURNAL).read_bytes()
    with pytest.raises(UsageError, match="is lost: "):
        tsdiff.resume(copy)
    assert (copy / JOURNAL).read_bytes().startswith(journal)
    assert status(copy) != "done"


def test_one_process_at_a_time(half, tmp_path):
    copy = copied(half, tmp_path)
    with planned(copy), pytest.raises(UsageError, match="is being written by process"):
        tsdiff.resume(copy)


def test_what_is_done_stays_as_it_is(tmp_path):
    (result,) = begin(tmp_path, **BEAM)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in result.path.iterdir() if path.name != "lock"}
    again = tsdiff.resume(result.path)
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in result.path.iterdir() if path.name != "lock"}
    assert after == before
    assert again.score == result.score
    assert again.ledger == result.ledger
    assert again.image.tobytes() == result.image.tobytes()


def test_objects_have_to_be_passed_again_and_files_hold_the_rest(tmp_path):
    import torch

    def brightness(images, prompts):
        return images.mean(dim=(1, 2, 3))

    condition = tsdiff.Condition("near (1, 2)", metadata={"why": ["a", 1.5]})
    cases = {
        "callable": ({"verifiers": brightness}, {"verifier": brightness}),
        "noise": ({"latents": torch.tensor([0.25, -1.5])}, {}),
        "condition": ({"prompts": condition}, {}),
    }
    for name, (options, given) in cases.items():
        options = {**BEAM, **options}
        folder, whole = halfway(tmp_path / name, **options)
        if given:
            with pytest.raises(UsageError, match=r"objects that no file holds: verifiers .*brightness.*tsdiff.resume"):
                tsdiff.resume(folder)
        go_on(folder, **given)
        assert derived(folder) == whole, name


TWO = {"policy": "best-of-n", "policy_options": {"n": 2}, "prompts": [PROMPT, "near (0, 0)"], "seed": [0, 3]}


def test_one_of_several_prompts_goes_on_by_itself(tmp_path):
    folder, whole = halfway(tmp_path, **TWO)
    states = {path.name: status(path) for path in folder.iterdir() if path.is_dir()}
    assert set(states.values()) & {"running"}
    for name in states:
        single = tsdiff.resume(folder / name)
        assert single.path == folder / name
    assert derived(folder).items() <= whole.items()
    results = go_on(folder)
    assert len(results) == 4
    assert derived(folder) == whole
    assert json.loads((folder / "index.json").read_text())["status"] == "done"


def test_what_shares_a_budget_goes_on_together(tmp_path):
    options = {"policy": "adaptive", "total_nfe": 60, "prompts": [PROMPT, "near (0, 0)"]}
    folder, whole = halfway(tmp_path, **options)
    part = next(path for path in folder.iterdir() if path.is_dir())
    with pytest.raises(UsageError, match="shares its budget with other prompts"):
        tsdiff.resume(part)
    results = tsdiff.resume(folder)
    assert results.forest.spent <= 60
    assert derived(folder) == whole


@pytest.mark.parametrize("after", [1, 4, 9])
def test_told_to_stop_a_search_finishes_its_batch_and_goes_on_later(tmp_path, after):
    batches = iter(range(10**6))
    begin(tmp_path / "whole", **BEAM)
    with pytest.raises(KeyboardInterrupt):
        begin(tmp_path / "cut", stop=lambda: next(batches) >= after, **BEAM)
    folder = tmp_path / "cut" / "run-0001"
    assert status(folder) == "interrupted"
    (result,) = results = go_on(folder)
    assert derived(folder) == derived(tmp_path / "whole" / "run-0001")
    assert status(folder) == "done"
    assert results.engine.rows == result.ledger.rows + result.baseline_ledger.rows


def test_a_pipeline_is_passed_again_and_its_images_are_the_same(tmp_path):
    from tiny_sd import tiny_stable_diffusion

    pipe = tiny_stable_diffusion()
    options = {"policy": "beam", "policy_options": {"width": 2, "branch": 2}, "verifiers": ["sharpness", "luminance"], "prompts": "a red cube", "steps": 5, "guidance_scale": 3.0}

    def searched(out, **more):
        return execute(prepare(pipe, out=out, deterministic=True, max_batch=4, **options), disk=QUICK, sync_seconds=0.0, **more)

    (result,) = searched(tmp_path / "whole")
    for after in (7,):
        batches = iter(range(10**6))
        with pytest.raises(KeyboardInterrupt):
            searched(tmp_path / str(after), stop=lambda batches=batches, after=after: next(batches) >= after)
        folder = tmp_path / str(after) / "run-0001"
        with pytest.raises(UsageError, match=r"objects that no file holds: model \(StableDiffusionPipeline"):
            tsdiff.resume(folder)
        with pytest.raises(UsageError, match="fingerprint was"):
            tsdiff.resume(folder, tiny_stable_diffusion(seed=1))
        again = tsdiff.resume(folder, pipe)
        assert derived(folder) == derived(result.path)
        assert again.score == result.score


@pytest.mark.parametrize("keep", ["all", "path", "leaves", "none"])
def test_what_is_kept_of_closed_nodes(tmp_path, keep):
    from safetensors import safe_open

    (result,) = begin(tmp_path, keep=keep, **BEAM)
    with safe_open(result.path / "latents.safetensors", "np") as file:
        kept = {int(name.removeprefix("node/")) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    nodes = [node for node in result.tree.nodes if not node.draft and not node.failed]
    expected = {
        "all": {node.index for node in nodes},
        "path": {node.index for node in result.node.path()},
        "leaves": {node.index for node in nodes if node.level == 5},
        "none": set(),
    }
    assert kept == expected[keep]


def test_a_search_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    tsdiff.search("gaussian", PROMPT, steps=5, **BEAM)
    assert list(tmp_path.iterdir()) == []


class Person(Jury):
    """Answers at once, one after another."""

    def ask(self, candidates, answer):
        self.batches.append((list(candidates.node_ids), list(candidates.levels)))
        for node_id, score in zip(candidates.node_ids, self.value(candidates).tolist(), strict=True):
            answer(node_id, score, None)


def test_who_has_answered_is_not_asked_again(tmp_path):
    """A verifier whose answers cannot be computed again, through `tsdiff.resume`, at every moment of the search."""
    options = {"policy": "beam", "policy_options": {"width": 2, "branch": 2}, "baseline": False}
    log, first = FaultyDisk(-1, "killed"), Person()
    begin(tmp_path / "whole", log, verifiers=[first], **options)
    whole = derived(tmp_path / "whole" / "run-0001")
    kept = 0
    for at in range(12, len(log.log), 7):
        before, after = Person(), Person()
        folder = interrupted(tmp_path / str(at), at, verifiers=[before], **options)
        answers = [line["answer"]["node"] for group in JournalReader(folder / JOURNAL) for line in group.records if "answer" in line] if (folder / JOURNAL).exists() else []
        (result,) = go_on(folder, verifier=[after])
        assert derived(folder) == whole, at
        ids = {f"{node.id:032x}": node.index for node in result.tree.nodes}
        assert not {ids[one] for asked, _ in after.batches for one in asked} & set(answers)
        assert len(answers) + after.rows == first.rows
        kept += 0 < len(answers) < first.rows
    assert kept > 3


def test_a_search_from_an_image_goes_on_from_the_copy_in_its_folder(tmp_path):
    import numpy as np
    from PIL import Image
    from tiny_sd import tiny_stable_diffusion

    tiny_stable_diffusion(tmp_path / "model")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(tmp_path / "start.png")
    shared = {"policy": "beam", "policy_options": {"width": 2, "branch": 2}, "verifiers": "sharpness", "steps": 6, "strength": 0.7, "deterministic": True, "max_batch": 4}

    def searched(out, **more):
        plan = prepare(str(tmp_path / "model"), "a red cube", init_image=str(tmp_path / "start.png"), out=out, **shared)
        return execute(plan, disk=QUICK, sync_seconds=0.0, **more)

    searched(tmp_path / "whole")
    batches = iter(range(10**6))
    with pytest.raises(KeyboardInterrupt):
        searched(tmp_path / "cut", stop=lambda: next(batches) >= 5)
    folder = tmp_path / "cut" / "run-0001"
    same = prepare(str(tmp_path / "model"), "a red cube", init_image=str(tmp_path / "start.png"), out=tmp_path / "cut", **shared)
    assert unfinished(same) == folder, "the same command would go on with it"
    Image.new("RGB", (24, 20)).save(tmp_path / "start.png")
    other = prepare(str(tmp_path / "model"), "a red cube", init_image=str(tmp_path / "start.png"), out=tmp_path / "cut", **shared)
    assert unfinished(other) is None, "another picture under the same name is another search"
    (tmp_path / "start.png").unlink()
    go_on(folder)
    assert derived(folder) == derived(tmp_path / "whole" / "run-0001")
    assert (folder / "init.png").exists()


def test_another_number_of_prompts_beside_it_changes_nothing(tmp_path):
    """Rows of two and of four searches share batches of another size before and after the interruption."""
    one = {**TWO, "prompts": [PROMPT], "max_batch": 8}
    folder, four = halfway(tmp_path / "four", **TWO)
    begin(tmp_path / "two", **one)
    two = derived(tmp_path / "two" / "run-0001")
    for path in sorted(path for path in folder.iterdir() if path.is_dir())[:2]:
        tsdiff.resume(path, max_batch=1)
        assert {f"{path.name}/{name}": data for name, data in derived(path).items()}.items() <= two.items()
    go_on(folder, max_batch=3)
    assert derived(folder) == four


def test_a_run_that_named_no_model_keeps_its_own_when_the_default_changes(tmp_path, monkeypatch):
    def searched(out, disk=QUICK):
        return execute(prepare(None, PROMPT, out=out, deterministic=True, steps=5), disk=disk, sync_seconds=0.0)

    searched(tmp_path / "whole")
    whole = derived(tmp_path / "whole" / "run-0001")
    with pytest.raises(Killed):
        searched(tmp_path / "cut", FaultyDisk(25, "killed"))
    monkeypatch.setattr(plan, "DEFAULT_MODEL", "shapes")
    folder = tmp_path / "cut" / "run-0001"
    go_on(folder)
    assert derived(folder) == whole
    grown = tsdiff.expand(folder, children=2)
    assert grown.model == "gaussian"
    assert rescore([folder], ["luminance"])  # decodes by the run's own model


def test_what_a_killed_process_had_spilled_is_removed(tmp_path):
    folder, whole = halfway(tmp_path, **BEAM)
    (folder / "tsdiff-latents-abc").mkdir()
    (folder / "tsdiff-latents-abc" / "segment-00000.bin").write_bytes(b"x")
    go_on(folder, memory_limit=1)
    assert derived(folder) == whole
    assert not list(folder.glob("tsdiff-latents-*"))


def test_a_picture_that_was_decoded_twice_is_counted(tmp_path):
    """A tree's ledger says what the search needs; the engine's what was done again."""
    options = {**BEAM, "verifiers": "luminance"}
    (result,) = begin(tmp_path / "whole", **options)
    lost = []
    for after in range(6, 16):
        batches = iter(range(10**6))
        try:
            begin(tmp_path / str(after), stop=lambda batches=batches, after=after: next(batches) >= after, **options)
        except KeyboardInterrupt:
            (again,) = results = go_on(tmp_path / str(after) / "run-0001")
            assert again.ledger.decodes == result.ledger.decodes
            lost.append(results.engine.lost_decodes)
    assert sum(lost) > 0
    assert set(lost) <= {0, 1, 2}


def test_waiting_for_a_slow_disk_stays_a_small_share(tmp_path, monkeypatch):
    clock = [0.0]

    class Slow(QuickDisk):
        def sync(self, file):
            synced.append(clock[0])
            clock[0] += 0.02

    synced = []
    monkeypatch.setattr("tsdiff.treesearch.runfile.time.monotonic", lambda: clock[0])
    file = RunFile(tmp_path, {}, disk=Slow(), sync_seconds=0.25)
    begun = len(synced)
    for _ in range(4000):
        clock[0] += 0.01
        file.commit([{"tree": "search", "request": {}}])
    file.close()
    assert 5 < len(synced) - begun < 0.012 * clock[0] / 0.02
