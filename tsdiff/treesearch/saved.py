"""Saved runs: `load_run` reads a run folder, whatever state it is in. Reading takes no lock and changes nothing.

    run = tsdiff.load_run("runs/run-0001")
    run.status, run.best.values, run.path_to(run.best), run.image(), run.latent(run.best)
    run.to_networkx(), run.to_pandas()

A run that is done is read from `tree.json`. One that goes on, or was interrupted, killed or damaged, is read from its journal,
as far as that is whole; `refresh` later reads what has come since. What is damaged is told in `damage`, and the rest is given.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdiff.treesearch.errors import SetupError, TsdiffWarning, UsageError
from tsdiff.treesearch.findruns import run_folder, run_folders
from tsdiff.treesearch.journal import Position
from tsdiff.treesearch.rescored import Rescored, read_rescored
from tsdiff.treesearch.runfacts import result_of
from tsdiff.treesearch.runfile import SEGMENTS
from tsdiff.treesearch.runfolder import LATENTS, PICTURES, RUN, VIDEOS, LatentsFile
from tsdiff.treesearch.runreader import RunReader, Update, mapping, stamp
from tsdiff.treesearch.savedtree import SavedNode, SavedTree
from tsdiff.treesearch.segmentfile import read
from tsdiff.treesearch.video import read_video

if TYPE_CHECKING:
    import networkx as nx
    from PIL.Image import Image
    from torch import Tensor


class SavedRun:
    """One search of one prompt under one seed, as it lies on disk. `load_run` makes it.

    Attributes:
      path: its folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = RunReader(path)
        self._file: tuple[tuple[int, ...], LatentsFile] | None = None  # the latents that were kept

    def refresh(self) -> Update:
        """Read what is new since last time. Costs as much as what is new; what was read before is not read again.

        Raises:
          UsageError: if nothing of the run can be read.
        """
        return self._reader.refresh()

    # What is known ----------------------------------------------------------------------------------------------

    @property
    def facts(self) -> dict[str, Any]:
        """What `run.json` says; what the journal says of the run, where that cannot be read."""
        return self._reader.facts

    @property
    def status(self) -> str:
        """One of "done", "failed", "interrupted" (stopped on request), "running", and "killed": it says that it is running, and nobody holds its lock."""
        return self._reader.status

    @property
    def place(self) -> Position | None:
        """Up to where its journal was read; None where it was not."""
        return self._reader.place

    @property
    def prompt(self) -> str:
        """The prompt, or the class."""
        return str(self.facts.get("prompt") or self.tree.prompt)

    @property
    def seed(self) -> int | None:
        """The seed of all noise."""
        seed = self.facts.get("seed")
        return seed if isinstance(seed, int) else self.tree.seed

    @property
    def options(self) -> dict[str, Any]:
        """The options as resolved."""
        return mapping(self.facts.get("options"))

    @property
    def arguments(self) -> dict[str, Any]:
        """What the search was called with, as far as that differs from the defaults."""
        return mapping(self.facts.get("arguments"))

    @property
    def policy(self) -> str:
        """The policy's name; "" where it is not known. `options["policy"]` has its parameters too."""
        return str(mapping(self.options.get("policy")).get("name", ""))

    @property
    def model(self) -> str:
        """The model's name; "" where it is not known."""
        return str(self.options.get("model") or "")

    @property
    def verifier(self) -> str:
        """The verifier that steers."""
        return self.result["verifier"] if isinstance(self.result.get("verifier"), str) else self.tree.verifier

    @property
    def result(self) -> dict[str, Any]:
        """What a run that is done says of its result; empty until then."""
        return result_of(self.facts)

    @property
    def error(self) -> str | None:
        """Why there is no result, where the search has failed."""
        error = self.facts.get("error") or self.tree.error
        return None if error is None else str(error)

    @property
    def truncated(self) -> str | None:
        """Why the policy was stopped early, if it was."""
        truncated = self.result.get("truncated") or self.tree.truncated
        return None if truncated is None else str(truncated)

    @property
    def relative(self) -> bool:
        """Whether scores are relative to the samples of this search, so that no other sample's can be held against them."""
        return bool(self.result.get("relative", self.facts.get("relative", False)))

    @property
    def rescored(self) -> dict[str, Rescored]:
        """What other verifiers said of the tree later (`tsdiff rescore`), by their names; `node.values` has what the search was told.

        Raises:
          UsageError: if such a file is damaged.
        """
        return read_rescored(self.path)

    @property
    def tree(self) -> SavedTree:
        """The tree of the search."""
        return self.trees["search"]

    @property
    def baseline(self) -> SavedTree | None:
        """The tree of the plain sample that the search is compared with; None where there is none (yet)."""
        return self.trees.get("baseline")

    @property
    def trees(self) -> Mapping[str, SavedTree]:
        """All trees by their lines: "search", "baseline"."""
        return self._reader.trees

    @property
    def nodes(self) -> list[SavedNode]:
        """The nodes of the search, by index."""
        return self.tree.nodes

    @property
    def ledger(self) -> dict[str, Any]:
        """What the search has spent, the baseline not included: `nfe`, `rows`, `encodes`, `decodes`, `verifier_calls`."""
        return self.tree.ledger

    @property
    def best(self) -> SavedNode | None:
        """The answer, or the best finished sample so far; None while there is none."""
        return self.tree.best

    @property
    def score(self) -> float | None:
        """The steering verifier's score of the best sample."""
        return self.tree.score

    @property
    def first_score(self) -> float | None:
        """The baseline sample's score; None where there is none, or where scores are relative to a search's own samples."""
        return None if self.baseline is None or self.relative else self.baseline.score

    @property
    def seconds(self) -> float | None:
        """Wall time of the search; None until it is done."""
        seconds = self.result.get("seconds")
        return float(seconds) if isinstance(seconds, (int, float)) else None

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return _size(self.path)

    @property
    def damage(self) -> tuple[str, ...]:
        """What is damaged or missing, a line each; empty if all is well."""
        found = self._reader.damage()
        if self.facts.get("status") == "done" and not self.result:
            found.append(f"{RUN}: its result is missing or makes no sense")
        if self.status == "done":
            named = {"best": self.result.get("image"), "baseline": self.result.get("image") and self.baseline}
            found += [f"{file} is missing" for which, file in PICTURES.items() if named[which] and not (self.path / file).exists()]
            films = {"best": self.result.get("video"), "baseline": self.result.get("video") and self.baseline}
            found += [f"{file} is missing" for which, file in VIDEOS.items() if films[which] and not (self.path / file).exists()]
        return tuple(found)

    def path_to(self, node: SavedNode | int) -> list[SavedNode]:
        """The nodes of the search from the root to a node."""
        return self.tree.path(self._node(node))

    def summary(self) -> dict[str, Any]:
        """The run in one row: plain values, None where something is not known."""
        result = self.result if self.status == "done" else {}
        if not result:
            ledger = self.ledger
            result = {"verifier": self.verifier, "score": self.score, "first_score": self.first_score, **ledger}
        calls: dict[str, int] = mapping(result.get("verifier_calls"))
        return {
            "prompt": self.prompt,
            "seed": self.seed,
            "policy": self.policy or result.get("policy"),
            "model": self.model or result.get("model"),
            "verifier": result.get("verifier"),
            "score": result.get("score"),
            "baseline": result.get("first_score"),
            "nfe": result.get("nfe"),
            "rows": result.get("rows"),
            "decodes": result.get("decodes"),
            "calls": sum(calls.values()),
            "seconds": self.seconds,
            "status": self.status,
        }

    # Tensors, pictures, tables ----------------------------------------------------------------------------------

    def latent(self, node: SavedNode | int) -> Tensor:
        """The latent of a node of the search, on the CPU, without batch axis.

        Raises:
          UsageError: if it was not kept (`--keep`), or cannot be read any more.
        """
        for _, latent in self.latents([node]):
            return latent
        raise UsageError(f"{str(self.path)!r} has not kept the latent of node {self._node(node).index}; `--keep all` keeps those of all nodes but drafts and failed ones")

    def latents(self, nodes: Iterable[SavedNode | int] | None = None) -> Iterator[tuple[SavedNode, Tensor]]:
        """Nodes of the search that have kept their latents, with them, one at a time.

        Args:
          nodes: which; None for all.

        Raises:
          UsageError: if one was kept and cannot be read any more.
        """
        file = self._latents_file()
        for node in map(self._node, self.nodes if nodes is None else nodes):
            if file is not None and f"node/{node.index}" in file:
                yield node, file.read(f"node/{node.index}")
            elif file is None and (place := self.tree.places.get(node.index)) is not None:
                yield node, read(self.path / SEGMENTS, place)[1].tensor()

    def image(self, which: str = "best") -> Image:
        """The picture of the answer, or of the plain sample ("baseline"), as a PIL image.

        Raises:
          UsageError: if there is none, or it cannot be read.
        """
        from PIL import Image as pil

        if which not in PICTURES:
            raise UsageError(f"image is {which!r} but must be {' or '.join(PICTURES)}")
        try:
            with pil.open(self.path / PICTURES[which]) as opened:
                return opened.copy()
        except FileNotFoundError:
            raise UsageError(f"{str(self.path)!r} has no {PICTURES[which]}; pictures are there when a run is done, if its model makes any") from None
        except (OSError, ValueError, SyntaxError, pil.DecompressionBombError) as error:
            raise UsageError(f"{str(self.path / PICTURES[which])!r} cannot be read: {error}") from None

    def frames(self, which: str = "best") -> list[Image]:
        """All frames of the answer, or of the plain sample ("baseline"), where they are videos; an image is the only one of its own.

        Raises:
          UsageError: if there are none, or they cannot be read.
        """
        path = self.path / VIDEOS.get(which, "")
        if which not in VIDEOS or not path.exists():
            return [self.image(which)]
        try:
            return read_video(path).images()
        except (OSError, ValueError, SyntaxError) as error:
            raise UsageError(f"{str(path)!r} cannot be read: {error}") from None

    def to_networkx(self) -> nx.DiGraph[int]:
        """The tree of the search as a networkx DiGraph: nodes by index, attributes that are plain numbers, text and truth values."""
        return self.tree.to_networkx()

    def to_pandas(self) -> Any:
        """The nodes of the search as a pandas DataFrame, a row each. Raises SetupError without pandas."""
        try:
            pandas = import_module("pandas")
        except ImportError:
            raise SetupError("to_pandas needs pandas, which is not installed; run: pip install pandas") from None
        from tsdiff.treesearch.exports import table

        columns, rows = table(self.tree)
        return pandas.DataFrame(rows, columns=columns)

    def to_json(self) -> dict[str, Any]:
        """Everything but tensors and pictures as strict JSON."""
        return {
            "format": 1,
            "path": str(self.path),
            **self.summary(),
            "truncated": self.truncated,
            "error": self.error,
            "damage": list(self.damage),
            "options": self.options,
            "arguments": self.arguments,
            "best": None if self.best is None else self.best.index,
            "tree": self.tree.to_json(),
            "baseline_tree": None if self.baseline is None else self.baseline.to_json(),
        }

    def __repr__(self) -> str:
        score = "no score yet" if self.score is None else f"{_printable(self.verifier)} {self.score:.4g}"
        first = "" if self.first_score is None else f" (one sample: {self.first_score:.4g})"
        damaged = ", damaged" if self.damage else ""
        return f"<SavedRun {str(self.path)!r} {self.status}{damaged}: {self.prompt!r} seed {self.seed}, {_printable(self.policy)}, {score}{first}, {self.ledger['nfe']} NFE, {len(self.nodes)} nodes>"

    def _repr_html_(self) -> str:
        from tsdiff.treesearch.savedpage import page

        return page(self)

    def _latents_file(self) -> LatentsFile | None:
        """The file of the latents that were kept; None while there is none."""
        path = self.path / LATENTS
        now = stamp(path)
        if now is None:
            return None
        if self._file is None or self._file[0] != now:
            self._file = now, LatentsFile(path)
        return self._file[1]

    def _node(self, node: SavedNode | int) -> SavedNode:
        found = self.tree.at(node if isinstance(node, int) else node.index)
        if found is not node and not isinstance(node, int):
            raise UsageError(f"{node!r} is not a node of this search's tree")
        return found


def load_run(path: str | Path) -> SavedRun:
    """A saved run: one that is done, goes on, was interrupted or killed, or is damaged.

    Reading takes no lock and changes nothing. `refresh()` of the result follows a run that goes on.

    Args:
      path: the run's folder.

    Raises:
      UsageError: if it is no run, holds several, or nothing of it can be read.
    """
    run = SavedRun(run_folder(Path(path)))
    run.refresh()
    return run


def load_runs(folder: str | Path) -> list[SavedRun]:
    """All saved runs in a folder and the folders in it, in the order of their names; one that cannot be read is a warning.

    Raises:
      UsageError: if there is no such folder.
    """
    found = []
    for path in run_folders(Path(folder)):
        try:
            found.append(load_run(path))
        except UsageError as error:
            warnings.warn(f"left out: {error}", TsdiffWarning, stacklevel=2)
    return found


def _size(folder: Path) -> int:
    """Bytes of all files; of those that go meanwhile, none."""
    size = 0
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                size += _size(Path(entry.path)) if entry.is_dir(follow_symlinks=False) else entry.stat(follow_symlinks=False).st_size
    return size


def _printable(name: str) -> str:
    """A name in one line without control characters."""
    return name if name.isprintable() else repr(name)[1:-1]
