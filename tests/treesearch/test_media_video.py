"""Videos: key frames are scored and shown, all frames are kept, and everything else is as with pictures."""

from __future__ import annotations

import itertools
import json
import shutil
from contextlib import suppress

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from fakes import PROMPT, Hooked, Judge, Jury
from faulty_disk import FaultyDisk, Killed, QuickDisk
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import tsdiff
from tsdiff.bench.rescore import rescore
from tsdiff.cli.app import cli
from tsdiff.policies import Beam, BestOfN
from tsdiff.treesearch.errors import SearchFailed, SetupError, UsageError
from tsdiff.treesearch.picturefiles import read_metadata
from tsdiff.treesearch.previewfile import read_previews
from tsdiff.treesearch.protocols import Media, Scores, VideoOutline
from tsdiff.treesearch.results import to_pil
from tsdiff.treesearch.search import execute, prepare
from tsdiff.treesearch.video import MOST_RATE, Video, held, key_frames, read_video, still

SEARCH = {"policy": Beam(width=2, branch=2), "verifier": "luminance", "steps": 5, "frames": 5}


class Film(Hooked):
    """The exact model, whose points are short videos that become brighter."""

    def __init__(self, count=5):
        super().__init__()
        self.media = "video"
        self.count = count

    def size(self, height=None, width=None, frames=None):
        if frames not in (None, self.count):
            raise UsageError(f"frames is {frames} but must be {self.count}")
        return 8, 8, self.count

    def frame_rate(self, condition):
        return float(condition.extra.get("frame_rate", 12.5))

    def check(self, condition, *, guided=False):
        """Any condition will do."""

    def decode(self, latents):
        self.decodes.append(len(latents))
        self.blind(latents)
        return Media(films(latents, self.count), "video")


def films(latents, count):
    """(B, count, 3, 8, 8): no two frames alike, and none the mean of others."""
    time = torch.arange(count).view(1, -1, 1, 1, 1)
    place = torch.linspace(0, 1, 8)
    x, y = (torch.tanh(part / 4).view(-1, 1, 1, 1, 1) for part in latents.unbind(1))
    return ((x * 0.3 + 0.5) * (0.4 + 0.6 * (time / 7) ** 2) + 0.2 * y * place.sin() * place[:, None]).clamp(0, 1).expand(-1, -1, 3, -1, -1).contiguous()


class Eye(Judge):
    """Keeps what it was shown of every node, call by call."""

    def __init__(self, value=lambda images: images.mean((1, 2, 3)), **options):
        self.seen = {}
        self.look = value
        super().__init__("eye", self._look, needs=["images"], **options)

    def score(self, candidates):
        answer = self._look(candidates)
        return answer if isinstance(answer, Scores) else Scores(answer)

    def _look(self, candidates):
        for name, picture in zip(candidates.node_ids, candidates.images, strict=True):
            self.seen.setdefault(name, []).append(picture)
        return self.look(candidates.images)


def film_of(result, count=5):
    """The frames (F, 3, 8, 8) of a result in memory."""
    return films(result.latents[result.node.index][None], count)[0]


def bright(frame):
    """What `luminance` says of a picture of three equal channels."""
    return float(frame.double().mean())


def begin(prompts, out, disk=None, **options):
    """Search in deterministic mode."""
    plan = prepare(Film(), prompts, policy=SEARCH["policy"], verifiers="luminance", steps=5, frames=5, deterministic=True, out=out, **options)
    return execute(plan, disk=disk or QuickDisk(), sync_seconds=0.0)


def pixels(images):
    return np.stack([np.asarray(image) for image in images])


# What verifiers and people see ---------------------------------------------------------------------------------------


def test_first_middle_and_last_frame_stand_for_a_video():
    for count, places in ((1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (7, [0, 3, 6]), (8, [0, 4, 7])):
        film = torch.arange(count).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).float()
        assert key_frames(film)[:, 0, 0, 0].tolist() == places
        assert torch.equal(key_frames(key_frames(film)), key_frames(film))
        assert torch.equal(still(key_frames(film)), still(film))
    picture = torch.rand(3, 4, 4)
    assert all(one(picture) is picture for one in (key_frames, still, held))


def test_key_frames_do_not_hold_the_whole_video_in_memory():
    film = torch.rand(50, 3, 8, 8)
    assert key_frames(film).untyped_storage().nbytes() == 3 * 3 * 8 * 8 * 4
    assert held(film).dtype == torch.uint8


