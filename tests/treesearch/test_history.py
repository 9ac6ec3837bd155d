"""Images that say how they were made: read back without loss, by other tools too, and telling nothing of the machine."""

from __future__ import annotations

import copy
import json
import re
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes import PROMPT, Hooked, Judge
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from test_resume import BEAM, begin, derived, go_on, interrupted

import tsdiff
from tsdiff.policies.beam import Beam
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.history import Origin, image_texts, nameless, parameters
from tsdiff.treesearch.picturefiles import METADATA_FORMAT, read_metadata
from tsdiff.treesearch.runfolder import write_image

TEXT = st.text(st.characters(), max_size=60) | st.text(st.sampled_from("ab,:\n\"\\{} é日😀\r\t\0\ud83d\udc80\u2028"), max_size=60)
"""Any characters at all, lone surrogates included."""

# The published rules of the reader of AUTOMATIC1111's web interface: the last line holds the settings.
SETTING = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
SIZE = re.compile(r"^(\d+)x(\d+)$")

# Those of ComfyUI's.
OPTION = re.compile(r'\s*([^:]+:\s*([^"\{].*?|".*?"|\{.*?\}))\s*(,|$)')


def read_webui(text):
    """(prompt, negative prompt, settings) as that reader finds them."""
    *lines, last = text.strip().split("\n")
    assert len(SETTING.findall(last)) >= 3
    parts = {False: [], True: []}
    negative = False
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            negative, line = True, line[len("Negative prompt:") :].strip()
        if line or parts[negative]:
            parts[negative].append(line)
    settings = {}
    for name, value in SETTING.findall(last):
        found = json.loads(value) if len(value) > 1 and value[0] == value[-1] == '"' else value
        size = SIZE.match(found)
        settings |= {f"{name}-1": size[1], f"{name}-2": size[2]} if size else {name: found}
    return "\n".join(parts[False]), "\n".join(parts[True]), settings


def read_comfy(text):
    """The same by that reader, which knows names in lower case."""
    at = text.rindex("\nSteps:")
    before = text.rindex("\nNegative prompt:", 0, at + 1)
    settings = dict(match[0].rstrip(",").split(":", 1) for match in OPTION.finditer(text[at:].split("\n")[1]))
    return text[:before].strip(), text[before + 18 : at].strip(), {name.strip().lower(): value.strip() for name, value in settings.items()}


def as_readers_trim(text):
    """What is left of a prompt whose lines are trimmed, and whose first lines are not empty."""
    return "\n".join(map(str.strip, re.sub("[\0\ud800-\udfff]", "\ufffd", text).split("\n"))).lstrip("\n")


def misread(text):
    """Whether a part of a prompt looks like the beginning of another part."""
    return any(line.strip().startswith(("Negative prompt:", "Steps:")) for line in text.split("\n"))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A search's result, saved; change copies only."""
    return tsdiff.search(Hooked(), PROMPT, policy=Beam(width=2, branch=2), verifier=Judge(needs=["images", "x0"]), steps=6, seed=5, out=tmp_path_factory.mktemp("found"))


def saying(result, prompt, negative):
    """The result of another prompt."""
    other = copy.copy(result)
    other.tree = copy.copy(result.tree)
    other.tree.condition = replace(result.tree.condition, prompt=prompt, negative_prompt=negative)
    return other


# What other tools read -----------------------------------------------------------------------------------------------


def test_the_text_is_the_widely_read_one(found):
    text = read_metadata(found.path / "best.png")["parameters"]
    assert text.startswith(f"{PROMPT}\nNegative prompt: \nSteps: 6, Sampler: DDIM, CFG scale: 1, Seed: 5, Size: 4x4, Model: gaussian, ")
    prompt, negative, settings = read_webui(text)
    assert (prompt, negative) == (PROMPT, "")
    assert settings == {
        "Steps": "6", "Sampler": "DDIM", "CFG scale": "1", "Seed": "5", "Size-1": "4", "Size-2": "4", "Model": "gaussian",
        "Policy": "beam", "Verifier": "judge", "Score": f"{found.score:.6g}", "NFE": str(found.ledger.nfe), "Version": f"tsdiff {tsdiff.__version__}",
    }  # fmt: skip
    assert read_comfy(text)[:2] == (PROMPT, "")
    assert read_comfy(text)[2]["sampler"] == "DDIM"
    plain = read_webui(read_metadata(found.path / "baseline.png")["parameters"])[2]
    assert "Policy" not in plain
    assert plain["Score"] == f"{found.baseline.score:.6g}"


