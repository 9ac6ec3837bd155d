"""`tsdiff score`: any picture file becomes the same pixels by one set of rules, and what cannot be scored is named."""

import json
import os
import struct
import threading
import zlib

import numpy as np
import pytest
import torch
from fakes import Judge
from PIL import Image

from tsdiff.treesearch import registry
from tsdiff.treesearch.batches import Limits
from tsdiff.treesearch.errors import SetupError, UsageError
from tsdiff.treesearch.picturefiles import MOST_PIXELS, PictureError, find_pictures, read_picture
from tsdiff.treesearch.pictures import judges_of, picture_device, score_pictures
from tsdiff.treesearch.protocols import Condition, Pool, Scores

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)


def pixels(image, path, **options):
    """What is read of an image after it was saved: (H, W, 3) in [0, 1]."""
    image.save(path, **options)
    read = read_picture(path)
    assert read.dtype == torch.float32
    assert read.is_contiguous()
    return read.permute(1, 2, 0).numpy()


def save(path, value=0.5, size=(8, 8)):
    Image.new("RGB", size, (round(255 * value),) * 3).save(path)
    return path


@pytest.fixture
def judged():
    """Registers a verifier under its own name."""

    def add(judge):
        registry.verifiers.add(judge.name, lambda: judge)
        return judge

    return add


class Eye(Judge):
    """A verifier of pictures whose batches are remembered."""

    def __init__(self, name="eye", value=lambda candidates: candidates.images.mean((1, 2, 3)), **options):
        super().__init__(name, value, **{"needs": ("images",), **options})
        self.sizes: list[tuple[int, ...]] = []

    def score(self, candidates):
        self.sizes.append(tuple(candidates.images.shape))
        return Scores(self.value(candidates))


# Files ---------------------------------------------------------------------------------------------------------------


def test_rgb_is_read_as_it_is(tmp_path):
    for name in ("a.png", "a.bmp", "a.tif", "a.ppm"):
        assert np.array_equal(pixels(Image.fromarray(RGB), tmp_path / name), RGB.astype(np.float32) / np.float32(255))


def test_grey_is_the_same_in_all_channels(tmp_path):
    grey = RGB[..., 0].astype(np.float32)[..., None].repeat(3, 2) / 255
    assert np.allclose(pixels(Image.fromarray(RGB[..., 0]), tmp_path / "8.png"), grey, atol=1e-7)
    assert np.allclose(pixels(Image.fromarray(RGB[..., 0].astype(np.uint16) * 257), tmp_path / "16.png"), grey, atol=1e-7)
    assert np.allclose(pixels(Image.fromarray(RGB[..., 0].astype(np.uint16) * 257), tmp_path / "16.tif"), grey, atol=1e-7)
    assert np.allclose(pixels(Image.fromarray(RGB[..., 0].astype(np.int32) * 257), tmp_path / "32.tif"), grey, atol=1e-7)
    assert np.allclose(pixels(Image.fromarray(RGB[..., 0].astype(np.float32) / 255), tmp_path / "float.tif"), grey, atol=1e-7)
    bits = RGB[..., 0] > 127
    assert np.array_equal(pixels(Image.fromarray(bits), tmp_path / "1.png")[..., 1], bits.astype(np.float32))


def test_transparency_is_laid_over_white(tmp_path):
    alpha = RNG.integers(0, 256, (5, 7, 1), dtype=np.uint8)
    over_white = (RGB * (alpha / 255.0) + 255.0 * (1.0 - alpha / 255.0)) / 255.0
    assert np.abs(pixels(Image.fromarray(np.dstack([RGB, alpha])), tmp_path / "rgba.png") - over_white).max() <= 1 / 255
    grey = np.dstack([RGB[..., :1], alpha])
    assert np.abs(pixels(Image.fromarray(grey, "LA"), tmp_path / "la.png")[..., 0] - over_white[..., 0]).max() <= 1 / 255


def test_palettes_are_looked_up_transparent_colours_too(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    assert pixels(palette, tmp_path / "p.png").tolist() == [[[1, 0, 0], [0, 0, 1]]]
    assert pixels(palette, tmp_path / "t.png", transparency=1).tolist() == [[[1, 0, 0], [1, 1, 1]]]
    assert pixels(palette, tmp_path / "p.gif").tolist() == [[[1, 0, 0], [0, 0, 1]]]


def test_other_modes_and_the_first_of_several_frames(tmp_path):
    assert pixels(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), tmp_path / "c.tif").tolist() == [[[1, 0, 0]] * 2] * 2
    frames = [Image.new("RGB", (2, 2), color) for color in ("red", "blue")]
    assert pixels(frames[0], tmp_path / "f.gif", save_all=True, append_images=frames[1:]).tolist() == [[[1, 0, 0]] * 2] * 2


