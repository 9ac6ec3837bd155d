"""Compute, counted: what a request costs, what a tree has spent, what the engine did beside.

NFE counts guided evaluations: one latent at one level, whatever guidance costs (the unit of the papers). Rows count
latents through the network, guidance included (the physical work).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Spend:
    """An amount of compute: network evaluations, decodes and verifier calls (images scored)."""

    nfe: int = 0
    decodes: int = 0
    verifier_calls: int = 0

    def __add__(self, other: Spend) -> Spend:
        return Spend(self.nfe + other.nfe, self.decodes + other.decodes, self.verifier_calls + other.verifier_calls)

    def __mul__(self, times: int) -> Spend:
        return Spend(self.nfe * times, self.decodes * times, self.verifier_calls * times)

    __rmul__ = __mul__


@dataclass(frozen=True)
class Cost:
    """Bounds on what a policy spends; equal where the cost does not depend on values."""

    lower: Spend
    upper: Spend

    @staticmethod
    def exactly(spend: Spend) -> Cost:
        """A cost known beforehand."""
        return Cost(spend, spend)

    @property
    def exact(self) -> bool:
        """Whether the cost is known beforehand."""
        return self.lower == self.upper


class Budget:
    """NFE that may be granted. `spent` counts grants, so it is known before the work is done, and replays alike."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.spent = 0

    @property
    def remaining(self) -> int | None:
        """NFE left, the reserve for finishing a sample included; None without a limit."""
        return None if self.limit is None else self.limit - self.spent


@dataclass
class TreeLedger:
    """What one tree has spent.

    `verifier_calls` counts images scored, by verifier; `encodes` the conditions and images that it needed encoded (the
    trees of one prompt share the work).
    """

    nfe: int = 0
    rows: int = 0
    encodes: int = 0
    decodes: int = 0
    verifier_calls: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        """Strict JSON."""
        return {
            "nfe": self.nfe,
            "rows": self.rows,
            "encodes": self.encodes,
            "decodes": self.decodes,
            "verifier_calls": dict(sorted(self.verifier_calls.items())),
        }


@dataclass
class EngineLedger:
    """What the engine did that belongs to no single tree.

    rows + padding + probe + retried of network rows is what a hook on the network sees.

    Attributes:
      rows: rows that trees asked for (the sum over trees, baselines included).
      padding: rows added to keep the row count constant.
      probe: rows of the batch-size calibration.
      retried: rows of batches that failed and ran again.
      lost: rows whose results an interruption lost, recomputed by a resume.
      lost_decodes: pictures that an interruption lost, decoded again by a resume; not on any tree's ledger either.
      batches: network calls.
      seconds: wall time by stage, without overlap: "network", "step", "noise", "decode", "verify", "encode", "policy", "store", "previews", "calibrate".
      peak_memory: bytes, by "host" and "device".
    """

    rows: int = 0
    padding: int = 0
    probe: int = 0
    retried: int = 0
    lost: int = 0
    lost_decodes: int = 0
    batches: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    peak_memory: dict[str, int] = field(default_factory=dict)

    @property
    def network_rows(self) -> int:
        """Rows that went through the network, for whatever reason."""
        return self.rows + self.padding + self.probe + self.retried

    def to_json(self) -> dict[str, Any]:
        """Strict JSON."""
        counts = {name: getattr(self, name) for name in ("rows", "padding", "probe", "retried", "lost", "lost_decodes", "batches")}
        seconds = {stage: round(value, 6) for stage, value in sorted(self.seconds.items())}
        return counts | {"seconds": seconds, "peak_memory": self.peak_memory}
