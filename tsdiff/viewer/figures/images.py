"""The pictures that a run has kept of the nodes of its search, and how a node is called beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.previewfile import DamagedRecord, Preview, read_previews
from tsdiff.treesearch.savedtree import SavedNode
from tsdiff.viewer.records import scores

if TYPE_CHECKING:
    from PIL.Image import Image

    from tsdiff.treesearch.saved import SavedRun


class Pictures:
    """Pictures of the nodes of a run's search: the answer's own image, of others their previews.

    Attributes:
      damaged: a line for each that could not be read.

    Raises:
      UsageError: if the file of previews cannot be read.
    """

    def __init__(self, run: SavedRun) -> None:
        self.run = run
        self.damaged: list[str] = []
        kept = read_previews(run.path)
        ids = {node.index: f"{node.id:032x}" for node in run.nodes}
        self._previews: dict[int, Preview] = {
            preview.node: preview for preview in kept.values() if preview.tree == "search" and ids.get(preview.node) == preview.id
        }
        self.answer = None if run.best is None or run.status != "done" or not run.result.get("image") else run.best.index

    def nodes(self) -> list[SavedNode]:
        """The nodes that have a picture, by index."""
        return [node for node in self.run.nodes if node.index in self._previews or node.index == self.answer]

    def image(self, node: SavedNode) -> Image | None:
        """The picture of a node in RGB; None if it has none, or it cannot be read."""
        if node.index == self.answer:
            try:
                return self.run.image().convert("RGB")
            except (UsageError, OSError) as error:
                self._tell(str(error))
        preview = self._previews.get(node.index)
        if preview is None:
            return None
        try:
            return preview.image()
        except (DamagedRecord, UsageError) as error:
            self._tell(str(error))
            return None

    def __len__(self) -> int:
        return len(self.nodes())

    def _tell(self, text: str) -> None:
        if text not in self.damaged:
            self.damaged.append(text)


def thumbnail(image: Image, side: int) -> Image:
    """An image of which no side is longer than `side` pixels; smaller ones grow to it, sharply if they are very small."""
    from PIL.Image import Resampling

    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    if size == image.size:
        return image
    return image.resize(size, Resampling.NEAREST if scale >= 4.0 else Resampling.LANCZOS)


def score_of(run: SavedRun, node: SavedNode) -> float | None:
    """What the verifier that steers says of a node, or of its look-ahead; None if it says nothing."""
    return scores(node).get(run.verifier)


def answer_path(run: SavedRun) -> list[SavedNode]:
    """The nodes from the root to the best sample; empty while there is none."""
    return [] if run.best is None else run.path_to(run.best)
