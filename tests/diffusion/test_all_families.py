"""What every family promises alike: searches repeat to the byte, texts of any length keep apart or hide, images start them, folders are checked."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from family_folders import FOLDERS, NETWORKS, OF_CLASSES, OF_FLOWS, asked, condition, guidance
from PIL import Image
from sit_reference import checkpoint, guided
from torch import Tensor

import tsdiff
from tsdiff.diffusion.loading import load_model, outline
from tsdiff.policies import Beam, BestOfN
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.noise import derive, initial_noise, normals
from tsdiff.treesearch.protocols import Condition, LoadOptions

OF_TEXTS = [family for family in FOLDERS if family not in OF_CLASSES]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here may reach for the network, even where the environment does not say that the hub is out of reach."""

    def refused(*args: Any, **kwargs: Any) -> Any:
        pytest.fail("something was to be downloaded")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


# Searches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FOLDERS)
def test_neither_order_nor_company_nor_the_largest_batch_change_a_byte(folders: Any, family: str) -> None:
    model = load_model(folders(family), device="cpu")
    rows = []
    handle = model.network.register_forward_pre_hook(lambda module, args, kwargs: rows.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True)

    def trees(*numbers: int, **options: Any) -> dict[str, tuple[str, bytes]]:
        rows.clear()
        conditions = [condition(family, number) for number in numbers]
        solver = "flow-ancestral" if family in OF_FLOWS else "ddim(eta=1)"
        results = tsdiff.search(
            model, conditions, policy=Beam(width=2, branch=2), verifier="luminance", steps=3, solver=solver, deterministic=True, **asked(family), **guidance(family), **options
        )
        assert not results.failures, results.failures[0].error
        assert sum(rows) == results.engine.network_rows
        assert results.engine.rows == sum(one.ledger.rows for result in results for one in (result, result.baseline))
        assert all(result.ledger.rows == 2 * result.ledger.nfe for result in results)
        return {result.prompt: (json.dumps(result.tree.to_json()), result.latents[result.node.index].numpy().tobytes()) for result in results}

    together = trees(0, 1, 2)
    assert len(together) == 3
    assert trees(2, 0, 1, max_batch=64) == together
    alone = trees(1, memory_limit=1)
    assert len(alone) == 1
    assert alone == {name: together[name] for name in alone}
    handle.remove()


@pytest.mark.parametrize("family", OF_TEXTS)
def test_texts_of_different_lengths_share_batches_behind_masks_and_nowhere_else(folders: Any, family: str) -> None:
    model = load_model(folders(family), device="cpu")
    conditions = [Condition(f"of {length} tokens", tensors=embeddings(family, length)) for length in (5, 9)]
    encoded = model.encode(conditions, guided=True)
    assert (encoded[0].bucket == encoded[1].bucket) == (family in ("pixart", "ltx"))

    def latents(*which: Condition) -> list[Tensor]:
        results = tsdiff.search(model, list(which), policy=BestOfN(n=1), verifier="luminance", steps=3, baseline=False, **asked(family), **guidance(family))
        assert not results.failures, results.failures[0].error
        return [result.latents[result.node.index] for result in results]

    for one, wanted in zip(latents(*conditions), conditions, strict=True):
        torch.testing.assert_close(one, *latents(wanted), rtol=0, atol=1e-4 * max(1.0, float(one.std())))


def embeddings(family: str, length: int) -> dict[str, Tensor]:
    """Random embeddings of a prompt, and of a negative prompt, of a length."""
    widths = {"sd": 32, "sdxl": 40, "sd3": 48, "flux": 48, "pixart": 24, "ltx": 24}
    pooled = {"sdxl": 20, "sd3": 40, "flux": 16}
    generator = torch.Generator().manual_seed(length)
    found: dict[str, Tensor] = {}
    for side in ("", "negative_"):
        found[f"{side}prompt_embeds"] = torch.randn((length, widths[family]), generator=generator)
        if family in pooled:
            found[f"{side}pooled_prompt_embeds"] = torch.randn(pooled[family], generator=generator)
        if family in ("pixart", "ltx"):
            found[f"{side}prompt_attention_mask"] = torch.ones(length)
    return found


