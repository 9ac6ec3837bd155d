"""What the engine is made to work with: models, samplers, verifiers, policies, recorders.

Implement one of these and register it (`tsdiff.plugin`); nothing else of tsdiff has to change. Names are imported from here,
whatever file of this package they stand in. Tensors appear in annotations only, so importing this imports no torch.
"""

from __future__ import annotations

from tsdiff.treesearch.protocols.allocators import Allocation, Allocator, ForestView, Grant, Outcome
from tsdiff.treesearch.protocols.conditions import Condition, Guidance
from tsdiff.treesearch.protocols.models import CompiledModel, DiffusionModel, Encoded, EstimateDecoder, Media, Row
from tsdiff.treesearch.protocols.outlines import (
    CountableOutline,
    Demo,
    Flops,
    LoadOptions,
    ModelOutline,
    Size,
    TellingOutline,
    ToldOutline,
    VideoOutline,
)
from tsdiff.treesearch.protocols.policies import FINAL, Policy, Search, TreeView
from tsdiff.treesearch.protocols.recorders import NullRecorder, Recorder
from tsdiff.treesearch.protocols.samplers import Sampler, StepState
from tsdiff.treesearch.protocols.setting import Setting
from tsdiff.treesearch.protocols.verifiers import (
    BoundVerifier,
    CalibratedVerifier,
    Candidates,
    Need,
    Page,
    PendingVerifier,
    Pool,
    Scores,
    Verifier,
)

__all__ = [
    "FINAL",
    "PROTOCOL_VERSION",
    "Allocation",
    "Allocator",
    "BoundVerifier",
    "CalibratedVerifier",
    "Candidates",
    "CompiledModel",
    "Condition",
    "CountableOutline",
    "Demo",
    "DiffusionModel",
    "Encoded",
    "EstimateDecoder",
    "Flops",
    "ForestView",
    "Grant",
    "Guidance",
    "LoadOptions",
    "Media",
    "ModelOutline",
    "Need",
    "NullRecorder",
    "Outcome",
    "Page",
    "PendingVerifier",
    "Policy",
    "Pool",
    "Recorder",
    "Row",
    "Sampler",
    "Scores",
    "Search",
    "Setting",
    "Size",
    "StepState",
    "TellingOutline",
    "ToldOutline",
    "TreeView",
    "Verifier",
    "VideoOutline",
]

PROTOCOL_VERSION = 1