@given(TEXT, TEXT, TEXT)
@example("a cat, blue eyes: \"very\" blue\nsecond line", "ugly, (bad:1.2)", 'x", Seed: 7')
@example("", "", "")
@example(" \n\n x ", "\n", "\\")
def test_other_readers_find_the_prompts_and_settings_of_any_text(prompt, negative, model):
    text = parameters(prompt, negative, {"Steps": 20, "Sampler": "Euler a", "CFG scale": 7.5, "Seed": 2**64 - 1, "Size": "512x768", "Model": model, "Left out": None})
    text.encode()
    read = read_webui(text)
    if not misread(prompt) and not misread(negative):
        assert read[0] == as_readers_trim(prompt).rstrip("\n") or read[0] == as_readers_trim(prompt)
        assert read[1].rstrip("\n") == as_readers_trim(negative).rstrip("\n")
        assert read_comfy(text)[0] == re.sub("[\0\ud800-\udfff]", "\ufffd", prompt).strip()
    settings = read[2]
    assert {name: settings[name] for name in ("Steps", "Sampler", "CFG scale", "Seed", "Size-1", "Size-2")} == {
        "Steps": "20", "Sampler": "Euler a", "CFG scale": "7.5", "Seed": str(2**64 - 1), "Size-1": "512", "Size-2": "768",
    }  # fmt: skip
    plain = re.sub("[\0\ud800-\udfff]", "\ufffd", model)
    if not SIZE.match(plain):
        assert settings["Model"] == plain


@pytest.mark.parametrize("line", ["Negative prompt: sun", "  Steps: 3, Seed: 4", "Steps: 20"])
def test_a_prompt_cannot_pass_for_another_part(line):
    text = parameters(f"a hill\n{line}", f"rain\n{line}", {"Steps": 1, "Sampler": "DDIM", "Seed": 9})
    prompt, negative, settings = read_webui(text)
    assert prompt == f"a hill {line}"
    assert negative == f"rain {line}"
    assert settings["Seed"] == "9"
    assert settings["Steps"] == "1"


def test_solvers_and_initial_images_are_told_as_others_know_them(tmp_path):
    from tiny_sd import tiny_stable_diffusion

    pipe = tiny_stable_diffusion()
    start = Image.new("RGB", (16, 16), "red")
    options = {"policy": "best-of-n", "policy_options": {"n": 1}, "verifier": "sharpness", "guidance_scale": 3.5, "negative_prompt": "rain, snow"}
    result = tsdiff.search(pipe, "a hill", solver="ddim", eta=0.5, steps=4, init_image=start, strength=0.5, out=tmp_path, **options)
    settings = read_webui(read_metadata(result.path / "best.png")["parameters"])
    assert settings[:2] == ("a hill", "rain, snow")
    assert {name: settings[2][name] for name in ("Steps", "Sampler", "CFG scale", "Denoising strength", "Eta DDIM", "Size-1")} == {
        "Steps": "4", "Sampler": "DDIM", "CFG scale": "3.5", "Denoising strength": "0.5", "Eta DDIM": "0.5", "Size-1": "16",
    }  # fmt: skip


# Our own record ------------------------------------------------------------------------------------------------------


