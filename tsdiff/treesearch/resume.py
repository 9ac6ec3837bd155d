"""Continuing a search from its folder. What is written down there is repeated at no cost; the rest is done."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tsdiff.treesearch.arguments import prepare_again
from tsdiff.treesearch.disk import LOCAL, Disk
from tsdiff.treesearch.durable import require_same, same_machine, unfinished_expansion
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.expand import carry_out
from tsdiff.treesearch.expansion import planned_expansion
from tsdiff.treesearch.lock import Lock
from tsdiff.treesearch.plan import Plan
from tsdiff.treesearch.results import Result, Results
from tsdiff.treesearch.runfacts import no_run, require_result, require_searched
from tsdiff.treesearch.runfile import different
from tsdiff.treesearch.runfolder import INDEX, RUN, lock_path, read_json
from tsdiff.treesearch.search import Progress, execute


def resume(path: str | Path, model: Any = None, *, callback: Callable[[Progress], None] | None = None, **given: Any) -> Result | Results:
    """Continue a search after an interruption, from where its record ends.

    Args:
      path: the folder of a run, or of a search of several prompts or seeds, of which those that are not done are continued;
        so are expansions (`tsdiff.expand`).
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
    again = {**({} if model is None else {"model": model}), **given}
    if unfinished_expansion(Path(path)):
        return _expanded(Path(path), again, callback)
    with planned(Path(path), **again) as (plan, folder):
        results = execute(plan, callback=callback, into=folder)
    for i, result in enumerate(results.results):
        if result.path is not None and unfinished_expansion(result.path):
            results.results[i] = _expanded(result.path, again, callback)
    if plan.num_runs > 1:
        return results
    if results.failures:
        raise results.failures[0].error
    (result,) = results
    return result


def _expanded(folder: Path, given: Mapping[str, Any], callback: Callable[[Progress], None] | None) -> Result:
    """What comes of an expansion that was interrupted."""
    with planned_expansion(folder, None, **given) as expansion:
        return carry_out(expansion, callback=callback)


@contextmanager
def planned(folder: Path, *, disk: Disk = LOCAL, **given: Any) -> Iterator[tuple[Plan, Path]]:
    """The plan of a folder's search, and the folder, locked: for `execute(plan, into=folder)`.

    Raises:
      UsageError: if it cannot be continued as asked.
    """
    if not folder.is_dir():
        raise UsageError(f"{str(folder)!r} is not the folder of a run; `--out` of the search says where it is")
    name = next((name for name in (RUN, INDEX) if (folder / name).exists()), None)
    if name is None:
        raise no_run(folder, RUN)
    facts = read_json(folder / name)
    require_searched(facts, folder)
    if name == RUN:
        require_result(facts, folder)
    if not facts.get("alone", True):
        raise UsageError(f"{str(folder)!r} shares its budget with other prompts; resume {str(folder.parent)!r}, which continues them all")
    if "verifier" in given:
        given["verifiers"] = given.pop("verifier")
    with Lock(lock_path(folder), disk=disk), ExitStack() as stack:
        known = facts["options"]
        plan = prepare_again(facts["arguments"], known, folder, given, out=folder.parent)
        require_same(known, plan, folder)
        notices: tuple[str, ...] = ()
        if plan.limits.deterministic:
            stack.enter_context(same_machine(known.get("environment") or facts.get("environment") or {}, folder))
            changed = different(known.get("rows_per_call"), plan.to_json()["rows_per_call"], "rows_per_call")
            notices = (f"{changed}: what is done from here on may differ in the last bits from a search without an interruption",) if changed else ()
        yield dataclasses.replace(plan, typed=known.get("typed", {}), notices=notices), folder
