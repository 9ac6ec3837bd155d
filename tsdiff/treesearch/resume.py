"""Continuing a search from its folder. What is written down there is repeated at no cost; the rest is done."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tsdiff.treesearch.arguments import read_arguments
from tsdiff.treesearch.disk import LOCAL, Disk
from tsdiff.treesearch.durable import MACHINE, require_same
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.lock import Lock
from tsdiff.treesearch.plan import Plan, prepare
from tsdiff.treesearch.results import Result, Results
from tsdiff.treesearch.runfile import different
from tsdiff.treesearch.runfolder import INDEX, RUN, environment, lock_path, read_json
from tsdiff.treesearch.search import Progress, execute


def resume(path: str | Path, model: Any = None, *, callback: Callable[[Progress], None] | None = None, **given: Any) -> Result | Results:
    """Continue a search after an interruption, from where its record ends.

    Args:
      path: the folder of a run, or of a search of several prompts or seeds, of which those that are not done are continued.
      model: the model again, where it was an object (a pipeline); its weights must be the same.
      callback: called with a `Progress` after every batch.
      **given: other arguments of `tsdiff.search` that were objects (`policy`, `verifier`), which no file holds; and
        `max_batch`, `memory_limit`, `seconds`, `previews`, `metadata`, which may change. Anything else must be as it was.

    Returns:
      A `Result` for one prompt and one seed, `Results` for several, as the search would have given.

    Raises:
      UsageError: if the folder is none of a run, another process writes it, or something is not as it was.
      SearchFailed: if a single search ends without a sample.
    """
    with planned(Path(path), **({} if model is None else {"model": model}), **given) as (plan, folder):
        results = execute(plan, callback=callback, into=folder)
    if plan.num_runs > 1:
        return results
    if results.failures:
        raise results.failures[0].error
    (result,) = results
    return result


@contextmanager
def planned(folder: Path, *, disk: Disk = LOCAL, **given: Any) -> Iterator[tuple[Plan, Path]]:
    """The plan of a folder's search, and the folder, locked: for `execute(plan, into=folder)`.

    Raises:
      UsageError: if it cannot be continued as asked.
    """
    if not folder.is_dir():
        raise UsageError(f"{str(folder)!r} is not the folder of a run; `--out` of the search says where it is")
    facts = read_json(folder / (RUN if (folder / RUN).exists() else INDEX))
    if "arguments" not in facts:
        raise UsageError(f"{str(folder)!r} cannot be continued: its {RUN} does not say what was searched")
    if not facts.get("alone", True):
        raise UsageError(f"{str(folder)!r} shares its budget with other prompts; resume {str(folder.parent)!r}, which continues them all")
    if "verifier" in given:
        given["verifiers"] = given.pop("verifier")
    with Lock(lock_path(folder), disk=disk), ExitStack() as stack:
        arguments = read_arguments(facts["arguments"], folder, given)
        plan = prepare(**arguments, out=folder.parent)
        known = facts["options"]
        require_same(known, plan, folder)
        notices: tuple[str, ...] = ()
        if plan.limits.deterministic:
            stack.enter_context(_same_machine(known.get("environment") or facts.get("environment") or {}, folder))
            changed = different(known.get("rows_per_call"), plan.to_json()["rows_per_call"], "rows_per_call")
            notices = (f"{changed}: what is done from here on may differ in the last bits from a search without an interruption",) if changed else ()
        yield dataclasses.replace(plan, typed=known.get("typed", {}), notices=notices), folder


@contextmanager
def _same_machine(known: dict[str, Any], folder: Path) -> Iterator[None]:
    """Deterministic bytes need the same libraries, kernels and number of threads, which is set."""
    import torch

    threads = torch.get_num_threads()
    if isinstance(known.get("threads"), int):
        torch.set_num_threads(known["threads"])
    try:
        now = environment()
        before, after = ({name: facts.get(name) for name in MACHINE} for facts in (known, now))
        changed = different(before, after)
        if changed:
            raise UsageError(f"{str(folder)!r} is deterministic and can be continued only where it was begun: {changed}")
        yield
    finally:
        torch.set_num_threads(threads)
