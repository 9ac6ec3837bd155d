"""What nobody hopes for, asked of every verifier: numbers that are not finite, plain and odd pictures, files of all modes,
prompts without an end, checkpoints that are damaged or gone, networks that break in the middle of a search."""

from __future__ import annotations

import math
import struct
import warnings
import zlib

import all_verifiers
import numpy as np
import pytest
import torch
from all_verifiers import (
    CHECKPOINTS,
    CLASSED,
    ELSEWHERE,
    PICTURELESS,
    REFERENCES,
    WEIGHTS,
    Dying,
    candidates,
    condition,
    make,
    noise,
    owner,
    scores,
)
from fakes import Hooked
from PIL import Image

import tsdiff
from tsdiff.policies.best_of_n import BestOfN
from tsdiff.treesearch import registry
from tsdiff.treesearch.errors import TsdiffError, UsageError
from tsdiff.treesearch.picturefiles import MOST_PIXELS, PictureError, read_picture
from tsdiff.treesearch.pictures import score_pictures, unfit
from tsdiff.treesearch.protocols import Condition
from tsdiff.treesearch.references import resolve_verifier
from tsdiff.treesearch.runfolder import read_tree
from tsdiff.verifiers.clip_network import PromptWarning
from tsdiff.verifiers.compositional_facts import facts_of_prompt

LAST = 6  # with fewer steps no node has an ancestor at the noise that samples are compared with
SHOWN = sorted(REFERENCES.keys() - PICTURELESS)


class Anything(Hooked):
    """The exact model, which makes the same of any prompt."""

    def check(self, condition, *, guided=False):
        """Any condition will do."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Checkpoints that stay whole."""
    folder = tmp_path_factory.mktemp("checkpoints")
    all_verifiers.checkpoints(folder)
    return folder


@pytest.fixture(scope="module")
def prepared(root):
    """Each verifier, made and loaded once."""
    ready = {}

    def get(name):
        if name not in ready:
            ready[name] = make(name, root)
            ready[name].prepare("cpu")
        return ready[name]

    return get


def test_no_verifier_is_forgotten():
    homes = {name: point.value for name, point in registry._entry_points("tsdiff.verifiers").items()}
    ours = {name for name, value in homes.items() if value.startswith("tsdiff.verifiers.")}
    assert {reference.partition(":")[0] for reference in REFERENCES.values()} | ELSEWHERE == ours
    assert WEIGHTS.keys() == CHECKPOINTS.keys()


# Batches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_a_score_is_the_same_in_batches_of_any_size_and_company(prepared, name):
    verifier, images = prepared(name), noise(6)
    whole = scores(verifier, candidates(name, images))
    assert whole.isfinite().all()
    assert whole.std() > 1e-6, "or this test shows nothing"
    for size in (1, 2, 5):
        parts = [scores(verifier, some(candidates(name, images), range(start, min(start + size, 6)))) for start in range(0, 6, size)]
        assert torch.allclose(torch.cat(parts), whole, atol=1e-5, rtol=1e-5)
    strangers = torch.cat([noise(2, seed=7), images, noise(1, seed=8)])
    batch = candidates(name, strangers)
    batch.ancestors = torch.cat([batch.ancestors[:2], candidates(name, images).ancestors, batch.ancestors[:1]])
    assert torch.allclose(scores(verifier, batch)[2:8], whole, atol=1e-5, rtol=1e-5)


def some(batch, rows):
    return batch.take(list(rows))


# Numbers that are not finite ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_a_picture_that_is_not_finite_fails_alone_and_says_so(prepared, name, bad):
    verifier, images = prepared(name), noise()
    good = scores(verifier, candidates(name, images))
    spoilt = images.clone()
    spoilt[2, 0, 0, 0] = bad
    answer = verifier.score(candidates(name, spoilt))
    values = torch.as_tensor(answer.values).double()
    assert values.isnan().tolist() == [False, False, True, False]
    assert torch.allclose(values[[0, 1, 3]], good[[0, 1, 3]], atol=1e-5, rtol=1e-5)
    assert set(answer.reasons) == {2}
    assert ("could not be scored" if name == "compositional" else "not finite") in answer.reasons[2]


