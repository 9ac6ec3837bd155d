"""Search algorithms: frozen dataclasses of hyperparameters with a generator that reads like the paper's pseudo-code."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Adaptive": "tsdiff.policies.adaptive",
    "Beam": "tsdiff.policies.beam",
    "BestOfN": "tsdiff.policies.best_of_n",
    "DTS": "tsdiff.policies.dts",
    "DTSStar": "tsdiff.policies.dts",
    "Hierarchical": "tsdiff.policies.hierarchical",
    "MCTS": "tsdiff.policies.mcts",
    "Paths": "tsdiff.policies.paths",
    "SMC": "tsdiff.policies.smc",
    "SVDD": "tsdiff.policies.svdd",
    "ZeroOrder": "tsdiff.policies.zero_order",
}

__all__ = ["DTS", "MCTS", "SMC", "SVDD", "Adaptive", "Beam", "BestOfN", "DTSStar", "Hierarchical", "Paths", "ZeroOrder"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
