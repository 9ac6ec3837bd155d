"""Operations are counted from configs alone, equal known figures, and are those of the call that searches make."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from families import PIPELINES
from family_folders import FOLDERS, asked, condition, kept_in, size
from torch.nn.attention import SDPBackend, sdpa_kernel

from tsdiff.diffusion.architectures import ARCHITECTURES
from tsdiff.diffusion.flops import operations
from tsdiff.diffusion.loading import load_model, outline
from tsdiff.treesearch.protocols import LoadOptions

PAGE = Path(__file__).parents[2] / "docs" / "families.md"

KNOWN = {
    "sd15": (512, 0.803, 2.52),
    "sdxl": (1024, 6.76, 10.5),
    "sd3": (1024, 8.90, 10.5),
    "flux-dev": (1024, 74.4, 10.5),
    "pixart-sigma": (1024, 6.63, 10.5),
    "dit-xl": (256, 0.237, None),
}
"""Side in pixels, TFLOP of a row and of a decode: counted independently, to three digits."""

TOLERANCE = 0.005


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Saved pipelines by family; tests must not change them."""
    return kept_in(tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("name", KNOWN)
def test_published_architectures_have_the_known_counts(name: str) -> None:
    side, row, decode = KNOWN[name]
    plan: Any = ARCHITECTURES[name].outline()
    found = plan.flops(plan.size(side, side))
    assert found.row / 1e12 == pytest.approx(row, rel=TOLERANCE)
    if decode is not None:
        assert found.decode / 1e12 == pytest.approx(decode, rel=TOLERANCE)
    # The page that docs/make_flops_table.py has filled in.
    line = next(line for line in PAGE.read_text().splitlines() if line.startswith(f"| {ARCHITECTURES[name].title} | {side} x {side} "))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[3:5] == [f"{found.row / 1e12:.3g}", f"{found.decode / 1e12:.3g}"]


def test_a_row_of_ltx_video_has_the_count_of_its_layers() -> None:
    """By hand: n latent pixels, d wide, t tokens of text; two operations for each multiply-add."""
    plan: Any = ARCHITECTURES["ltx-video"].outline()
    asked = plan.size(512, 704, 161)
    n, d, t, channels, text, blocks = 21 * 16 * 22, 2048, 128, 128, 4096, 28
    assert plan.tokens(asked) == n
    ends = 2 * n * channels * d + (256 + d + 6 * d) * d + t * (text + d) * d  # in and out, time, text
    own = 4 * n * d * d + 2 * n * n * d  # four projections, and two products of all pixels with all pixels
    other = 2 * n * d * d + 2 * t * d * d + 2 * n * t * d
    feed = 2 * n * d * 4 * d
    found = plan.flops(asked)
    assert found.row == 2 * (ends + blocks * (own + other + feed))
    line = next(line for line in PAGE.read_text().splitlines() if line.startswith("| LTX-Video 2B | 512 x 704, 161 frames | 128 "))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[3:5] == [f"{found.row / 1e12:.3g}", f"{found.decode / 1e12:.3g}"]


@pytest.mark.parametrize("family", FOLDERS)
def test_what_is_counted_is_what_a_search_does(folders: Any, family: str) -> None:
    plan: Any = outline(str(folders(family)), LoadOptions(device="cpu"))
    model: Any = load_model(folders(family), device="cpu")
    usual = condition(family)
    usual = type(usual)(usual.prompt, class_label=usual.class_label)
    row = model.encode([usual], guided=False)[0].rows[0]
    counted = plan.row()
    assert {name: tuple(tensor.shape) for name, tensor in counted.items()} == {name: tuple(tensor.shape) for name, tensor in row.items()}
    latents, time = torch.zeros(1, *plan.latent_shape(size(family))), torch.tensor([500.0])
    found = plan.flops(size(family))
    with sdpa_kernel(SDPBackend.MATH):  # torch does not count its attention kernels for CPUs
        assert found.row == operations(lambda: model.forward(latents, time, [row])) > 0
        assert found.decode == operations(lambda: model.decode(latents)) > 0
    assert found.x0_decode is None


@pytest.mark.parametrize("family", FOLDERS)
def test_plan_shows_operations_of_every_family(folders: Any, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    from click.testing import CliRunner

    from tsdiff.cli.app import cli

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights were read"))
    wanted = condition(family)
    said = [f"--class={wanted.class_label}"] if wanted.class_label is not None else [wanted.prompt]
    sides = [f"--{name}={value}" for name, value in asked(family).items()]
    shown = CliRunner().invoke(cli, ["plan", *said, "--model", str(folders(family)), "--device", "cpu", "--verifier", "luminance", *sides]).stdout
    assert re.search(r"^an evaluation +[\d.]+ [MG]FLOP(, 2 rows of [\d.]+ [MG]FLOP)?; a decode [\d.]+ [MG]FLOP$", shown, re.MULTILINE), shown
    assert ("5 frames" in shown) == (family == "ltx")


def test_plan_shows_operations_and_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from tsdiff.cli.app import cli

    PIPELINES["sd"](tmp_path / "model")
    diffusers.AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights were read"))
    typed = ["plan", "a cat", "--model", str(tmp_path / "model"), "--device", "cpu", "--verifier", "luminance", "--policy", "best-of-n", "-P", "n=4", "--steps", "5", "--x0-decoder", str(tmp_path / "tiny")]
    shown = CliRunner().invoke(cli, typed).stdout
    assert re.search(r"^an evaluation +[\d.]+ MFLOP, 2 rows of [\d.]+ MFLOP; a decode [\d.]+ MFLOP \(an estimate [\d.]+ MFLOP\)$", shown, re.MULTILINE), shown
    assert re.search(r"^operations +[\d.]+ GFLOP at most in network and decoder", shown, re.MULTILINE)
    plan = json.loads(CliRunner().invoke(cli, [*typed, "--json"]).stdout)
    flops = plan["flops"]
    # Five steps of five samples, the baseline among them, with two rows each, and every sample decoded once.
    assert plan["rows_upper"] == 2 * 5 * 5
    assert flops["upper"] == 50 * flops["row"] + 5 * flops["decode"]
    assert 0 < flops["x0_decode"] < flops["decode"]
