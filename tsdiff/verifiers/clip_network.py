"""A CLIP or SigLIP model ready to run, whichever library built it: normalised features of images and of prompts.

Shapes: B images, d dimensions of the features' common space.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from tsdiff.treesearch.errors import TsdiffWarning, UsageError
from tsdiff.verifiers import clip_open, clip_transformers
from tsdiff.verifiers.clip_files import Source
from tsdiff.verifiers.clip_towers import Towers

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class PromptWarning(TsdiffWarning):
    """A prompt is longer than a text model can read."""


def load(source: Source, name: str, dtype: Literal["float32", "float16", "bfloat16"] = "float32") -> ClipNetwork:
    """The model of a source, on the CPU; `name` is the verifier's, for messages.

    Raises:
      UsageError: if the files do not make a model together.
      SetupError: if a part of the model is not on this machine.
    """
    if source.notice:
        warnings.warn(TsdiffWarning(f"{name}: {source.notice}"), stacklevel=4)
    library = clip_open if source.library == "open_clip" else clip_transformers
    return ClipNetwork(library.load(source), name, dtype)


class ClipNetwork:
    """Features of images and prompts in one space, of length 1, in float32.

    Weights take no gradients; images do.

    Args:
      towers: the model.
      name: of the verifier, for messages.
      dtype: number format of weights and activations. Cosines are always taken in float32.
    """

    def __init__(self, towers: Towers, name: str, dtype: Literal["float32", "float16", "bfloat16"] = "float32") -> None:
        import torch

        self.towers = towers
        self.name = name
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.device = torch.device("cpu")
        self._texts: dict[str, Tensor] = {}
        towers.module.requires_grad_(False).eval().to(self.dtype)

    def to(self, device: str) -> None:
        """Move the weights and what is remembered."""
        import torch

        self.device = torch.device(device)
        self.towers.module.to(self.device)
        self._texts = {prompt: feature.to(self.device) for prompt, feature in self._texts.items()}

    def image_features(self, images: Tensor) -> Tensor:
        """Features (B, d) of images (B, 3, H, W) in [0, 1], on the network's device; differentiable.

        Raises:
          UsageError: for another shape.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.shape[2] or not images.shape[3]:
            raise UsageError(f"{self.name} was given images of shape {tuple(images.shape)} but takes RGB images (B, 3, H, W)")
        pixels = self.towers.preprocessing(images.to(self.device))
        return normalised(self.towers.encode_images(pixels.to(self.dtype)))

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Features (B, d) of prompts; each different prompt is encoded once, by itself, and remembered.

        A prompt longer than the model reads is cut, with one `PromptWarning`. An empty one is encoded as it is.
        """
        import torch

        for prompt in dict.fromkeys(prompts):
            if prompt not in self._texts:
                # Ordinary tensors even within inference mode, which could not enter a gradient later.
                with torch.inference_mode(False), torch.no_grad():
                    self._texts[prompt] = self._encode(self._tokens(prompt))[0]
        return torch.stack([self._texts[prompt] for prompt in prompts])

    def direction(self, prompts: Sequence[str]) -> Tensor:
        """Direction (d,) of the mean of several prompts' features, as zero-shot classifiers are made; not remembered."""
        import torch

        batches: dict[tuple[int, ...], list[dict[str, Tensor]]] = {}  # by length: filling may change an answer's last digits
        for prompt in prompts:
            tokens = self._tokens(prompt)
            batches.setdefault(next(iter(tokens.values())).shape, []).append(tokens)
        with torch.inference_mode(False), torch.no_grad():
            features = [self._encode({key: torch.cat([row[key] for row in batch]) for key in batch[0]}) for batch in batches.values()]
            return normalised(torch.cat(features).mean(0))

    def _tokens(self, prompt: str) -> dict[str, Tensor]:
        tokens, dropped = self.towers.tokenize(prompt)
        if dropped:
            shown = prompt if len(prompt) <= 60 else f"{prompt[:57]}..."
            length = next(iter(tokens.values())).shape[1]
            message = f"{self.name} reads {length} tokens at most, so the last {dropped} of the prompt {shown!r} do not count"
            warnings.warn(PromptWarning(message), stacklevel=2)
        return tokens

    def _encode(self, tokens: dict[str, Tensor]) -> Tensor:
        return normalised(self.towers.encode_text(**{key: tensor.to(self.device) for key, tensor in tokens.items()}))

    def cosines(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine (B,) of each image with its own prompt, in [-1, 1] up to rounding."""
        return (self.image_features(images) * self.text_features(prompts)).sum(-1)


def normalised(features: Tensor) -> Tensor:
    """To length 1, in float32; a feature of zeros stays zero."""
    import torch

    return torch.nn.functional.normalize(features.float(), dim=-1)
