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
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdiff.treesearch.errors import SetupError, TsdiffWarning, UsageError
from tsdiff.treesearch.journal import JournalReader, Position, Tail
from tsdiff.treesearch.lock import holder
from tsdiff.treesearch.rescored import Rescored, read_rescored
from tsdiff.treesearch.runfacts import result_of
from tsdiff.treesearch.runfile import JOURNAL, SEGMENTS
from tsdiff.treesearch.runfolder import BASELINE, LATENTS, PICTURES, RUN, TREE, VIDEOS, LatentsFile, lock_path, read_json
from tsdiff.treesearch.savedtree import WRONG, SavedNode, SavedTree
from tsdiff.treesearch.segmentfile import read, segment_path
from tsdiff.treesearch.video import read_video

if TYPE_CHECKING:
    import networkx as nx
    from PIL.Image import Image
    from torch import Tensor

_TREES = {"search": TREE, "baseline": BASELINE}
_SEAL = len(b',"crc32":"00000000"}\n')
_PATIENCE = 3
"""How often a journal that is being written is read again where it looks damaged: a line may be seen half written."""


@dataclass(frozen=True)
class Update:
    """What `SavedRun.refresh` has found; false where nothing is new.

    Attributes:
      nodes: of each tree by its line ("search", "baseline"), those that are new or have changed, by index.
      status: the status has changed.
      restarted: what was read before is no longer there (the end of a journal was lost to a power cut, say); everything was read
        again, and nodes that were given out before are not part of the trees any more.
    """

    nodes: Mapping[str, tuple[SavedNode, ...]] = field(default_factory=dict)
    status: bool = False
    restarted: bool = False

    def __bool__(self) -> bool:
        return bool(self.nodes) or self.status or self.restarted