def test_the_record_tells_what_makes_the_image_again(found):
    record = read_metadata(found.path / "best.png")["tsdiff"]
    assert record["format"] == METADATA_FORMAT
    assert (record["version"], record["prompt"], record["seed"], record["run"], record["tree"]) == (tsdiff.__version__, PROMPT, 5, "run-0001", "search")
    assert record["node"] == found.node.index
    assert [step["id"] for step in record["path"]] == [f"{node.id:032x}" for node in found.node.path()]
    assert [step["move"] for step in record["path"]] == [node.move.to_json() for node in found.node.path()]
    assert record["scores"] == {name: value.to_json() for name, value in found.node.values.items()}
    assert record["score"] == found.score
    assert record["cost"] == found.ledger.to_json()
    assert record["options"]["policy"]["width"] == 2
    assert record["options"]["solver"] == "ddim"
    assert record["arguments"]["steps"] == 6
    plain = read_metadata(found.path / "baseline.png")["tsdiff"]
    assert plain["tree"] == "baseline"
    assert plain["cost"] == found.baseline.ledger.to_json()
    assert plain["node"] == found.baseline.node.index


def test_pixels_are_the_same_with_and_without_history(tmp_path, found):
    bare = tsdiff.search(Hooked(), PROMPT, policy=Beam(width=2, branch=2), verifier=Judge(needs=["images", "x0"]), steps=6, seed=5, metadata=False, out=tmp_path)
    for name in ("best.png", "baseline.png"):
        assert read_metadata(bare.path / name) is None
        assert b"tEXt" not in (bare.path / name).read_bytes()
        with Image.open(bare.path / name) as one, Image.open(found.path / name) as other:
            assert one.mode == other.mode == "RGB"
            assert np.array_equal(np.asarray(one), np.asarray(other))
    assert np.array_equal(np.asarray(bare.image), np.asarray(found.image))


@given(TEXT, TEXT)
@example("\ud83d", "\udc80 lone")
@example("日本語, 😀 \"quoted\"\n\\n", "é")
def test_every_prompt_comes_back_from_the_file(found, tmp_path_factory, prompt, negative):
    path = tmp_path_factory.mktemp("images") / "x.png"
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    texts = image_texts(saying(found, prompt, negative), Origin({"prompt": prompt}, {"prompts": prompt}, "f", "run-0001"), image.size)
    write_image(path, image, texts)
    read = read_metadata(path)
    assert read["parameters"] == texts["parameters"]
    record = read["tsdiff"]
    assert (record["prompt"], record["negative_prompt"], record["arguments"]["prompts"]) == (prompt, negative, prompt)
    strict = json.loads(chunks(path.read_bytes())["tsdiff"], parse_constant=lambda name: pytest.fail(name))
    assert strict["seed"] == 5
    with Image.open(path) as opened:
        opened.load()
        assert opened.tobytes() == image.tobytes()


