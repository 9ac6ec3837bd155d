"""Options of memory and speed: results stay what they are, rows are counted, and what does not apply is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers.pipelines.dit import pipeline_dit
from family_folders import FOLDERS, OF_CLASSES, asked, condition, guidance, kept_in, size
from tiny_ltx import tiny_ltx
from tiny_sd import tiny_stable_diffusion
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

import tsdiff
from tsdiff.diffusion import devices, latent, memory
from tsdiff.diffusion.devices import resolve_dtype
from tsdiff.diffusion.loading import load_model, outline
from tsdiff.diffusion.memory import Stages
from tsdiff.policies import Beam, BestOfN
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.plan import prepare
from tsdiff.treesearch.protocols import LoadOptions
from tsdiff.treesearch.results import Results
from tsdiff.verifiers.programmatic import Luminance

FAMILIES = list(FOLDERS)
OF_IMAGES = [family for family in FAMILIES if family != "ltx"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Saved pipelines by family; tests must not change them."""
    return kept_in(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny autoencoder for latents of 4 channels, half as wide as their images."""
    folder = tmp_path_factory.mktemp("tiny") / "taesd"
    torch.manual_seed(7)
    diffusers.AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(folder)
    return folder


def searched(model: Any, family: str, **options: Any) -> Results:
    """A beam for two prompts, with guidance."""
    device = {"device": "cpu"} if isinstance(model, Path) else {}
    conditions = [condition(family, number) for number in range(2)]
    results = tsdiff.search(model, conditions, policy=Beam(width=2, branch=2), verifier="luminance", steps=3, **asked(family), **guidance(family), **device, **options)
    assert not results.failures, results.failures[0].error
    return results


def require_same(results: Results, others: Results) -> None:
    """The same trees, counted alike; numbers up to what depends on where weights lie in memory, and on the other rows of a kernel."""
    for one, other in zip(results, others, strict=True):
        assert one.ledger == other.ledger
        assert [(node.id, node.level, node.values.keys()) for node in one.tree.nodes] == [(node.id, node.level, node.values.keys()) for node in other.tree.nodes]
        assert one.node.index == other.node.index
        assert one.score == pytest.approx(other.score, abs=1e-5)
        latents = one.latents[one.node.index]
        torch.testing.assert_close(latents, other.latents[other.node.index], rtol=0, atol=1e-4 * max(1.0, float(latents.std())))


# Results stay what they are -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_offloading_slicing_and_tiling_small_images_change_nothing(folders: Any, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    plain = searched(folders(family), family)
    monkeypatch.setattr(memory, "resolve_device", lambda name: "cuda:0")  # for the check alone: it would refuse a CPU
    monkeypatch.setattr(latent, "Stages", Watched)
    Watched.seen = []
    options = searched(folders(family), family, offload=True, vae_slicing=family != "ltx", vae_tiling=True)
    require_same(options, plain)
    assert options.engine.network_rows == plain.engine.network_rows
    # A component works in its own stage only, and each of them has worked.
    assert {stage for stage, _ in Watched.seen} == {"network", "vae"} | ({"text"} if family not in OF_CLASSES else set())
    assert all(stage == current for stage, current in Watched.seen)


class Watched(Stages):
    """Notes the stage that each component works in."""

    seen: list[tuple[str, str | None]]

    def __init__(self, stages: Any, device: str) -> None:
        super().__init__(stages, device)
        for name, parts in self.stages.items():
            for part in parts:
                part = getattr(part, "decoder", part) if name == "vae" else part
                part.register_forward_pre_hook(lambda *_, name=name: self.seen.append((name, self.current)))


def test_components_take_turns_on_the_device() -> None:
    where: dict[str, str] = {}

    class Part:
        def __init__(self, name: str) -> None:
            self.name, where[name] = name, "cpu"

        def to(self, device: str) -> None:
            where[self.name] = device

    stages = Stages({"text": [Part("clip"), None, Part("t5")], "network": [Part("unet")], "vae": [Part("vae")], "none": []}, "cuda:0")

    def there() -> set[str]:
        return {name for name, device in where.items() if device == "cuda:0"}

    stages.bring("network")
    assert there() == {"unet"}
    with stages.during("text"):
        assert there() == {"clip", "t5"}
    assert there() == set()  # encoders leave as soon as prompts are encoded
    stages.bring("vae")
    with stages.during("none"):
        assert there() == {"vae"}
    stages.bring("network")
    assert there() == {"unet"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiled_network_is_compiled_once_and_called_with_one_row_count(folders: Any, monkeypatch: pytest.MonkeyPatch, counting: list[int], family: str) -> None:
    plain = searched(folders(family), family)
    model = load_model(folders(family), device="cpu", compile=True)
    assert model.constant_rows
    rows: list[int] = []
    model.network.register_forward_pre_hook(lambda module, args, kwargs: rows.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True)
    results = searched(model, family, max_batch=6)
    compiled = sum(counting)
    assert compiled > 0
    assert set(rows) == {6}
    assert sum(rows) == results.engine.network_rows
    assert results.engine.padding == sum(rows) - results.engine.rows
    assert results.engine.rows == plain.engine.rows
    require_same(results, plain)
    searched(model, family, max_batch=6, seed=5)
    assert sum(counting) == compiled  # other prompts, levels and batches: nothing new


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A compiler that compiles nothing, and counts."""
    calls: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(1)
        return graph.forward

    monkeypatch.setattr(memory, "BACKEND", backend)
    yield calls
    torch._dynamo.reset()


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_one_by_one_or_in_one_tile_is_the_same(folders: Any, family: str) -> None:
    model = load_model(folders(family), device="cpu")
    latents = torch.randn(3, *model.latent_shape(size(family)), generator=torch.Generator().manual_seed(0))
    plain = model.decode(latents).pixels
    model.pipeline.vae.enable_tiling()
    assert torch.equal(model.decode(latents).pixels, plain)
    model.pipeline.vae.enable_slicing()
    torch.testing.assert_close(model.decode(latents).pixels, plain, rtol=0, atol=1e-5)  # kernels sum in the order of their batch


@pytest.mark.parametrize("family", OF_IMAGES)
def test_channels_last_changes_the_layout_alone(folders: Any, family: str) -> None:
    model = load_model(folders(family), device="cpu", channels_last=True)
    plain = load_model(folders(family), device="cpu")
    assert model.fingerprint == plain.fingerprint
    # Transformers have next to no convolutions: there it is the autoencoder that gains.
    convolutions = [part for one in (model.network, model.pipeline.vae) for part in one.modules() if isinstance(part, torch.nn.Conv2d)]
    assert len(convolutions) > 5
    assert all(one.weight.is_contiguous(memory_format=torch.channels_last) for one in convolutions)
    latents = torch.randn(2, *model.latent_shape(size(family)), generator=torch.Generator().manual_seed(0))
    rows = [one.encode([condition(family)], guided=False)[0].rows * 2 for one in (model, plain)]
    time = torch.tensor([500.0, 20.0])
    torch.testing.assert_close(model.forward(latents, time, rows[0]), plain.forward(latents, time, rows[1]), rtol=0, atol=1e-5)
    torch.testing.assert_close(model.decode(latents).pixels, plain.decode(latents).pixels, rtol=0, atol=1e-5)


def test_tiling_is_for_larger_images_and_part_of_the_fingerprint(folders: Any) -> None:
    model, plain = (load_model(folders("sd"), device="cpu", vae_tiling=tiling) for tiling in (True, False))
    assert model.fingerprint != plain.fingerprint
    large = torch.randn(1, 4, 24, 24, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(model.decode(large).pixels, plain.decode(large).pixels)
    assert torch.equal(model.decode(large[..., :8, :8]).pixels, plain.decode(large[..., :8, :8]).pixels)


def test_videos_larger_than_a_tile_are_decoded_as_their_autoencoder_tiles_them(folders: Any) -> None:
    model, plain = (load_model(folders("ltx"), device="cpu", vae_tiling=tiling) for tiling in (True, False))
    assert model.fingerprint != plain.fingerprint
    latents = torch.randn(1, 8, 2, 8, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.decode(latents).pixels, plain.decode(latents).pixels)  # not larger than a tile
    vae = model.pipeline.vae
    vae.enable_tiling(tile_sample_min_height=32, tile_sample_min_width=32, tile_sample_stride_height=24, tile_sample_stride_width=24)
    tiled, whole = (one.decode(latents).pixels for one in (model, plain))
    assert tiled.shape == whole.shape == (1, 5, 3, 32, 64)
    assert not torch.equal(tiled, whole)
    mean, std = (part.view(-1, 1, 1, 1) for part in (vae.latents_mean, vae.latents_std))
    with torch.no_grad():
        theirs = vae.tiled_decode(latents * std / vae.config.scaling_factor + mean, None).sample[0].transpose(0, 1)
    torch.testing.assert_close(tiled[0], (theirs / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "sit"])
def test_weights_that_an_owner_keeps_elsewhere_are_used_in_place(folders: Any, family: str) -> None:
    """As `pipe.enable_model_cpu_offload()` and its sequential twin leave them: on the meta device, until a hook brings them."""
    plain, pipe = load_model(folders(family), device="cpu"), load_model(folders(family), device="cpu").pipeline
    for part in (getattr(pipe, plain._network), pipe.vae):
        cpu_offload(part, execution_device=torch.device("cpu"))
    model = load_model(pipe)
    assert next(model.network.parameters()).is_meta
    latents = torch.randn(2, *model.latent_shape(size(family)), generator=torch.Generator().manual_seed(0))
    (row,) = plain.encode([condition(family)], guided=False)[0].rows
    time = torch.tensor([500.0, 20.0])
    torch.testing.assert_close(model.forward(latents, time, [row] * 2), plain.forward(latents, time, [row] * 2), rtol=0, atol=1e-5)
    torch.testing.assert_close(model.decode(latents).pixels, plain.decode(latents).pixels, rtol=0, atol=1e-5)
    assert next(model.network.parameters()).is_meta


# Number formats -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "format", "near"), [("bf16", torch.bfloat16, 0.02), ("fp16", torch.float16, 0.003)], ids=["bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_latents_in_the_models_format_follow_the_pipeline_in_half_precision(
    folders: Any, monkeypatch: pytest.MonkeyPatch, family: str, dtype: str, format: torch.dtype, near: float
) -> None:
    model = load_model(folders(family), device="cpu", dtype=dtype, latent_dtype="model")
    usual = load_model(folders(family), device="cpu", dtype=dtype)
    assert model.dtype == format
    assert model.fingerprint != usual.fingerprint
    noise = torch.randn((1, *model.latent_shape(size(family))), generator=torch.Generator().manual_seed(1))
    ours, kept = (half_sampled(one, family, noise) for one in (model, usual))
    assert ours.dtype == torch.float32
    assert torch.equal(ours, ours.to(format).float())
    assert not torch.equal(kept, kept.to(format).float())
    if family == "sit":  # which has no pipeline; test_sit.py compares it with the paper's code
        theirs = half_sampled(load_model(folders(family), device="cpu"), family, noise)
    else:
        theirs = pipelines_latents(model.pipeline, family, noise.to(format), monkeypatch)
    # Such numbers have 8 or 11 bits: steps that round at other places differ by a few units of the last one.
    assert (ours - theirs).abs().mean() < near * theirs.std()


def half_sampled(model: Any, family: str, noise: torch.Tensor) -> torch.Tensor:
    """The sample of a search (C, ...), from noise of the test's."""
    result = tsdiff.search(model, condition(family), policy=BestOfN(n=1), verifier="luminance", steps=5, latents=noise, baseline=False, **asked(family), **guidance(family))
    return result.latents[result.node.index]


def pipelines_latents(pipe: Any, family: str, noise: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The sample of diffusers' own pipeline (C, ...), float32, from the same noise."""
    options: dict[str, Any] = {"num_inference_steps": 5, "output_type": "latent", **guidance(family)}
    pipe.set_progress_bar_config(disable=True)
    if family == "dit":  # draws its noise itself, and shows its latents to the autoencoder alone
        seen = []
        monkeypatch.setattr(pipeline_dit, "randn_tensor", lambda *args, **kwargs: noise)
        monkeypatch.setattr(pipe.vae, "decode", lambda latents: seen.append(latents) or SimpleNamespace(sample=torch.zeros(1, 3, 2, 2)))
        pipe([condition(family).class_label], **options)
        return (seen[0] * pipe.vae.config.scaling_factor)[0].float()
    wanted = condition(family)
    options |= {"prompt": wanted.prompt, "negative_prompt": wanted.negative_prompt, **wanted.extra}
    if family == "pixart":
        options["use_resolution_binning"] = False
    if family == "flux":
        made = pipe(latents=pixel_unshuffle(noise, 2).flatten(2).transpose(1, 2), **asked(family), **options).images
        return pixel_shuffle(made.transpose(1, 2).unflatten(2, (4, 4)), 2)[0].float()
    if family == "ltx":
        height, width, frames = size(family)
        made = pipe(latents=noise.flatten(2).transpose(1, 2), height=height, width=width, num_frames=frames, **options).frames
        return made.transpose(1, 2).reshape(noise.shape)[0].float()
    return pipe(latents=noise, **asked(family), **options).images[0].float()


def test_float32_models_have_float32_latents_whatever_is_asked(folders: Any) -> None:
    model, plain = (load_model(folders("sd"), device="cpu", latent_dtype=name) for name in ("model", "float32"))
    assert model.fingerprint == plain.fingerprint
    require_same(searched(model, "sd"), searched(plain, "sd"))


def test_formats_by_default_are_those_that_the_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, format in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(devices, "has_bfloat16", lambda device, has=has: has)
        assert resolve_dtype("auto", "cuda:0") == format
        assert resolve_dtype("auto", "cuda:0", "float16") == torch.float16
    assert resolve_dtype("auto", "cpu") == torch.float32
    assert [LoadOptions(dtype=name).dtype for name in ("bf16", "fp16", "fp32", "auto")] == ["bfloat16", "float16", "float32", "auto"]


# The decoder of estimates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", OF_IMAGES)
def test_a_tiny_autoencoder_decodes_unfinished_nodes_and_nothing_else(folders: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    model = load_model(folders(family), device="cpu", x0_decoder=tiny)
    plain = load_model(folders(family), device="cpu")
    assert model.fingerprint != plain.fingerprint
    counts = {"decode": 0, "decode_estimates": 0}
    for name in counts:
        monkeypatch.setattr(model, name, _counted(counts, name, getattr(model, name)))
    results = searched(model, family)
    assert counts["decode_estimates"] > 0
    assert sum(counts.values()) == sum(one.ledger.decodes for result in results for one in (result, result.baseline))
    for result in results:
        picture = plain.decode(result.latents[result.node.index][None]).pixels
        shown = torch.from_numpy(np.asarray(result.image).copy()).permute(2, 0, 1) / 255
        torch.testing.assert_close(shown, picture[0], rtol=0, atol=0.5 / 255 + 1e-6)
        unfinished = [node for node in result.tree.nodes if node.level < result.tree.schedule.last and node.values]
        assert unfinished
        assert result.score == pytest.approx(luminance(picture), abs=1e-6)
    assert any(one.tree.to_json() != other.tree.to_json() for one, other in zip(results, searched(plain, family), strict=True))


def luminance(picture: torch.Tensor) -> float:
    """The score of a picture (1, 3, H, W)."""
    return float(torch.as_tensor(Luminance().score(SimpleNamespace(images=picture)).values)[0])


def _counted(counts: dict[str, int], name: str, call: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
    def counted(latents: torch.Tensor) -> Any:
        counts[name] += len(latents)
        return call(latents)

    return counted


def test_runs_say_which_decoder_estimates_had(folders: Any, tiny: Path) -> None:
    plan = prepare(str(folders("sd")), "a cat", verifiers="luminance", device="cpu", x0_decoder=tiny)
    assert plan.to_json()["x0_decoder"] == str(tiny)
    assert prepare(str(folders("sd")), "a cat", verifiers="luminance", device="cpu").to_json()["x0_decoder"] is None


# Refused --------------------------------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "offload": ({"offload": True}, "offload .* device is cpu"),
    "latent_dtype": ({"latent_dtype": "float16"}, "latent_dtype is 'float16' but must be 'float32', or 'model'"),
    "no decoder": ({"x0_decoder": "nowhere"}, "x0_decoder 'nowhere' is no folder"),
    "dtype": ({"dtype": "int8"}, "dtype 'int8' is not known"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_apply_is_refused_before_weights_are_read(folders: Any, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights were read"))
    options, says = REFUSED[case]
    with pytest.raises(UsageError, match=says) as caught:
        load_model(folders("sd"), **{"device": "cpu"} | options)
    assert "\n" not in str(caught.value)


NOT_OF_VIDEOS: dict[str, tuple[dict[str, Any], str]] = {
    "vae_slicing": ({"vae_slicing": True}, "decodes its videos one at a time as it is"),
    "channels_last": ({"channels_last": True}, "has convolutions over time as well, which that layout is not for"),
    "x0_decoder": ({"x0_decoder": "taesd"}, "makes videos, and tiny autoencoders decode images"),
}


@pytest.mark.parametrize("handed", ["folder", "object"])
@pytest.mark.parametrize("name", NOT_OF_VIDEOS)
def test_what_a_family_does_not_take_is_refused_by_name(folders: Any, name: str, handed: str) -> None:
    options, says = NOT_OF_VIDEOS[name]
    model = str(folders("ltx")) if handed == "folder" else tiny_ltx()
    with pytest.raises(UsageError, match=rf"^{name} was asked for but .* \(LTXPipeline\) .*{says}; leave {name} out$"):
        outline(model, LoadOptions(**options))


TINY: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json' is missing"),
    "another class": (lambda f: _edit(f / "config.json", _class_name="AutoencoderKL"), "is a AutoencoderKL, not an AutoencoderTiny"),
    "channels": (lambda f: _edit(f / "config.json", latent_channels=16), "16 channels but those of .* have 4"),
    "factor": (lambda f: _edit(f / "config.json", decoder_block_out_channels=[8, 8, 8, 8]), "8 times but .* 2 times"),
    "no weights": (lambda f: (f / "diffusion_pytorch_model.safetensors").unlink(), "holds no weights"),
}


@pytest.mark.parametrize("case", TINY)
def test_a_decoder_that_does_not_fit_is_refused_before_weights_are_read(folders: Any, tiny: Path, tmp_path: Path, case: str) -> None:
    import shutil

    spoil, says = TINY[case]
    own = Path(shutil.copytree(tiny, tmp_path / "tiny"))
    spoil(own)
    with pytest.raises(UsageError, match=says) as caught:
        outline(str(folders("sd")), LoadOptions(device="cpu", x0_decoder=str(own)))
    assert "\n" not in str(caught.value)


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", ["offload", "vae_slicing", "vae_tiling", "channels_last", "compile"])
def test_pipeline_objects_are_changed_by_their_owners(name: str) -> None:
    pipe = tiny_stable_diffusion()
    with pytest.raises(UsageError, match=f"{name} was asked for but the StableDiffusionPipeline object is never changed; call `pipe"):
        load_model(pipe, **{name: True})


@pytest.mark.parametrize("name", ["offload", "vae_tiling", "compile", "x0_decoder", "latent_dtype"])
def test_models_of_other_kinds_take_none(name: str) -> None:
    value: Any = {"x0_decoder": "folder", "latent_dtype": "model"}.get(name, True)
    with pytest.raises(UsageError, match=f"{name} .* but model 'gaussian' takes none"):
        load_model("gaussian", **{name: value})


def test_an_autoencoder_without_the_method_is_named(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers, "AutoencoderKL", type("AutoencoderKL", (), {}))
    with pytest.raises(UsageError, match=r"vae_tiling was asked for but the autoencoder of .*, AutoencoderKL, has no enable_tiling"):
        outline(str(folders("sd")), LoadOptions(device="cpu", vae_tiling=True))


def test_an_owner_who_compiled_a_network_gets_one_row_count_too(counting: list[int]) -> None:
    pipe = tiny_stable_diffusion()
    assert not load_model(pipe).constant_rows
    memory.compile_blocks(pipe.unet)
    assert load_model(pipe).constant_rows