def test_a_score_is_the_mean_of_what_a_verifier_says_of_the_key_frames():
    eye = Eye()
    result = tsdiff.search(Film(), PROMPT, **SEARCH | {"verifier": [eye, "luminance"]}, seed=2)
    film = film_of(result)
    shown = eye.seen[f"{result.node.id:032x}"]
    assert len(shown) == 3
    for picture, frame in zip(shown, film[[0, 2, 4]], strict=True):
        assert torch.equal(picture, frame)
    assert result.score == pytest.approx(np.mean([bright(frame) for frame in film[[0, 2, 4]]]), rel=1e-6)
    assert result.scores["luminance"].score == pytest.approx(result.score, rel=1e-6)
    assert abs(result.score - bright(film[2])) > 1e-3


def test_parts_are_means_too_and_a_frame_that_cannot_be_scored_fails_the_video():
    def value(images):
        light = images.mean((1, 2, 3))
        calls.append(light)
        return Scores(light, parts={"half": light / 2}, reasons={0: "said so"})

    calls: list = []
    eye = Eye(value)
    result = tsdiff.search(Film(), PROMPT, **SEARCH | {"verifier": eye, "policy": BestOfN(n=1), "baseline": False})
    assert result.scores["eye"].parts["half"] == pytest.approx(result.score / 2)
    assert result.scores["eye"].reason == "said so"
    assert result.score == pytest.approx(float(torch.stack(calls).mean()))

    def blind_at_last(images):
        light = images.mean((1, 2, 3))
        return Scores(torch.where(light > calls[1].min() + 1e-4, float("nan"), light), reasons=dict.fromkeys(range(len(light)), "too bright"))

    result = tsdiff.search(Film(), PROMPT, **SEARCH | {"verifier": Eye(blind_at_last), "policy": BestOfN(n=1), "baseline": False})
    assert result.score is None
    assert result.scores["eye"].reason == "too bright"


def test_a_verifier_of_sets_ranks_each_key_frame_among_the_same_frames_of_the_others():
    def rank(images):
        return images.mean((1, 2, 3)).argsort().argsort().double()

    result = tsdiff.search(Film(), PROMPT, **SEARCH | {"verifier": Eye(rank, scope="set"), "policy": BestOfN(n=4), "baseline": False})
    leaves = [node for node in result.tree.nodes if node.level == 5]
    assert sorted(node.values["eye"].score for node in leaves) == [0.0, 1.0, 2.0, 3.0]


def test_people_are_asked_once_and_shown_the_middle():
    eye = Eye()
    jury = Jury("jury", lambda candidates: eye._look(candidates), needs=["images"])
    result = tsdiff.search(Film(), PROMPT, **SEARCH | {"verifier": jury, "policy": BestOfN(n=2), "baseline": False})
    (shown,) = eye.seen[f"{result.node.id:032x}"]
    assert torch.equal(shown, film_of(result)[2])


def test_a_verifier_that_reads_no_images_is_called_once():
    judge = Judge()
    result = tsdiff.search(Film(), PROMPT, **SEARCH | {"verifier": judge})
    assert judge.rows == sum(one.ledger.verifier_calls["judge"] for one in (result, result.baseline))


def test_pictures_of_ancestors_are_seen_at_the_same_key_frame():
    class Drift(Eye):
        def _look(self, candidates):
            before = candidates.ancestor_images(1.0)
            self.pairs += zip(candidates.images, before, strict=True)
            return (candidates.images - before).mean((1, 2, 3))

    drift = Drift()
    drift.pairs = []
    drift.needs = frozenset({"images", "ancestor_images@1"})
    result = tsdiff.search(Film(), PROMPT, **SEARCH | {"verifier": drift, "policy": BestOfN(n=1), "baseline": False})
    assert len(drift.pairs) == 3
    assert result.score == pytest.approx(float(torch.stack([now.mean() - before.mean() for now, before in drift.pairs]).mean()), rel=1e-5)
    assert len({float(before.mean()) for _, before in drift.pairs}) == 3


# Counted and reproducible --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [Beam(width=2, branch=2), BestOfN(n=3)], ids=["beam", "best-of-n"])
def test_costs_are_those_of_pictures(policy):
    film, hooked = Film(), Hooked()
    plan = prepare(film, PROMPT, policy=policy, verifiers="luminance", steps=5, frames=5)
    (result,) = execute(plan)
    other = tsdiff.search(hooked, PROMPT, policy=policy, verifier="luminance", steps=5)
    assert plan.cost.exact
    spent = result.ledger
    assert (spent.nfe, spent.decodes, spent.verifier_calls.total()) == (plan.cost.upper.nfe, plan.cost.upper.decodes, plan.cost.upper.verifier_calls)
    assert spent.to_json() == other.ledger.to_json()
    assert film.seen == sum(one.ledger.rows for one in (result, result.baseline))
    assert sum(film.decodes) == sum(one.ledger.decodes for one in (result, result.baseline))


