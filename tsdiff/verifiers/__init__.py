"""Verifiers: they score samples, higher is better. Nothing is imported until it is asked for."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Aesthetic": "tsdiff.verifiers.aesthetic",
    "CallableVerifier": "tsdiff.treesearch.callables",
    "Clip": "tsdiff.verifiers.clip",
    "ClipZeroShot": "tsdiff.verifiers.zero_shot",
    "Compositional": "tsdiff.verifiers.compositional",
    "Detection": "tsdiff.verifiers.compositional_detect",
    "DinoClassifier": "tsdiff.verifiers.dino",
    "Ensemble": "tsdiff.verifiers.ensemble",
    "Human": "tsdiff.verifiers.human",
    "JpegCompressibility": "tsdiff.verifiers.programmatic",
    "JpegSize": "tsdiff.verifiers.programmatic",
    "Luminance": "tsdiff.verifiers.programmatic",
    "PathStability": "tsdiff.verifiers.self_supervised",
    "SelfSupervised": "tsdiff.verifiers.self_supervised",
    "Sharpness": "tsdiff.verifiers.programmatic",
    "TargetColor": "tsdiff.verifiers.programmatic",
    "TotalVariation": "tsdiff.verifiers.programmatic",
}

__all__ = [
    "Aesthetic",
    "CallableVerifier",
    "Clip",
    "ClipZeroShot",
    "Compositional",
    "Detection",
    "DinoClassifier",
    "Ensemble",
    "Human",
    "JpegCompressibility",
    "JpegSize",
    "Luminance",
    "PathStability",
    "SelfSupervised",
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
