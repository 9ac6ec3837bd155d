"""Tensors in segments come back bit for bit or not at all, and what no journal knows of is taken back."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import zlib
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from durable_work import DTYPES, SHAPES, check, files, same, some, work
from faulty_disk import FaultyDisk, Killed, QuickDisk
from hypothesis import given, settings
from hypothesis import strategies as st

from tsdiff.treesearch.errors import SetupError, UsageError
from tsdiff.treesearch.raw import ITEM_BYTES, Raw
from tsdiff.treesearch.segmentfile import Damage, DamagedRecord, Entry, Place, read, scan, segment_numbers, segment_path
from tsdiff.treesearch.segments import Segments

QUICK = QuickDisk()
KEYS = ["node/0/latent", "node/0/history0", "prediction/日本\udc80", "", "node/1/latent", "node/2/latent"]


def fill(folder: Path, numbers=range(6), *, end=None, limit=1 << 20, disk=QUICK) -> list[Place]:
    with Segments.open(folder, end=end, limit=limit, disk=disk) as segments:
        places = [segments.append(KEYS[number % 6], some(number)) for number in numbers]
        segments.sync()
    return places


@pytest.fixture
def whole(tmp_path):
    folder = tmp_path / "latents"
    places = fill(folder)
    return folder, places, segment_path(folder, 0).read_bytes()


# Tensors as bytes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (0,), (2, 0, 3)])
@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_tensors_survive_bit_for_bit(tmp_path, dtype, shape):
    bits = torch.randint(0, 2 if dtype == "bool" else 256, (*shape, ITEM_BYTES[dtype]), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    tensor = bits.view(getattr(torch, dtype)).reshape(shape)
    with Segments.open(tmp_path / "latents", disk=QUICK) as segments:
        place = segments.append("x", Raw.of_tensor(tensor))
    key, raw = read(tmp_path / "latents", place)
    assert (key, raw.dtype, raw.shape) == ("x", dtype, shape)
    back = raw.tensor()
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert bytes(Raw.of_tensor(back).data) == bytes(Raw.of_tensor(tensor).data) == bits.numpy().tobytes()
    if dtype == "bfloat16":
        with pytest.raises(UsageError, match="numpy has no bfloat16"):
            raw.array()
    else:
        array = raw.array()
        assert array.tobytes() == tensor.numpy().tobytes()
        assert (array.dtype, array.shape) == (tensor.numpy().dtype, shape)
        assert same(Raw.of_array(array), raw)


def test_views_and_gradients_are_stored_as_they_look():
    tensor = torch.arange(24.0).reshape(2, 3, 4).requires_grad_()
    view = tensor.permute(2, 0, 1)[1:3]
    assert torch.equal(Raw.of_tensor(view).tensor(), view)
    assert torch.equal(torch.from_numpy(Raw.of_array(view.detach().numpy()[..., ::2]).array().copy()), view[..., ::2])
    raw = Raw("float32", (2,), memoryview(b"\0" * 8))
    raw.tensor()[0] = 1.0
    assert bytes(raw.data) == b"\0" * 8, "bytes that cannot change do not"


def test_payloads_are_little_endian(monkeypatch):
    array = np.array([1, 256], dtype=np.int32)
    assert bytes(Raw.of_array(array).data) == bytes(Raw.of_array(array.astype(">i4")).data) == b"\1\0\0\0\0\1\0\0"
    monkeypatch.setattr("sys.byteorder", "big")  # the bytes of a machine that turns them round
    assert bytes(Raw.of_array(array).data) == b"\0\0\0\1\0\0\1\0"
    assert Raw.of_array(array).array().tolist() == [1, 256]
    assert Raw.of_tensor(torch.tensor([1.0, -2.5])).tensor().tolist() == [1.0, -2.5]


def test_what_cannot_be_stored_is_told():
    with pytest.raises(UsageError, match="'complex64' cannot be stored; allowed are float64, float32"):
        Raw.of_tensor(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(UsageError, match="'complex64' cannot be stored"):
        Raw.of_array(np.zeros(2, dtype=np.complex64))
    with pytest.raises(UsageError, match="'text' cannot be stored"):
        Raw("text", (2,), memoryview(b"ab"))
    for shape in ((3,), (-1, -2)):
        with pytest.raises(UsageError, match="does not have 2 bytes"):
            Raw("uint8", shape, memoryview(b"ab"))


# Segments -------------------------------------------------------------------------------------------------------------


def test_tensors_are_found_by_place_and_by_scanning(whole):
    folder, places, data = whole
    for number, place in enumerate(places):
        key, raw = read(folder, place)
        assert key == KEYS[number]
        assert same(raw, some(number))
        assert Place.from_json(place.to_json()) == place
    assert list(scan(folder)) == list(scan(folder, verify=False)) == [Entry(place, KEYS[i], DTYPES[i], SHAPES[i]) for i, place in enumerate(places)]
    assert sum(place.size for place in places) == len(data)


def test_payloads_are_aligned(whole):
    _, places, data = whole
    for number, place in enumerate(places):
        assert place.offset % 64 == place.size % 64 == 0
        record = data[place.offset : place.offset + place.size]
        raw = some(number)
        begin = 32 + int.from_bytes(record[20:24], "little") + 4
        assert begin % 64 == 0
        assert record[begin:].startswith(bytes(raw.data))


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(0, 11), max_size=6), max_size=4), st.sampled_from([1, 300, 700, 1 << 20]), st.sampled_from([100, 1 << 20]))
def test_many_at_once_have_the_bytes_of_one_after_another(groups, limit, at_once):
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr("tsdiff.treesearch.segments._WRITE_BYTES", at_once)
        one, many = Path(name) / "one", Path(name) / "many"
        log = FaultyDisk(-1, "full")
        with Segments.open(one, limit=limit, disk=QUICK) as segments:
            places = [segments.append(f"{number}", some(number)) for group in groups for number in group]
        with Segments.open(many, limit=limit, disk=log) as segments:
            together = [place for group in groups for place in segments.append_all([(f"{number}", some(number)) for number in group])]
            end = segments.end
        assert together == places
        assert end == ((places[-1].segment, places[-1].offset + places[-1].size) if places else (0, 0))
        assert [segment_path(many, number).read_bytes() for number in segment_numbers(one)] == [segment_path(one, number).read_bytes() for number in segment_numbers(one)]
        if limit == at_once == 1 << 20:
            assert log.log.count("write") == sum(bool(group) for group in groups)


def test_tensors_of_a_group_leave_their_device_together():
    shapes = [(2, 3), (2, 3), (), (2, 3), (0, 2), (), (0, 2)]
    tensors = [torch.randn(shape, generator=torch.Generator().manual_seed(number)) for number, shape in enumerate(shapes)]
    tensors += [tensors[0].double(), tensors[1].bfloat16(), tensors[3].T.T, tensors[1] > 0, tensors[3] > 0]
    tensors[1][0, 0] = torch.tensor(0x7FC12345, dtype=torch.int32).view(torch.float32)  # a NaN with a payload
    for tensor, raw in zip(tensors, Raw.of_tensors(tensors), strict=True):
        assert same(raw, Raw.of_tensor(tensor))
    assert Raw.of_tensors([]) == []


@settings(max_examples=40)
@given(st.lists(st.tuples(st.text(st.characters(exclude_categories=()), max_size=40), st.integers(0, 200)), max_size=12), st.sampled_from([1, 300, 700, 1 << 20]))
def test_segments_rotate(tensors, limit):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "latents"
        with Segments.open(folder, limit=limit, disk=QUICK) as segments:
            places = [segments.append(key, Raw("uint8", (size,), memoryview(bytes(size)))) for key, size in tensors]
            for (key, size), place in zip(tensors, places, strict=True):  # also before it is synced
                assert read(folder, place)[0] == key
                assert read(folder, place)[1].shape == (size,)
            assert segments.end == ((places[-1].segment, places[-1].offset + places[-1].size) if places else (0, 0))
        assert [entry.place for entry in scan(folder)] == places
        for number in segment_numbers(folder):
            inside = [place for place in places if place.segment == number]
            assert segment_path(folder, number).stat().st_size == sum(place.size for place in inside)
            assert len(inside) == 1 or sum(place.size for place in inside) <= limit


def test_any_prefix_of_a_segment_opens(whole):
    folder, places, data = whole
    path = segment_path(folder, 0)
    ends = [0, *(place.offset + place.size for place in places)]
    for size in reversed(range(len(data) + 1)):
        os.truncate(path, size)
        kept = sum(end <= size for end in ends[1:])
        found = list(scan(folder))
        assert [one.place for one in found if isinstance(one, Entry)] == places[:kept]
        torn = [one for one in found if isinstance(one, Damage)]
        assert [(one.torn, one.offset, one.size) for one in torn] == ([] if size in ends else [(True, ends[kept], size - ends[kept])])
        assert path.stat().st_size == size, "reading changes nothing"
        if size % 16 and size not in ends:  # to save time
            continue
        with Segments.open(folder, disk=QUICK) as segments:
            assert segments.end == (0, ends[kept])
            assert segments.damage == torn
        assert path.stat().st_size == ends[kept]
        fill(folder, range(kept, 6))
        assert path.read_bytes() == data


def test_every_flipped_bit_is_found_or_harmless(whole):
    folder, places, data = whole
    path = segment_path(folder, 0)
    harmless = 0
    with path.open("r+b", buffering=0) as file:
        for byte in range(len(data)):
            file.seek(byte)
            file.write(bytes([data[byte] ^ 1 << byte % 8]))
            hit = next(i for i, place in enumerate(places) if byte < place.offset + place.size)
            found = list(scan(folder))
            good = [one.place for one in found if isinstance(one, Entry)]
            if good == places:  # the zeros that fill up a record
                harmless += 1
                key, raw = read(folder, places[hit])
                assert key == KEYS[hit]
                assert same(raw, some(hit))
            else:
                assert good == places[:hit] + places[hit + 1 :], "the others are still found"
                assert [one.torn for one in found if isinstance(one, Damage)] == [hit == 5]
                with pytest.raises(DamagedRecord, match=rf"at byte {places[hit].offset} of .*00000.seg' is lost"):
                    read(folder, places[hit])
            file.seek(byte)
            file.write(data[byte : byte + 1])
    assert harmless == sum(-(raw.data.nbytes + 4) % 64 for raw in map(some, range(6)))


@settings(max_examples=60)
@given(st.data())
def test_bytes_in_a_wrong_place_are_no_record(draw):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "latents"
        places = fill(folder)
        path = segment_path(folder, 0)
        data = path.read_bytes()
        blocks = [data[i : i + 64] for i in range(0, len(data), 64)]
        i, j = sorted((draw.draw(st.integers(0, len(blocks))), draw.draw(st.integers(0, len(blocks)))))
        k = draw.draw(st.integers(0, len(blocks)))
        changed = b"".join(draw.draw(st.sampled_from([blocks[:i] + blocks[j:], blocks[:k] + blocks[i:j] + blocks[k:], blocks[:i] + [b"\0" * 64] * (j - i) + blocks[j:]])))
        changed += draw.draw(st.binary(max_size=100))
        path.write_bytes(changed)
        for one in scan(folder):
            if isinstance(one, Entry):
                assert one.place in places
                assert changed[one.place.offset :][: one.place.size - 63] == data[one.place.offset :][: one.place.size - 63] or same(read(folder, one.place)[1], some(places.index(one.place)))
        for number, place in enumerate(places):
            try:
                assert same(read(folder, place)[1], some(number))
            except DamagedRecord:
                assert changed[place.offset : place.offset + place.size] != data[place.offset : place.offset + place.size]


def test_damage_in_the_middle_stays_where_it_is(whole):
    folder, places, data = whole
    path = segment_path(folder, 0)
    broken = bytearray(data)
    broken[places[2].offset] ^= 1
    path.write_bytes(broken)
    with Segments.open(folder, disk=QUICK) as segments:
        (damage,) = segments.damage
        assert str(damage) == f"segment 0: {places[2].size} bytes from byte {places[2].offset} on are damaged (no record begins there)"
        place = segments.append("more", some(0))
    assert place.offset == len(data)
    assert path.read_bytes()[: len(data)] == broken
    assert same(read(folder, place)[1], some(0))


def test_the_journal_says_where_segments_end(tmp_path):
    folder = tmp_path / "latents"
    places = fill(folder, range(12), limit=500)
    before = {number: segment_path(folder, number).read_bytes() for number in segment_numbers(folder)}
    assert len(before) > 3
    for kept in range(13):
        end = (places[kept - 1].segment, places[kept - 1].offset + places[kept - 1].size) if kept else (0, 0)
        with Segments.open(folder, end=end, limit=500, disk=QUICK) as segments:
            assert (segments.end, segments.damage) == (end, [])
            assert [entry.place for entry in scan(folder)] == places[:kept]
        fill(folder, range(kept, 12), end=end, limit=500)
        assert {number: segment_path(folder, number).read_bytes() for number in segment_numbers(folder)} == before


def test_a_segment_that_lost_its_end_is_left_and_told(whole):
    folder, places, data = whole
    end = (0, len(data))
    os.truncate(segment_path(folder, 0), places[4].offset + 10)
    with Segments.open(folder, end=end, disk=QUICK) as segments:
        assert segments.end == (1, 0)
        assert "ends before what the journal knows of" in str(segments.damage[0])
        place = segments.append("more", some(0))
    assert place.segment == 1
    assert [one.place for one in scan(folder) if isinstance(one, Entry)] == [*places[:4], place]
    segment_path(folder, 0).unlink()
    with pytest.raises(DamagedRecord, match="the file is gone"):
        read(folder, places[0])
    with Segments.open(folder, end=end, disk=QUICK) as segments:
        assert segments.end == (1, 0)
    assert list(scan(folder)) == [], "what the journal does not know of is taken back"


def test_old_segments_can_be_discarded(tmp_path):
    folder = tmp_path / "latents"
    places = fill(folder, range(6), limit=1)
    with Segments.open(folder, limit=1, disk=QUICK) as segments:
        segments.discard(2)
        with pytest.raises(AssertionError):
            segments.discard(5)
        segments.append("more", some(0))
    assert [entry.place for entry in scan(folder)][:5] == places[:2] + places[3:]
    assert segment_numbers(folder) == [0, 1, 3, 4, 5, 6]


def test_a_newer_format_is_refused_in_one_line(whole):
    folder, places, data = whole
    record = bytearray(data[: places[0].size])
    record[4] = 2
    begin = 32 + int.from_bytes(record[20:24], "little")
    record[begin : begin + 4] = zlib.crc32(record[:begin]).to_bytes(4, "little")
    segment_path(folder, 0).write_bytes(bytes(record) + data[len(record) :])
    for opening in (lambda: list(scan(folder)), lambda: read(folder, places[0]), lambda: Segments.open(folder)):
        with pytest.raises(UsageError, match=r"00000.seg' has format 2, but this tsdiff reads up to format 1; install a newer tsdiff") as told:
            opening()
        assert not isinstance(told.value, DamagedRecord)
        assert "\n" not in str(told.value)


def test_records_of_other_types_are_passed_over(whole):
    folder, places, data = whole
    record = bytearray(data[: places[0].size])
    record[6] = 9
    begin = 32 + int.from_bytes(record[20:24], "little")
    payload = begin + 4 + some(0).data.nbytes
    record[begin : begin + 4] = zlib.crc32(record[:begin]).to_bytes(4, "little")
    record[payload : payload + 4] = zlib.crc32(record[:payload]).to_bytes(4, "little")
    segment_path(folder, 0).write_bytes(bytes(record) + data[len(record) :])
    assert [one.place for one in scan(folder)] == places[1:]
    with pytest.raises(DamagedRecord, match="no tensor"):
        read(folder, places[0])


def test_bad_places_are_told(whole):
    folder, places, _ = whole
    for place in (Place(0, 64, 64), Place(0, 10**9, 64), Place(3, 0, 64), Place(0, 0, places[0].size + 64)):
        with pytest.raises(DamagedRecord, match="is lost"):
            read(folder, place)
    with Segments.open(folder, disk=QUICK) as segments:
        with pytest.raises(UsageError, match="too long to store"):
            segments.append("k" * (1 << 20), some(0))
        segments.append("k", some(0))
    assert len(list(scan(folder))) == 7


# Faults, with a journal: latents first, then the journal ---------------------------------------------------------------

@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    work(folder, QUICK, [])
    assert len(files(folder)) > 3
    return files(folder)


@pytest.mark.parametrize("fault", ["full", "killed", "power"])
def test_a_fault_at_any_change_loses_no_group(tmp_path, undisturbed, fault):
    for at in count():
        folder = tmp_path / str(at)
        folder.mkdir()
        disk, acknowledged, told = FaultyDisk(at, fault, seed=at), [], ""
        try:
            work(folder, disk, acknowledged)
        except (Killed, SetupError) as error:
            told = f"{type(error).__name__} {error}"
        assert told.startswith("" if not disk.failed else "SetupError no room to write" if fault == "full" else "Killed")
        assert check(folder) >= len(acknowledged)
        again = FaultyDisk(3 + at % 11, fault, seed=at)  # and once more while it recovers
        try:
            work(folder, again, acknowledged)
        except (Killed, SetupError):
            assert again.failed
        assert check(folder) >= len(acknowledged)
        work(folder, QUICK, [])
        assert files(folder) == undisturbed
        if not disk.failed:
            break
    assert at > 40
    assert {"open", "write", "sync", "truncate", "rename", "make_folder", "sync_folder"} <= set(disk.log)


def test_after_a_fault_segments_take_no_more(tmp_path):
    folder = tmp_path / "latents"
    fill(folder, range(2))
    before = segment_path(folder, 0).read_bytes()
    log = FaultyDisk(-1, "full")
    Segments.open(folder, disk=log).close()
    with Segments.open(folder, disk=FaultyDisk(len(log.log), "full")) as segments:
        with pytest.raises(SetupError, match="no room to write"):
            segments.append("x", some(0))
        assert segment_path(folder, 0).read_bytes() == before, "what was half written is taken back"
        for change in (lambda: segments.append("x", some(0)), segments.sync):
            with pytest.raises(SetupError, match="open it again"):
                change()
    segments.close()


WRITER = """
import sys
from pathlib import Path
from durable_work import work
from tsdiff.treesearch.disk import LOCAL
class Told(list):
    def append(self, step):
        print(step, flush=True)
work(Path(sys.argv[1]), LOCAL, Told(), steps=10**9)
"""


def test_a_killed_process_loses_no_group(tmp_path):
    rng = random.Random(1)
    folder, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    folder.mkdir()
    undisturbed.mkdir()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "support")}
    groups = 0
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-W", "error", "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(rng.randint(1, 15)):
            told = process.stdout.readline()
        for _ in range(rng.randint(0, 20_000)):  # it goes on writing, so that the kill hits it anywhere
            pass
        process.send_signal(signal.SIGKILL)
        rest = process.communicate(timeout=60)[0].split("\n")[:-1]  # the last number may be torn
        assert check(folder) > max([int(told), *map(int, rest)]) >= groups
        groups = check(folder)
    work(folder, QUICK, [], steps=groups + 3)
    work(undisturbed, QUICK, [], steps=groups + 3)
    assert files(folder) == files(undisturbed)
