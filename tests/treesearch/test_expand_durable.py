"""Expansions that are interrupted anywhere and continued end in the same bytes, and never harm the search before them."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import pytest
from expansions import PROMPT, AllMoves, begin, derived, expand, go_on
from faulty_disk import FaultyDisk, Killed

import tsdiff
from tsdiff.treesearch.durable import status, unfinished_expansion
from tsdiff.treesearch.errors import SetupError, UsageError
from tsdiff.treesearch.journal import JournalReader
from tsdiff.treesearch.runfile import JOURNAL
from tsdiff.worlds.gaussian.model import GaussianModel

STEP = int(os.environ.get("TSDIFF_DRILL_STEP", "0"))
"""1 interrupts drills at every change of their files, which takes minutes; by default they are sampled."""

EXPANSIONS = {
    "children": ({}, {"children": 3}),
    "stay": ({"solver": "ddpm"}, {"node": 0, "children": 3, "renoise": 0.0}),
    "beam, sde": ({"solver": "dpm++2m-sde"}, {"renoise": 0.7, "policy": "beam", "policy_options": {"width": 2, "branch": 2}}),
    "mcts, budget": ({"keep": "path"}, {"policy": "mcts", "nfe": 14, "renoise": 1.0}),
    "restored": ({"policy": AllMoves(), "keep": "none"}, {"node": 20, "children": 2}),
    "ranked": ({"verifiers": ["luminance", "sharpness"], "ensemble": "rank"}, {"children": 2}),
}


def prepared(out: Path, name: str) -> tuple[Path, dict]:
    """A run to expand, and how."""
    options, how = EXPANSIONS[name]
    return begin(out, steps=5, **options) if name != "restored" else begin(out, **options), {"node": "best", **how}


def again(folder: Path, at: int, how: dict) -> bool:
    """Continue, in one of the ways there are; whether there was anything to do."""
    begun = unfinished_expansion(folder)
    if begun and at % 2:
        go_on(folder)
    elif begun or len(json.loads((folder / "run.json").read_text()).get("drivers", ())) < 2:
        expand(folder, **how)
    else:
        return False
    return True


@pytest.mark.parametrize("fault", ["killed", "power", "full"])
@pytest.mark.parametrize("name", EXPANSIONS)
def test_interrupted_at_a_change_of_its_files_it_goes_on_to_the_same_bytes(tmp_path, name, fault):
    folder, how = prepared(tmp_path / "searched", name)
    searched = derived(folder)
    whole = Path(shutil.copytree(folder, tmp_path / "whole"))
    expand(whole, **how)
    expected = derived(whole)
    assert expected != searched
    done, step = 0, STEP or {"killed": 13, "power": 19, "full": 23}[fault]
    for at in count(random.Random(f"{name}{fault}").randrange(step), step):
        copy = Path(shutil.copytree(folder, tmp_path / "cut"))
        disk = FaultyDisk(at, fault, seed=at)
        try:
            expand(copy, disk=disk, **how)
        except (Killed, SetupError):
            assert disk.failed
        else:
            break
        plain = {name: data for name, data in derived(copy).items() if name.startswith("baseline")}
        assert plain == {name: data for name, data in searched.items() if name.startswith("baseline")}
        continued = again(copy, at, how)
        assert derived(copy) == expected, at
        assert status(copy) == "done"
        assert not (continued and (copy / "latents").exists()), "the tensors of a run that is done are in its latents.safetensors"
        shutil.rmtree(copy)
        done += 1
    assert done >= 2


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """(a run whose second expansion was interrupted, what it would have come to, how); do not write there."""
    out = tmp_path_factory.mktemp("half")
    folder, how = prepared(out / "searched", "beam, sde")
    expand(folder, "best", children=2)
    whole = Path(shutil.copytree(folder, out / "whole"))
    expand(whole, **how)
    changes = FaultyDisk(10**9, "killed")
    expand(Path(shutil.copytree(folder, out / "counted")), disk=changes, **how)
    with pytest.raises(Killed):
        expand(folder, disk=FaultyDisk(len(changes.log) // 2, "killed"), **how)
    assert unfinished_expansion(folder)
    return folder, derived(whole), how


def test_a_journal_cut_in_an_expansion_goes_on_and_one_cut_before_it_is_told(half, tmp_path):
    folder, whole, how = half
    text = (folder / JOURNAL).read_bytes()
    ends = [i + 1 for i, byte in enumerate(text) if byte == 10]
    start = next(group.end.offset for group in JournalReader(folder / JOURNAL) if "driver" in group.records[0] and group.records[0]["driver"]["number"] == 2)
    before = max(end for end in ends if end < start)
    chosen = random.Random(0)
    late = [end for end in ends if end >= before]
    assert len(late) > 6
    for at in [before, *late[1::3], *(chosen.randrange(before, len(text)) for _ in range(3))]:
        copy = Path(shutil.copytree(folder, tmp_path / "cut"))
        (copy / JOURNAL).write_bytes(text[:at])
        again(copy, at, how)
        assert derived(copy) == whole, at
        shutil.rmtree(copy)
    for at in (ends[0], chosen.randrange(ends[0], before)):
        copy = Path(shutil.copytree(folder, tmp_path / "cut"))
        (copy / JOURNAL).write_bytes(text[:at])
        with pytest.raises(UsageError, match=r"does not hold the tree that its run.json tells of"):
            go_on(copy)
        assert (copy / JOURNAL).read_bytes() == text[:at]
        shutil.rmtree(copy)


def test_a_flipped_bit_is_never_believed(half, tmp_path):
    folder, whole, _ = half
    text = (folder / JOURNAL).read_bytes()
    chosen = random.Random(1)
    for at in [*(chosen.randrange(len(text)) for _ in range(3)), *(chosen.randrange(len(text) - 2000, len(text)) for _ in range(3))]:
        copy = Path(shutil.copytree(folder, tmp_path / "cut"))
        data = bytearray(text)
        data[at] ^= 1 << chosen.randrange(8)
        (copy / JOURNAL).write_bytes(data)
        try:
            go_on(copy)
        except UsageError as error:
            assert "does not hold the tree" in str(error)  # noqa: PT017 - either is right, depending on where the bit is
            assert (copy / JOURNAL).read_bytes() == data
        else:
            assert derived(copy) == whole, at
        shutil.rmtree(copy)


def test_a_damaged_tensor_of_an_expansion_is_named_and_never_used(half, tmp_path):
    copy = Path(shutil.copytree(half[0], tmp_path / "copy"))
    for segment in (copy / "latents").iterdir():
        data = bytearray(segment.read_bytes())
        for at in range(64, len(data), 64):
            data[at] ^= 1
        segment.write_bytes(data)
    with pytest.raises(UsageError, match="is lost: "):
        go_on(copy)
    assert unfinished_expansion(copy)


def test_another_expansion_in_its_place_is_refused(half, tmp_path):
    folder, whole, how = half
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    with pytest.raises(UsageError, match="was interrupted; finish it first: tsdiff resume"):
        expand(copy, "best", children=5)
    facts = json.loads((copy / "run.json").read_text())
    facts["drivers"][-1]["arguments"]["to_level"] = 2
    (copy / "run.json").write_text(json.dumps(facts))
    with pytest.raises(UsageError, match=r"cannot be continued with another expansion: to was 1 and is 2 now"):
        go_on(copy)
    facts["drivers"][-1]["arguments"]["to_level"] = facts["drivers"][-1]["to"]
    (copy / "run.json").write_text(json.dumps(facts))
    result = tsdiff.resume(copy)
    assert derived(copy) == whole
    assert [driver["number"] for driver in result.drivers] == [0, 1, 2]
    assert expand(copy, **how).drivers[-1]["number"] == 3, "what is done can be asked for again"


@pytest.mark.parametrize("rows", [1, 64])
def test_the_rows_of_a_call_may_change_when_it_goes_on(half, tmp_path, rows):
    copy = Path(shutil.copytree(half[0], tmp_path / "copy"))
    tsdiff.resume(copy, max_batch=rows)
    assert derived(copy) == half[1]


def test_only_what_was_lost_is_computed_again(half, tmp_path, monkeypatch):
    copy = Path(shutil.copytree(half[0], tmp_path / "copy"))
    records = [record for group in JournalReader(copy / JOURNAL) for record in group.records]
    known = [record["ledger"]["rows"] for record in records if "ledger" in record and record["tree"] == "search"][-1]
    before = [record["engine"] for record in records if "engine" in record][-1]
    seen, forward = [], GaussianModel.forward
    monkeypatch.setattr(GaussianModel, "forward", lambda self, latents, timesteps, rows: seen.append(len(latents)) or forward(self, latents, timesteps, rows))
    result = tsdiff.resume(copy)
    engine = json.loads((copy / "index.json").read_text())["engine"]
    assert engine["rows"] == result.ledger.rows + result.baseline.ledger.rows
    assert sum(seen) == result.ledger.rows - known + engine["padding"] - before["padding"] > 0
    assert engine["lost"] == before["rows"] - known - result.baseline.ledger.rows


def test_a_real_kill(tmp_path):
    folder = begin(tmp_path / "cut", steps=30)
    whole = Path(shutil.copytree(folder, tmp_path / "whole"))
    script = """
import sys, time, tsdiff
slow = lambda progress: time.sleep(0.005)
tsdiff.expand(sys.argv[1], policy="beam", policy_options={"width": 2, "branch": 2}, renoise=1.0, callback=slow, max_batch=4)
"""
    journal = folder / JOURNAL
    size = journal.stat().st_size
    process = subprocess.Popen([sys.executable, "-c", script, str(folder)])
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and journal.stat().st_size < size + 9000:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert status(folder) == "running"
    tsdiff.resume(folder)
    expand(whole, "best", policy="beam", policy_options={"width": 2, "branch": 2}, renoise=1.0, max_batch=4)
    assert derived(folder) == derived(whole)
    assert PROMPT in json.loads((folder / "run.json").read_text())["prompt"]
