"""LoRA files: refused early where they cannot be merged; merged, they change weights by scale * (alpha / rank) * B A."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from family_folders import asked, condition, guidance, size
from safetensors.torch import save_file
from tiny_flux import tiny_flux
from tiny_ltx import tiny_ltx
from tiny_sd import tiny_stable_diffusion
from tiny_sd3 import tiny_sd3
from tiny_sdxl import tiny_sdxl
from torch import Tensor

import tsdiff
from tsdiff.diffusion.loading import load_model, outline
from tsdiff.diffusion.lora import FOLDER_FILE, Lora, parse_lora
from tsdiff.diffusion.quiet import quiet_libraries
from tsdiff.treesearch.errors import SetupError, UsageError
from tsdiff.treesearch.plan import prepare
from tsdiff.treesearch.protocols import Condition, LoadOptions

needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="merging LoRA files needs peft")

RANK = 2
LAYERS = ("to_q", "to_out.0", "q_proj", "out_proj")
ENCODERS = {"text_encoder": "lora_te_text_model_", "text_encoder_2": "lora_te2_text_model_"}


def factors_of(pipe: Any, parts: tuple[str, ...]) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """Random (B, A) for the attention layers of a pipeline's parts, by (part, layer)."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for part in parts:
        for name, module in getattr(pipe, part).named_modules():
            if name.endswith(LAYERS) and hasattr(module, "weight"):
                rows, columns = module.weight.shape
                found[part, name] = (0.1 * torch.randn(rows, RANK, generator=generator), torch.randn(RANK, columns, generator=generator))
    return found


def as_diffusers(factors: dict[tuple[str, str], tuple[Tensor, Tensor]], alpha: float) -> dict[str, Tensor]:
    """The names that diffusers saves, with alpha equal to the rank."""
    assert alpha == RANK
    return {f"{part}.{name}.lora_{letter}.weight": factor for (part, name), pair in factors.items() for letter, factor in zip("BA", pair, strict=True)}


def as_kohya(factors: dict[tuple[str, str], tuple[Tensor, Tensor]], alpha: float) -> dict[str, Tensor]:
    """The names that most published files have."""
    tensors: dict[str, Tensor] = {}
    encoders = ENCODERS | ({"text_encoder": "lora_te1_text_model_"} if any(part == "text_encoder_2" for part, _ in factors) else {})
    for (part, name), (b, a) in factors.items():
        key = encoders.get(part, "lora_unet_") + name.removeprefix("text_model.").replace(".", "_")
        tensors |= {f"{key}.lora_up.weight": b, f"{key}.lora_down.weight": a, f"{key}.alpha": torch.tensor(alpha)}
    return tensors


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """Tiny pipelines and the folders that they are saved in."""
    folder = tmp_path_factory.mktemp("pipes")
    return {make.__name__: (make(folder / make.__name__), folder / make.__name__) for make in (tiny_stable_diffusion, tiny_sdxl, tiny_sd3, tiny_flux, tiny_ltx)}


def with_peft(monkeypatch: pytest.MonkeyPatch, there: bool = True) -> None:
    monkeypatch.setattr("diffusers.utils.constants.USE_PEFT_BACKEND", there)


# Merging ------------------------------------------------------------------------------------------------------------


@needs_peft
@pytest.mark.parametrize(
    ("name", "parts", "write", "alpha"),
    [
        ("tiny_stable_diffusion", ("unet", "text_encoder"), as_diffusers, 2.0),
        ("tiny_stable_diffusion", ("unet", "text_encoder"), as_kohya, 1.0),
        ("tiny_sdxl", ("unet", "text_encoder", "text_encoder_2"), as_diffusers, 2.0),
        ("tiny_sdxl", ("unet", "text_encoder", "text_encoder_2"), as_kohya, 1.0),
        ("tiny_sd3", ("transformer", "text_encoder"), as_diffusers, 2.0),
        ("tiny_flux", ("transformer",), as_diffusers, 2.0),
        ("tiny_ltx", ("transformer",), as_diffusers, 2.0),
    ],
    ids=["sd", "sd, kohya", "sdxl", "sdxl, kohya", "sd3", "flux", "ltx"],
)
def test_weights_change_by_the_scaled_product_of_the_factors(
    pipes: dict[str, tuple[Any, Path]], tmp_path: Path, name: str, parts: tuple[str, ...], write: Callable[..., dict[str, Tensor]], alpha: float
) -> None:
    pipe, folder = pipes[name]
    factors = factors_of(pipe, parts)
    file = tmp_path / "style.safetensors"
    save_file(write(factors, alpha), file)
    merged = load_model(folder, device="cpu", lora=f"{file}:0.5").pipeline
    for part in parts:
        after = getattr(merged, part).state_dict()
        for key, before in getattr(pipe, part).state_dict().items():
            b, a = factors.get((part, key.removesuffix(".weight")), (torch.zeros(1), torch.zeros(1)))
            change = 0.5 * alpha / RANK * (b @ a)
            torch.testing.assert_close(after[key], before + change, rtol=0, atol=1e-6)
            assert torch.equal(after[key], before) != bool(change.any())
        assert sorted(after) == sorted(getattr(pipe, part).state_dict())  # nothing of an adapter is left
    changed = next(getattr(merged, part).get_submodule(layer) for part, layer in factors)
    assert type(changed) is torch.nn.Linear