def test_neither_order_nor_batch_changes_a_byte(tmp_path):
    prompts = [PROMPT, "near (-1, 2)"]
    for number, (order, rows) in enumerate([((0, 1), 8), ((1, 0), 3)]):
        results = begin([prompts[i] for i in order], tmp_path / str(number), max_batch=rows)
        for result in results:
            copy = tmp_path / f"{number}-{prompts.index(result.prompt)}"
            shutil.copytree(result.path, copy)
    for index, name in itertools.product(range(2), ("tree.json", "baseline.json", "best.webp", "baseline.webp", "latents.safetensors")):
        assert (tmp_path / f"0-{index}" / name).read_bytes() == (tmp_path / f"1-{index}" / name).read_bytes()


# Files ---------------------------------------------------------------------------------------------------------------


def test_a_run_keeps_all_frames_and_a_picture_with_its_history(tmp_path):
    plain = tsdiff.search(Film(), PROMPT, **SEARCH)
    result = tsdiff.search(Film(), PROMPT, **SEARCH, out=tmp_path)
    run = tsdiff.load_run(result.path)
    film = pixels(plain.frames)
    assert film.shape == (5, 8, 8, 3)
    assert np.array_equal(film, pixels(map(to_pil, film_of(plain))))
    assert result.video is None
    for frames in (result.frames, run.frames()):
        assert np.array_equal(pixels(frames), film)
    for image in (plain.image, result.image, run.image()):
        assert np.array_equal(np.asarray(image), film[2])
    assert np.array_equal(pixels(run.frames("baseline")), pixels(plain.baseline.frames))
    assert read_metadata(run.path / "best.png")["tsdiff"]["options"]["size"] == [8, 8, 5]
    assert result.to_json()["video"] == str(result.video_path) == run.result["video"]
    assert run.damage == ()
    previews = read_previews(run.path)
    assert np.array_equal(np.asarray(previews["search", result.node.index].image()), film[2])
    with Image.open(result.video_path) as opened:
        assert (opened.format, opened.n_frames) == ("WEBP", 5)
    result.video_path.unlink()
    assert tsdiff.load_run(result.path).damage == ("best.webp is missing",)
    assert tsdiff.load_run(result.path).frames()[0].size == (8, 8)


def test_a_result_can_be_saved_later_and_again(tmp_path):
    result = tsdiff.search(Film(), PROMPT, **SEARCH)
    film = pixels(result.frames)
    for name in ("one", "two"):
        result.save(tmp_path / name)
        assert np.array_equal(pixels(result.frames), film)
    assert (tmp_path / "one/best.webp").read_bytes() == (tmp_path / "two/best.webp").read_bytes()


def test_pictures_have_one_frame():
    result = tsdiff.search(Hooked(), PROMPT, policy=BestOfN(n=1), verifier="luminance", steps=3)
    (frame,) = result.frames
    assert frame == result.image
    assert "video" not in result.to_json()


@pytest.mark.parametrize("at", [20, 90, 150])
def test_a_search_that_is_interrupted_ends_in_the_same_video(tmp_path, at):
    (whole,) = begin(PROMPT, tmp_path / "whole")
    with suppress(Killed, SetupError):
        begin(PROMPT, tmp_path, disk=FaultyDisk(at, "killed", seed=at))
    if tsdiff.load_run(tmp_path / "run-0001").status != "done":
        result = tsdiff.resume(tmp_path / "run-0001", model=Film())
        assert np.array_equal(pixels(result.frames), pixels(whole.frames))
    for name in ("tree.json", "baseline.json", "best.webp", "baseline.webp"):
        assert (tmp_path / "run-0001" / name).read_bytes() == (whole.path / name).read_bytes()


def test_an_expansion_that_finds_a_better_one_replaces_the_video(tmp_path):
    run = tsdiff.search(Film(), PROMPT, **SEARCH | {"policy": BestOfN(n=1)}, seed=3, out=tmp_path)
    before = pixels(run.frames)
    result = tsdiff.expand(run.path, "best", children=8, renoise=0.9, model=Film())
    after = pixels(tsdiff.load_run(run.path).frames())
    assert result.score > run.score
    assert not np.array_equal(before, after)
    assert np.array_equal(after[2], np.asarray(tsdiff.load_run(run.path).image()))


