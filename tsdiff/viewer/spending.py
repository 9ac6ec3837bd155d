"""When things happened in a search, counted in network evaluations: read from its journal, beside the tree.

`tree.json` says what each node cost; when it was made, and when it got its score, only the journal knows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.journal import JournalReader, Position
from tsdiff.treesearch.runfile import JOURNAL
from tsdiff.treesearch.savedtree import WRONG


class Spending:
    """The running cost of the search of one run. `refresh` reads on from where the last one ended.

    Attributes:
      made: for each node by index, NFE that the search had spent when the request that made it was complete.
      scored: for each value in the order of their coming: NFE spent by then, the node, the key, the score.
      rows: network rows that it had spent, by NFE.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL
        self.made: list[int] = []
        self.scored: list[tuple[int, int, str, float]] = []
        self.rows: dict[int, int] = {0: 0}
        self._nfe = 0
        self._place: Position | None = None
        self._lost = False

    def refresh(self) -> int:
        """Read what is new; returns the index of the first node that was added (the number of nodes if none was)."""
        first = len(self.made)
        if self._lost:
            return first
        try:
            reader = JournalReader(self.path, after=self._place)
            for group in reader:
                for record in group.records:
                    self._take(record)
                self._place = group.end
        except (UsageError, OSError):  # the run's own reader tells what is wrong
            return first
        except WRONG:
            self._lost = True
        return first

    def restart(self) -> None:
        """Read everything again."""
        self.made, self.scored, self.rows, self._nfe, self._place, self._lost = [], [], {0: 0}, 0, None, False

    def _take(self, record: Any) -> None:
        if record["tree"] != "search":
            return
        if "answer" in record:
            self._score(record["answer"])
        if "request" not in record or "refused" in record:
            return
        nfe = record["ledger"]["nfe"]
        if type(nfe) is not int or nfe < self._nfe:
            raise ValueError(f"{nfe!r} is no number of evaluations")
        self._nfe = nfe
        self.rows[nfe] = int(record["ledger"]["rows"])
        for item in record["nodes"]:
            if item["index"] != len(self.made):
                raise ValueError("a node is missing")
            self.made.append(nfe)
        for effect in record["effects"]:
            if effect["effect"] == "valued":
                self._score(effect)

    def _score(self, told: Any) -> None:
        score = told["value"]["score"]
        if score is not None:
            node = told["node"]
            if type(node) is not int or node < 0:
                raise ValueError(f"{node!r} is no node")
            self.scored.append((self._nfe, node, str(told["key"]), float(score)))
