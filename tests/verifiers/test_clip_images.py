"""The tensor path of CLIP's preprocessing against the libraries' own, which go through 8-bit pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tsdiff.treesearch.errors import UsageError
from tsdiff.verifiers.clip_images import OPENAI_MEAN, Preprocessing, from_open_clip, from_transformers
from tsdiff.verifiers.libraries import quiet_libraries

with quiet_libraries():
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from transformers import CLIPImageProcessor, SiglipImageProcessor

SIZES = [(64, 64), (48, 80), (101, 37), (20, 20), (32, 32), (33, 47)]
ZERO, ONE = [0.0] * 3, [1.0] * 3


def picture(height, width, seed=0):
    """A smooth picture of 8-bit numbers (H, W, 3), with an edge in it."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(generator.uniform(2, 12) * x + generator.uniform(2, 12) * y + generator.uniform(0, 6)) for _ in range(3)]
    pixels = 127.5 + 120.0 * np.stack(waves, axis=-1)
    pixels[: height // 3, : width // 3] = 255
    return pixels.round().clip(0, 255).astype(np.uint8)


def as_images(pixels):
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize(("interpolation", "target"), [("bicubic", 32), ("bilinear", 32), ("bicubic", (24, 40))])
def test_follows_open_clips_pictures_within_two_of_255(size, mode, interpolation, target):
    config = {"mean": ZERO, "std": ONE, "interpolation": interpolation, "resize_mode": mode, "fill_color": 128}
    ours = from_open_clip(config, target, "test")(as_images(picture(*size)))[0]
    theirs = image_transform_v2(PreprocessCfg(size=target, **config), is_train=False)(Image.fromarray(picture(*size)))
    assert ours.shape == theirs.shape
    difference = (ours - theirs).abs() * 255
    assert difference.quantile(0.98) <= 2.0
    assert difference.max() <= (2.0 if size[0] == size[1] and isinstance(target, int) else 10.0), "unequal sides: Pillow 13 may begin with the other one"
    assert difference.mean() <= 0.5


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("kind", "edge", "crop"), [(CLIPImageProcessor, 32, 32), (CLIPImageProcessor, 37, 32), (SiglipImageProcessor, None, 32)])
def test_follows_transformers_pictures_within_two_of_255(size, kind, edge, crop):
    options = {"image_mean": ZERO, "image_std": ONE, "size": {"height": crop, "width": crop} if edge is None else {"shortest_edge": edge}}
    processor = kind(**options, **({} if edge is None else {"crop_size": {"height": crop, "width": crop}}))
    ours = from_transformers(processor.to_dict(), crop, "test")(as_images(picture(*size)))[0]
    theirs = processor(Image.fromarray(picture(*size)), return_tensors="pt").pixel_values[0]
    assert ours.shape == theirs.shape
    difference = (ours - theirs).abs() * 255
    assert difference.max() <= 2.0
    assert difference.mean() <= 0.5


@given(height=st.integers(1, 90), width=st.integers(1, 90), level=st.floats(0, 1), mode=st.sampled_from(["shortest", "squash"]))
def test_a_plain_image_stays_plain_at_any_size(height, width, level, mode):
    """Weights of the filter add up to one, borders included."""
    prepared = Preprocessing((16, 16), resize=mode)(torch.full((2, 3, height, width), level))
    expected = (torch.tensor([level]) - torch.tensor(OPENAI_MEAN)) / torch.tensor((0.26862954, 0.26130258, 0.27577711))
    assert prepared.shape == (2, 3, 16, 16)
    assert torch.allclose(prepared, expected[None, :, None, None].expand_as(prepared), atol=2e-5)


def test_the_whole_of_a_long_image_is_kept_between_bars():
    prepared = from_open_clip({"mean": ZERO, "std": ONE, "resize_mode": "longest", "fill_color": 51}, 16, "test")(torch.ones(1, 3, 32, 64))
    assert torch.allclose(prepared[0, :, 4:12], torch.ones(3, 8, 16))
    assert torch.allclose(prepared[0, :, [0, 1, 2, 3, 12, 13, 14, 15]], torch.tensor(0.2))


def test_overshoot_is_cut_off_as_in_a_picture():
    edge = torch.zeros(1, 3, 64, 64)
    edge[..., 32:] = 1.0
    prepared = Preprocessing((128, 128), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))(edge)
    assert (prepared.min(), prepared.max()) == (0.0, 1.0)


def test_images_do_not_mix_and_half_precision_is_resized_in_float32():
    images = torch.cat([as_images(picture(50, 70, seed)) for seed in range(5)])
    prepare = Preprocessing((32, 32))
    assert torch.allclose(prepare(images), torch.cat([prepare(image[None]) for image in images]), atol=1e-6)
    half = prepare(images.half())
    assert half.dtype == torch.float32
    assert torch.allclose(half, prepare(images), atol=5e-3)


@pytest.mark.parametrize("config", [{"interpolation": "nearest"}, {"resize_mode": "stretch"}, {"mean": [0.5, 0.5]}, {"std": [float("nan")] * 3}])
def test_what_open_clip_would_not_know_is_refused(config):
    with pytest.raises(UsageError, match="here"):
        from_open_clip(config, 32, "here")


@pytest.mark.parametrize(
    "changes",
    [
        {"do_resize": False},
        {"do_normalize": False},
        {"resample": 0},
        {"do_center_crop": False},
        {"crop_size": {"height": 30, "width": 32}},
        {"size": {"height": 40, "width": 40}},
    ],
)
def test_steps_that_are_not_clips_are_refused(changes):
    known = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).to_dict()
    from_transformers(known, 32, "here")
    with pytest.raises(UsageError, match="here"):
        from_transformers(known | changes, 32, "here")
