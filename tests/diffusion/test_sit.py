"""SiT: converted checkpoints predict as the paper's own code does; what it has in common with all families is in `test_family_*.py`."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damages import INDEX, edit
from family import Shelf, ours
from family_sit import SIT, weights
from safetensors.torch import save_file
from sit_reference import CHANNELS, CLASSES, HEADS, SIDE, checkpoint, guided, tiny_vae_folder, velocity
from torch import Tensor

from tsdiff.diffusion.loading import load_model, outline
from tsdiff.diffusion.sit_checkpoint import Sizes, convert, read_checkpoint, sizes_of, translate
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import LoadOptions


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Tests must not change it."""
    return weights()


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vae_folder(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def model(shelf: Shelf) -> Any:
    return shelf.model(SIT)


# The network ---------------------------------------------------------------------------------------------------------


def noise_of(*shape: int) -> Tensor:
    return torch.randn((*shape, CHANNELS, SIDE, SIDE), generator=torch.Generator().manual_seed(5))


def test_velocities_equal_the_papers_code(model: Any, state: dict[str, Tensor]) -> None:
    """At data, at noise and between, a time for each row, both rows of a condition."""
    x = noise_of(2).repeat(3, 1, 1, 1)
    t = torch.tensor([0.0, 0.13, 0.5, 0.77, 0.999, 1.0])
    y = torch.tensor([0, 9, CLASSES, 3, CLASSES, 5])
    rows = [{"class_labels": label} for label in y]
    found = model.forward(x, 1000.0 * (1.0 - t), rows)
    theirs = velocity(state, x, t, y)
    torch.testing.assert_close(-found, theirs, rtol=0, atol=1e-5)
    assert theirs.std() > 0.1
    assert model.prediction_type == "flow"


def test_clean_estimates_follow_the_path(model: Any, state: dict[str, Tensor]) -> None:
    """x = t x0 + (1 - t) eps, so that x0 = x + (1 - t) (x0 - eps)."""
    x, info = noise_of(2), model.solver()
    schedule = model.schedule(info, 6, None)
    sampler = model.sampler(schedule, info)
    rows = [encoded.rows[0] for encoded in model.encode(SIT.conditions, guided=False)]
    levels, labels = [1, 4], torch.tensor([one.class_label for one in SIT.conditions])
    t = torch.tensor([1.0 - schedule.sigma[level] for level in levels])
    theirs = x + (1 - t)[:, None, None, None] * velocity(state, x, t, labels)
    SIT.require_equal(sampler.x0(x, levels, sampler.evaluate(x, levels, rows)), theirs)


def test_levels_are_even(model: Any) -> None:
    """Those of a plain loop from t = 0 to t = 1."""
    assert model.schedule(model.solver(), 4, None).sigma == pytest.approx((1.0, 0.75, 0.5, 0.25, 0.0), abs=1e-7)


def test_guidance_of_all_channels_where_the_folder_says_so(shelf: Shelf, tmp_path: Path, state: dict[str, Tensor], model: Any) -> None:
    folder = Path(shutil.copytree(shelf.folder(SIT), tmp_path / "model"))
    edit(folder / INDEX, guided_channels=CHANNELS)
    whole, call = load_model(folder, device="cpu"), SIT.call(steps=2, guidance="on", noise=True)
    assert whole.fingerprint != model.fingerprint
    assert call.noise is not None
    x, y = call.noise[0].clone(), torch.tensor([one.class_label for one in SIT.conditions])
    for step in range(2):
        x = x + guided(state, x, torch.full((2,), step / 2), y, call.scale, channels=CHANNELS) / 2
    SIT.require_equal(ours(whole, call), x)


# Converting ----------------------------------------------------------------------------------------------------------


def test_what_was_converted(state: dict[str, Tensor], vae: Path, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "sit.pt")
    facts = convert(tmp_path / "sit.pt", tmp_path / "out", vae=vae, heads=HEADS)
    assert facts["weights"] == "plain"
    assert (facts["latents"], facts["classes"], facts["variance"]) == ([CHANNELS, SIDE, SIDE], CLASSES, "dropped")
    last = state["final_layer.linear.weight"].numel() + state["final_layer.linear.bias"].numel()
    assert facts["parameters"] == sum(tensor.numel() for key, tensor in state.items() if key != "pos_embed") - last // 2
    assert {path.name for path in tmp_path.iterdir()} == {"sit.pt", "out"}
    config = json.loads((tmp_path / "out/transformer/config.json").read_text())
    assert (config["num_layers"], config["out_channels"], config["sample_size"], config["norm_eps"]) == (2, CHANNELS, SIDE, 1e-6)


@pytest.mark.parametrize("made", [CHANNELS, 2 * CHANNELS], ids=["prediction alone", "with a variance"])
def test_every_number_of_a_checkpoint_is_in_the_folder_once_or_in_every_block(made: int) -> None:
    state = checkpoint(made=made)
    translated = translate(state, sizes_of(state, "it"))
    assert translated["proj_out_2.weight"].shape == (4 * CHANNELS, 48)
    torch.testing.assert_close(translated["proj_out_2.weight"].unflatten(0, (4, CHANNELS)), state["final_layer.linear.weight"].unflatten(0, (4, made))[:, :CHANNELS], rtol=0, atol=0)
    stacked = torch.cat([translated[f"transformer_blocks.1.attn1.to_{name}.weight"] for name in "qkv"])
    assert torch.equal(stacked, state["blocks.1.attn.qkv.weight"])
    pointers = [tensor.untyped_storage().data_ptr() for tensor in translated.values()]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("kind", ["safetensors", "plain", "model", "old zip"])
def test_a_checkpoint_may_come_in_several_forms(state: dict[str, Tensor], tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("sit.safetensors" if kind == "safetensors" else "sit.pt")
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"model": state} if kind == "model" else state, path, _use_new_zipfile_serialization=kind != "old zip")
    read, which = read_checkpoint(path)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], tensor) for key, tensor in state.items())
    assert which == ("plain (model)" if kind == "model" else "plain")


