"""What other verifiers said of a saved tree later: one derived file each, beside the run, which the run itself never reads.

    rescored/VERIFIER.json   which verifier, what it scored, and a value for each of those nodes

The journal and `tree.json` stay as they are. Names are percent-encoded where a file system might mind them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from tsdiff.treesearch.disk import LOCAL, Disk, told
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.node import Value
from tsdiff.treesearch.runfolder import FORMAT, read_json, write_json

FOLDER = "rescored"


@dataclass(frozen=True)
class Rescored:
    """A verifier's values of the nodes of a saved tree.

    Attributes:
      verifier: its name.
      values: by the index of the node.
      facts: what else the file says: `reference` (how the verifier was named), `at`, `fingerprint` of the model, `sha256` of
        the verifier's weights, `against`, `spearman`, `skipped` (nodes by why they have no value), `packages`.
    """

    verifier: str
    values: Mapping[int, Value]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Strict JSON, as in the file."""
        values = {str(index): value.to_json() for index, value in sorted(self.values.items())}
        return {"format": FORMAT, "verifier": self.verifier, **self.facts, "values": values}


def write_rescored(folder: Path, found: Rescored, *, disk: Disk = LOCAL) -> Path:
    """Write the file of one verifier, in place of what it said before; returns its path.

    Raises:
      UsageError, SetupError: if it cannot be written.
    """
    path = folder / FOLDER / f"{quote(found.verifier, safe='()+')}.json"
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise told(error, path.parent) from error
    write_json(path, found.to_json(), disk=disk)
    return path


def read_rescored(folder: Path) -> dict[str, Rescored]:
    """What was said of a run later, by the verifier's name; empty where nothing was.

    Raises:
      UsageError: if a file is damaged, or of a newer format.
    """
    found = {}
    for path in sorted((folder / FOLDER).glob("*.json")):
        data = read_json(path)
        try:
            name = data.pop("verifier")
            values = {int(index): Value(**value) for index, value in data.pop("values").items()}
            wrong = name != unquote(path.stem) or not all(isinstance(value.score, (float, int, type(None))) for value in values.values())
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"{str(path)!r} cannot be read ({type(error).__name__}: {error}); remove it and rescore the run") from None
        if wrong:
            raise UsageError(f"{str(path)!r} cannot be read (it is another verifier's, or its scores are no numbers); remove it and rescore the run")
        data.pop("format")
        found[name] = Rescored(name, values, data)
    return found