def chunks(data):
    """The texts of a PNG file, read by the book (PNG 3rd edition, 11.3.3)."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, texts = 8, {}
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + body)
        keyword, _, rest = body.partition(b"\0")
        if kind == b"tEXt":
            assert b"\0" not in rest
            texts[keyword.decode("latin-1")] = rest.decode("latin-1")
        elif kind == b"iTXt":
            assert rest[:2] == b"\0\0", "not compressed"
            texts[keyword.decode("latin-1")] = rest[2:].split(b"\0", 2)[2].decode()
        at += 12 + size
    return texts


def test_text_beyond_latin_1_is_international_text(found, tmp_path):
    for prompt, kind in (("a café", b"tEXt"), ("日本", b"iTXt")):
        write_image(tmp_path / "x.png", Image.new("RGB", (1, 1)), image_texts(saying(found, prompt, ""), Origin(), (1, 1)))
        data = (tmp_path / "x.png").read_bytes()
        assert data.count(kind) == 2
        assert chunks(data)["parameters"].startswith(prompt)


def test_a_saved_result_tells_its_history_too(tmp_path):
    result = tsdiff.search(Hooked(), PROMPT, verifier=Judge(needs=["images", "x0"]), steps=4)
    record = read_metadata(result.save(tmp_path / "mine") / "best.png")["tsdiff"]
    assert record["run"] == "mine"
    assert record["options"]["steps"] == 4
    assert not record["options"].keys() & {"environment", "typed"}
    bare = tsdiff.search(Hooked(), PROMPT, verifier=Judge(needs=["images", "x0"]), steps=4, metadata=False)
    assert read_metadata(bare.save(tmp_path / "bare") / "best.png") is None


# Nothing of the machine ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/ann/models/sd15", "sd15"),
        ("/home/ann/my models/sd 15/", "sd 15"),
        ("C:\\Users\\ann\\sd15", "sd15"),
        ("\\\\server\\share\\sd15", "sd15"),
        ("~/models/sd15", "sd15"),
        ("~ann/models/sd15", "sd15"),
        ("value:path=/home/ann/head.safetensors,width=8", "value:path=head.safetensors,width=8"),
        ("['/home/ann/a', '/home/ann/b']", "['a', 'b']"),
        ("file:///home/ann/x", "file:x"),
        ("cannot read '/home/ann/x' (gone)", "cannot read 'x' (gone)"),
        ("stabilityai/sd-turbo", "stabilityai/sd-turbo"),
        ("gaussian:process=flow,preset=rare-mode", "gaussian:process=flow,preset=rare-mode"),
        ("1/2, a / b, 0.5", "1/2, a / b, 0.5"),
        ("../models/x", "../models/x"),
    ],
)
def test_file_names_are_cut_to_their_last_part(text, expected):
    assert nameless(text) == expected
    assert nameless({text: [text, {"deep": text}]}) == {expected: [expected, {"deep": expected}]}
    assert nameless({"prompt": text, "prompts": [text], "negative_prompt": text}) == {"prompt": text, "prompts": [text], "negative_prompt": text}


def test_images_tell_nothing_of_the_machine(tmp_path):
    import getpass
    import platform

    from tiny_sd import tiny_stable_diffusion

    home = tmp_path / "home of ann"
    tiny_stable_diffusion(home / "sd15")
    Image.new("RGB", (16, 16), "red").save(home / "start.png")
    options = {"policy": "best-of-n", "policy_options": {"n": 1}, "verifier": "sharpness", "guidance_scale": 2.0}
    result = tsdiff.search(str(home / "sd15"), "of /home/ann and C:\\x", steps=2, init_image=home / "start.png", out=home / "runs", **options)
    data = (result.path / "best.png").read_bytes()
    read = read_metadata(result.path / "best.png")
    assert read["tsdiff"]["model"] == read_webui(read["parameters"])[2]["Model"] == "sd15"
    assert read["tsdiff"]["prompt"] == "of /home/ann and C:\\x"
    text = str(read).replace("of /home/ann and C:", "")
    for secret in ("home of ann", str(tmp_path), str(Path.home()), str(Path.cwd()), getpass.getuser() + "/", platform.node() or "no name"):
        assert secret not in text, secret
    assert str(tmp_path).encode() not in data
    assert "environment" not in read["tsdiff"]["options"]


def test_an_interrupted_search_ends_in_the_same_images(tmp_path):
    options = {**BEAM, "verifiers": ["luminance", "sharpness"], "prompts": [PROMPT, "near (1, 1)"], "seed": [3], "steps": 4}
    begin(tmp_path / "whole", **options)
    folder = interrupted(tmp_path / "cut", 150, **options)
    go_on(folder, max_batch=3, memory_limit=10**6)
    whole = tmp_path / "whole" / "run-0001"
    assert derived(folder) == derived(whole)
    records = [read_metadata(path)["tsdiff"] for path in sorted(whole.glob("*/best.png"))]
    assert [record["prompt"] for record in records] == [PROMPT, "near (1, 1)"]
    assert [record["run"] for record in records] == [f"run-0001/{path.name}" for path in sorted(whole.iterdir()) if path.is_dir()]


# Damaged and hostile files -------------------------------------------------------------------------------------------


def png(*extra):
    """A 1 x 1 PNG with more chunks (type, body) before its pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
    tail = chunk(b"IDAT", zlib.compress(b"\0abc")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunk(*one) for one in extra) + tail