def test_heads_of_published_widths_are_known(tmp_path: Path) -> None:
    torch.save(checkpoint(width=384, blocks=1), tmp_path / "s.pt")
    facts = convert(tmp_path / "s.pt", tmp_path / "out")
    assert json.loads((tmp_path / "out/transformer/config.json").read_text())["num_attention_heads"] == 6
    assert "put the AutoencoderKL" in facts["missing"]
    with pytest.raises(UsageError, match=r"vae/config.json' is missing, so the pipeline is incomplete"):
        outline(str(tmp_path / "out"), LoadOptions())
    assert facts["network"] == "SiT, width 384, depth 1, patch 2"
    assert [Sizes(width, 4, 4, blocks, 1000, 16, 8).name for width, blocks in ((384, 12), (768, 12), (1024, 24), (1152, 28))] == ["SiT-S/4", "SiT-B/4", "SiT-L/4", "SiT-XL/4"]


def test_positions_that_averaging_has_moved_are_sines_still(state: dict[str, Tensor], vae: Path, tmp_path: Path) -> None:
    torch.save(state | {"pos_embed": state["pos_embed"] + 3e-4}, tmp_path / "sit.pt")
    assert "up to 3.0e-04 off" in convert(tmp_path / "sit.pt", tmp_path / "out", vae=vae, heads=HEADS)["positions"]


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code was run",))


def _without(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if key not in names}


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "code": (lambda s: {"ema": s, "opt": Harmful()}, "files that would run code are not opened"),
    "not tensors": (lambda s: {"ema": {"a": 1}}, "no dictionary of tensors"),
    "a list": (lambda s: [s], "no dictionary of tensors"),
    "other path": (lambda s: {"ema": s, "args": argparse.Namespace(path_type="GVP")}, "path_type 'GVP', but only 'linear'"),
    "other prediction": (lambda s: {"ema": s, "args": argparse.Namespace(prediction="noise")}, "prediction 'noise', but only 'velocity'"),
    "another network": (lambda s: {"weight": torch.zeros(3)}, "x_embedder.proj.weight is missing; it holds weight"),
    "missing": (lambda s: _without(s, "blocks.1.mlp.fc1.bias", "t_embedder.mlp.0.weight"), r"missing: blocks.1.mlp.fc1.bias, t_embedder.mlp.0.weight$"),
    "a whole block": (lambda s: {key: t for key, t in s.items() if "blocks.0." not in key}, r"missing: blocks.0.*and 7 more"),
    "one more": (lambda s: s | {"blocks.0.attn.q_norm.weight": torch.ones(16)}, "not expected: blocks.0.attn.q_norm.weight"),
    "shape": (lambda s: s | {"blocks.0.attn.proj.weight": torch.zeros(48, 40)}, r"of another shape: blocks.0.attn.proj.weight \(48, 40\) for \(48, 48\)"),
    "positions' shape": (lambda s: s | {"pos_embed": torch.zeros(1, 15, 48)}, r"of another shape: pos_embed \(1, 15, 48\)"),
    "three outputs": (lambda s: s | {"final_layer.linear.weight": torch.zeros(12, 48), "final_layer.linear.bias": torch.zeros(12)}, "takes 4 channels and makes 3"),
    "not finite": (lambda s: s | {"t_embedder.mlp.2.bias": torch.full((48,), float("nan"))}, "not finite numbers: t_embedder.mlp.2.bias"),
    "learned positions": (lambda s: s | {"pos_embed": torch.zeros_like(s["pos_embed"])}, "have learned their positions are not supported"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_checkpoint_that_is_none_is_one_clear_line_and_leaves_nothing(state: dict[str, Tensor], tmp_path: Path, case: str, capfd: pytest.CaptureFixture[str]) -> None:
    make, says = WRONG[case]
    torch.save(make(state), tmp_path / "sit.pt")
    with pytest.raises(UsageError, match=says) as caught:
        convert(tmp_path / "sit.pt", tmp_path / "out", heads=HEADS)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["sit.pt"]
    assert capfd.readouterr() == ("", "")


def test_other_wrong_inputs(state: dict[str, Tensor], vae: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "sit.pt", tmp_path / "out"
    with pytest.raises(UsageError, match=r"checkpoint .* is not there"):
        convert(source, out)
    source.write_bytes(b"version https://git-lfs")
    with pytest.raises(UsageError, match="cannot be read as weights"):
        convert(source, out)
    torch.save(state, source)
    with pytest.raises(UsageError, match=r"the network is 48 wide, which no published one is.*--heads"):
        convert(source, out)
    with pytest.raises(UsageError, match="5 attention heads do not divide"):
        convert(source, out, heads=5)
    with pytest.raises(UsageError, match=r"config.json' is missing"):
        convert(source, out, heads=HEADS, vae=tmp_path)
    other = tiny_vae_folder(tmp_path / "wide", latent_channels=8)
    with pytest.raises(UsageError, match="makes latents of 8 channels but the network takes 4"):
        convert(source, out, heads=HEADS, vae=other)
    edit(other / "config.json", _class_name="VQModel")
    with pytest.raises(UsageError, match="holds a VQModel"):
        convert(source, out, heads=HEADS, vae=other)
    assert not out.exists()
    out.mkdir()
    convert(source, out, heads=HEADS, vae=vae)
    with pytest.raises(UsageError, match="nothing is ever overwritten"):
        convert(source, out, heads=HEADS, vae=vae)