@needs_peft
def test_latents_equal_those_of_a_pipeline_with_the_adapters_and_several_files_add_up(pipes: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    pipe, folder = pipes["tiny_sdxl"]
    for number, parts in enumerate((("unet",), ("unet", "text_encoder"))):
        save_file(as_kohya(factors_of(pipe, parts), 1.0 + number), tmp_path / f"{number}.safetensors")
    model = load_model(folder, device="cpu", lora=[f"{tmp_path}/0.safetensors", f"{tmp_path}/1.safetensors:-0.7"])
    with quiet_libraries():
        theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
        theirs.set_progress_bar_config(disable=True)
        for number in range(2):
            theirs.load_lora_weights(tmp_path, weight_name=f"{number}.safetensors", adapter_name=f"a{number}")
        theirs.set_adapters(["a0", "a1"], adapter_weights=[1.0, -0.7])
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    asked = {"latents": noise, "num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent"}
    torch.testing.assert_close(model.pipeline("a cat", **asked).images, theirs("a cat", **asked).images, rtol=0, atol=1e-4)
    assert not torch.allclose(model.pipeline("a cat", **asked).images, pipe("a cat", **asked).images, atol=1e-3)


@needs_peft
def test_a_search_of_videos_is_that_of_a_pipeline_with_the_adapter(pipes: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    pipe, folder = pipes["tiny_ltx"]
    save_file(as_diffusers(factors_of(pipe, ("transformer",)), RANK), tmp_path / "style.safetensors")
    with quiet_libraries():
        theirs = diffusers.LTXPipeline.from_pretrained(folder)
        theirs.set_progress_bar_config(disable=True)
        theirs.load_lora_weights(tmp_path, weight_name="style.safetensors", adapter_name="style")
        theirs.set_adapters(["style"], adapter_weights=[0.5])
    noise = torch.randn((1, 8, 2, 8, 8), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"policy": "best-of-n", "policy_options": {"n": 1}, "verifier": "luminance", "steps": 3, "baseline": False, "device": "cpu", "latents": noise}
    merged, plain = (tsdiff.search(folder, condition("ltx"), lora=lora, **options, **asked("ltx"), **guidance("ltx")) for lora in (f"{tmp_path}/style.safetensors:0.5", ()))
    wanted, (height, width, frames) = condition("ltx"), size("ltx")
    made = theirs(
        wanted.prompt, negative_prompt=wanted.negative_prompt, latents=noise.flatten(2).transpose(1, 2), height=height, width=width, num_frames=frames,
        num_inference_steps=3, output_type="latent", **wanted.extra, **guidance("ltx"),
    ).frames.transpose(1, 2).reshape(noise.shape)  # fmt: skip
    torch.testing.assert_close(merged.latents[merged.node.index], made[0], rtol=0, atol=1e-4)
    assert (made[0] - plain.latents[plain.node.index]).abs().max() > 1e-3


@needs_peft
def test_a_fingerprint_names_files_by_content_and_scale(pipes: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    pipe, folder = pipes["tiny_stable_diffusion"]
    (tmp_path / "again").mkdir()
    factors = factors_of(pipe, ("unet",))
    for file in (tmp_path / "a.safetensors", tmp_path / "again" / FOLDER_FILE):
        save_file(as_kohya(factors, 1.0), file)
    names = [load_model(folder, device="cpu", lora=lora).fingerprint for lora in ((), tmp_path / "a.safetensors", f"{tmp_path}/a.safetensors:0.5", tmp_path / "again")]
    assert names[0] == load_model(pipe).fingerprint
    assert names[1] == names[3]
    assert len(set(names)) == 3


@needs_peft
def test_a_run_says_which_files_were_merged(pipes: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    pipe, folder = pipes["tiny_stable_diffusion"]
    save_file(as_kohya(factors_of(pipe, ("unet",)), 1.0), tmp_path / "a.safetensors")
    lora = f"{tmp_path}/a.safetensors:0.5"
    options: dict[str, Any] = {"policy": "best-of-n", "policy_options": {"n": 2}, "verifier": "luminance", "steps": 2, "device": "cpu", "baseline": False}
    changed = tsdiff.search(folder, "a cat", lora=lora, out=tmp_path / "runs", **options)
    plain = tsdiff.search(folder, "a cat", **options)
    assert changed.score != plain.score
    (run,) = (tmp_path / "runs").rglob("run.json")
    facts = json.loads(run.read_text())
    assert facts["arguments"]["lora"] == lora
    assert facts["fingerprint"] == load_model(folder, device="cpu", lora=lora).fingerprint != load_model(pipe).fingerprint


@needs_peft
@pytest.mark.parametrize("damage", ["another model", "half of it", "not numbers"])
def test_files_that_do_not_fit_are_refused(pipes: dict[str, tuple[Any, Path]], tmp_path: Path, damage: str) -> None:
    pipe, folder = pipes["tiny_stable_diffusion"]
    factors = factors_of(pipes["tiny_sdxl"][0] if damage == "another model" else pipe, ("unet",))
    if damage == "half of it":
        factors |= {(part, f"elsewhere.{name}"): (b.clone(), a.clone()) for (part, name), (b, a) in factors.items()}
    if damage == "not numbers":
        factors = {key: (b * float("nan"), a) for key, (b, a) in factors.items()}
    save_file(as_diffusers(factors, RANK), tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match=r"does not fit|made for another model") as caught:
        load_model(folder, device="cpu", lora=tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)


# Before weights load ------------------------------------------------------------------------------------------------


def test_reading_a_path_and_its_scale(tmp_path: Path) -> None:
    file, odd = tmp_path / "a.safetensors", tmp_path / "b:2.safetensors"
    (tmp_path / "folder").mkdir()
    for path in (file, odd, tmp_path / "folder" / FOLDER_FILE):
        path.touch()
    assert parse_lora(str(file)) == Lora(file, 1.0)
    assert parse_lora(f"{file}:0.25") == Lora(file, 0.25)
    assert parse_lora(f"{file}:-1") == Lora(file, -1.0)
    assert parse_lora(str(odd)) == Lora(odd, 1.0)
    assert parse_lora(f"{tmp_path}/folder:2") == Lora(tmp_path / "folder" / FOLDER_FILE, 2.0)


REFUSED: dict[str, tuple[str, str]] = {
    "missing": ("none.safetensors", "'.*none.safetensors' does not exist"),
    "missing with a scale": ("none.safetensors:0.5", "'.*none.safetensors' does not exist"),
    "pickle": ("a.pt", "is a pickle, which can run code"),
    "missing pickle": ("none.bin:0.5", "is a pickle"),
    "other file": ("a.txt", "is not of safetensors"),
    "folder": ("empty", f"has no {FOLDER_FILE}"),
    "scale": ("good.safetensors:strong", "is 'strong' but must be a number"),
    "endless scale": ("good.safetensors:inf", "must be finite"),
    "damaged": ("damaged.safetensors", "is damaged"),
    "no LoRA": ("weights.safetensors", r"holds no LoRA \(its first tensor is unet\.conv\.weight"),
    "another kind": ("lokr.safetensors", "is a LoKr file"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files, one of them good."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "empty").mkdir()
    for name in ("a.pt", "a.txt", "damaged.safetensors"):
        (folder / name).write_text("abc")
    for name, key in (("good", "unet.to_q.lora_A.weight"), ("weights", "unet.conv.weight"), ("lokr", "lora_unet_to_q.lokr_w1")):
        save_file({key: torch.zeros(1)}, folder / f"{name}.safetensors")
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_files_are_refused_before_weights_are_read(pipes: dict[str, tuple[Any, Path]], files: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    with_peft(monkeypatch)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights were read"))
    name, says = REFUSED[case]
    with pytest.raises(UsageError, match=says) as caught:
        prepare(pipes["tiny_sdxl"][1], "a cat", verifiers="luminance", lora=files / name)
    assert "\n" not in str(caught.value)


def test_a_plan_keeps_what_was_asked_for(pipes: dict[str, tuple[Any, Path]], files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_peft(monkeypatch)
    lora = [f"{files}/good.safetensors:0.5", files / "good.safetensors"]
    plan = prepare(pipes["tiny_sdxl"][1], "a cat", verifiers="luminance", lora=lora)
    assert plan.arguments["lora"] == lora
    assert plan.model.source.options.lora == tuple(map(str, lora))


def test_without_peft_it_is_asked_for(pipes: dict[str, tuple[Any, Path]], files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_peft(monkeypatch, False)
    with pytest.raises(SetupError, match="need the library peft, which is not installed; run `pip install peft`"):
        outline(str(pipes["tiny_sdxl"][1]), LoadOptions(lora=(f"{files}/good.safetensors",)))


def test_models_that_we_do_not_load_or_that_take_none_are_refused_by_name(pipes: dict[str, tuple[Any, Path]], files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_peft(monkeypatch)
    pipe, folder = pipes["tiny_sdxl"]
    lora = files / "good.safetensors"
    with pytest.raises(UsageError, match=r"is never changed; load it yourself with `pipe.load_lora_weights"):
        load_model(pipe, lora=lora)
    with pytest.raises(UsageError, match="but a loaded model takes none"):
        load_model(load_model(pipe), lora=lora)
    with pytest.raises(UsageError, match="but model 'gaussian' takes none"):
        load_model("gaussian", lora=lora)
    for name in ("DiTPipeline", "SiTPipeline", "PixArtSigmaPipeline", "PixArtAlphaPipeline"):
        other = tmp_path / name
        other.mkdir()
        (other / "model_index.json").write_text(json.dumps({"_class_name": name}))
        with pytest.raises(UsageError, match=rf"a {name} .* takes no LoRA"):
            load_model(other, lora=lora)
    assert load_model(folder, device="cpu").encode([Condition("a")], guided=False)
