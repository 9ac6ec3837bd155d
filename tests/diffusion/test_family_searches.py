"""Searches of every family: counted exactly, reproducible, planned without weights, and nothing of the caller's is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES
from family import Family, Shelf
from PIL import Image
from pipeline_state import state_of
from safetensors.torch import load_file

import tsdiff
from tsdiff.diffusion.loading import load_model, outline
from tsdiff.policies import Beam
from tsdiff.treesearch.plan import prepare
from tsdiff.treesearch.protocols import LoadOptions
from tsdiff.treesearch.results import Results


class Flows(Beam):
    """Beam search that asks for a flow model."""

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"flow"}


def searched(model: Any, family: Family, *, scale: float = 4.0, **options: Any) -> Results:
    """Beam search for two conditions, or others."""
    policy = (Flows if family.flow else Beam)(width=2, branch=2)
    usual = {"prompts": list(family.conditions[:2]), "policy": policy, "verifier": "luminance", "solver": family.branching, "steps": 3}
    results = tsdiff.search(model, **usual | family.call().sides | family.guided(scale) | options)
    assert not results.failures
    return results


@pytest.mark.parametrize("scale", [1.0, 4.0], ids=["one row", "two rows"])
def test_a_search_is_counted_and_leaves_the_pipeline_as_it_was(shelf: Shelf, family: Family, scale: float) -> None:
    pipe, rows = shelf.pipe(family), 0
    before = state_of(pipe)

    def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal rows
        rows += (args[0] if args else kwargs["hidden_states"]).shape[0]

    handle = getattr(pipe, family.network).register_forward_pre_hook(count, with_kwargs=True)
    try:
        results = searched(shelf.searched(family), family, scale=scale)
    finally:
        handle.remove()
    assert rows == results.engine.network_rows
    ledgers = [one.ledger for result in results for one in (result, result.baseline)]
    assert results.engine.rows == sum(ledger.rows for ledger in ledgers)
    assert all(ledger.rows == ledger.nfe * (1 + (scale > 1)) for ledger in ledgers)
    assert results[0].image.size == family.size[1::-1]
    assert state_of(pipe) == before


def test_neither_order_nor_neighbours_change_a_byte_and_sizes_of_batches_only_last_digits(shelf: Shelf, family: Family, tmp_path: Path) -> None:
    """In deterministic mode every call has the same number of rows, whatever they are; searches of one prompt are filled up."""
    first, second = family.conditions[:2]
    cases: list[dict[str, Any]] = [{"prompts": [first, second]}, {"prompts": [second, first], "max_batch": 64}, {"prompts": [first], "memory_limit": 1}]
    runs: list[Results] = []
    for number, case in enumerate(cases):
        model = shelf.model(family) if number == 2 else shelf.searched(family)
        runs.append(searched(model, family, deterministic=True, out=tmp_path / str(number), **case))
        assert runs[-1].engine.padding > 0
    together, reversed_, alone = ({result.prompt: bytes_of(result.path) for result in results} for results in runs)
    assert together == reversed_
    assert alone == {first.prompt: together[first.prompt]}
    batches = searched(shelf.searched(family), family, max_batch=3)
    for one, other in zip(runs[0], batches, strict=True):
        assert one.ledger == other.ledger
        assert [(node.id, node.level) for node in one.tree.nodes] == [(node.id, node.level) for node in other.tree.nodes]
        assert one.node.index == other.node.index
        assert one.score == pytest.approx(other.score, abs=1e-5)
        saved = load_file(one.path / "latents.safetensors")[f"node/{one.node.index}"]
        family.require_equal(saved, other.latents[other.node.index])


def bytes_of(folder: Path) -> dict[str, bytes]:
    """What a run's folder says of the search, by file name; of images the pixels alone, for they carry the options of their run."""
    names = ["tree.json", "baseline.json", "latents.safetensors", *(path.name for path in folder.glob("best.webp"))]
    return {name: (folder / name).read_bytes() for name in names} | {"best.png": Image.open(folder / "best.png").tobytes()}


# Before weights are read ---------------------------------------------------------------------------------------------


def test_a_folder_is_planned_without_its_weights(shelf: Shelf, family: Family, loaded: Any, no_weights: None) -> None:
    folder, model = str(shelf.folder(family)), loaded
    plan = outline(folder, LoadOptions())
    assert plan.solvers == model.solvers
    assert (plan.default_steps, plan.default_guidance_scale, plan.guidable) == (*family.defaults, True)
    assert plan.media == model.media == ("video" if family.video else "image")
    assert plan.notices == ()
    for name in plan.solvers:
        solver = plan.solver(name)
        for size in filter(None, (family.size, family.other_size)):
            assert plan.schedule(solver, 10, size) == model.schedule(solver, 10, size)
            assert plan.latent_shape(size) == model.latent_shape(size)
    assert plan.latent_shape(family.size) == family.latent
    options = {"policy": "best-of-n", "policy_options": {"n": 4}, "steps": 5, "verifiers": "luminance", "device": "cpu"}
    planned = prepare(folder, list(family.conditions[:2]), **options, **family.call().sides, **family.guided(4.0))
    assert planned.rows_upper == 2 * planned.nfe_upper > 0


def test_the_pipelines_scheduler_is_the_default(shelf: Shelf, family: Family) -> None:
    plan = outline(str(shelf.folder(family)), LoadOptions())
    assert plan.solvers[0] == plan.solver().name == family.solvers[0].partition("(")[0]
    assert sorted(plan.solvers) == sorted(family.offered)
    if family.flow:
        return  # whose schedules depend on how the pipeline calls the scheduler; samples show that they are its
    fresh = type(shelf.pipe(family).scheduler).from_config(shelf.pipe(family).scheduler.config)
    fresh.set_timesteps(50)
    assert plan.schedule(plan.solver(), 50, family.size).timesteps == tuple(map(float, fresh.timesteps))


@pytest.mark.parametrize("family", [name for name, one in FAMILIES.items() if one.make is not None], indirect=True)
def test_objects_and_folders_are_outlined_alike(shelf: Shelf, family: Family) -> None:
    folder = outline(str(shelf.folder(family)), LoadOptions())
    for pipe in (shelf.pipe(family), shelf.loaded(family).pipeline):
        for one in (outline(pipe, LoadOptions()), load_model(pipe)):
            assert (one.solvers, one.notices, one.media) == (folder.solvers, folder.notices, folder.media)
            assert (one.default_steps, one.default_guidance_scale) == (folder.default_steps, folder.default_guidance_scale)
            assert one.size(None, None) == folder.size(None, None)
            # What a scheduler's config leaves to its class is another class's own in memory, but is written down in a folder.
            for name in folder.solvers if pipe is not shelf.pipe(family) else folder.solvers[:1]:
                solver = folder.solver(name)
                assert one.schedule(solver, 10, family.size) == folder.schedule(solver, 10, family.size)