BOMB = zlib.compress(bytes(80 << 20), 9)
GOOD = b'tsdiff\0{"format":1}'


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png((b"tEXt", b"tsdiff\0{")), "damaged record of its search"),
        (png((b"tEXt", b"tsdiff\0[1]")), "it names no format"),
        (png((b"tEXt", b'tsdiff\0{"format":1,"x":NaN}')), "NaN is not strict JSON"),
        (png((b"tEXt", b'tsdiff\0{"format":"1"}')), "it names no format"),
        (png((b"tEXt", b'tsdiff\0{"format":99}')), "format 99, but this tsdiff reads up to format 1; install a newer tsdiff"),
        (png((b"tEXt", b"tsdiff\0" + b"[" * 200_000)), "nested too deeply"),
        (png((b"tEXt", b'tsdiff\0{"format":' + b"9" * 10_000 + b"}")), "damaged record"),
        (png((b"zTXt", b"tsdiff\0\0" + BOMB)), "cannot be read .*too large"),
        (png((b"iTXt", b"parameters\0\1\0\0\0" + BOMB)), "cannot be read .*too large"),
        (png(*[(b"zTXt", b"%d\0\0" % i + zlib.compress(bytes(1 << 20))) for i in range(70)]), "cannot be read .*[Tt]oo much|cannot be read"),
        (png((b"tEXt", GOOD))[:40], "cannot be read|not a picture"),
        (png()[:45], "cannot be read"),
        (b"", "not a picture"),
        (b"GIF89a", "cannot be read|not a picture"),
        (b"hello", "not a picture"),
    ],
)
def test_what_is_hostile_or_damaged_is_one_line(tmp_path, data, message):
    path = tmp_path / "x.png"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=message) as caught:
        read_metadata(path)
    assert "\n" not in str(caught.value)
    assert "x.png" in str(caught.value)


@given(st.data())
def test_a_file_with_any_bytes_changed_or_cut_is_read_or_refused(found, tmp_path_factory, data):
    whole = (found.path / "best.png").read_bytes()
    spoiled = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for at in data.draw(st.lists(st.integers(0, max(len(spoiled) - 1, 0)), max_size=4)) if spoiled else ():
        spoiled[at] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("spoiled") / "x.png"
    path.write_bytes(spoiled)
    try:
        read = read_metadata(path)
    except UsageError:
        return
    assert read is None or set(read) == {"parameters", "tsdiff"}


def test_what_is_whole_is_read_wherever_it_stands(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(png((b"tEXt", GOOD), (b"zTXt", b"parameters\0\0" + zlib.compress(b"a cat"))))
    assert read_metadata(path) == {"parameters": "a cat", "tsdiff": {"format": 1}}
    path.write_bytes(png((b"tEXt", GOOD))[:-28])
    assert read_metadata(str(path)) == {"parameters": None, "tsdiff": {"format": 1}}, "a picture cut short still has its history"
    body = b"parameters\0late"
    late = struct.pack(">I", len(body)) + b"tEXt" + body + struct.pack(">I", zlib.crc32(b"tEXt" + body))
    plain = png()
    path.write_bytes(plain[:-12] + late + plain[-12:])
    assert read_metadata(path) == {"parameters": "late", "tsdiff": None}
    path.write_bytes(plain)
    assert read_metadata(path) is None
    Image.new("RGB", (2, 2)).save(tmp_path / "x.jpg")
    assert read_metadata(tmp_path / "x.jpg") is None


def test_what_is_no_file_is_told(tmp_path):
    for path, message in ((tmp_path / "nowhere.png", "does not exist"), (tmp_path, "is not a file")):
        with pytest.raises(UsageError, match=message):
            read_metadata(path)
    huge = tmp_path / "huge.png"
    with huge.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(UsageError, match="too many for a picture"):
        read_metadata(huge)
