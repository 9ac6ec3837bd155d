"""Programmatic verifiers: exact values on known images, orderings, independence of the batch."""

from __future__ import annotations

import io
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.parameters import build
from tsdiff.treesearch.protocols import Condition
from tsdiff.verifiers import JpegCompressibility, JpegSize, Luminance, Sharpness, TargetColor, TotalVariation

ALL = [Luminance(), JpegSize(), JpegCompressibility(), TargetColor(), TotalVariation(), Sharpness()]


class Pictures:
    """Candidates that are just images."""

    def __init__(self, images):
        self.images = images


def scores(verifier, images):
    values = verifier.score(Pictures(images)).values
    assert values.shape == (len(images),)
    assert values.dtype == torch.float32
    return values


def plain(red, green, blue, size=(8, 6)):
    return torch.tensor([red, green, blue])[None, :, None, None].expand(1, 3, *size).contiguous()


def noise(seed, count=1, size=(16, 12)):
    return torch.rand((count, 3, *size), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("verifier", ALL, ids=lambda verifier: verifier.name)
class TestAll:
    def test_declares_what_it_is(self, verifier):
        assert verifier.needs == {"images"}
        assert (verifier.scope, verifier.latency, verifier.judges) == ("row", "immediate", "any")
        assert verifier.prepare("cpu") is None
        assert verifier.check(Condition("anything")) is None

    def test_a_row_does_not_depend_on_its_batch(self, verifier):
        images = noise(1, count=7, size=(33, 31))
        together = scores(verifier, images)
        alone = torch.cat([scores(verifier, image[None]) for image in images])
        assert torch.equal(together, alone), "bit for bit"
        assert torch.equal(scores(verifier, images.flip(0)), together.flip(0))
        assert torch.equal(scores(verifier, images.to(memory_format=torch.channels_last)), together)

    @pytest.mark.parametrize("size", [(8, 8), (1, 1), (1, 5), (2, 1)])
    def test_black_and_white_score_finite(self, verifier, size):
        images = torch.cat([plain(0.0, 0.0, 0.0, size), plain(1.0, 1.0, 1.0, size)])
        assert torch.isfinite(scores(verifier, images)).all()

    def test_half_precision_images_are_scored_in_float32(self, verifier):
        assert torch.isfinite(scores(verifier, noise(2).half())).all()

    def test_gradients_flow_where_declared(self, verifier):
        images = noise(3, count=2).requires_grad_()
        values = scores(verifier, images)
        assert values.requires_grad == verifier.differentiable
        if verifier.differentiable:
            values.sum().backward()
            assert torch.isfinite(images.grad).all()
            assert images.grad.abs().sum() > 0


@given(red=st.floats(0, 1), green=st.floats(0, 1), blue=st.floats(0, 1))
def test_plain_images_have_known_scores(red, green, blue):
    image = plain(red, green, blue)
    assert scores(Luminance(), image).item() == pytest.approx(0.2126 * red + 0.7152 * green + 0.0722 * blue, abs=1e-6)
    assert scores(TotalVariation(), image).item() == 0.0
    assert scores(Sharpness(), image).item() == 0.0
    squares = [(red - 1.0) ** 2, green**2, blue**2]
    assert scores(TargetColor(), image).item() == pytest.approx(-sum(squares) / 3, abs=1e-6)


def test_the_total_variation_of_stripes():
    stripes = torch.zeros(1, 3, 4, 6)
    stripes[..., 1::2] = 1.0
    assert scores(TotalVariation(), stripes).item() == -1.0, "every horizontal neighbour differs by 1, no vertical one does"
    board = (torch.arange(4)[:, None] + torch.arange(6)).remainder(2).float().expand(1, 3, 4, 6)
    assert scores(TotalVariation(), board).item() == -2.0


def test_sharpness_is_the_variance_of_the_five_point_laplacian():
    image = noise(4, size=(9, 7))
    luma = (image[0] * torch.tensor([0.2126, 0.7152, 0.0722])[:, None, None]).sum(0).double()
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]).double()
    padded = torch.nn.functional.pad(luma[None, None], (1, 1, 1, 1), mode="replicate")
    laplacian = torch.nn.functional.conv2d(padded, kernel[None, None])
    assert scores(Sharpness(), image).item() == pytest.approx(laplacian.var(unbiased=False).item(), rel=1e-5)


def test_blur_lowers_sharpness_and_raises_smoothness_and_compressibility():
    pixels = (noise(5, size=(32, 32))[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    sharp = Image.fromarray(pixels)
    images = torch.stack(
        [
            torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
            for picture in (sharp, sharp.filter(ImageFilter.GaussianBlur(1)), sharp.filter(ImageFilter.GaussianBlur(3)))
        ]
    )
    for verifier, rises in [(Sharpness(), False), (TotalVariation(), True), (JpegSize(), False), (JpegCompressibility(), True)]:
        first, second, third = scores(verifier, images).tolist()
        assert (first < second < third) if rises else (first > second > third), verifier.name


@given(seed=st.integers(0, 1000), quality=st.integers(1, 100))
def test_jpeg_size_is_that_of_a_file_saved_by_pillow(seed, quality):
    pixels = np.random.default_rng(seed).integers(0, 256, (13, 17, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    expected = len(buffer.getvalue()) / 1000
    assert scores(JpegSize(quality=quality), image).item() == pytest.approx(expected, rel=1e-6)
    assert scores(JpegCompressibility(quality=quality), image).item() == pytest.approx(-expected, rel=1e-6)


def test_out_of_range_pixels_do_not_wrap_around():
    assert torch.equal(scores(JpegSize(), plain(2.0, -1.0, 1.0)), scores(JpegSize(), plain(1.0, 0.0, 1.0)))


@pytest.mark.parametrize(
    ("color", "rgb"), [("red", (1, 0, 0)), ("#00ff00", (0, 1, 0)), ("Navy", (0, 0, 128 / 255)), ("#0a141e", (10 / 255, 20 / 255, 30 / 255))]
)
def test_the_wanted_color_scores_highest(color, rgb):
    verifier = build(TargetColor, {"color": color})
    assert verifier.rgb == pytest.approx(rgb)
    assert scores(verifier, plain(*map(float, rgb))).item() == pytest.approx(0.0, abs=1e-12)
    assert scores(verifier, noise(6)).item() < 0.0


@pytest.mark.parametrize("color", ["redd", "#12345", "#ff000080", "", 5])
def test_a_wrong_color_is_refused_at_once(color):
    with pytest.raises(UsageError, match="CSS colour name"):
        TargetColor(color=color)


@pytest.mark.parametrize("quality", [0, 101])
def test_a_wrong_quality_is_refused_at_once(quality):
    with pytest.raises(UsageError, match="quality"):
        JpegSize(quality=quality)


def test_scores_are_ranked_as_people_would():
    dark, bright = plain(0.1, 0.1, 0.1), plain(0.9, 0.9, 0.9)
    assert scores(Luminance(), dark) < scores(Luminance(), bright)
    assert math.isclose(scores(Luminance(), plain(1.0, 1.0, 1.0)).item(), 1.0, abs_tol=1e-6)


def test_importing_verifiers_and_policies_needs_no_torch():
    program = (
        "import sys, tsdiff.verifiers, tsdiff.policies, tsdiff.plugin, tsdiff.plugin.conformance\n"
        "import tsdiff.verifiers.programmatic, tsdiff.policies.beam, tsdiff.policies.best_of_n, tsdiff.treesearch.callables\n"
        "tsdiff.verifiers.TargetColor(color='blue'); tsdiff.policies.Beam()\n"
        "sys.exit(bool({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