class SavedRun:
    """One search of one prompt under one seed, as it lies on disk. `load_run` makes it.

    Attributes:
      path: its folder.
      facts: what `run.json` says; what the journal says of the run, where that cannot be read.
      status: "done", "failed", "interrupted" (stopped on request), "running", or "killed" (it says that it is running, and
        nobody holds its lock).
      place: up to where its journal was read; None where it was not.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts: dict[str, Any] = {}
        self.status = ""
        self.place: Position | None = None
        self._known: tuple[int, ...] | None = None  # which run.json the facts are from
        self._trees: dict[str, SavedTree] | None = None
        self._from_files = False
        self._wrong: dict[str, str] = {}  # by file, what cannot be read
        self._tail: Tail | None = None
        self._mark = b""  # the checksum of the line before `place`
        self._limit: int | None = None  # the last group that makes sense, where a later one does not
        self._ends: tuple[int, int] = (0, 0)  # where the journal says that the segments end
        self._file: tuple[tuple[int, ...], LatentsFile] | None = None  # the latents that were kept
        self._read_facts()

    # What is known ----------------------------------------------------------------------------------------------

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
        return _mapping(self.facts.get("options"))

    @property
    def arguments(self) -> dict[str, Any]:
        """What the search was called with, as far as that differs from the defaults."""
        return _mapping(self.facts.get("arguments"))

    @property
    def policy(self) -> str:
        """The policy's name; "" where it is not known. `options["policy"]` has its parameters too."""
        return str(_mapping(self.options.get("policy")).get("name", ""))

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
        if self._trees is None:
            self.refresh()
        assert self._trees is not None
        return self._trees

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
        found = [*self._wrong.values()]
        trees = self.trees
        if self._tail is not None and (self._tail.damaged or self.status != "running"):
            found.append(f"{JOURNAL}: {self._tail}")
        if not self._from_files and self.status in ("interrupted", "killed") and any(tree.places for tree in trees.values()):
            found += self._short_segments()
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
        calls: dict[str, int] = _mapping(result.get("verifier_calls"))
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

    # Reading ----------------------------------------------------------------------------------------------------

    def refresh(self) -> Update:
        """Read what is new since last time. Costs as much as what is new; what was read before is not read again.

        Raises:
          UsageError: if nothing of the run can be read.
        """
        status = self.status
        restarted = self._read_facts() and self._from_files  # what was done has been begun again, to grow it further
        if restarted:
            self._trees = self.place = None
        if self._trees is None:
            whole = self.status == "done" or ((self.path / TREE).exists() and not (self.path / JOURNAL).exists())
            self._from_files = whole and self._read_files()
        touched: dict[str, set[int]] = {}
        if not self._from_files:
            restarted |= self._read_journal(touched)
        if self._trees is None or not (self.facts or self._from_files or self.place):
            raise UsageError(self._unreadable())
        trees = self._trees
        if restarted:
            touched = {line: set(range(len(tree.nodes))) for line, tree in trees.items()}
        nodes = {line: tuple(trees[line].nodes[index] for index in sorted(indices)) for line, indices in touched.items() if indices}
        return Update(nodes, status != self.status, restarted)

    def _read_facts(self) -> bool:
        """Read `run.json` if it has changed, and see who writes; whether it has changed."""
        changed = False
        while True:
            stamp = _stamp(self.path / RUN)
            if stamp != self._known or not self.status:
                self._known, changed = stamp, True
                self._wrong.pop(RUN, None)
                try:
                    self.facts = read_json(self.path / RUN)
                except UsageError as error:  # what was known stays known
                    self._wrong[RUN] = str(error) if stamp else f"{RUN} is missing"
            word = self.facts.get("status")
            if word in ("done", "failed", "interrupted"):
                self.status = word
            elif "status" not in self.facts and (self.path / TREE).exists():
                self.status = "done"
            else:
                self.status = "running" if self._written() else "killed"
            if self.status != "killed" or _stamp(self.path / RUN) == self._known:  # it may have ended in between
                return changed

    def _written(self) -> bool:
        try:
            return holder(lock_path(self.path)) is not None
        except (UsageError, SetupError):  # a file system without locks tells nothing, and reading needs none
            return True

    def _read_files(self) -> bool:
        """Read the trees of a run that is done; whether that of the search could be read."""
        trees = {}
        for line, name in _TREES.items():
            self._wrong.pop(name, None)
            if line != "search" and not (self.path / name).exists():
                continue
            try:
                trees[line] = SavedTree.from_json(read_json(self.path / name))
            except UsageError as error:
                self._wrong[name] = str(error) if (self.path / name).exists() else f"{name} is missing"
            except WRONG as error:
                self._wrong[name] = f"{str(self.path / name)!r} cannot be read ({type(error).__name__}: {error})"
        if "search" not in trees:
            return False
        self._trees = trees
        answer = self.result.get("node")
        if type(answer) is int and 0 <= answer < len(trees["search"].nodes):
            trees["search"].answer = answer
        if "baseline" in trees and trees["baseline"].best is None:  # it has a sample, and no verifier could score it
            trees["baseline"].answer = next((node.index for node in trees["baseline"].finished), None)
        return True

    def _read_journal(self, touched: dict[str, set[int]]) -> bool:
        """Read the groups that are new; whether everything had to be read again."""
        path = self.path / JOURNAL
        restarted = self._trees is not None and self.place is not None and not self._goes_on(path)
        if self._trees is None or restarted:
            self._limit = None
            self._begin()
        for _ in range(_PATIENCE):
            try:
                sense = self._read_groups(path, touched)
            except UsageError as error:
                if self._wrong.get(JOURNAL) is None and (path.exists() or self._wrong):
                    self._wrong[JOURNAL] = str(error)
                break
            self._wrong.pop(JOURNAL, None)
            if not sense:  # the tree is half grown: make it again, up to where it is whole
                restarted = restarted or self.place is not None
                self._begin()
                touched.clear()
                self._read_groups(path, touched)
            if self._tail is None or not self._tail.damaged or self.status != "running":
                break
        if self._limit is not None:
            self._wrong[JOURNAL] = f"{JOURNAL}: group {self._limit + 1} makes no sense; it and what follows is left out"
        return restarted

    def _begin(self) -> None:
        """Forget what was read of the journal."""
        self.place, self._tail, self._mark = None, None, b""
        self._trees = {}
        self._tree("search")

    def _tree(self, line: str) -> SavedTree:
        assert self._trees is not None
        if line not in self._trees:
            steps = self.options.get("steps")
            try:
                tree = SavedTree(self._head(), line=line, last=steps if type(steps) is int else 0)
            except WRONG as error:
                self._wrong["schedule"] = f"{RUN}: its schedule makes no sense ({type(error).__name__}: {error})"
                tree = SavedTree({}, line=line, last=steps if type(steps) is int else 0)
            self._trees[line] = tree
        return self._trees[line]

    def _head(self) -> dict[str, Any]:
        """What a tree is from its beginning, from whatever says so."""
        verifiers = self.options.get("verifiers") or [""]
        known = {"prompt": self.facts.get("prompt"), "seed": self.facts.get("seed"), "solver": self.options.get("solver"), "verifier": verifiers[0]}
        return known | _mapping(self.facts.get("tree"))

    def _read_groups(self, path: Path, touched: dict[str, set[int]]) -> bool:
        """Grow the trees by the groups after `place`; false where one makes no sense."""
        reader = JournalReader(path, after=self.place)
        if not self.facts and isinstance(reader.about, dict):  # run.json cannot be read
            self.facts = dict(reader.about)
            self._begin()
        self.place = self.place or reader.start
        try:
            for group in reader:
                if self._limit is not None and group.number > self._limit:
                    break
                try:
                    for record in group.records:
                        self._apply(record, touched)
                except WRONG:
                    self._limit = group.number - 1
                    return False
                self.place = group.end
            self._tail = reader.tail
        finally:
            self._mark = b"" if self.place is None else _seal(path, self.place)
        return True

    def _apply(self, record: Any, touched: dict[str, set[int]]) -> None:
        tree = self._tree(_line(record["tree"]))
        touched.setdefault(tree.line, set()).update(tree.apply(record))
        segment, offset = record.get("segments", self._ends)
        self._ends = int(segment), int(offset)

    def _goes_on(self, path: Path) -> bool:
        """Whether the journal still has what was read of it."""
        assert self.place is not None
        return _seal(path, self.place) == self._mark

    def _unreadable(self) -> str:
        why = self._wrong.get(JOURNAL) or self._wrong.get(RUN) or "it holds no file of a run"
        if self._tail is not None:
            why = f"{JOURNAL}: {self._tail}"
        return f"nothing of the run {str(self.path)!r} can be read: {why}"

    def _short_segments(self) -> list[str]:
        last, offset = self._ends
        folder, missing = self.path / SEGMENTS, []
        for number in sorted({place.segment for tree in self.trees.values() for place in tree.places.values()}):
            path = segment_path(folder, number)
            size = path.stat().st_size if path.exists() else -1
            if number == last and 0 <= size < offset:
                missing.append(f"{SEGMENTS}/{path.name} ends at byte {size}, where the journal knows of {offset}")
            elif number == last and size < offset and folder.is_dir() and not (self.path / LATENTS).exists():  # that has those of ended drivers
                missing.append(f"{SEGMENTS}/{path.name} is missing")
        return missing

    def _latents_file(self) -> LatentsFile | None:
        """The file of the latents that were kept; None while there is none."""
        path = self.path / LATENTS
        stamp = _stamp(path)
        if stamp is None:
            return None
        if self._file is None or self._file[0] != stamp:
            self._file = stamp, LatentsFile(path)
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
    folder = Path(path)
    if not folder.is_dir():
        names = f"; name its folder, {str(folder.parent)!r}" if folder.is_file() else "; `tsdiff list runs` shows those there are"
        raise UsageError(f"{str(folder)!r} is not the folder of a run{names}")
    if not _is_run(folder):
        within = run_folders(folder)
        if not within:
            raise UsageError(f"{str(folder)!r} is not the folder of a run, and holds none")
        if len(within) > 1:
            raise UsageError(f"{str(folder)!r} holds {len(within)} runs; name one of them, such as {str(within[0])!r} (load_runs and `tsdiff list runs` give all)")
        folder = within[0]
    run = SavedRun(folder)
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


