"""DiT: trajectories equal those of diffusers' own pipeline, whatever shares the batch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines.dit import pipeline_dit
from mixed_levels import GUIDANCE, sample
from sd_reference import SCHEDULERS, inject, swapped
from tiny_dit import assert_latents_equal, tiny_dit
from torch import Tensor

import tsdiff
from tsdiff.diffusion.loading import load_model, outline
from tsdiff.policies import Beam
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Condition, LoadOptions

# Of numpy, about how diffusers itself computes sigmas.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STEPS = 5
LABELS = [207, 3]
NAMES = {"0": "tench, Tinca tinca", "134": "crane", "207": "golden retriever", "517": "crane"}


@pytest.fixture(scope="module")
def pipe() -> Any:
    """Tests must not change it."""
    return tiny_dit()


def noise_of() -> Tensor:
    """(1 + STEPS, B, ...): initial noise, then one for each step."""
    return torch.randn((1 + STEPS, 2, 4, 8, 8), generator=torch.Generator().manual_seed(5))


def conditions() -> list[Condition]:
    return [Condition(class_label=label) for label in LABELS]


def pipelines_own(monkeypatch: pytest.MonkeyPatch, pipe: Any, solver: str, eta: float, noise: Tensor, scale: float) -> Tensor:
    """Latents of diffusers' pipeline, fed with noise of ours."""
    other = swapped(pipe, solver)
    if eta:
        other.scheduler.step = partial(other.scheduler.step, eta=eta)  # the pipeline cannot say it
    inject(monkeypatch, [torch.cat([one] * (1 + (scale > 1))) for one in noise[1:]])
    monkeypatch.setattr(pipeline_dit, "randn_tensor", lambda *args, **kwargs: noise[0])
    decode, seen = pipe.vae.decode, []
    with monkeypatch.context() as patch:
        patch.setattr(pipe.vae, "decode", lambda latents: seen.append(latents) or decode(latents))
        other(LABELS, guidance_scale=scale, num_inference_steps=STEPS, output_type="pt")
    return seen[0] * pipe.vae.config.scaling_factor


def as_pipelines_do(monkeypatch: pytest.MonkeyPatch, pipe: Any, solver: str, noise: Tensor, scale: float) -> Tensor:
    """Latents of a loop around Euler's schedulers, as in any pipeline but DiT's, which hands what the network sees to the step."""
    inject(monkeypatch, list(noise[1:]))
    scheduler = swapped(pipe, solver).scheduler
    scheduler.set_timesteps(STEPS)
    latents = noise[0] * scheduler.init_noise_sigma
    for time in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, time)
        with torch.no_grad():
            cond, uncond = (pipe.transformer(scaled, timestep=time.expand(2), class_labels=torch.tensor(labels)).sample[:, :4] for labels in (LABELS, [1000] * 2))
        latents = scheduler.step(uncond + scale * (cond - uncond) if scale > 1 else cond, time, latents).prev_sample
    return latents


@pytest.mark.parametrize("guidance", ["off", "on"])
@pytest.mark.parametrize("solver", SCHEDULERS)
def test_a_trajectory_equals_the_pipelines_in_one_batch_of_mixed_levels(pipe: Any, monkeypatch: pytest.MonkeyPatch, solver: str, guidance: str) -> None:
    model, noise, scale = load_model(pipe), noise_of(), GUIDANCE[guidance][0]
    info = model.solver(solver)
    schedule = model.schedule(info, STEPS, None)
    encoded = model.encode(conditions(), guided=scale > 1)
    assert len(encoded[0].rows) == 1 + (scale > 1)
    ours = sample(model, schedule, info, model.sampler(schedule, info).draw(noise[0]), encoded, noise[1:], guidance, stagger=2)
    if info.kind == "euler":
        theirs = as_pipelines_do(monkeypatch, pipe, solver, noise, scale)
    else:
        theirs = pipelines_own(monkeypatch, pipe, solver, info.eta, noise, scale)
    assert_latents_equal(ours, theirs)


