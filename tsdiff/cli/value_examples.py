"""From run folders to what a learned value is fitted to: nodes, and the scores of the samples that came of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdiff.cli.output import plural
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.models import resolve_model
from tsdiff.treesearch.protocols import Condition, DiffusionModel, Guidance, LoadOptions, Sampler
from tsdiff.treesearch.runfolder import read_tree
from tsdiff.treesearch.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 16
"""Nodes evaluated in one network call, where clean estimates are made."""


@dataclass(frozen=True, eq=False)
class SavedTree:
    """A searched tree as it lies on disk.

    Attributes:
      folder: where.
      schedule: its levels; where steps really land is not kept.
      nodes: as in tree.json.
      options: of the search, as resolved.
    """

    folder: Path
    schedule: Schedule
    solver: str
    condition: Condition
    seed: int
    verifier: str
    nodes: Sequence[dict[str, Any]]
    options: dict[str, Any]

    @property
    def finished(self) -> list[dict[str, Any]]:
        """Its finished samples."""
        return [node for node in self.nodes if node["level"] == self.schedule.last and not node["draft"] and node["status"] != "failed"]


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


def find_trees(paths: Sequence[Path]) -> list[SavedTree]:
    """The trees of run folders, of folders of such, and of whole output folders; each folder counts once.

    Raises:
      UsageError: if a path holds none, or a file is damaged.
    """
    folders: dict[Path, Path] = {}
    for path in paths:
        found = sorted(file.parent for file in path.rglob("tree.json"))
        if not found:
            raise UsageError(f"{str(path)!r} holds no saved tree (tree.json); give run folders, or the folder that --out named")
        folders |= {folder.resolve(): folder for folder in found}
    return [_read(folder) for folder in folders.values()]


def _read(folder: Path) -> SavedTree:
    data = read_tree(folder)
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        kept = data["schedule"]
        steps = tuple(zip(kept["alpha"], kept["sigma"], strict=True))
        schedule = Schedule(kept["kind"], kept["key"], tuple(kept["timesteps"]), tuple(kept["alpha"]), tuple(kept["sigma"]), steps, 1.0)
        condition = Condition(data["prompt"], data["negative_prompt"], data["class"])
        return SavedTree(folder, schedule, data["solver"], condition, data["seed"], data["verifier"], data["nodes"], run["options"])
    except FileNotFoundError as error:
        raise UsageError(f"{str(folder)!r} is not a whole run folder: it has no {Path(error.filename).name}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{str(folder)!r} cannot be read ({type(error).__name__}: {error}); leave that run out") from None


def outcomes(tree: SavedTree, verifier: str, target: str) -> dict[int, float]:
    """Of each node, by index, the mean or best score of the finished samples that came of it.

    A finished sample's is its own score, whatever was made of it later. Re-noised copies are continuations of a node like
    any other; perturbed ones are its neighbours, and are not.
    """
    kinds = {"denoise", "renoise"}
    by_index = {node["index"]: node for node in tree.nodes}
    gathered: dict[int, list[float]] = {}
    for leaf in tree.finished:
        score = (leaf["values"].get(verifier) or {}).get("score")
        if score is None:
            continue
        if not math.isfinite(score):
            raise UsageError(f"node {leaf['index']} of {str(tree.folder)!r} has the score {score}; leave that run out")
        node = leaf
        gathered.setdefault(node["index"], []).append(score)
        while node["parent"] is not None and node["move"]["kind"] in kinds:
            node = by_index[node["parent"]]
            if node["level"] == tree.schedule.last:
                break
            gathered.setdefault(node["index"], []).append(score)
    kept = {index: scores for index, scores in gathered.items() if not by_index[index]["draft"] and by_index[index]["status"] != "failed"}
    return {index: max(scores) if target == "best" else math.fsum(scores) / len(scores) for index, scores in sorted(kept.items())}


def choose_verifier(trees: Sequence[SavedTree], named: str | None) -> str:
    """The value key whose scores are learned: the named one, or the one that steered. Raises UsageError."""
    scored = {key for tree in trees for node in tree.finished for key, value in node["values"].items() if value.get("score") is not None}
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
    trees: Sequence[SavedTree], *, verifier: str, target: str, input: str, device: str = "auto", model: Any = None, progress: Callable[[int, int], None] | None = None
) -> SavedExamples:
    """Saved trees -> examples: the one place that knows how runs are stored.

    The model is loaded to name its weights; for clean estimates (`input` "x0") it also evaluates every node once more,
    since only latents are kept.

    Args:
      model: a loaded model instead of the one that the runs name.
      progress: called with the nodes done and all of them.

    Raises:
      UsageError: for runs of several models, kinds of schedule or shapes of latents, or latents that are not finite.
    """
    import torch

    names = sorted({str(tree.options["model"]) for tree in trees})
    if len(names) > 1:
        raise UsageError(f"the runs are of the models {' and '.join(names)}; fit one value to each")
    kinds = sorted({tree.schedule.kind for tree in trees})
    if len(kinds) > 1:
        raise UsageError(f"the runs have schedules of the kinds {' and '.join(kinds)}; fit one value to each")
    wanted = [outcomes(tree, verifier, target) for tree in trees]
    total = sum(map(len, wanted))
    loaded: DiffusionModel = resolve_model(names[0], LoadOptions(device=device)).load() if model is None else model
    columns: list[tuple[int, int, int, float]] = []
    inputs: list[Tensor] = []
    for place, (tree, found) in enumerate(zip(trees, wanted, strict=True)):
        latents, kept = _latents(tree, list(found))
        columns += [(place, index, tree.nodes[index]["level"], found[index]) for index in kept]
        if kept and latents.shape[1:] != (inputs or [latents])[0].shape[1:]:
            raise UsageError(f"{str(tree.folder)!r} has latents of shape {tuple(latents.shape[1:])}, the runs before it {tuple(inputs[0].shape[1:])}; fit one value to each")
        levels, read = [tree.nodes[index]["level"] for index in kept], _reader(loaded, tree, input)
        for start in range(0, len(kept), ROWS):
            rows = slice(start, start + ROWS)
            inputs.append(read(latents[rows], levels[rows]))
            if progress is not None:
                progress(sum(map(len, inputs)), total)
    places, nodes, levels, scores = (list(column) for column in zip(*columns, strict=True)) if columns else ([], [], [], [])
    together = torch.cat(inputs) if inputs else torch.zeros((0, 1))
    return SavedExamples(together, trees, places, nodes, levels, scores, input, target, verifier, names[0], loaded.fingerprint, loaded.device)


def _latents(tree: SavedTree, indices: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Latents (N, ...) of the nodes that have kept theirs, and which those are."""
    import torch
    from safetensors import SafetensorError, safe_open

    path = tree.folder / "latents.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            kept = [index for index in indices if f"node/{index}" in names]
            tensors = [file.get_tensor(f"node/{index}").float() for index in kept]
    except FileNotFoundError:
        raise UsageError(f"{str(tree.folder)!r} has no latents.safetensors; only searches with --out (out=) keep the latents that a value is fitted to") from None
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{str(path)!r} cannot be read ({error}); leave that run out") from None
    if len({tensor.shape for tensor in tensors}) > 1:
        raise UsageError(f"{str(path)!r} holds latents of different shapes; leave that run out")
    for index, tensor in zip(kept, tensors, strict=True):
        if not bool(tensor.isfinite().all()):
            raise UsageError(f"node {index} of {str(tree.folder)!r} holds numbers that are not finite; leave that run out")
    return (torch.stack(tensors) if tensors else torch.zeros((0, 1))), kept


