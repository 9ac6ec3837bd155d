"""Against the pipelines that others score with: every image an 8-bit PIL picture, resized by Pillow, alone in its batch.

Pictures as decoders make them, floats of any size, are not rounded on our way; that and Pillow's own rounding are all that may
differ. `TOLERANCE` says by how much a cosine may, and the docstring of `Clip` says so too.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny_clip
import tiny_dino
import torch
from all_verifiers import checkpoints, noise
from PIL import Image

from tsdiff.treesearch.results import to_pil
from tsdiff.verifiers import Aesthetic, Clip, ClipZeroShot, DinoClassifier, SelfSupervised
from tsdiff.verifiers.libraries import quiet_libraries

TOLERANCE = 0.002
"""Of cosines, and of logits in units of their scale."""

SIZES = [(96, 128), (64, 64), (33, 70)]
KINDS = ["open_clip", "squash", "clip", "siglip"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    squash = tiny_clip.config(custom_text=True, init_logit_bias=-3.0)
    made = checkpoints(root)
    made["squash"] = tiny_clip.save_open_clip(root / "squash", tiny_clip.open_clip_module(squash), squash, mean=[0.5] * 3, std=[0.5] * 3, resize_mode="squash")
    made["labelled"] = tiny_dino.save_dino(root / "labelled", ("a", "b", "c"), resize=40, crop=28)
    return made


def drawn(count, size, seed=0):
    """Smooth shades with a few shapes on them, (B, 3, H, W): what decoders make, rather than noise, where resampling is all."""
    rows, columns = torch.meshgrid(torch.linspace(0, 1, size[0]), torch.linspace(0, 1, size[1]), indexing="ij")
    generator = torch.Generator().manual_seed(seed)
    pictures = []
    for _ in range(count):
        turn, phase = torch.rand((3, 2), generator=generator) * 4.0, torch.rand(3, generator=generator) * math.tau
        shades = torch.stack([0.5 + 0.4 * torch.sin(turn[c, 0] * rows + turn[c, 1] * columns + phase[c]) for c in range(3)])
        place, colour = torch.rand(2, generator=generator), torch.rand(3, generator=generator)
        disc = torch.sigmoid((0.06 - (rows - place[0]) ** 2 - (columns - place[1]) ** 2) * 400.0)
        pictures.append(shades * (1 - disc) + colour[:, None, None] * disc)
    return torch.stack(pictures).clamp(0.0, 1.0)


def by_pillow(picture, *, edge, crop, mean, std, squash=False):
    """A transformers processor in Pillow's own words: pixels (1, 3, h, w)."""
    width, height = picture.size
    if squash:
        picture = picture.resize((crop, crop), Image.Resampling.BICUBIC)
    else:
        picture = picture.resize((edge if width <= height else int(edge * width / height), edge if height <= width else int(edge * height / width)), Image.Resampling.BICUBIC)
        left, top = (picture.width - crop) // 2, (picture.height - crop) // 2
        picture = picture.crop((left, top, left + crop, top + crop))
    pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255.0)
    return ((pixels - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1)[None]


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def reference_features(kind, folder, pictures):
    """Features (B, d) of length 1 by the library alone, one PIL picture a call."""
    with quiet_libraries(), torch.no_grad():
        if kind in ("clip", "siglip"):
            from transformers import AutoModel

            model = AutoModel.from_pretrained(folder).eval()
            half = (0.5,) * 3
            how = {"edge": 32, "crop": 32, "mean": CLIP_MEAN, "std": CLIP_STD} if kind == "clip" else {"edge": 32, "crop": 32, "mean": half, "std": half, "squash": True}
            features = [model.get_image_features(pixel_values=by_pillow(to_pil(picture), **how)).pooler_output for picture in pictures]
        else:
            import open_clip

            model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
            features = [model.eval().encode_image(transform(to_pil(picture))[None]) for picture in pictures]
    return torch.nn.functional.normalize(torch.cat(features), dim=-1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_cosines_of_clip_are_those_of_pil_pictures_within_the_stated_tolerance(folders, kind, size):
    verifier = Clip(model=str(folders[kind]))
    verifier.prepare("cpu")
    pictures = drawn(4, size)
    texts = verifier.network.text_features(["a", "red", "blue"])
    reference = reference_features(kind, folders[kind], pictures) @ texts.T
    ours = torch.stack([verifier.values(pictures, [prompt] * 4) for prompt in ("a", "red", "blue")], dim=1)
    assert (ours - reference).abs().max() < TOLERANCE
    assert reference.std(0).min() > 3 * TOLERANCE, "or this test shows nothing"


@pytest.mark.parametrize("size", SIZES)
def test_the_aesthetic_score_follows_within_the_tolerance_times_the_heads_length(folders, size):
    """The head is affine: features that differ by d change the score by |w| |d| at most, d = sqrt(2 - 2 cos)."""
    verifier = Aesthetic(head=str(folders["head"]), model=str(folders["quick"]))
    verifier.prepare("cpu")
    pictures = drawn(4, size)
    weight = torch.linspace(-1.0, 1.0, 16)
    reference = reference_features("open_clip", folders["quick"], pictures) @ weight + 1.0
    assert (verifier.values(pictures) - reference).abs().max() < TOLERANCE * weight.norm()
    assert reference.std() > 3 * TOLERANCE * weight.norm(), "or this test shows nothing"


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_zero_shot_logits_follow_within_the_tolerance_times_their_scale(folders, kind):
    verifier = ClipZeroShot(model=str(folders[kind]), classes=("red", "green", "blue"), templates=("a {}",))
    verifier.prepare("cpu")
    pictures = drawn(4, (96, 128))
    towers = verifier._network.towers
    directions = verifier._network.text_features(["a red", "a green", "a blue"])
    reference = towers.logit_scale * reference_features(kind, folders[kind], pictures) @ directions.T
    assert (verifier.logits(pictures) - reference).abs().max() < TOLERANCE * towers.logit_scale


def dino_reference(folder, pictures, pixels):
    """Class logits and features of length 1 by transformers, one PIL picture a call."""
    with quiet_libraries(), torch.no_grad():
        from transformers import Dinov2ForImageClassification

        model = Dinov2ForImageClassification.from_pretrained(folder).eval()
        inputs = [by_pillow(to_pil(picture), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), **pixels) for picture in pictures]
        features = torch.cat([model.dinov2(pixel_values=one).pooler_output for one in inputs])
        return torch.cat([model(pixel_values=one).logits for one in inputs]), torch.nn.functional.normalize(features, dim=-1)


@pytest.mark.parametrize("size", SIZES)
def test_dino_follows_and_so_does_what_compares_by_it(folders, size):
    verifier = DinoClassifier(model=str(folders["labelled"]), scale="logit")
    consistency = SelfSupervised(model=str(folders["labelled"]))
    for one in (verifier, consistency):
        one.prepare("cpu")
    pictures = drawn(4, size)
    logits, features = dino_reference(folders["labelled"], pictures, {"edge": 40, "crop": 28})
    spread = logits.abs().max()
    assert (verifier.logits(pictures) - logits).abs().max() < 3 * TOLERANCE * spread
    turned = pictures.roll(1, 0)
    expected = (features * features.roll(1, 0)).sum(-1)
    assert (consistency.values(pictures, turned) - expected).abs().max() < TOLERANCE
    assert expected.std() > 3 * TOLERANCE, "or this test shows nothing"


def test_noise_is_where_pipelines_differ_and_the_order_of_pictures_is_kept_all_the_same(folders):
    """The hardest case for resampling, and what a search needs: which picture is the best."""
    verifier = Clip(model=str(folders["clip"]))
    verifier.prepare("cpu")
    pictures = noise(12, (96, 96))
    reference = reference_features("clip", folders["clip"], pictures) @ verifier.network.text_features(["red"])[0]
    ours = verifier.values(pictures, ["red"] * 12)
    assert ours.argmax() == reference.argmax()
    assert np.corrcoef(ours.numpy(), reference.numpy())[0, 1] > 0.99