def test_decoded_images_equal_the_pipelines(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_dit, "randn_tensor", lambda *args, **kwargs: noise_of()[0])
    decode, seen = pipe.vae.decode, []
    with monkeypatch.context() as patch:
        patch.setattr(pipe.vae, "decode", lambda latents: seen.append(latents) or decode(latents))
        theirs = swapped(pipe, "ddim")(LABELS, num_inference_steps=2, output_type="pt").images
    torch.testing.assert_close(load_model(pipe).decode(seen[0] * pipe.vae.config.scaling_factor).pixels, theirs, rtol=0, atol=1e-5)


def test_the_pipelines_scheduler_is_the_default(pipe: Any) -> None:
    plan = outline(pipe, LoadOptions())
    assert (plan.solvers[0], plan.default_steps, plan.default_guidance_scale) == ("ddim", 50, 4.0)
    fresh = type(pipe.scheduler).from_config(pipe.scheduler.config)
    fresh.set_timesteps(50)
    assert plan.schedule(plan.solver(), 50, None).timesteps == tuple(map(float, fresh.timesteps))


def test_classes_by_number_and_by_name(pipe: Any) -> None:
    named = diffusers.DiTPipeline(**pipe.components, id2label={0: "tench, Tinca tinca", 207: "golden retriever"})
    rules = outline(named, LoadOptions()).rules
    same = [Condition(class_label=label) for label in (207, "207", " golden retriever ")]
    assert {rules.index(condition) for condition in same} == {207}
    assert rules.index(Condition("a fish for verifiers", class_label="Tinca tinca")) == 0
    (encoded,) = load_model(named).encode([same[2]], guided=True)
    assert [int(row["class_labels"]) for row in encoded.rows] == [207, 1000]