def _reader(model: DiffusionModel, tree: SavedTree, input: str) -> Callable[[Tensor, Sequence[int]], Tensor]:
    """From latents (B, ...) and their levels to what the network reads: the latents themselves, or clean estimates (CPU) as the search had them."""
    import torch

    if input == "latent":
        return lambda latents, levels: latents
    sampler, guidance = _sampler(model, tree), _guidance(tree)
    encoded = model.encode([tree.condition], guided=guidance.on)[0].rows

    @torch.no_grad()
    def estimate(latents: Tensor, levels: Sequence[int]) -> Tensor:
        clean = latents.clone()  # at the last level the latents are the estimates
        for guided, rows in _alike(tree.schedule, guidance, levels):
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


def _guidance(tree: SavedTree) -> Guidance:
    interval = tree.options["guidance_interval"]
    return Guidance(tree.options["guidance_scale"], tree.options["guidance_rescale"], None if interval is None else (interval[0], interval[1]))


def _sampler(model: DiffusionModel, tree: SavedTree) -> Sampler:
    """The model's own arithmetic on the tree's schedule. Raises UsageError if the model no longer makes that schedule."""
    key, *starts = tree.schedule.key.split("+")
    size = tree.options["size"]
    solver = model.solver(tree.solver)
    schedule = model.schedule(solver, tree.schedule.last + sum(map(int, starts)), None if size is None else (size[0], size[1]))
    if schedule.key != key:
        raise UsageError(f"the model {model.name!r} has another schedule than the run {str(tree.folder)!r}; fit to --input latent, or leave that run out")
    for start in starts:
        schedule = schedule.tail(int(start))
    return model.sampler(schedule, solver)
