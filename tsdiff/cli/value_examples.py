"""From run folders to what a learned value is fitted to: nodes, and the scores of the samples that came of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdiff.cli.output import plural
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.findruns import run_folders
from tsdiff.treesearch.models import resolve_model, saved_options
from tsdiff.treesearch.node import Node
from tsdiff.treesearch.protocols import DiffusionModel, Guidance, Sampler
from tsdiff.treesearch.runfolder import LATENTS, TREE
from tsdiff.treesearch.saved import SavedRun, load_run
from tsdiff.treesearch.savedtree import SavedTree
from tsdiff.treesearch.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 16
"""Nodes evaluated in one network call, where clean estimates are made."""


@dataclass(frozen=True, eq=False)
class SavedExamples:
    """N nodes and what became of them; see `fit` of the verifier `value`.

    Attributes:
      inputs: (N, ...) float32.
      places, nodes: of each node, the index of its tree, and its own in that tree.
      scores: mean or best (`target`) of the finished samples that came of each node.
      device: of the model.
    """

    inputs: Tensor
    trees: Sequence[SavedTree]
    places: list[int]
    nodes: list[int]
    levels: list[int]
    scores: list[float]
    input: str
    target: str
    verifier: str
    model: str
    fingerprint: str
    device: str


# Run folders ---------------------------------------------------------------------------------------------------------


def find_runs(paths: Sequence[Path]) -> list[SavedRun]:
    """The finished runs in run folders, in folders of such, and in whole output folders; each folder counts once.

    Raises:
      UsageError: if a path holds none, or a file is damaged.
    """
    folders: dict[Path, Path] = {}
    for path in paths:
        found = [folder for folder in run_folders(path) if (folder / TREE).exists()] if path.is_dir() else []
        if not found:
            raise UsageError(f"{str(path)!r} holds no saved tree (tree.json); give run folders, or the folder that --out named")
        folders |= {folder.resolve(): folder for folder in found}
    runs = [load_run(folder) for folder in folders.values()]
    for run in runs:
        if run.damage or not run.options:
            raise UsageError(f"{str(run.path)!r} is not a whole run: {'; '.join(run.damage) or 'its options are not known'}; leave that run out")
    return runs


def outcomes(tree: SavedTree, verifier: str, target: str) -> dict[int, float]:
    """Of each node, by index, the mean or best score of the finished samples that came of it.

    A finished sample's is its own score, whatever was made of it later. Re-noised copies are continuations of a node like
    any other; perturbed ones are its neighbours, and are not.
    """
    kinds = {"denoise", "renoise"}
    gathered: dict[int, list[float]] = {}
    for leaf in tree.finished:
        score = leaf.score(verifier)
        if score is None:
            continue
        gathered.setdefault(leaf.index, []).append(score)
        node: Node = leaf
        while node.parent is not None and node.move.kind in kinds:
            node = node.parent
            if node.level == tree.last:
                break
            gathered.setdefault(node.index, []).append(score)
    kept = {index: scores for index, scores in gathered.items() if not tree.nodes[index].draft and not tree.nodes[index].failed}
    return {index: max(scores) if target == "best" else math.fsum(scores) / len(scores) for index, scores in sorted(kept.items())}


def choose_verifier(trees: Sequence[SavedTree], named: str | None) -> str:
    """The value key whose scores are learned: the named one, or the one that steered. Raises UsageError."""
    scored = {key for tree in trees for node in tree.finished for key, value in node.values.items() if value.score is not None}
    if not scored:
        raise UsageError(f"no finished sample of {plural(len(trees), 'tree')} has a score, so there is nothing to fit a value to; search with a verifier first")
    steering = sorted({tree.verifier for tree in trees})
    if named is None and len(steering) > 1:
        raise UsageError(f"the runs were steered by {' and '.join(steering)}; say which to learn with --target-verifier")
    name = steering[0] if named is None else named
    if name not in scored:
        raise UsageError(f"no finished sample has a score under {name!r}; --target-verifier may be {' or '.join(sorted(scored))}")
    return name


# Examples ------------------------------------------------------------------------------------------------------------


def read_examples(
    runs: Sequence[SavedRun], *, verifier: str, target: str, input: str, device: str = "auto", model: Any = None, levels: Sequence[float] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SavedExamples:  # fmt: skip
    """Saved runs -> examples.

    The model is loaded to name its weights; for clean estimates (`input` "x0") it also evaluates every node once more,
    since only latents are kept.

    Args:
      model: a loaded model instead of the one that the runs name.
      levels: to read nodes of, as shares of each trajectory; None for all.
      progress: called with the nodes done and all of them.

    Raises:
      UsageError: for runs of several models, kinds of schedule or shapes of latents, or latents that are not finite.
    """
    import torch

    names = sorted({run.model for run in runs})
    if len(names) > 1:
        raise UsageError(f"the runs are of the models {' and '.join(names)}; fit one value to each")
    options = {saved_options(run.arguments, device) for run in runs}
    if model is None and len(options) > 1:
        raise UsageError(f"the runs of {names[0]} were made with different weights or number formats (--dtype, --lora, --revision, --x0-decoder, ...); fit one value to each")
    kinds = sorted({_schedule(run).kind for run in runs})
    if len(kinds) > 1:
        raise UsageError(f"the runs have schedules of the kinds {' and '.join(kinds)}; fit one value to each")
    wanted = [_at(run, outcomes(run.tree, verifier, target), levels) for run in runs]
    total = sum(map(len, wanted))
    loaded: DiffusionModel = resolve_model(names[0], *options).load() if model is None else model
    columns: list[tuple[int, int, int, float]] = []
    inputs: list[Tensor] = []
    for place, (run, found) in enumerate(zip(runs, wanted, strict=True)):
        latents, kept = _latents(run, list(found))
        columns += [(place, index, run.nodes[index].level, found[index]) for index in kept]
        if kept and latents.shape[1:] != (inputs or [latents])[0].shape[1:]:
            raise UsageError(f"{str(run.path)!r} has latents of shape {tuple(latents.shape[1:])}, the runs before it {tuple(inputs[0].shape[1:])}; fit one value to each")
        levels, read = [run.nodes[index].level for index in kept], _reader(loaded, run, input)
        for start in range(0, len(kept), ROWS):
            rows = slice(start, start + ROWS)
            inputs.append(read(latents[rows], levels[rows]))
            if progress is not None:
                progress(sum(map(len, inputs)), total)
    places, nodes, levels, scores = (list(column) for column in zip(*columns, strict=True)) if columns else ([], [], [], [])
    together = torch.cat(inputs) if inputs else torch.zeros((0, 1))
    return SavedExamples(together, [run.tree for run in runs], places, nodes, levels, scores, input, target, verifier, names[0], loaded.fingerprint, loaded.device)


def _at(run: SavedRun, found: dict[int, float], levels: Sequence[float] | None) -> dict[int, float]:
    """What was found of nodes at some levels."""
    if levels is None:
        return found
    last = run.tree.schedule.last
    return {index: score for index, score in found.items() if run.nodes[index].level in [int(share * last) for share in levels]}


def _latents(run: SavedRun, indices: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Latents (N, ...) of the nodes that have kept theirs, and which those are."""
    import torch

    if not (run.path / LATENTS).exists():
        raise UsageError(f"{str(run.path)!r} has no {LATENTS}; only searches with --out (out=) keep the latents that a value is fitted to")
    found = [(node.index, latent.float()) for node, latent in run.latents(indices)]
    if len({tensor.shape for _, tensor in found}) > 1:
        raise UsageError(f"{str(run.path / LATENTS)!r} holds latents of different shapes; leave that run out")
    for index, tensor in found:
        if not bool(tensor.isfinite().all()):
            raise UsageError(f"node {index} of {str(run.path)!r} holds numbers that are not finite; leave that run out")
    return (torch.stack([tensor for _, tensor in found]) if found else torch.zeros((0, 1))), [index for index, _ in found]


