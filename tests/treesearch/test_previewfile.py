"""The file of previews: pictures agree, an index follows from the bytes alone, and no damage is ever shown as a picture."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
import torch
from faulty_disk import FaultyDisk, Killed
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.previewfile import (
    CRISP_BYTES,
    PREVIEWS,
    SIDE,
    PreviewFile,
    Previews,
    compress,
    quantize,
    read_previews,
    shrink,
)
from tsdiff.treesearch.segmentfile import DamagedRecord


def facts(node, tree="search", id="0" * 32):
    return {"tree": tree, "node": node, "id": id, "media_type": "image/webp", "width": 1, "height": 1}


def picture(number):
    """Bytes that stand for a picture; of every length modulo 64."""
    return bytes(i * (number + 3) % 256 for i in range(40 + 37 * number % 200))


def pack(path, numbers, disk=None):
    file = PreviewFile(path, *([] if disk is None else [disk]))
    try:
        for number in numbers:
            file.append(facts(number), picture(number))
    finally:
        file.close()


def shown(previews):
    """What can be seen: the picture of each node, None where it is known to be damaged."""
    seen = {}
    for (tree, node), preview in previews.items():
        try:
            seen[tree, node] = preview.read()
        except DamagedRecord:
            seen[tree, node] = None
    return seen


def psnr(one, other):
    error = np.mean((one.astype(float) - other.astype(float)) ** 2)
    return np.inf if error == 0 else 10 * np.log10(255**2 / error)


def opened(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


# Pictures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((64, 64), (64, 64)), ((128, 128), (128, 128)), ((512, 512), (128, 128)), ((768, 512), (128, 85)), ((1, 1), (1, 1)), ((3, 2000), (1, 128)), ((129, 40), (128, 40))],
)
def test_pictures_are_made_smaller_never_larger(shape, expected):
    pixels = torch.rand(3, *shape)
    small = quantize(shrink(pixels))
    assert shrink(pixels).data_ptr() != pixels.data_ptr(), "a row must not keep its batch"
    assert small.shape == (*expected, 3)
    assert small.dtype == np.uint8


def test_small_pictures_keep_every_pixel_and_large_ones_their_means():
    pixels = torch.rand(3, 64, 48)
    assert np.array_equal(quantize(shrink(pixels)), (pixels.permute(1, 2, 0) * 255).round().byte().numpy())
    large = torch.rand(3, 4 * SIDE, 2 * SIDE)
    blocks = large.reshape(3, SIDE, 4, SIDE // 2, 4).mean(dim=(2, 4))
    assert np.abs(quantize(shrink(large)).astype(int) - (blocks.permute(1, 2, 0) * 255).round().byte().numpy().astype(int)).max() <= 1  # of rounding


def test_values_outside_the_range_and_lower_precision_are_fine():
    pixels = torch.tensor([-1.0, 2.0, float("nan"), float("inf"), 0.5]).expand(3, 1, 5)
    assert quantize(shrink(pixels))[0, :, 0].tolist() == [0, 255, 0, 255, 128]
    for size in (100, 300):
        half = quantize(shrink(torch.full((3, size, size), 0.5, dtype=torch.bfloat16)))
        assert np.array_equal(half, np.full_like(half, 128))


def test_plain_shapes_are_exact_and_photographs_close():
    y, x = np.mgrid[:64, :64]
    shapes = np.full((64, 64, 3), 235, np.uint8)
    shapes[10:30, 12:40] = (200, 30, 30)
    shapes[(y - 42) ** 2 + (x - 40) ** 2 < 120] = (30, 60, 200)
    data, media_type = compress(shapes)
    assert media_type == "image/webp"
    assert np.array_equal(opened(data), shapes)
    assert len(data) < 500
    y, x = np.mgrid[:128, :128] / 128
    smooth = np.stack([0.5 + 0.5 * np.sin(7 * x + 3 * y), x * y, 1 - y], axis=2)
    texture = 0.08 * np.random.default_rng(0).normal(size=(32, 32, 3)).repeat(4, 0).repeat(4, 1)
    photograph = np.round(np.clip(0.8 * smooth + texture + 0.1, 0, 1) * 255).astype(np.uint8)
    data, media_type = compress(photograph)
    assert media_type == "image/jpeg"
    assert psnr(opened(data), photograph) > 30
    assert len(data) < 8 * 1024


@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 2**32 - 1))
def test_pictures_that_are_small_without_loss_have_none(height, width, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    data, media_type = compress(pixels)
    assert media_type == "image/webp"
    assert len(data) <= CRISP_BYTES
    assert np.array_equal(opened(data), pixels)


# The file ------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_and_the_last_of_a_node_counts(tmp_path):
    file = PreviewFile(tmp_path / PREVIEWS)
    for number in (0, 1, 2, 1):
        file.append(facts(number, id=f"{number + 7:032x}"), picture(number))
    file.append(facts(1, id="f" * 32), picture(9))
    file.append(facts(1, tree="baseline"), picture(5))
    file.close()
    previews = read_previews(tmp_path)
    assert shown(previews) == {("search", 0): picture(0), ("search", 1): picture(9), ("search", 2): picture(2), ("baseline", 1): picture(5)}
    assert previews["search", 1].id == "f" * 32
    assert previews["search", 0].media_type == "image/webp"
    assert ("search", 3) not in previews
    assert len(read_previews(tmp_path / "nowhere")) == 0


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """(the bytes of a file of eight previews, where each record ends)"""
    path = tmp_path_factory.mktemp("packed") / PREVIEWS
    ends = [0]
    for number in range(8):
        pack(path, [number])
        ends.append(path.stat().st_size)
    return path.read_bytes(), ends


def test_records_are_aligned_and_many_processes_write_one_file(packed):
    data, ends = packed
    assert [end % 64 for end in ends] == [0] * 9
    assert len(data) == ends[-1]


@given(st.data())
def test_a_file_cut_anywhere_has_the_whole_records_and_goes_on(packed, tmp_path_factory, data):
    text, ends = packed
    at = data.draw(st.integers(0, len(text)))
    path = tmp_path_factory.mktemp("cut") / PREVIEWS
    path.write_bytes(text[:at])
    whole = sum(end <= at for end in ends[1:])
    assert shown(Previews(path)) == {("search", number): picture(number) for number in range(whole)}
    assert path.stat().st_size == at, "reading changes nothing"
    pack(path, [20])
    assert shown(Previews(path)) == {("search", number): picture(number) for number in (*range(whole), 20)}
    assert path.read_bytes()[: ends[whole]] == text[: ends[whole]]


@given(st.data())
def test_flipped_bits_cost_the_pictures_that_they_hit_and_nothing_is_made_up(packed, tmp_path_factory, data):
    text, ends = packed
    spoiled = bytearray(text)
    bits = data.draw(st.lists(st.integers(0, 8 * len(text) - 1), min_size=1, max_size=3, unique=True))
    for bit in bits:
        spoiled[bit // 8] ^= 1 << bit % 8
    path = tmp_path_factory.mktemp("flipped") / PREVIEWS
    path.write_bytes(spoiled)
    hit = {number for number in range(8) for bit in bits if ends[number] <= bit // 8 < ends[number + 1]}
    seen = {number: found for (_, number), found in shown(Previews(path)).items()}
    for number in range(8):
        if number in hit:
            assert seen.get(number) in (None, picture(number))  # the zeros after a record mean nothing
        else:
            assert seen[number] == picture(number)
    pack(path, [20])
    assert shown(Previews(path))["search", 20] == picture(20)


@given(st.binary(max_size=600))
def test_any_bytes_can_be_opened_and_written_after(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("any") / PREVIEWS
    path.write_bytes(text)
    assert shown(Previews(path)) == {}
    pack(path, [3])
    assert shown(Previews(path)) == {("search", 3): picture(3)}


@pytest.mark.parametrize("step", [1, 7, 64, 150])
def test_a_growing_file_is_followed(packed, tmp_path, step):
    text, ends = packed
    path = tmp_path / PREVIEWS
    previews = Previews(path)
    found = 0
    with path.open("wb", buffering=0) as file:
        for at in range(0, len(text) + step, step):
            file.write(text[at - step : at] if at else b"")
            found += previews.refresh()
            assert len(previews) == sum(end <= at for end in ends[1:]) == found
    assert shown(previews) == {("search", number): picture(number) for number in range(8)}
    assert previews.refresh() == 0


def test_a_file_that_is_replaced_or_gone_is_noticed(packed, tmp_path):
    path = tmp_path / PREVIEWS
    pack(path, range(4))
    previews, early = Previews(path), Previews(path)["search", 2]
    file = PreviewFile(path)
    file.keep(lambda preview: preview.node in (1, 3))
    file.append(facts(9), picture(9))
    file.close()
    with pytest.raises(DamagedRecord, match=r"preview of node 2 in .* is lost"):
        early.read()
    assert previews.refresh() == 3
    assert shown(previews) == {("search", number): picture(number) for number in (1, 3, 9)}
    path.unlink()
    assert previews.refresh() == 0
    assert len(previews) == 0
    with pytest.raises(DamagedRecord, match="the file is gone"):
        early.read()


def test_nothing_is_written_anew_where_all_is_wanted(tmp_path):
    path = tmp_path / PREVIEWS
    pack(path, range(4))
    before = path.stat()
    file = PreviewFile(path)
    file.keep(lambda preview: True)
    file.close()
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("fault", ["full", "killed", "power"])
def test_a_fault_at_any_change_costs_previews_only(packed, tmp_path, fault):
    before, after = range(3), range(3, 6)
    for at in itertools.count():
        folder = tmp_path / str(at)
        folder.mkdir()
        path = folder / PREVIEWS
        pack(path, before)
        disk = FaultyDisk(at, fault, seed=at)
        try:
            pack(path, after, disk)
            file = PreviewFile(path, disk)
            file.keep(lambda preview: preview.node % 2 == 0)
            file.close()
        except (OSError, Killed):
            pass
        seen = shown(Previews(path))
        assert all(found in (None, picture(number)) for (_, number), found in seen.items())
        assert {number for _, number in seen} >= {number for number in before if number % 2 == 0}
        pack(path, [20])
        assert shown(Previews(path))["search", 20] == picture(20)
        if not disk.failed:
            break
    assert at > 8


def test_a_newer_file_is_refused_and_left_as_it_is(tmp_path, monkeypatch):
    from tsdiff.treesearch import segmentfile

    path = tmp_path / PREVIEWS
    with monkeypatch.context() as patch:
        patch.setattr(segmentfile, "VERSION", 2)
        pack(path, [0])
    text = path.read_bytes()
    for use in (Previews, PreviewFile):
        with pytest.raises(UsageError, match="has format 2, but this tsdiff reads up to format 1"):
            use(path)
    assert path.read_bytes() == text


def test_a_folder_in_its_place_is_told(tmp_path):
    (tmp_path / PREVIEWS).mkdir()
    with pytest.raises(UsageError, match="cannot read"):
        read_previews(tmp_path)


def test_records_that_are_no_previews_are_passed_over(tmp_path):
    path = tmp_path / PREVIEWS
    file = PreviewFile(path)
    for spoiled in ({"media_type": "text/html"}, {"node": "1"}, {"node": True}, {"tree": None}, {"more": 1}):
        file.append(facts(1) | spoiled, b"<script>")
    file.append(facts(2), picture(2))
    file.append({}, b"")
    file.close()
    assert shown(Previews(path)) == {("search", 2): picture(2)}


def test_bytes_that_are_no_picture_are_told(tmp_path):
    pack(tmp_path / PREVIEWS, [0])
    with pytest.raises(DamagedRecord, match="is no picture"):
        read_previews(tmp_path)["search", 0].image()
