"""Folders and objects of every family: one model, whatever was saved how; what is wrong is said in one line before weights are read."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from damages import INDEX, edit, edited, spoilt
from families import FAMILIES
from family import Family, Shelf, other_class, ours, refusal, require_embeddings_asked_for

from tsdiff.diffusion.loading import load_model, outline
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.models import resolve_model
from tsdiff.treesearch.protocols import LoadOptions

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # numpy's, of diffusers

SAVED = [(name, how) for name, one in FAMILIES.items() for how in ("as today", *one.saved_as)]
OBJECTS = [name for name, one in FAMILIES.items() if one.make is not None]


@pytest.mark.parametrize(("family", "how"), SAVED, indirect=["family"])
def test_a_folder_and_the_object_it_was_saved_from_are_one_model(shelf: Shelf, folder: Path, family: Family, how: str, capfd: pytest.CaptureFixture[str]) -> None:
    family.saved_as.get(how, lambda _: None)(folder)
    known = shelf.model(family)
    capfd.readouterr()
    model = load_model(folder, device="cpu")
    assert capfd.readouterr() == ("", "")
    assert (model.name, model.device) == (str(folder), "cpu")
    assert model.fingerprint == known.fingerprint
    latents, time = torch.randn((1, *family.latent), generator=torch.Generator().manual_seed(5)), torch.tensor([500.0])
    outputs = [each.forward(latents, time, each.encode(family.conditions[:1], guided=False)[0].rows) for each in (model, known)]
    # Weights that are read from a file lie elsewhere in memory, which the last digits of matrix kernels depend on.
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
    assert outputs[0].std() > 1e-3
    assert outline(str(folder), LoadOptions()).schedule(model.solver(), 10, family.size) == known.schedule(known.solver(), 10, family.size)


def test_half_precision_keeps_latents_in_float32(shelf: Shelf, family: Family) -> None:
    model = load_model(shelf.folder(family), device="cpu", dtype="bfloat16")
    assert model.dtype == getattr(model.pipeline, family.network).dtype == torch.bfloat16
    latents = ours(model, family.call(steps=2, guidance="on", noise=True))
    assert latents.dtype == model.decode(latents).pixels.dtype == torch.float32
    assert latents.isfinite().all()


@pytest.mark.parametrize("family", OBJECTS, indirect=True)
def test_objects_are_checked_before_they_are_used(shelf: Shelf, family: Family) -> None:
    assert family.make is not None
    pipe = shelf.pipe(family)
    for options in ({"device": "cpu"}, {"dtype": "float16"}):
        with pytest.raises(UsageError, match="keeps its own device and dtype"):
            load_model(pipe, **options)
    modules = [name for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)]
    assert len(modules) >= 2
    for name in modules:
        training = family.make(**{**pipe.components, name: copy.deepcopy(getattr(pipe, name))})
        list(getattr(training, name).modules())[-1].train()
        with pytest.raises(UsageError, match=rf"call `pipe\.{name}\.eval\(\)`"):
            load_model(training)
    for stranger in family.strangers:
        with pytest.raises(UsageError, match=rf"{stranger} .*is not supported"):
            load_model(other_class(pipe, stranger))


def test_a_scheduler_without_a_solver_is_replaced_and_said(folder: Path, family: Family) -> None:
    name = "FlowMatchHeunDiscreteScheduler" if family.flow else "TCDScheduler"
    edit(folder / INDEX, scheduler=["diffusers", name])
    by = "flow-euler on the same config" if family.flow else "ddim on the same betas"
    plan = outline(str(folder), LoadOptions())
    assert plan.notices == (f"scheduler {name} is not supported; replaced by {by}",)
    assert plan.solvers[0] == by.partition(" ")[0]
    assert sorted(plan.solvers) == sorted(family.offered)
    with pytest.raises(UsageError, match=f"{name}.*strict_scheduler forbids"):
        outline(str(folder), LoadOptions(strict_scheduler=True))


# Damages -------------------------------------------------------------------------------------------------------------


def damaged_parts(folder: Path, family: Family) -> Iterator[str]:
    """Components that are not there, of another class, of code that is not run, or without config."""
    index = folder / INDEX
    for name in (family.network, "vae"):
        for entry, says in (
            ([None, None], f"has no {name}"),
            (["diffusers", "UNet2DModel"], f"the {name} .*UNet2DModel, which is not supported"),
            (["my_code", "MyModel"], f"the {name} .*only classes of diffusers and transformers"),
        ):
            with edited(index, **{name: entry}):
                yield says
        config = folder / name / "config.json"
        for content, says in ((None, f"{name}/config.json' is missing"), (b"null", "holds a NoneType"), (b"{", "cannot be read as JSON"), (b"{}", f"the {name} config of .* has no ")):
            with spoilt(config, content):
                yield says


def damaged_texts(folder: Path, family: Family) -> Iterator[str]:
    """Text encoders of another class or without tokenizer or config."""
    for config in sorted(folder.glob("text_encoder*/config.json")):
        encoder = config.parent.name
        tokenizer = encoder.replace("text_encoder", "tokenizer")
        for changes, says in (
            ({tokenizer: [None, None]}, f"has no {tokenizer}"),
            ({tokenizer: ["transformers", "BertTokenizer"]}, f"{tokenizer} .* is a BertTokenizer"),
            ({encoder: ["transformers", "BertModel"]}, f"{encoder} .* is a BertModel"),
            ({encoder: ["my_code", "MyModel"]}, f"the {encoder} .*only classes of diffusers and transformers"),
        ):
            with edited(folder / INDEX, **changes):
                yield says
        for content, says in ((None, f"{encoder}/config.json' is missing"), (b"{}", f"the {encoder} config of .* has no ")):
            with spoilt(config, content):
                yield says


def damaged_schedulers(folder: Path, family: Family) -> Iterator[str]:
    """Schedulers that are not there, without config, or of the other kind."""
    config, other = folder / "scheduler/scheduler_config.json", "DDIMScheduler" if family.flow else "FlowMatchEulerDiscreteScheduler"
    with edited(folder / INDEX, scheduler=[None, None]):
        yield "has no scheduler"
    with edited(folder / INDEX, scheduler=["diffusers", other]):
        yield f"{other}, is not for flow models" if family.flow else f"{other}, is for flow models"
    with spoilt(config, None):
        yield "scheduler_config.json' is missing"
    if not family.flow:
        with edited(config, prediction_type="noise"):
            yield "predicts 'noise'"


def damaged_weights(folder: Path, family: Family) -> Iterator[str]:
    """Weights of every component that are not there, cut off, not downloaded, or split with a part missing."""
    files = sorted(folder.glob("*/*.safetensors"))
    assert len(files) >= 2
    for file in files:
        whole = file.read_bytes()
        for content, says in (
            (None, f"{file.parent.name}' holds no weights"),
            (whole[:-100], f"{file.parent.name}/.* is damaged"),
            (b"abc", "damaged"),
            (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ):
            with spoilt(file, content):
                yield says
        index = file.with_name(f"{file.name}.index.json")
        with spoilt(file, None):
            index.write_text(json.dumps({"weight_map": {"a": "part-1.safetensors"}}))
            yield "part-1.safetensors' is missing"
            index.unlink()


DAMAGED: dict[str, Callable[[Path, Family], Iterator[str]]] = {
    "parts": damaged_parts,
    "texts": damaged_texts,
    "schedulers": damaged_schedulers,
    "weights": damaged_weights,
}


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_folder_is_one_clear_line_before_weights_are_read(folder: Path, family: Family, damage: str) -> None:
    cases = 0
    for says in DAMAGED[damage](folder, family):
        assert re.search(says, refusal(partial(resolve_model, str(folder)))), says
        cases += 1
    assert cases > 2 or (damage == "texts" and not family.embeddings)
    resolve_model(str(folder))  # nothing is left of the damage


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(("family", "damage"), [(name, damage) for name, one in FAMILIES.items() for damage in one.damages], indirect=["family"])
def test_a_damage_of_its_own_is_one_clear_line_before_weights_are_read(folder: Path, family: Family, damage: str) -> None:
    spoil, says = family.damages[damage]
    spoil(folder)
    assert re.search(says, refusal(partial(resolve_model, str(folder))))


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("family", [name for name, one in FAMILIES.items() if one.embeddings], indirect=True)
def test_a_text_encoder_that_is_not_there_leaves_embeddings(folder: Path, family: Family) -> None:
    for config in sorted(folder.glob("text_encoder*/config.json")):
        encoder = config.parent.name
        with edited(folder / INDEX, **{encoder: [None, None], encoder.replace("text_encoder", "tokenizer"): [None, None]}, **family.bare):
            plan = outline(str(folder), LoadOptions())
        if encoder in family.optional:
            plan.check(family.conditions[0], guided=True)
        else:
            require_embeddings_asked_for(plan, family)
