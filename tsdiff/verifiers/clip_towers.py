"""What a library makes of a CLIP or SigLIP checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tsdiff.verifiers.clip_images import Preprocessing


@dataclass(frozen=True, eq=False)
class Towers:
    """The two halves of a contrastive model, weights loaded, as a library made them.

    Attributes:
      module: holds all weights.
      encode_images: pixels as the network takes them (B, 3, h, w) -> features (B, d), not normalised.
      encode_text: what `tokenize` gives, as keywords, of one prompt or several -> features (B, d), not normalised.
      tokenize: a prompt -> its token numbers (1, L) and what else the text model takes, by the model's names for them,
        and how many tokens had to be cut off.
      preprocessing: from images in [0, 1] to what `encode_images` takes.
      logit_scale: what trained models multiply cosines by (already exponentiated; 100 for OpenAI's).
      logit_bias: what is added then; None for models without (CLIP), a number for SigLIP.
    """

    module: nn.Module
    encode_images: Callable[[Tensor], Tensor]
    encode_text: Callable[..., Tensor]
    tokenize: Callable[[str], tuple[dict[str, Tensor], int]]
    preprocessing: Preprocessing
    logit_scale: float
    logit_bias: float | None
