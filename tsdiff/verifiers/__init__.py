"""Verifiers: they score samples, higher is better. Nothing is imported until it is asked for."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "CallableVerifier": "tsdiff.treesearch.callables",
    "Clip": "tsdiff.verifiers.clip",
    "Compositional": "tsdiff.verifiers.compositional",
    "Detection": "tsdiff.verifiers.compositional_detect",
    "Ensemble": "tsdiff.verifiers.ensemble",
    "JpegCompressibility": "tsdiff.verifiers.programmatic",
    "JpegSize": "tsdiff.verifiers.programmatic",
    "Luminance": "tsdiff.verifiers.programmatic",
    "Sharpness": "tsdiff.verifiers.programmatic",
    "TargetColor": "tsdiff.verifiers.programmatic",
    "TotalVariation": "tsdiff.verifiers.programmatic",
}

__all__ = [
    "CallableVerifier",
    "Clip",
    "Compositional",
    "Detection",
    "Ensemble",
    "JpegCompressibility",
    "JpegSize",
    "Luminance",
    "Sharpness",
    "TargetColor",
    "TotalVariation",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