@pytest.mark.parametrize("name", SHOWN)
def test_a_sample_that_is_not_finite_costs_a_search_that_sample_only(prepared, name):
    """The picture of one sample of four cannot be judged; the best of the others is the answer."""

    class Spoilt(Anything):
        def decode(self, latents):
            media = super().decode(latents)
            far = latents.sum(1) == latents.sum(1).max()
            media.pixels[far] = math.nan
            return media

    verifier = prepared(name)
    found = condition(name)
    result = tsdiff.search(
        Spoilt(), None if name in CLASSED else found.prompt, class_label=1 if name in CLASSED else None, policy=BestOfN(n=4), verifier=verifier, steps=LAST, baseline=False
    )
    leaves = [node for node in result.tree.nodes if node.level == LAST]
    null = [node for node in leaves if node.score(verifier.name) is None]
    assert len(null) == 1
    assert not null[0].failed, "the sample is there, its score is not"
    assert result.complete
    assert result.score == max(node.score(verifier.name) for node in leaves if node not in null)


# Plain and odd pictures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16), (1, 1), (3, 50)])
@pytest.mark.parametrize("name", SHOWN)
def test_constant_pictures_of_any_size_have_scores(prepared, name, size):
    shades = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.5, 0.5, 0.5], [1.0, 0.0, 0.0]])
    images = shades[:, :, None, None].expand(-1, -1, *size).contiguous()
    assert scores(prepared(name), candidates(name, images)).isfinite().all()


def test_constant_latents_have_values(prepared):
    assert scores(prepared("value"), candidates("value", torch.zeros(3, 3, 4, 4))).isfinite().all()


@pytest.mark.parametrize("name", sorted(CHECKPOINTS.keys() - PICTURELESS))
def test_tensors_that_are_no_rgb_pictures_are_refused(prepared, name):
    """Grey and transparent ones must have become RGB before: a network would read something else in them."""
    for channels in (1, 4):
        with pytest.raises(UsageError, match=r"takes RGB images \(B, 3, H, W\)"):
            prepared(name).score(candidates(name, torch.rand(3, channels, 16, 16)))


