"""What a search gives back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdiff.treesearch.disk import LOCAL, Disk
from tsdiff.treesearch.history import Origin, image_texts
from tsdiff.treesearch.ledger import EngineLedger, TreeLedger
from tsdiff.treesearch.node import Node, Value
from tsdiff.treesearch.protocols import Condition, ModelOutline, VideoOutline
from tsdiff.treesearch.runfolder import FORMAT, PICTURES, VIDEOS, write_file, write_image, write_json, write_latents
from tsdiff.treesearch.tree import Tree
from tsdiff.treesearch.video import Video, is_video, read_video

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from tsdiff.treesearch.basepool import Calibrated
    from tsdiff.treesearch.forest import Forest


def to_pil(pixels: Tensor) -> Image:
    """An 8-bit image of pixels (3, H, W) in [0, 1]."""
    from PIL import Image

    array = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().cpu().numpy()
    return Image.fromarray(array)


def shown(pixels: Tensor | None, model: ModelOutline, condition: Condition) -> tuple[Image | None, Video | None]:
    """What people are shown of pixels, as `video.held`: an image, and of a video its frames too."""
    if pixels is None or not is_video(pixels):
        return None if pixels is None else to_pil(pixels), None
    assert isinstance(model, VideoOutline), f"model {model.name!r} decodes videos but has no frame rate"
    video = Video.of(pixels, model.frame_rate(condition))
    return video.still, video


@dataclass
class Result:
    """One search's answer.

    Attributes:
      tree: the whole tree.
      node: the answer, a finished node of the tree.
      score: its value under the steering verifier; None if that failed.
      picture: its image in memory, of a video its middle frame; None where the model makes none, or once it is on disk
        (`image` reads it back).
      video: its frames in memory, where it is a video; None once they are on disk (`frames` reads them back).
      baseline: the plain sample with the same first noise, searched for nothing; None if it was not asked for.
      latents: latents by node index: the path to the answer, where the run was not saved while it ran.
      seconds: wall time from the tree's start to its end (trees share batches).
      path: the run folder, if there is one.
      image_path: the saved image, if there is one.
      video_path: the saved video, if there is one.
      truncated: why the policy was stopped early, if it was.
      relative: the score is relative to the samples of this search (a verifier of scope "set"), so that no other
        sample's can be held against it.
      calibrated: how verifiers came to know the plain samples that they compare with; shared by all runs of a search.
      drivers: what the tree's drivers were and came to, strict JSON: the search itself, then its expansions; empty where
        there are none.
    """

    tree: Tree
    node: Node
    picture: Image | None
    seconds: float
    policy: str
    model: str
    baseline: Result | None = None
    latents: dict[int, Tensor] = field(default_factory=dict)
    path: Path | None = None
    image_path: Path | None = None
    truncated: str | None = None
    relative: bool = False
    calibrated: tuple[Calibrated, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    drivers: list[dict[str, Any]] = field(default_factory=list)
    video: Video | None = None
    video_path: Path | None = None

    @property
    def prompt(self) -> str:
        """The prompt, or the class."""
        return self.tree.condition.label

    @property
    def seed(self) -> int:
        """The seed of all noise."""
        return self.tree.seed

    @property
    def score(self) -> float | None:
        """The answer's value under the steering verifier."""
        return self.node.score(self.tree.verifier)

    @property
    def scores(self) -> Mapping[str, Value]:
        """The answer's values by verifier."""
        return self.node.values

    @property
    def first_score(self) -> float | None:
        """The baseline sample's value; None where there is none, or where values are relative to a search's own samples."""
        return None if self.baseline is None or self.relative else self.baseline.score

    @property
    def parts(self) -> dict[str, tuple[float, float | None]]:
        """The parts of the answer's steering value by name, each with the baseline sample's (None where it has none)."""
        value = self.node.values.get(self.tree.verifier)
        plain = {} if self.baseline is None else self.baseline.parts
        return {name: (part, plain[name][0] if name in plain else None) for name, part in ((value.parts if value else None) or {}).items()}

    @property
    def others(self) -> dict[str, tuple[float | None, float | None]]:
        """What the other verifiers make of the answer, by name, each with the baseline sample's (None where it has none)."""
        plain = {} if self.baseline is None else self.baseline.node.values
        names = [name for name in self.node.values if name != self.tree.verifier and "@" not in name]
        return {name: (self.node.values[name].score, plain[name].score if name in plain else None) for name in names}

    @property
    def ledger(self) -> TreeLedger:
        """What the search has spent."""
        return self.tree.ledger

    @property
    def baseline_ledger(self) -> TreeLedger | None:
        """What the baseline sample has spent; never part of `ledger`."""
        return None if self.baseline is None else self.baseline.tree.ledger

    @property
    def complete(self) -> bool:
        """Whether the answer (and the baseline, if asked for) has a score."""
        return self.score is not None and (self.baseline is None or self.baseline.score is not None)

    @property
    def image(self) -> Image | None:
        """The answer as a PIL image; None where the model makes none."""
        if self.picture is None and self.image_path is not None:
            from PIL import Image

            with Image.open(self.image_path) as opened:
                return opened.copy()
        return self.picture

    @property
    def frames(self) -> list[Image]:
        """The frames of the answer, where it is a video; an image is the only one of its own. Empty where the model makes none."""
        if self.video is None and self.video_path is not None:
            return read_video(self.video_path).images()
        image = self.image
        return self.video.images() if self.video is not None else [] if image is None else [image]

    def save(self, path: str | Path) -> Path:
        """Write the result into a new or empty folder; returns it. See `tsdiff.treesearch.runfolder`.

        Raises:
          FileExistsError: if the folder holds anything.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise FileExistsError(f"{str(folder)!r} is not empty; choose a new folder")
        from tsdiff.treesearch.durable import lasting

        self.write(folder, origin=Origin(lasting(self.options), run=folder.name))
        return folder

    def write(self, folder: Path, *, origin: Origin, facts: Mapping[str, Any] | None = None, disk: Disk = LOCAL) -> None:
        """Write everything but latents that were saved while the search ran.

        Args:
          folder: is there.
          origin: what the images say of where they come from, unless `options["metadata"]` is False.
          facts: what `run.json` says of the run beside its result.
          disk: through which files are changed.
        """
        self.path = folder
        write_tree(folder / "tree.json", self.tree, disk=disk)
        told = origin if self.options.get("metadata", True) else None
        self._write_image(folder / "best.png", told, disk)
        if self.baseline is not None:
            write_tree(folder / "baseline.json", self.baseline.tree, disk=disk)
            self.baseline._write_image(folder / "baseline.png", told, disk)
        if self.latents and not (folder / "latents.safetensors").exists():
            write_latents(folder / "latents.safetensors", [f"node/{index}" for index in self.latents], lambda name: self.latents[int(name[5:])], disk=disk)
        known = {"format": FORMAT, "options": self.options} if facts is None else facts
        write_json(folder / "run.json", {**known, "status": "done", "result": self.to_json()}, disk=disk)

    def update_image(self, folder: Path, origin: Origin, *, changed: bool, disk: Disk = LOCAL) -> None:
        """Replace the saved image, where the answer has changed since; without a picture of the new one there is none."""
        path = folder / "best.png"
        if changed and self.picture is not None:
            self._write_image(path, origin if self.options.get("metadata", True) else None, disk)
        elif changed:
            for old in (path, folder / VIDEOS["best"]):
                if old.exists():
                    disk.remove(old)
        self.picture = self.video = None
        self.found(folder)

    def found(self, folder: Path) -> None:
        """All of it has been written into a folder before."""
        self.path = folder
        for result, which in ((self, "best"), (self.baseline, "baseline")):
            if result is not None and (folder / PICTURES[which]).exists():
                result.image_path = folder / PICTURES[which]
            if result is not None and (folder / VIDEOS[which]).exists():
                result.video_path = folder / VIDEOS[which]

    def _write_image(self, path: Path, origin: Origin | None, disk: Disk) -> None:
        """Move the image, and the video that it is of, from memory to disk: many results may not fit in memory."""
        image, film = self.image, path.with_suffix(".webp")
        if self.video is not None or self.video_path is not None:
            write_file(film, [self.video.file() if self.video is not None else self.video_path.read_bytes()], disk=disk)  # type: ignore[union-attr]
            self.video_path, self.video = film, None
        if image is not None:
            write_image(path, image, None if origin is None else image_texts(self, origin, image.size), disk=disk)
            self.image_path, self.picture = path, None

    def to_json(self) -> dict[str, Any]:
        """The result as strict JSON."""
        values = {name: value.to_json() for name, value in sorted(self.node.values.items())}
        return {
            "prompt": self.prompt,
            "seed": self.seed,
            "model": self.model,
            "policy": self.policy,
            "verifier": self.tree.verifier,
            "image": None if self.image_path is None else str(self.image_path),
            **({} if self.video_path is None else {"video": str(self.video_path)}),
            "score": self.score,
            "scores": values,
            "first_score": self.first_score,
            "first_scores": {} if self.baseline is None or self.relative else self.baseline.to_json()["scores"],
            "node": self.node.index,
            "nodes": len(self.tree.nodes),
            "failed_nodes": sum(node.failed for node in self.tree.nodes),
            "complete": self.complete,
            "truncated": self.truncated,
            "relative": self.relative,
            "calibrated": [one.to_json() for one in self.calibrated],
            "nfe": self.ledger.nfe,
            "rows": self.ledger.rows,
            "decodes": self.ledger.decodes,
            "verifier_calls": dict(sorted(self.ledger.verifier_calls.items())),
            "baseline_nfe": None if self.baseline_ledger is None else self.baseline_ledger.nfe,
            "seconds": round(self.seconds, 3),
            "run": None if self.path is None else str(self.path),
        }

    def __repr__(self) -> str:
        score = "no score" if self.score is None else f"{self.tree.verifier} {self.score:.4g}"
        first = "" if self.first_score is None else f" (one sample: {self.first_score:.4g})"
        return f"<Result {self.prompt!r} seed {self.seed}: {score}{first}, {self.ledger.nfe} NFE, {len(self.tree.nodes)} nodes>"

    def _repr_html_(self) -> str:
        import base64
        import html
        import io

        cells = []
        for title, one in (("searched", self), ("one sample", self.baseline)):
            if one is None:
                continue
            picture = ""
            if one.image is not None:
                buffer = io.BytesIO()
                one.image.save(buffer, format="PNG")
                picture = f'<img style="max-width:256px" alt="{title}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"><br>'
            score = "no score" if one.score is None else f"{one.score:.4g}"
            cells.append(f"<td>{picture}{title}: {html.escape(self.tree.verifier)} {score}, {one.ledger.nfe} NFE</td>")
        return f"<table><caption>{html.escape(self.prompt)}</caption><tr>{''.join(cells)}</tr></table>"


def write_tree(path: Path, tree: Tree, *, disk: Disk = LOCAL) -> None:
    """Write a tree node by node: as JSON objects, all nodes of a large one would take much more memory than the tree."""
    write_json(path, tree.facts() | {"nodes": (node.to_json() for node in tree.nodes)}, disk=disk)


@dataclass(frozen=True)
class Failure:
    """A search that ended without an answer."""

    prompt: str
    seed: int
    error: BaseException

    @property
    def message(self) -> str:
        """What went wrong, in one line."""
        return " ".join(str(self.error).split()) or type(self.error).__name__


@dataclass
class Results(Sequence[Result]):
    """The results of several searches, prompt-major, then by seed.

    Attributes:
      engine: what the engine did for all of them together.
      failures: the searches that ended without an answer.
      path: the folder of run folders, if there is one.
      notices: what came up while it ran (a prompt that was cut, say), for the user.
      forest: how one budget was shared among the searches; None where each had its own.
      calibrated: how verifiers came to know the plain samples that they compare with.
    """

    results: list[Result]
    engine: EngineLedger
    failures: list[Failure] = field(default_factory=list)
    path: Path | None = None
    seconds: float = 0.0
    notices: tuple[str, ...] = ()
    forest: Forest | None = None
    calibrated: tuple[Calibrated, ...] = ()

    @property
    def nfe(self) -> int:
        """NFE of all searches together, baselines not included; of those that failed too where they shared one budget."""
        if self.forest is not None:
            return sum(tree.ledger.nfe for tree in self.forest.trees)
        return sum(result.ledger.nfe for result in self.results)

    def __len__(self) -> int:
        return len(self.results)

    def __getitem__(self, index: Any) -> Any:
        return self.results[index]

    def __iter__(self) -> Iterator[Result]:
        return iter(self.results)

    def __repr__(self) -> str:
        return f"<Results of {len(self.results)} searches, {len(self.failures)} failed>"

    def _repr_html_(self) -> str:
        return "".join(result._repr_html_() for result in self.results)
