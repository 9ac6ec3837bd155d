"""Loading: what is wrong is said in one line, before weights are read where it can be known; objects stay as they are."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tiny_sd import SCHEDULER, tiny_stable_diffusion

from tsdiff.diffusion import devices
from tsdiff.diffusion.devices import available_devices, resolve_device, resolve_dtype
from tsdiff.diffusion.loading import FAMILIES, load_model, outline
from tsdiff.treesearch.errors import SetupError, UsageError
from tsdiff.treesearch.models import resolve_model
from tsdiff.treesearch.protocols import Condition, LoadOptions


def edit(path: Path, **changes: Any) -> None:
    """Change entries of a JSON file; None removes one."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def outline_of(folder: Path, **options: Any) -> Any:
    return outline(str(folder), LoadOptions(**options))


def test_a_folder_runs_bit_for_bit_as_the_object_it_was_saved_from(tiny_folder: Path, tiny_pipe: Any) -> None:
    model = load_model(tiny_folder, device="cpu")
    latents, rows = torch.ones(1, 4, 8, 8), load_model(tiny_pipe).encode([Condition("a cat")], guided=False)[0].rows
    assert torch.equal(model.encode([Condition("a cat")], guided=False)[0].rows[0]["encoder_hidden_states"], rows[0]["encoder_hidden_states"])
    assert torch.equal(model.forward(latents, torch.tensor([5.0]), rows), load_model(tiny_pipe).forward(latents, torch.tensor([5.0]), rows))


def test_half_precision_and_variants_load(tmp_path: Path) -> None:
    tiny_stable_diffusion().save_pretrained(tmp_path, variant="fp16")
    model = load_model(tmp_path, variant="fp16", dtype="bfloat16", device="cpu")
    assert model.pipeline.unet.dtype == torch.bfloat16
    (encoded,) = model.encode([Condition("a cat")], guided=True)
    assert model.forward(torch.zeros(1, 4, 8, 8), torch.tensor([5.0]), encoded.rows[:1]).dtype == torch.bfloat16
    assert model.decode(torch.zeros(1, 4, 8, 8)).pixels.dtype == torch.float32


def test_pickled_weights_load_but_their_code_does_not_run(tiny_folder: Path, tmp_path: Path) -> None:
    unet = tiny_folder / "unet"
    weights = unet / "diffusion_pytorch_model.safetensors"
    from safetensors.torch import load_file

    torch.save(load_file(weights), unet / "diffusion_pytorch_model.bin")
    expected = load_model(tiny_folder, device="cpu").fingerprint
    weights.unlink()
    assert load_model(tiny_folder, device="cpu").fingerprint == expected

    marker = tmp_path / "ran"
    with (unet / "diffusion_pytorch_model.bin").open("wb") as file:
        pickle.dump(Trap(str(marker)), file)
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_model(tiny_folder, device="cpu")
    assert not marker.exists()