# Images to start from, where diffusers has no pipeline of that kind ---------------------------------------------------


STEPS, STRENGTH, SEED = 5, 0.6, 3
SCALE = 3.0


@pytest.mark.parametrize("family", ["pixart", "dit", "sit"])
def test_an_initial_image_is_noised_and_remade_by_the_last_steps(folders: Any, family: str) -> None:
    picture = Image.new("RGB", (16, 16), (200, 40, 90))
    solver = "flow-euler" if family == "sit" else "ddim"
    result = tsdiff.search(
        folders(family), condition(family, 3), policy=BestOfN(n=1), verifier="luminance", steps=STEPS, seed=SEED, init_image=picture, strength=STRENGTH,
        solver=solver, baseline=False, device="cpu", **asked(family), **guidance(family),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL.from_pretrained(folders(family) / "vae").eval()
    pixels = torch.tensor([200.0, 40.0, 90.0])[None, :, None, None].expand(1, 3, 16, 16) / 255
    noises = [torch.from_numpy(normals(derive(SEED, "encode"), 256).reshape(1, 4, 8, 8)), torch.from_numpy(initial_noise(derive(SEED, "draw", 0), (4, 8, 8)))[None]]
    with torch.no_grad():
        posterior = vae.encode(2 * pixels - 1).latent_dist
        clean = (posterior.mean + posterior.std * noises[0]) * vae.config.scaling_factor
        theirs = (remade_flow if family == "sit" else remade)(folders(family), family, clean, noises[1])
    ours = result.latents[result.node.index][None]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * max(1.0, float(theirs.std())))
    assert (ours - clean).abs().max() > 0.1
    assert result.ledger.nfe == STEPS * STRENGTH


def remade(folder: Path, family: str, clean: Tensor, noise: Tensor) -> Tensor:
    """As image-to-image pipelines do, with the scheduler DDIM of diffusers."""
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    scheduler = diffusers.DDIMScheduler.from_config(config, clip_sample=False)
    scheduler.set_timesteps(STEPS)
    times = scheduler.timesteps[STEPS - int(STEPS * STRENGTH) :]
    predict = predictor(folder, family)
    latents = scheduler.add_noise(clean, noise, times[:1])
    for time in times:
        cond, uncond = predict(latents, time)
        latents = scheduler.step(uncond + SCALE * (cond - uncond), time, latents).prev_sample
    return latents


def predictor(folder: Path, family: str) -> Any:
    """The noise that a network sees in latents (1, 4, 8, 8) at a time, with its condition and without."""
    if family == "dit":
        network = diffusers.DiTTransformer2DModel.from_pretrained(folder / "transformer").eval()
        return lambda latents, time: [network(latents, timestep=time.expand(1), class_labels=torch.tensor([label])).sample[:, :4] for label in (3, 1000)]
    pipe = diffusers.PixArtSigmaPipeline.from_pretrained(folder)
    wanted = condition(family, 3)
    embeds, mask, other, other_mask = pipe.encode_prompt(wanted.prompt, negative_prompt=wanted.negative_prompt, **wanted.extra)
    sizes = {"resolution": None, "aspect_ratio": None}
    return lambda latents, time: [
        pipe.transformer(latents, encoder_hidden_states=text, encoder_attention_mask=hidden, timestep=time.expand(1), added_cond_kwargs=sizes).sample[:, :4]
        for text, hidden in ((embeds, mask), (other, other_mask))
    ]


