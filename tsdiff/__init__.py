"""tsdiff: sampling from diffusion and flow models as tree search.

    import tsdiff

    result = tsdiff.search("gaussian", "near (2, 2)", policy="beam", nfe=400)
    result.image, result.score, result.baseline.score, result.tree

Everything is imported on first use, so that `import tsdiff` is instant and needs neither torch nor diffusers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tsdiff.diffusion.loading import load_model
    from tsdiff.treesearch.errors import BudgetExhausted, SearchFailed, SetupError, TsdiffError, UsageError
    from tsdiff.treesearch.expand import expand
    from tsdiff.treesearch.imports import prepare_torchvision
    from tsdiff.treesearch.protocols import Condition
    from tsdiff.treesearch.results import Result, Results
    from tsdiff.treesearch.resume import resume
    from tsdiff.treesearch.saved import SavedRun, load_run, load_runs
    from tsdiff.treesearch.search import Progress, search

_HOMES = {
    "BudgetExhausted": "tsdiff.treesearch.errors",
    "Condition": "tsdiff.treesearch.protocols",
    "Progress": "tsdiff.treesearch.search",
    "Result": "tsdiff.treesearch.results",
    "Results": "tsdiff.treesearch.results",
    "SavedRun": "tsdiff.treesearch.saved",
    "SearchFailed": "tsdiff.treesearch.errors",
    "SetupError": "tsdiff.treesearch.errors",
    "TsdiffError": "tsdiff.treesearch.errors",
    "UsageError": "tsdiff.treesearch.errors",
    "expand": "tsdiff.treesearch.expand",
    "load_model": "tsdiff.diffusion.loading",
    "load_run": "tsdiff.treesearch.saved",
    "load_runs": "tsdiff.treesearch.saved",
    "prepare_torchvision": "tsdiff.treesearch.imports",
    "resume": "tsdiff.treesearch.resume",
    "search": "tsdiff.treesearch.search",
}
__all__ = [
    "BudgetExhausted",
    "Condition",
    "Progress",
    "Result",
    "Results",
    "SavedRun",
    "SearchFailed",
    "SetupError",
    "TsdiffError",
    "UsageError",
    "expand",
    "load_model",
    "load_run",
    "load_runs",
    "prepare_torchvision",
    "resume",
    "search",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tsdiff' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
