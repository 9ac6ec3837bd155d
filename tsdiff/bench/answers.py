"""What searches answered, from results in memory or run folders: one record an answer, whatever it came from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.findruns import run_folders
from tsdiff.treesearch.node import Value
from tsdiff.treesearch.noise import Fresh, Given, Torch
from tsdiff.treesearch.protocols import Condition, Verifier
from tsdiff.treesearch.rescored import read_rescored
from tsdiff.treesearch.results import Result
from tsdiff.treesearch.runfolder import PICTURES, TREE
from tsdiff.treesearch.saved import SavedRun, load_run
from tsdiff.treesearch.savedtree import SavedNode, SavedTree

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

BATCH = 16
"""Pictures that a verifier or feature network is shown at once."""


@dataclass(frozen=True)
class Sample:
    """A finished sample: what it cost, what verifiers say of it.

    Attributes:
      nfe: evaluations spent until it was there: of the whole search for an answer, its own otherwise.
      scores: by verifier; failed ones are left out.
      picture: an image, or the file that holds it; None where there is none.
    """

    nfe: int
    scores: Mapping[str, float]
    picture: Image | Path | None = None


@dataclass(frozen=True)
class Search:
    """One search of one prompt under one seed.

    Attributes:
      source: the run folder, or a description for messages.
      condition: what was asked for (metadata and tensors are not saved with a run).
      budget: NFE that it might spend; what it did spend where no budget was set.
      answer: its answer.
      plain: the baseline sample, None without.
      samples: all finished samples in the order of their making, if none of them shares an evaluation with another
        (best-of-n); empty for any other search.
    """

    source: str
    condition: Condition
    seed: int
    model: str
    policy: str
    verifier: str
    budget: int
    answer: Sample
    plain: Sample | None
    samples: tuple[Sample, ...] = field(repr=False, default=())


def load_searches(runs: Iterable[Result | Search | str | Path]) -> list[Search]:
    """The searches of results and run folders; a folder of run folders stands for all in it. Records pass through.

    Raises:
      UsageError: if a path holds no run, one is not finished or not readable, or its scores are relative to its own samples.
    """
    searches = []
    for run in runs:
        if isinstance(run, Search):
            searches.append(run)
        elif isinstance(run, Result):
            searches.append(_from_result(run))
        else:
            searches.extend(_from_folder(folder) for folder in _folders(Path(run)))
    return searches


def _folders(path: Path) -> list[Path]:
    found = [folder for folder in run_folders(path) if (folder / TREE).exists()] if path.is_dir() else []
    if not found:
        raise UsageError(f"{str(path)!r} is no run folder and holds none; name a folder that `tsdiff search` has written")
    return found


def _from_result(result: Result) -> Search:
    baseline = result.baseline
    return _search(
        f"the search of {result.prompt!r} under seed {result.seed}",
        SavedTree.from_json(result.tree.to_json()),
        result.to_json(),
        result.options,
        None if baseline is None else (SavedTree.from_json(baseline.tree.to_json()), baseline.node.index, baseline.picture or baseline.image_path),
        result.picture or result.image_path,
    )


def _from_folder(folder: Path) -> Search:
    run = load_run(folder)
    if not run.result or not run.nodes:
        raise UsageError(f"{str(folder)!r} is not a finished run: {'; '.join(run.damage) or run.status}; leave it out")
    baseline = None
    if run.baseline is not None and run.baseline.finished:
        baseline = (run.baseline, run.baseline.finished[0].index, _existing(folder / PICTURES["baseline"]))
    found = _search(str(folder), run.tree, run.result, run.options, baseline, _existing(folder / PICTURES["best"]))
    return found if not found.samples else replace(found, samples=_with_later(found.samples, run))


def _with_later(samples: Sequence[Sample], run: SavedRun) -> tuple[Sample, ...]:
    """Independent samples with the scores too that `tsdiff rescore` gave them. Answers are held against plain samples, which have none."""
    later = [{name: value.score for name, rescored in read_rescored(run.path).items() if (value := rescored.values.get(node.index)) and value.score is not None} for node in run.tree.finished]
    return tuple(replace(sample, scores={**more, **sample.scores}) for sample, more in zip(samples, later, strict=True))


def _existing(path: Path) -> Path | None:
    return path if path.exists() else None


def _search(
    source: str, tree: SavedTree, result: Mapping[str, Any], options: Mapping[str, Any], baseline: tuple[SavedTree, int, Any] | None, picture: Any
) -> Search:
    if result["relative"]:
        raise UsageError(f"{source}: verifier {result['verifier']} scores relative to each search's own samples, so that budgets cannot be compared")
    budget = options.get("nfe_budget")
    if options.get("total_nfe") is not None:
        budget = options["total_nfe"] // options["runs"]
    plain = None
    if baseline is not None:
        plain_tree, leaf, plain_picture = baseline
        plain = Sample(plain_tree.ledger["nfe"], _scores(plain_tree.nodes[leaf]), plain_picture)
    return Search(
        source=source,
        condition=tree.condition,
        seed=tree.seed or 0,
        model=result["model"],
        policy=result["policy"],
        verifier=result["verifier"],
        budget=result["nfe"] if budget is None else budget,
        answer=Sample(result["nfe"], _scores(tree.at(result["node"])), picture),
        plain=plain,
        samples=_independent(tree),
    )


def _scores(node: SavedNode) -> dict[str, float]:
    return {name: value.score for name, value in node.values.items() if value.score is not None}


def _independent(tree: SavedTree) -> tuple[Sample, ...]:
    """The finished samples of a tree of plain chains, each from a first noise of its own; nothing of any other tree."""
    for node in tree.nodes:
        fresh = node.move.kind == "draw" and isinstance(node.move.noise, (Fresh, Torch, Given, NoneType))
        if node.draft or len(node.children) > 1 or not (fresh if node.parent is None else node.move.kind == "denoise"):
            return ()
    samples = []
    for node, nfe in zip(tree.nodes, tree.path_costs(), strict=True):
        if node.children or node.failed:
            continue
        if node.level == tree.last:
            samples.append(Sample(nfe, _scores(node)))
        elif nfe:
            return ()  # begun and given up: a choice was made on the way
    return tuple(samples)


# Pictures ------------------------------------------------------------------------------------------------------------


def pixels(picture: Image | Path) -> Tensor:
    """A picture as (3, H, W) in [0, 1]. Raises PictureError if its file cannot be used."""
    from tsdiff.treesearch.picturefiles import read_picture

    if isinstance(picture, Path):
        return read_picture(picture)
    import numpy as np
    import torch

    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255.0).permute(2, 0, 1).contiguous()


def image_batches(pictures: Sequence[Image | Path]) -> Iterator[Tensor]:
    """Pictures in order, as images (B, 3, H, W) of equal size, `BATCH` at most."""
    import torch

    held: list[Tensor] = []
    for picture in pictures:
        one = pixels(picture)
        if held and (one.shape != held[0].shape or len(held) == BATCH):
            yield torch.stack(held)
            held = []
        held.append(one)
    if held:
        yield torch.stack(held)


def judge_pictures(verifier: Verifier, pictures: Sequence[Image | Path], conditions: Sequence[Condition], device: str) -> list[Value]:
    """A verifier's values of pictures on their own.

    Raises:
      UsageError: if it reads more than pictures and prompts, or scores whole sets.
    """
    from tsdiff.treesearch.pictures import score_pictures, unfit

    reason = unfit(verifier)
    if reason:
        raise UsageError(f"verifier {verifier.name} {reason}, or name it with --verifier, after the first, when the search runs")
    for condition in conditions:
        verifier.check(condition)
    verifier.prepare(device)
    values: list[Value] = []
    for images in image_batches(pictures):
        few = conditions[len(values) : len(values) + len(images)]
        values += [value[verifier.name] for value in score_pictures([verifier], list(images), few, device=device)]
    return values
