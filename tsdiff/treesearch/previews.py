"""Keeping small pictures of nodes while a search goes on: of what was decoded anyway, written beside the search's way.

The engine's loop only makes a picture small; a thread compresses and writes it. When the process is killed, pictures that
were waiting are missing, and nothing else.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tsdiff.treesearch.disk import LOCAL, Disk
from tsdiff.treesearch.errors import TsdiffError
from tsdiff.treesearch.node import Node
from tsdiff.treesearch.previewfile import PREVIEWS, Preview, PreviewFile, compress, quantize, shrink
from tsdiff.treesearch.run import Run
from tsdiff.treesearch.video import still

if TYPE_CHECKING:
    from torch import Tensor

Show: TypeAlias = Literal["kept", "all", "none"]
SHOWS: tuple[Show, ...] = ("kept", "all", "none")

WAITING = 64
"""Pictures that may wait to be written; the search waits for more."""


class PreviewWriter:
    """Writes the previews of the runs of one search, in a thread of its own.

    Pictures of nodes are kept where the nodes' latents are: with `keep` "all" every picture, with "leaves" those of
    finished samples, with "path" those on the way to the answer. Look-ahead leaves belong to the node that looks ahead.
    The way to the answer is known at the end only, so until then all are kept.

    Args:
      show: "all" keeps every picture whatever `keep` says, "none" keeps no picture.
      keep: whose latents are kept: "all", "path", "leaves" or "none".
      disk: through which the files are changed.

    Attributes:
      notice: why pictures are missing, in one line; None if none are.
    """

    def __init__(self, show: Show, keep: str, *, disk: Disk = LOCAL) -> None:
        self.show = show
        self.keep = keep
        self.notice: str | None = None
        self._disk = disk
        self._seen: dict[int, set[int]] = {}
        self._files: dict[Path, PreviewFile] = {}  # the thread's own
        self._work: queue.Queue[tuple[Path, Callable[[], None]] | None] = queue.Queue(WAITING)
        self._thread: threading.Thread | None = None

    def wants(self, run: Run, node: Node) -> bool:
        """Whether a node's picture may be kept, as far as is known before the tree has ended."""
        if self.show == "kept" and self.keep == "leaves":
            return node.level == run.tree.schedule.last and not node.draft
        return self.show == "all" or (self.show == "kept" and self.keep != "none")

    def add(self, folder: Path, run: Run, node: Node, pixels: Tensor) -> None:
        """A node of a run in a folder was decoded: pixels (3, H, W), or (F, 3, H, W) of a video, in [0, 1], on any device."""
        seen = self._seen.setdefault(id(run), set())
        if self.notice is not None or node.index in seen or not self.wants(run, node):
            return
        seen.add(node.index)
        facts = {"tree": run.tree.line, "node": node.index, "id": f"{node.id:032x}"}
        self._do(folder, partial(self._append, folder, facts, shrink(still(pixels))))

    def end(self, folder: Path, run: Run, *, last: bool) -> None:
        """A tree of a folder has ended; with `last`, no other tree uses the folder."""
        self._seen.pop(id(run), None)
        if self._thread is None and not (folder / PREVIEWS).exists():
            return
        if self.show == "kept" and self.keep == "path" and run.answer is not None and not run.done:
            path = {node.index for node in run.answer.path()} | {node.index for node in run.tree.nodes if node.driver != run.tree.driver}
            drafts = {node.index for node in run.tree.nodes if node.draft and node.parent is not None and node.parent.index in path}
            self._do(folder, partial(self._drop, folder, run.tree.line, path | drafts))
        if last and self._thread is not None:
            self._do(folder, partial(self._close, folder))

    def close(self) -> None:
        """Return when all is written; closing twice is fine."""
        if self._thread is not None:
            self._work.put(None)
            self._thread.join()
            self._thread = None

    def _do(self, folder: Path, work: Callable[[], None]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="previews", daemon=True)
            self._thread.start()
        self._work.put((folder, work))

    # In the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            folder, work = item
            if self.notice is None:
                self._try(folder, work)
        for folder in list(self._files):
            self._try(folder, partial(self._close, folder))

    def _try(self, folder: Path, work: Callable[[], None]) -> None:
        """Whatever goes wrong ends the previews, never the search."""
        try:
            work()
        except Exception as error:
            why = error.strerror or str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            what = str(error) if isinstance(error, TsdiffError) else f"{str(folder / PREVIEWS)!r} cannot be written ({why})"
            self.notice = self.notice or f"previews are missing, the search went on without: {' '.join(what.split())}"

    def _append(self, folder: Path, facts: dict[str, Any], pixels: Tensor) -> None:
        (height, width), (picture, media_type) = pixels.shape[1:], compress(quantize(pixels))
        self._file(folder).append(facts | {"media_type": media_type, "width": width, "height": height}, picture)

    def _drop(self, folder: Path, tree: str, kept: set[int]) -> None:
        """Take out what a tree has not kept."""

        def wanted(preview: Preview) -> bool:
            return preview.tree != tree or preview.node in kept

        self._file(folder).keep(wanted)

    def _file(self, folder: Path) -> PreviewFile:
        if folder not in self._files:
            self._files[folder] = PreviewFile(folder / PREVIEWS, self._disk)
        return self._files[folder]

    def _close(self, folder: Path) -> None:
        file = self._files.pop(folder, None)
        if file is not None:
            file.close()