def _reader(model: DiffusionModel, run: SavedRun, input: str) -> Callable[[Tensor, Sequence[int]], Tensor]:
    """From latents (B, ...) and their levels to what the network reads: the latents themselves, or clean estimates (CPU) as the search had them."""
    import torch

    if input == "latent":
        return lambda latents, levels: latents
    schedule, sampler, guidance = _schedule(run), _sampler(model, run), _guidance(run)
    encoded = model.encode([run.tree.condition], guided=guidance.on)[0].rows

    @torch.no_grad()
    def estimate(latents: Tensor, levels: Sequence[int]) -> Tensor:
        clean = latents.clone()  # at the last level the latents are the estimates
        for guided, rows in _alike(schedule, guidance, levels):
            own, noisy = [levels[row] for row in rows], latents[rows].to(model.device)
            output = sampler.evaluate(noisy, own, [encoded[0]] * len(rows))
            if guided:
                uncond = sampler.evaluate(noisy, own, [encoded[1]] * len(rows))
                output = sampler.guide(output, uncond, [guidance.scale] * len(rows), [guidance.rescale] * len(rows))
            clean[rows] = sampler.x0(noisy, own, output).float().cpu()
        return clean

    return estimate


def _alike(schedule: Schedule, guidance: Guidance, levels: Sequence[int]) -> Iterator[tuple[bool, list[int]]]:
    """Rows before the last level, those that are guided and those that are not."""
    for guided in (False, True):
        rows = [row for row, level in enumerate(levels) if level < schedule.last and guidance.active(schedule, level) == guided]
        if rows:
            yield guided, rows


def _schedule(run: SavedRun) -> Schedule:
    assert run.tree.schedule is not None, "a finished run has its schedule"
    return run.tree.schedule


def _guidance(run: SavedRun) -> Guidance:
    interval = run.options["guidance_interval"]
    return Guidance(run.options["guidance_scale"], run.options["guidance_rescale"], None if interval is None else (interval[0], interval[1]))


def _sampler(model: DiffusionModel, run: SavedRun) -> Sampler:
    """The model's own arithmetic on the tree's schedule. Raises UsageError if the model no longer makes that schedule."""
    key, *starts = _schedule(run).key.split("+")
    size = run.options["size"]
    solver = model.solver(run.tree.solver)
    schedule = model.schedule(solver, _schedule(run).last + sum(map(int, starts)), None if size is None else (size[0], size[1]))
    if schedule.key != key:
        raise UsageError(f"the model {model.name!r} has another schedule than the run {str(run.path)!r}; fit to --input latent, or leave that run out")
    for start in starts:
        schedule = schedule.tail(int(start))
    return model.sampler(schedule, solver)
