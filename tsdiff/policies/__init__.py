"""Search algorithms: frozen dataclasses of hyperparameters with a generator that reads like the paper's pseudo-code."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Beam": "tsdiff.policies.beam",
    "BestOfN": "tsdiff.policies.best_of_n",
}

__all__ = ["Beam", "BestOfN"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
