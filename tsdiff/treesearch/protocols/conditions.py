"""What a sample is asked for: its condition, and how strongly it follows that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tsdiff.treesearch.node import Json
from tsdiff.treesearch.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Condition:
    """What a sample is conditioned on.

    Attributes:
      prompt: the text, "" for none; also what verifiers read.
      negative_prompt: text of the unconditional row under guidance.
      class_label: id or name, for class-conditional models.
      tensors: embeddings made by the caller, e.g. `prompt_embeds` (tokens, width), `negative_prompt_embeds`.
      extra: options of the model family, e.g. `clip_skip`, `cross_attention_kwargs`, `ip_adapter_image`.
      metadata: facts about the prompt for verifiers (a line of a JSONL prompt file), strict JSON.
    """

    prompt: str = ""
    negative_prompt: str = ""
    class_label: int | str | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Json] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """A short text for people: the prompt, or the class."""
        if self.prompt or self.class_label is None:
            return self.prompt
        return f"class {self.class_label}"


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: m = uncond + scale * (cond - uncond) (Ho & Salimans 2022, arXiv 2207.12598).

    Attributes:
      scale: guidance at or below 1 is off, as in diffusers: only the conditional row is evaluated.
      rescale: share in [0, 1] of the std-matching of Lin et al. 2023 (arXiv 2305.08891).
      interval: guide only where sigma/alpha lies in [low, high] (Kynkaanniemi et al. 2024, arXiv 2404.07724); None
        guides everywhere.
    """

    scale: float = 1.0
    rescale: float = 0.0
    interval: tuple[float, float] | None = None

    @property
    def on(self) -> bool:
        """Whether any level is guided."""
        return self.scale > 1.0

    def active(self, schedule: Schedule, level: int) -> bool:
        """Whether a level is guided, so that its unconditional row is evaluated too."""
        if not self.on or self.interval is None:
            return self.on
        alpha = schedule.alpha[level]
        ratio = schedule.sigma[level] / alpha if alpha > 0.0 else float("inf")
        return self.interval[0] <= ratio <= self.interval[1]