def test_pictures_stand_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter to the left: its right side is up
    upright = pixels(Image.fromarray(RGB), tmp_path / "turned.png", exif=exif)
    assert np.array_equal(upright, np.rot90(RGB, -1).astype(np.float32) / np.float32(255))


def claims(width, height):
    """A PNG file that says so many pixels and holds hardly any."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"\0" * 9))


@pytest.mark.parametrize("size", [(8192, 4097), (20000, 20000)])  # Pillow warns of and refuses the second by itself
def test_huge_pictures_are_refused_before_they_are_decoded(tmp_path, size):
    assert size[0] * size[1] > MOST_PIXELS
    (tmp_path / "huge.png").write_bytes(claims(*size))
    with pytest.raises(PictureError, match="more than 33,554,432 pixels; make the picture smaller"):
        read_picture(tmp_path / "huge.png")


@pytest.mark.parametrize(
    ("name", "content", "hint"),
    [
        ("empty.png", b"", "not a picture that can be read"),
        ("text.png", b"hello", "not a picture that can be read"),
        ("short.png", claims(64, 64), "cannot be read"),
        ("nowhere.png", None, "there is no such file"),
    ],
)
def test_files_that_are_no_pictures(tmp_path, name, content, hint):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(PictureError, match=f"{name}: .*{hint}"):
        read_picture(tmp_path / name)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(PictureError, match=r"pipe\.png: not a file") as refused:
        read_picture(tmp_path / "pipe.png")
    assert refused.value.name == str(tmp_path / "pipe.png")


def test_half_a_file_is_named(tmp_path):
    save(tmp_path / "whole.jpg", size=(200, 200))
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:700])
    with pytest.raises(PictureError, match=r"half\.jpg: cannot be read"):
        read_picture(tmp_path / "half.jpg")


@pytest.mark.parametrize("values", [[[0.0, 1.5]], [[-0.1, 0.0]], [[np.nan, 0.0]]])
def test_numbers_that_are_no_brightness_are_refused(tmp_path, values):
    Image.fromarray(np.array(values, dtype=np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(PictureError, match=r"floating point pictures must lie in \[0, 1\]"):
        read_picture(tmp_path / "f.tif")


def test_names_stand_for_files_folders_and_patterns_each_file_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("a/2.png", "a/1.PNG", "a/b/3.jpg"):
        save(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("")
    (tmp_path / "[x].png").write_bytes((tmp_path / "a/2.png").read_bytes())

    def found(*names):
        return [str(one) for one in find_pictures(names)]

    assert found("a") == ["a/1.PNG", "a/2.png"]
    assert found("a/*.png", "a") == ["a/2.png", "a/1.PNG"]
    assert found("a/**/*.*g") == ["a/2.png", "a/b/3.jpg"]
    assert found("[x].png") == ["[x].png"]  # a file of that name is no pattern
    (tmp_path / "none").mkdir()
    assert [type(one) for one in find_pictures(["none", "q*.png", "a/1.PNG"])][:2] == [PictureError, PictureError]


# Scores --------------------------------------------------------------------------------------------------------------


def test_pictures_go_in_batches_of_one_size_and_no_larger_than_the_engines():
    eye = Eye()
    images = [torch.full((3, 4, 4 + index % 2), index / 40) for index in range(40)]
    scored = score_pictures([eye], images, [Condition()] * 40, device="cpu")
    assert [values["eye"].score for values in scored] == pytest.approx([index / 40 for index in range(40)])
    most = Limits().verify
    assert sorted(size[0] for size in eye.sizes) == sorted([most, 20 - most] * 2)


def test_a_picture_that_breaks_a_verifier_fails_alone():
    def value(candidates):
        if (candidates.images == 0).all((1, 2, 3)).any():
            raise RuntimeError("too dark")
        return candidates.images.mean((1, 2, 3))

    eye, other = Eye(value=value), Eye("other")
    images = [torch.full((3, 4, 4), index / 4) for index in range(4)]
    scored = score_pictures([eye, other], images, [Condition()] * 4, device="cpu")
    assert [values["eye"].score for values in scored] == [None, 0.25, 0.5, 0.75]
    assert "too dark" in scored[0]["eye"].reason
    assert [values["other"].score for values in scored] == [0.0, 0.25, 0.5, 0.75]


def test_every_picture_is_judged_by_its_own_condition():
    eye = Eye(value=lambda candidates: [float(len(condition.prompt)) for condition in candidates.conditions], needs=("images", "conditions"))
    conditions = [Condition("a" * length) for length in (3, 1, 2)]
    scored = score_pictures([eye], [torch.zeros(3, 4, 4)] * 3, conditions, device="cpu")
    assert [values["eye"].score for values in scored] == [3.0, 1.0, 2.0]


def test_nothing_to_score_is_nothing():
    assert score_pictures([Eye()], [], [], device="cpu") == []


def test_verifiers_whose_answers_come_later_are_waited_for():
    class Late(Eye):
        latency = "pending"

        def ask(self, candidates, answer):
            scores = dict(zip(candidates.node_ids, candidates.images.mean((1, 2, 3)).tolist(), strict=True))
            threads.append(threading.Thread(target=lambda: [answer(node_id, score) for node_id, score in reversed(scores.items())]))
            threads[-1].start()

    threads = []
    images = [torch.full((3, 4, 4), index / 4) for index in range(4)]
    scored = score_pictures([Late(), Eye("other")], images, [Condition("a")] * 4, device="cpu")
    assert [values["eye"].score for values in scored] == [values["other"].score for values in scored] == [0.0, 0.25, 0.5, 0.75]
    for thread in threads:
        thread.join()


def test_verifiers_that_need_a_search_are_refused():
    class Calibrated(Eye):
        pool = Pool((), 4, 1)

        def calibrate(self, schedule, scores):
            raise AssertionError

    class Mute(Eye):
        latency = "pending"

    for judge, hint in (
        (Judge(), "reads x0 of a search"),
        (Eye(scope="set"), "scope 'row'"),
        (Calibrated(), "plain samples"),
        (Mute(), "no method `ask`"),
    ):
        with pytest.raises(UsageError, match=hint):
            judges_of([judge])


def test_devices_that_are_not_there():
    assert picture_device("cpu") == "cpu"
    assert picture_device("auto") in ("cpu", "mps", "cuda:0")
    with pytest.raises(SetupError, match="'cuda:99' is not there; this machine has"):
        picture_device("cuda:99")


# The command ---------------------------------------------------------------------------------------------------------


def test_one_picture_prints_its_facts(tsdiff, tmp_path, judged):
    judged(Eye(value=lambda candidates: candidates.images.mean((1, 2, 3))))
    save(tmp_path / "a.png", 0.2)
    result = tsdiff("score", "a.png", "--verifier", "eye", "--verifier", "luminance")
    assert (result.exit_code, result.stderr) == (0, "")
    assert dict(line.split() for line in result.stdout.splitlines()) == {"image": "a.png", "eye": "0.2", "luminance": "0.2"}


def test_several_pictures_print_a_table_in_their_order(tsdiff, tmp_path):
    for name, value, size in (("c.png", 0.2, (8, 8)), ("a.png", 0.4, (4, 4)), ("b.png", 0.6, (8, 8))):
        save(tmp_path / name, value, size)
    result = tsdiff("score", "c.png", "a.png", "b.png", "--verifier", "luminance")
    assert [line.split() for line in result.stdout.splitlines()] == [["image", "luminance"], ["c.png", "0.2"], ["a.png", "0.4"], ["b.png", "0.6"]]


def test_json_is_one_strict_object_for_each_file_the_bad_ones_too(tsdiff, tmp_path):
    save(tmp_path / "a.png", 0.2)
    (tmp_path / "b.png").write_text("hello")
    result = tsdiff("score", ".", "missing.png", "--verifier", "luminance", "--prompt", "a cube", "--json")
    assert result.exit_code == 1
    lines = [json.loads(line, parse_constant=pytest.fail) for line in result.stdout.splitlines()]
    assert [line["image"] for line in lines] == ["a.png", "b.png", "missing.png"]
    assert lines[0]["values"]["luminance"]["score"] == pytest.approx(0.2)
    assert (lines[0]["prompt"], lines[0]["error"]) == ("a cube", None)
    assert "not a picture" in lines[1]["error"]
    assert "no such file" in lines[2]["error"]


def test_bad_files_are_named_and_the_others_scored(tsdiff, tmp_path):
    save(tmp_path / "a.png", 0.2)
    (tmp_path / "b.png").write_text("hello")
    result = tsdiff("score", "b.png", "nowhere", "*.gif", "a.png", "--verifier", "luminance")
    assert result.exit_code == 1
    assert "0.2" in result.stdout
    assert [line.split(":")[1].strip() for line in result.stderr.splitlines()[:3]] == ["b.png", "nowhere", "*.gif"]
    assert result.stderr.splitlines()[3] == "1 image of 4 scored by every verifier"
    only = tsdiff("score", "b.png", "--verifier", "luminance")
    assert (only.exit_code, only.stdout) == (1, "")


def test_a_verifier_without_a_score_says_why(tsdiff, tmp_path, judged):
    judged(Eye(value=lambda candidates: candidates.images.std((1, 2, 3)).log()))
    save(tmp_path / "plain.png")
    Image.fromarray(RGB).save(tmp_path / "other.png")
    result = tsdiff("score", "plain.png", "other.png", "--verifier", "eye", "--verifier", "luminance")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[1].split()[:2] == ["plain.png", "-"]
    assert "failed: plain.png: eye: eye gave -inf" in result.stderr


def test_memory_holds_a_few_pictures_at_a_time(tsdiff, tmp_path, judged, monkeypatch):
    from tsdiff.cli import score

    monkeypatch.setattr(score, "PIXELS_AT_ONCE", 3 * 64)
    eye = judged(Eye())
    for index in range(7):
        save(tmp_path / f"{index}.png", index / 10)
    result = tsdiff("score", ".", "--verifier", "eye", "--json")
    assert [json.loads(line)["values"]["eye"]["score"] for line in result.stdout.splitlines()] == pytest.approx([index / 10 for index in range(7)], abs=2e-3)
    assert [size[0] for size in eye.sizes] == [3, 3, 1]


def test_prompts_and_classes_reach_the_verifier(tsdiff, tmp_path, judged):
    seen = []

    def value(candidates):
        seen.extend((condition.prompt, condition.class_label) for condition in candidates.conditions)
        return [1.0] * len(candidates.conditions)

    judged(Eye(value=value, needs=("images", "conditions")))
    save(tmp_path / "a.png")
    for arguments in (["--prompt", "a cube"], ["--class", "3"], ["--class", "cat", "--prompt", "a cat"], ["--prompt", ""]):
        assert tsdiff("score", "a.png", "--verifier", "eye", *arguments).exit_code == 0
    assert seen == [("a cube", None), ("", 3), ("a cat", "cat"), ("", None)]


@pytest.mark.parametrize(
    ("arguments", "hints"),
    [
        ([], ["IMAGE..."]),
        (["a.png"], ["--verifier"]),
        (["a.png", "--verifier", "luminence"], ["'luminence'", "'luminance'"]),
        (["a.png", "--verifier", "target-color:colour=red"], ["'colour'", "'color'"]),
        (["a.png", "--verifier", "luminance", "--verifier", "luminance"], ["given twice"]),
        (["a.png", "--verifier", "gaussian-target"], ["reads x0"]),
        (["a.png", "--verifier", "relative"], ["whole set", "scope 'row'"]),
        (["a.png", "--verifier", "shapes-oracle"], ["--prompt", "--class"]),
        (["a.png", "--verifier", "shapes-oracle", "--prompt", "a dog"], ["nothing to judge"]),
        (["a.png", "--verifier", "luminance", "--device", "gpu"], ["gpu", "cuda:N"]),
        (["a.png", "--verifier", "luminance", "--device", "cuda:99"], ["cuda:99", "cpu"]),
        (["a.png", "--verifier", "luminance", "--prompt", "\udcff"], ["UTF-8"]),
        (["a.png", "--verifier", "luminance", "--promt", "a"], ["'--promt'", "'--prompt'"]),
        (["a.png", "--verifier", "clip:model=nowhere", "--prompt", "a"], ["nowhere"]),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_scored(tsdiff, tmp_path, judged, arguments, hints):
    judged(Eye("relative", scope="set"))
    save(tmp_path / "a.png")
    result = tsdiff("score", *arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert all(hint in last for hint in hints), last
    assert "Traceback" not in result.stderr