def remade_flow(folder: Path, family: str, clean: Tensor, noise: Tensor) -> Tensor:
    """As SiT's paper has it: along the straight path back to a time, and from there on with Euler's steps."""
    start = STEPS - int(STEPS * STRENGTH)
    x = start / STEPS * clean + (1 - start / STEPS) * noise
    for step in range(start, STEPS):
        x = x + guided(checkpoint(), x, torch.tensor([step / STEPS]), torch.tensor([3]), SCALE) / STEPS
    return x


def test_videos_do_not_start_from_an_image_and_say_so_before_weights_are_read(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights were read"))
    with pytest.raises(UsageError, match=r"init_image was given but .* makes videos, which cannot start from an image"):
        tsdiff.search(folders("ltx"), condition("ltx"), verifier="luminance", init_image=Image.new("RGB", (32, 32)), strength=0.5, device="cpu", **asked("ltx"))


# Folders --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def copies(folders: Any, tmp_path: Path) -> Any:
    """Makes a copy of a family's folder that a test may damage."""
    return lambda family: Path(shutil.copytree(folders(family), tmp_path / "model"))


@pytest.mark.parametrize("family", FOLDERS)
def test_every_part_that_is_missing_or_of_another_class_is_one_clear_line_before_weights_are_read(copies: Any, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights were read"))
    folder = copies(family)
    assert outline(str(folder), LoadOptions()).solvers

    def refused(says: str) -> None:
        with pytest.raises(UsageError, match=says) as caught:
            outline(str(folder), LoadOptions())
        assert "\n" not in str(caught.value)

    index = json.loads((folder / "model_index.json").read_text())
    parts = {name: entry for name, entry in index.items() if isinstance(entry, list) and all(entry)}
    assert {"scheduler", "vae", NETWORKS.get(family, "transformer")} <= parts.keys()
    for name, (library, _) in parts.items():
        for other in ([library, "VQModel"], ["my_module", "MyModel"]):
            (folder / "model_index.json").write_text(json.dumps(index | {name: other}))
            refused(f"the {name} of .* is (a|the class) {other[1]}")
        (folder / "model_index.json").write_text(json.dumps(index))
        for path in [*(folder / name).glob("*config.json"), *(folder / name).glob("*.safetensors")]:
            kept = path.read_bytes()
            if name.startswith("tokenizer") and path.name == "tokenizer_config.json":
                continue  # not needed
            path.unlink()
            refused(rf"{path.name}' is missing|{name}' holds no weights")
            path.write_bytes(kept)
    wrong = "DDIMScheduler" if family in OF_FLOWS else "FlowMatchEulerDiscreteScheduler"
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", wrong]}))
    refused("not for flow models|is for flow models")


class Trap:
    """Unpickling one makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.path,)


def weights_of(folder: Path) -> Iterator[tuple[Path, str]]:
    """The weight files of a pipeline's folder, and how a pickle in their place is called."""
    for path in sorted(folder.glob("*/*.safetensors")):
        yield path, "diffusion_pytorch_model.bin" if path.stem == "diffusion_pytorch_model" else "pytorch_model.bin"


@pytest.mark.parametrize("family", FOLDERS)
def test_files_that_could_run_code_are_one_clear_line_and_run_none(copies: Any, tmp_path: Path, family: str) -> None:
    folder = copies(family)
    for path, pickled in list(weights_of(folder)):
        kept = path.read_bytes()
        path.unlink()
        for name, says in ((pickled, "cannot be loaded"), ("model.ckpt", "holds no weights"), ("weights.pt", "holds no weights")):
            torch.save({"weight": torch.zeros(1), "trap": Trap(tmp_path / "ran")}, path.with_name(name))
            with pytest.raises(UsageError, match=says) as caught:
                load_model(folder, device="cpu")
            assert "\n" not in str(caught.value)
            assert not (tmp_path / "ran").exists()
            path.with_name(name).unlink()
        path.write_bytes(kept)
    single = tmp_path / "single.ckpt"
    shutil.copy(path, single)
    with pytest.raises(UsageError, match="is a file; give the folder"):
        load_model(single, device="cpu")