def claims(path, width, height):
    """A PNG whose header claims a size, and which holds next to nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"\0" * 9)))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One picture in every mode: (file, the RGB that it shows)."""
    folder = tmp_path_factory.mktemp("files")
    levels = (noise(1, (24, 30), seed=3)[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    rgb, grey = Image.fromarray(levels), Image.fromarray(levels[..., 0])
    alpha = Image.fromarray((levels[..., 1] // 2 + 100).astype(np.uint8))
    transparent, veiled = rgb.copy(), grey.copy()
    transparent.putalpha(alpha)
    veiled.putalpha(alpha)
    palette = rgb.convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    deep = Image.fromarray(levels[..., 0].astype(np.uint16) * 257)
    white = Image.new("RGBA", rgb.size, "white")
    shown = {
        "grey": (grey, grey.convert("RGB")),
        "grey-16": (deep, grey.convert("RGB")),
        "grey-alpha": (veiled, Image.alpha_composite(white, veiled.convert("RGBA")).convert("RGB")),
        "rgba": (transparent, Image.alpha_composite(white, transparent).convert("RGB")),
        "palette": (palette, palette.convert("RGB")),
    }
    for mode, (picture, _) in shown.items():
        picture.save(folder / f"{mode}.png")
    return {mode: (folder / f"{mode}.png", torch.from_numpy(np.array(plain)).permute(2, 0, 1).float() / 255) for mode, (_, plain) in shown.items()}


@pytest.mark.parametrize("name", [name for name in SHOWN if name not in ("self-supervised", "path-stability")])
def test_grey_and_transparent_files_score_as_the_rgb_pictures_that_they_show(prepared, files, name):
    verifier = prepared(name)
    assert unfit(verifier) == ""
    pictures = [read_picture(path) for path, _ in files.values()] + [plain for _, plain in files.values()]
    values = [answer[verifier.name].score for answer in score_pictures([verifier], pictures, [condition(name)] * len(pictures), device="cpu")]
    assert None not in values
    assert values[: len(files)] == pytest.approx(values[len(files) :], abs=1e-4, rel=1e-4)


@pytest.mark.parametrize("name", [name for name in SHOWN if name not in ("self-supervised", "path-stability")])
def test_large_pictures_are_scored_and_huge_ones_refused_before_they_are_decoded(prepared, name, tmp_path):
    verifier = prepared(name)
    large = noise(1, (20, 30)).repeat_interleave(30, 2).repeat_interleave(30, 3)[0]
    (answer,) = score_pictures([verifier], [large], [condition(name)], device="cpu")
    assert math.isfinite(answer[verifier.name].score)
    huge = claims(tmp_path / "huge.png", 8192, MOST_PIXELS // 8192 + 1)
    with pytest.raises(PictureError, match="make the picture smaller first"):
        read_picture(huge)


# Prompts -------------------------------------------------------------------------------------------------------------

READERS = ["clip-transformers", "clip-open", "clip-siglip", "ensemble"]  # those that show a network the whole prompt
LONG = "a red star and " * 40


@pytest.mark.parametrize("name", READERS)
def test_an_overlong_prompt_is_cut_with_one_warning_in_a_whole_search(root, name):
    verifier = make(name, root)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = tsdiff.search(Anything(), [LONG, "a red star"], policy=BestOfN(n=3), verifier=verifier, steps=4, seed=[0, 1])
    assert len(results) == 4
    assert all(result.complete for result in results)
    told = [str(one.message) for one in caught if issubclass(one.category, PromptWarning)]
    assert len(told) == 1, "for two seeds, several batches and a baseline"
    assert "tokens at most, so the last" in told[0]
    assert "'a red star and" in told[0]
    assert len(told[0]) < 200, "the prompt is not repeated whole"


@pytest.mark.parametrize("name", sorted(REFERENCES.keys() - set(READERS)))
def test_where_the_prompt_is_not_shown_whole_a_long_one_is_no_matter(prepared, name):
    """Warnings are errors here."""
    verifier, images = prepared(name), noise(3)
    whole = scores(verifier, candidates(name, images, prompt=LONG))
    assert whole.isfinite().all()
    if "conditions" not in verifier.needs:
        assert torch.equal(whole, scores(verifier, candidates(name, images, prompt="")))


def test_an_overlong_fact_and_an_overlong_class_are_cut_with_one_warning(root):
    compositional = make("compositional", root)
    compositional.prepare("cpu")
    asked = candidates("compositional", noise(3))
    asked.conditions = [Condition("a star", metadata={"questions": [LONG, "is it red"]})] * 3
    with pytest.warns(PromptWarning) as caught:
        first = scores(compositional, asked)
    assert len(caught) == 1
    assert torch.equal(first, scores(compositional, asked)), "and no second warning, which would be an error"
    assert first.isfinite().all()
    zero_shot = resolve_verifier(REFERENCES["clip-zero-shot"].format(clip=root / "clip").replace("red,green,blue", f"red,{LONG.strip()}"))
    with pytest.warns(PromptWarning) as caught:
        zero_shot.prepare("cpu")
    assert len(caught) == 1
    zero_shot.prepare("cpu")  # classes are encoded once
    assert zero_shot.values(noise(2), [0, 1]).isfinite().all()


@pytest.mark.parametrize("name", sorted(REFERENCES))
@pytest.mark.parametrize("prompt", ["", " ", "\n\t", "\0", "🟥", "漢字", "é" * 3, "a" * 3000])
def test_odd_prompts_are_scored_or_refused_before_anything_runs(root, prepared, name, prompt):
    verifier = prepared(name)
    batch = candidates(name, noise(2), prompt=prompt)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptWarning)
        if name == "compositional" and not facts_of_prompt(prompt):
            with pytest.raises(UsageError, match="compositional has nothing to judge in the prompt"):
                verifier.check(batch.conditions[0])
        else:
            verifier.check(batch.conditions[0])
            assert scores(verifier, batch).isfinite().all()


@pytest.mark.parametrize("name", sorted(CLASSED))
def test_no_class_at_all_is_told_with_what_to_do(prepared, name):
    with pytest.raises(UsageError, match=r"scores for a class, but the condition '' has none; give one \(--class\)"):
        prepared(name).check(Condition(""))


# Checkpoints ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(root):
    """The bytes of every file of weights."""
    return {file: (root / file).read_bytes() for file in set(WEIGHTS.values())}


@pytest.fixture
def mended(root, whole):
    """The folder of checkpoints, to be damaged; whole again afterwards."""
    yield root
    for file, content in whole.items():
        (root / file).write_bytes(content)


def not_finite(path):
    """One number of the middle tensor becomes NaN, as a flipped bit makes it."""
    from safetensors.torch import load_file, save_file

    state = load_file(path)
    key = sorted(state)[len(state) // 2]
    state[key].view(-1)[0] = math.nan
    save_file(state, path, metadata={"format": "pt"})


DAMAGE = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "a page of the web": lambda path: path.write_bytes(b"<!DOCTYPE html><html>rate limit exceeded</html>" * 9),
    "of Git LFS": lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n"),
    "not finite": not_finite,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", sorted(CHECKPOINTS))
def test_a_damaged_checkpoint_is_named_before_anything_is_denoised(mended, tmp_path, name, damage):
    """By a search, which leaves no run behind; and by nobody else, so that one line says what to mend."""
    DAMAGE[damage](mended / WEIGHTS[name])
    model = Anything()
    with pytest.raises(TsdiffError) as told:
        tsdiff.search(model, class_label=1 if name in CLASSED else None, prompts=None if name in CLASSED else "a star", policy=BestOfN(n=2), verifier=make(name, mended), steps=4, out=tmp_path / "runs")
    message = str(told.value)
    assert (mended / WEIGHTS[name]).name in message or (mended / WEIGHTS[name]).parent.name in message
    assert any(advice in message for advice in ("copy", "download", "git lfs pull", "fit", "must be in", "the predictor's file", "has neither", "holds no")), message
    assert "\n" not in message
    assert model.seen == 0


@pytest.mark.parametrize("name", sorted(CHECKPOINTS))
def test_a_checkpoint_that_goes_away_after_it_was_found_is_told_when_it_loads(mended, name):
    verifier = make(name, mended)
    (mended / WEIGHTS[name]).unlink()
    with pytest.raises(TsdiffError) as told:
        verifier.prepare("cpu")
    assert (mended / WEIGHTS[name]).parent.name in str(told.value)


# Networks that break -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(CHECKPOINTS))
def test_a_search_keeps_what_it_has_when_a_network_breaks(root, tmp_path, name):
    """The first batch of 16 is scored, the network breaks, and the best of the 16 is the answer, on disk too."""
    verifier = make(name, root)
    verifier.prepare("cpu")
    state = owner(verifier)._state
    answered = {"self-supervised": 2, "path-stability": 2, "compositional": all_facts(verifier, name)}.get(name, 1)
    state["network"] = Dying(state["network"], answered)
    found = condition(name)
    result = tsdiff.search(
        Anything(), None if name in CLASSED else found.prompt, class_label=1 if name in CLASSED else None,
        policy=BestOfN(n=20), verifier=verifier, steps=LAST, baseline=False, out=tmp_path / "runs",
    )  # fmt: skip
    leaves = [node for node in result.tree.nodes if node.level == LAST]
    null = [node for node in leaves if node.score(verifier.name) is None]
    assert (len(leaves), len(null)) == (20, 4)
    assert all("the network is broken" in node.values[verifier.name].reason for node in null)
    assert not any(node.failed for node in leaves)
    assert result.complete
    assert result.score == max(node.score(verifier.name) for node in leaves if node not in null)
    saved = read_tree(result.path)["nodes"]
    assert sum(node["values"].get(verifier.name, {"score": 0.0})["score"] is None for node in saved) == 4


def all_facts(verifier, name):
    """Calls of a network that one batch of 16 samples takes."""
    facts = len(verifier.facts_of(condition(name))) if name == "compositional" else 0
    return math.ceil(16 * facts / 16)