REFUSED: dict[str, tuple[Condition, str]] = {
    "no class": (Condition(), r"conditioned on classes; give one \(--class, class_label=\), by name or by number from 0 to 999"),
    "a prompt": (Condition("a cat"), "conditioned on classes, not on text such as 'a cat'; give one"),
    "another name": (Condition(class_label="golden retreiver"), "unknown class of .* did you mean 'golden retriever'.* Numbers from 0 to 999"),
    "two classes": (Condition(class_label="crane"), "class 'crane' .* may be any of 134, 517; give its number"),
    "too high": (Condition(class_label=1000), "no class 1000; classes run from 0 to 999"),
    "negative": (Condition(class_label=-1), "no class -1"),
    "truth": (Condition(class_label=True), "no class True"),
    "negative prompt": (Condition(class_label=3, negative_prompt="blurry"), "knows no negative prompt"),
    "option": (Condition(class_label=3, extra={"clip_skip": 1}), "clip_skip was given, but .* classes alone"),
    "tensor": (Condition(class_label=3, tensors={"prompt_embeds": torch.zeros(3, 4)}), "prompt_embeds was given"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_conditions_are_checked_before_weights_are_loaded(folder: Path, case: str) -> None:
    condition, says = REFUSED[case]
    edit(folder / "model_index.json", id2label=NAMES)
    with pytest.raises(UsageError, match=says) as caught:
        outline(str(folder), LoadOptions()).check(condition, guided=True)
    assert "\n" not in str(caught.value)


def test_sizes(pipe: Any) -> None:
    plan = outline(pipe, LoadOptions())
    assert (plan.size(None, 16), plan.latent_shape(None)) == ((16, 16), (4, 8, 8))
    with pytest.raises(UsageError, match=r"width is 32 but .* makes images of 16 x 16 pixels only"):
        plan.size(16, 32)


def test_a_search_is_counted_and_leaves_the_pipeline_as_it_was() -> None:
    own = tiny_dit()
    before = {name: (id(part), sorted(vars(part)), [len(child._forward_hooks) for child in part.modules()]) for name, part in own.components.items() if isinstance(part, torch.nn.Module)}
    scheduler = json.dumps({key: str(value) for key, value in vars(own.scheduler).items()})
    rows = 0

    def count(module: Any, args: tuple[Any, ...]) -> None:
        nonlocal rows
        rows += args[0].shape[0]

    handle = own.transformer.register_forward_pre_hook(count)
    prompts = [Condition("gold", class_label=207), Condition("fish", class_label=0)]
    results = tsdiff.search(own, prompts, policy=Beam(width=2, branch=2), verifier="luminance", steps=4, solver="ddpm", guidance_scale=4.0)
    handle.remove()
    assert not results.failures
    assert rows == results.engine.network_rows
    assert results.engine.rows == sum(one.ledger.rows for result in results for one in (result, result.baseline))
    after = {name: (id(part), sorted(vars(part)), [len(child._forward_hooks) for child in part.modules()]) for name, part in own.components.items() if isinstance(part, torch.nn.Module)}
    assert after == before
    assert json.dumps({key: str(value) for key, value in vars(own.scheduler).items()}) == scheduler


# Folders -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dit") / "saved"
    tiny_dit(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A saved pipeline that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("published", [False, True], ids=["as saved today", "as the published models were saved"])
def test_a_folder_and_the_object_it_was_saved_from_are_one_model(folder: Path, pipe: Any, capfd: pytest.CaptureFixture[str], published: bool) -> None:
    edit(folder / "model_index.json", id2label=NAMES)
    if published:
        edit(folder / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
        edit(folder / "transformer/config.json", _class_name="Transformer2DModel")
    model = load_model(folder, device="cpu")
    assert capfd.readouterr() == ("", "")
    assert model.fingerprint == load_model(pipe).fingerprint
    rows = model.encode([Condition(class_label="golden retriever")], guided=False)[0].rows
    latents, time = noise_of()[0, :1], torch.tensor([500.0])
    torch.testing.assert_close(model.forward(latents, time, rows), load_model(pipe).forward(latents, time, rows), rtol=0, atol=1e-5)
    assert outline(str(folder), LoadOptions()).schedule(model.solver(), 10, (16, 16)) == model.schedule(model.solver(), 10, (16, 16))


def test_half_precision_keeps_latents_in_float32(saved: Path) -> None:
    model, noise = load_model(saved, device="cpu", dtype="bfloat16"), noise_of()
    info = model.solver()
    ours = sample(model, model.schedule(info, 2, None), info, noise[0], model.encode(conditions(), guided=True), noise[1:], "on")
    assert (model.dtype, ours.dtype, model.decode(ours).pixels.dtype) == (torch.bfloat16, torch.float32, torch.float32)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no transformer": (lambda f: edit(f / "model_index.json", transformer=[None, None]), "has no transformer"),
    "another transformer": (lambda f: edit(f / "model_index.json", transformer=["diffusers", "PixArtTransformer2DModel"]), "PixArtTransformer2DModel, which is not supported"),
    "another norm": (lambda f: edit(f / "transformer/config.json", norm_type="ada_norm_single"), "none of DiT's .*ada_norm_single"),
    "flow scheduler": (lambda f: edit(f / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"]), "is for flow models"),
    "empty config": (lambda f: (f / "transformer/config.json").write_text("{}"), "has no in_channels"),
    "other channels": (lambda f: edit(f / "transformer/config.json", in_channels=8), "takes 8 channels but its autoencoder makes 4"),
    "odd outputs": (lambda f: edit(f / "transformer/config.json", out_channels=6), "takes 4 channels and makes 6"),
    "names": (lambda f: edit(f / "model_index.json", id2label={"cat": "cat"}), "id2label .* must give a name to numbers from 0 to 999"),
    "names as a list": (lambda f: edit(f / "model_index.json", id2label=["cat"]), "id2label .* must give a name"),
    "no weights": (lambda f: (f / "transformer/diffusion_pytorch_model.safetensors").unlink(), "transformer' holds no weights"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_one_clear_line_before_weights_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights were read"))
    spoil, says = DAMAGE[damage]
    spoil(folder)
    with pytest.raises(UsageError, match=says) as caught:
        outline(str(folder), LoadOptions())
    assert "\n" not in str(caught.value)


def test_modules_in_training_mode_are_refused() -> None:
    training = tiny_dit()
    training.transformer.train()
    with pytest.raises(UsageError, match=r"call `pipe\.transformer\.eval\(\)`"):
        load_model(training)