class Trap:
    """Unpickling one creates a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no index": (lambda f: (f / "model_index.json").unlink(), "has no model_index.json"),
    "index is not JSON": (lambda f: (f / "model_index.json").write_text("{"), "cannot be read as JSON"),
    "index is a list": (lambda f: (f / "model_index.json").write_text("[]"), "holds a list"),
    "index is binary": (lambda f: (f / "model_index.json").write_bytes(b"\xff\xfe\x00"), "cannot be read as JSON"),
    "no class": (lambda f: edit(f / "model_index.json", _class_name=None), "names no pipeline class"),
    "another class": (lambda f: edit(f / "model_index.json", _class_name="FluxControlNetPipeline"), "FluxControlNetPipeline .* supported are .*StableDiffusionPipeline"),
    "own code": (lambda f: edit(f / "model_index.json", _class_name=["pipeline", "MyPipeline"]), "not run"),
    "no folder": (lambda f: f.rename(f.parent / "elsewhere"), "does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_folder_of_no_family_is_one_clear_line(tiny_folder: Path, damage: str) -> None:
    """What is wrong with folders of a family is in `test_family_folders.py`."""
    spoil, says = DAMAGE[damage]
    spoil(tiny_folder)
    with pytest.raises(UsageError, match=says) as caught:
        resolve_model(str(tiny_folder))
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_belong_to_the_config_are_refused(tiny_folder: Path) -> None:
    edit(tiny_folder / "unet/config.json", block_out_channels=[32, 32])
    with pytest.raises(UsageError, match="cannot be loaded") as caught:
        load_model(tiny_folder, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"])
def test_weights_that_are_left_out_are_not_made_up(tiny_folder: Path, part: str) -> None:
    from safetensors.torch import load_file, save_file

    path = tiny_folder / f"{part}.safetensors"
    tensors = load_file(path)
    del tensors[sorted(tensors)[0]]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"cannot be loaded|lack"):
        load_model(tiny_folder, device="cpu")


@pytest.mark.parametrize("name", ["PNDMScheduler", "LMSDiscreteScheduler", "UniPCMultistepScheduler"])
def test_a_scheduler_without_a_solver_is_replaced_by_ddim_with_one_line(tiny_folder: Path, name: str) -> None:
    edit(tiny_folder / "model_index.json", scheduler=["diffusers", name])
    edit(tiny_folder / "scheduler/scheduler_config.json", _class_name=name, skip_prk_steps=True, clip_sample=None)
    plan = outline_of(tiny_folder)
    assert plan.solvers[0] == "ddim"
    assert len(plan.notices) == 1
    assert name in plan.notices[0]
    schedule = plan.schedule(plan.solver(), 10, None)
    same = load_model(tiny_stable_diffusion()).schedule(plan.solver(), 10, None)
    assert schedule == same
    model = plan.load()
    assert model.notices == plan.notices
    assert model.fingerprint
    with pytest.raises(UsageError, match=f"{name}.*strict_scheduler"):
        outline_of(tiny_folder, strict_scheduler=True)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("options", [{"algorithm_type": "dpmsolver"}, {"algorithm_type": "dpmsolver++", "solver_order": 3}])
def test_orders_and_kinds_of_dpm_solver_that_we_lack_are_replaced_too(options: dict[str, Any]) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(**SCHEDULER_OF_DPM, final_sigmas_type="sigma_min", **options)
    model = load_model(tiny_stable_diffusion(scheduler=scheduler))
    assert model.solvers[0] == "ddim"
    assert "DPMSolverMultistepScheduler" in model.notices[0]


SCHEDULER_OF_DPM = {key: value for key, value in SCHEDULER.items() if key not in ("clip_sample", "set_alpha_to_one")}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_outdated_scheduler_configs_are_corrected_as_the_pipeline_corrects_them(tiny_folder: Path) -> None:
    edit(tiny_folder / "scheduler/scheduler_config.json", clip_sample=True, steps_offset=0)
    plan = outline_of(tiny_folder)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None).scheduler.config
    assert (theirs["clip_sample"], theirs["steps_offset"]) == (False, 1)
    assert plan.schedule(plan.solver(), 10, None) == load_model(tiny_stable_diffusion()).schedule(plan.solver(), 10, None)


def test_what_is_no_pipeline_is_refused() -> None:
    with pytest.raises(UsageError, match="a dict object is not a model"):
        load_model({})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_module_counts_as_what_it_wraps(tiny_pipe: Any) -> None:
    pipe = tiny_stable_diffusion()
    pipe.unet = torch.compile(pipe.unet)
    model = load_model(pipe)
    assert model.fingerprint == load_model(tiny_pipe).fingerprint
    pipe.unet.train()
    with pytest.raises(UsageError, match=r"pipe\.unet is in training mode"):
        load_model(pipe)


def test_weights_that_accelerate_keeps_elsewhere_are_used_in_place(tiny_pipe: Any) -> None:
    from accelerate import cpu_offload

    pipe = tiny_stable_diffusion()
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        cpu_offload(part, execution_device=torch.device("cpu"))
    assert next(pipe.unet.parameters()).is_meta
    model, plain = load_model(pipe), load_model(tiny_pipe)
    assert model.fingerprint == plain.fingerprint
    (row,) = model.encode([Condition("a cat")], guided=False)[0].rows
    latents, time = torch.ones(1, 4, 8, 8), torch.tensor([5.0])
    assert torch.equal(model.forward(latents, time, [row]), plain.forward(latents, time, [row]))
    assert torch.equal(model.decode(latents).pixels, plain.decode(latents).pixels)
    assert next(pipe.unet.parameters()).is_meta


def test_hub_ids_that_are_not_cached_are_a_setup_error_offline() -> None:
    with pytest.raises(SetupError, match="hf download nobody/nothing") as caught:
        load_model("nobody/nothing", offline=True)
    assert "offline=True" in str(caught.value)


def test_a_cached_hub_id_loads_offline(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--someone--tiny"
    (repository / "snapshots").mkdir(parents=True)
    tiny_folder.rename(repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    model = load_model("someone/tiny", offline=True, device="cpu")
    assert model.name == "someone/tiny"
    assert model.fingerprint == load_model(tiny_stable_diffusion()).fingerprint
    with pytest.raises(SetupError, match="hf download someone/tiny"):
        load_model("someone/tiny", offline=True, revision="dev")
    (repository / "snapshots" / revision / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(SetupError, match=r"scheduler_config\.json of 'someone/tiny'"):
        resolve_model("someone/tiny", LoadOptions(offline=True))


def test_devices_that_are_not_there_are_named_before_weights_are_read(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights were read"))
    with pytest.raises(SetupError, match=r"this machine has .*cpu"):
        load_model(tiny_folder, device="cuda:99")
    with pytest.raises(UsageError, match="'gpu' is not known"):
        load_model(tiny_folder, device="gpu")
    with pytest.raises(UsageError, match="'half' is not known"):
        load_model(tiny_folder, dtype="half")


def test_devices_and_number_formats_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_devices()[-1] == "cpu"
    monkeypatch.setattr(devices, "available_devices", lambda: ["cuda:0", "cuda:1", "mps", "cpu"])
    assert [resolve_device(name) for name in ("auto", "cuda", "cuda:1", "mps", "cpu")] == ["cuda:0", "cuda:0", "cuda:1", "mps", "cpu"]
    for name in ("cuda:2", "mps:1"):
        with pytest.raises(SetupError):
            resolve_device(name)
    assert resolve_dtype("auto", "cpu") == torch.float32
    assert resolve_dtype("bfloat16", "cpu") == torch.bfloat16


def test_every_family_can_be_imported() -> None:
    for place in FAMILIES.values():
        module, _, name = place.partition(":")
        __import__(module)
        assert callable(getattr(sys.modules[module], name))


def test_naming_a_model_imports_no_torch() -> None:
    code = "import sys, tsdiff.treesearch.models, tsdiff.diffusion.loading; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