def test_saved_videos_are_rescored_by_their_key_frames(tmp_path):
    result = tsdiff.search(Film(), PROMPT, **SEARCH | {"verifier": ["luminance", "sharpness"]}, out=tmp_path)
    rescore([result.path], ["sharpness"], model=Film())
    (file,) = (result.path / "rescored").iterdir()
    values = json.loads(file.read_text())["values"]
    assert values[str(result.node.index)]["score"] == pytest.approx(result.scores["sharpness"].score, rel=1e-6)


@settings(max_examples=30)
@given(pattern=st.lists(st.integers(0, 2), min_size=1, max_size=12), rate=st.floats(0.5, MOST_RATE))
def test_a_file_gives_back_every_frame_also_where_some_are_equal(tmp_path_factory, pattern, rate):
    frames = np.random.default_rng(1).integers(0, 256, (3, 6, 9, 3), dtype=np.uint8)[pattern]
    path = tmp_path_factory.mktemp("film") / "film.webp"
    path.write_bytes(Video(frames, rate).file())
    again = read_video(path)
    assert np.array_equal(again.frames, frames)
    assert again.frame_rate == rate


def test_large_videos_are_close_and_small(tmp_path):
    ramp = np.linspace(0, 200, 256, dtype=np.float32)
    frames = np.stack([np.stack([ramp + 5 * k, ramp[::-1], np.roll(ramp, 9 * k)], -1)[None].repeat(256, 0) for k in range(17)]).astype(np.uint8)
    path = tmp_path / "film.webp"
    path.write_bytes(Video(frames, 25.0).file())
    again = read_video(path).frames
    error = np.mean((again.astype(float) - frames) ** 2)
    assert 10 * np.log10(255**2 / error) > 32
    assert path.stat().st_size < frames.size / 20
    assert again.shape == frames.shape


def test_files_that_are_no_videos_of_ours_are_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "other.webp")
    with pytest.raises(ValueError, match="no video of a search"):
        read_video(tmp_path / "other.webp")
    run = tsdiff.search(Film(), PROMPT, **SEARCH, out=tmp_path)
    run.video_path.write_bytes(b"RIFF")
    with pytest.raises(UsageError, match=r"best\.webp' cannot be read"):
        tsdiff.load_run(run.path).frames()


# Options -------------------------------------------------------------------------------------------------------------


def test_the_frame_rate_is_an_option_of_conditions():
    result = tsdiff.search(Film(), PROMPT, **SEARCH, fps=24)
    assert (result.video.frame_rate, result.tree.condition.extra) == (24.0, {"frame_rate": 24})
    assert tsdiff.search(Film(), PROMPT, **SEARCH, fps=24, condition_extra={"frame_rate": 8}).video.frame_rate == 8.0
    assert tsdiff.search(Film(), PROMPT, **SEARCH).video.frame_rate == 12.5
    assert isinstance(Film(), VideoOutline)


REFUSED = {
    "frames of images": (Hooked, {"frames": 5}, "frames is 5 but .* makes images, not videos"),
    "fps of images": (Hooked, {"fps": 5}, "fps is 5 but .* makes images, not videos"),
    "no frames": (Film, {"frames": 0}, "frames is 0 but must be at least 1"),
    "half a frame": (Film, {"frames": 2.5}, "must be a whole number"),
    "an image to start from": (Film, {"init_image": Image.new("RGB", (8, 8))}, "makes videos, which cannot start from an image"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_runs(case):
    model, options, says = REFUSED[case]
    with pytest.raises(UsageError, match=says):
        prepare(model(), PROMPT, verifiers="luminance", **options)


def test_a_model_that_decodes_something_else_than_it_says_is_told(monkeypatch):
    monkeypatch.setattr(Film, "decode", lambda self, latents: Media(films(latents, 5)[:, 0]))
    with pytest.raises((UsageError, SearchFailed), match="whose media is 'video', decoded 'image'"):
        raise tsdiff.search(Film(), [PROMPT], **SEARCH).failures[0].error


def test_the_command_line_shows_where_the_video_is(tmp_path):
    from tsdiff.treesearch.registry import models

    models.add("film", lambda reference, options: Film())
    command = ["search", PROMPT, "--model", "film", "--verifier", "luminance", "--policy", "best-of-n", "-P", "n=2", "--steps", "3", "--frames", "5", "--fps", "30", "--out", str(tmp_path)]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    assert "best.webp" in done.stdout
    assert len(tsdiff.load_run(tmp_path / "run-0001").frames()) == 5
    shown = CliRunner().invoke(cli, ["show", str(tmp_path / "run-0001")])
    assert "5 frames, 30 a second" in shown.stdout