def run_folders(folder: Path) -> list[Path]:
    """The run folders in a folder (or that folder itself) and the folders in it, in the order of their names.

    Raises:
      UsageError: if there is no such folder, or it cannot be read.
    """
    if not folder.is_dir():
        raise UsageError(f"there is no folder {str(folder)!r}")
    found: list[Path] = []

    def fail(error: OSError) -> None:
        raise UsageError(f"cannot read {error.filename!r} ({error.strerror}); check its permissions") from None

    for parent, names, _ in os.walk(folder, onerror=fail):
        names.sort()
        if _is_run(Path(parent)):
            found.append(Path(parent))
            names.clear()
    return found


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (RUN, JOURNAL, TREE))


def _size(folder: Path) -> int:
    """Bytes of all files; of those that go meanwhile, none."""
    size = 0
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                size += _size(Path(entry.path)) if entry.is_dir(follow_symlinks=False) else entry.stat(follow_symlinks=False).st_size
    return size


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What changes when a file does."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_size, facts.st_ino


def _seal(path: Path, place: Position) -> bytes:
    """The end of the line before a place of a journal, with its checksum."""
    try:
        with path.open("rb") as file:
            file.seek(place.offset - _SEAL)
            return file.read(_SEAL)
    except OSError:
        return b""


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _printable(name: str) -> str:
    """A name in one line without control characters."""
    return name if name.isprintable() else repr(name)[1:-1]


def _line(value: Any) -> str:
    if type(value) is not str:
        raise TypeError("a tree's name is text")
    return value
