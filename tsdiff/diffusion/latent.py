"""What the loaded models of latent families share: a network that predicts, and an autoencoder between latents and images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from tsdiff.diffusion.family import PipelineModel, PipelineOutline
from tsdiff.diffusion.fingerprint import fingerprint
from tsdiff.diffusion.lora import lora_facts, merge_loras
from tsdiff.diffusion.pipelines import device_of, load_pipeline
from tsdiff.diffusion.vae import decode, encode, needs_upcast, upcast
from tsdiff.treesearch.protocols import Condition, Encoded, Media, Row

if TYPE_CHECKING:
    from torch import Tensor


class Conditioner(Protocol):
    """Makes rows of conditions."""

    notices: list[str]

    def encode(self, conditions: Sequence[Condition], *, guided: bool) -> list[Encoded]:
        """The rows of conditions, in order."""
        ...


class LatentModel(PipelineModel):
    """A pipeline with a network and an autoencoder, ready to run. A family adds `forward`.

    Args:
      outline: of the model to load.
      pipeline_class: what a folder or hub id is loaded as; an object that was handed over is used as it is.
      network: the component that predicts.
      **without: arguments of `from_pretrained` that keep parts from being read which are not used.

    Attributes:
      conditioner: set by the family.
      parts: the components that results depend on.

    Raises:
      UsageError, SetupError: if the weights cannot be loaded.
    """

    conditioner: Conditioner
    parts: tuple[str, ...]

    def __init__(self, outline: PipelineOutline, pipeline_class: str, network: str, **without: Any) -> None:
        pipeline, device = load_pipeline(outline.source, pipeline_class, **without)
        self._network = network
        super().__init__(outline, pipeline, str(device_of(getattr(pipeline, network), device)))
        self.dtype = self.network.dtype  # diffusers walks through all parameters to tell it, which takes a millisecond
        if outline.source.options.lora:
            # Named before they are merged: merged weights have other last bits on every kind of machine.
            _ = self.fingerprint
            merge_loras(pipeline, outline.name, outline.source.options.lora)
        vae = pipeline.vae
        self._vae_device = device_of(vae, device)
        self._vae = upcast(vae) if needs_upcast(vae) else vae

    @property
    def network(self) -> Any:
        """The component that predicts, as the pipeline has it now."""
        return getattr(self.pipeline, self._network)

    @cached_property
    def fingerprint(self) -> str:
        """Names the weights, configs and adapters: equal fingerprints give equal results on one machine."""
        plan = self.outline.plan
        parts = {name: getattr(self.pipeline, name) for name in self.parts}
        return fingerprint(parts, scheduler=plan.config, scheduler_class=plan.class_name, **self.facts())

    def facts(self) -> dict[str, Any]:
        """Further plain data that results depend on."""
        files = self.outline.source.options.lora
        return {"lora": lora_facts(files)} if files else {}

    def encode(self, conditions: Sequence[Condition], *, guided: bool) -> list[Encoded]:
        """Encode conditions, in order; with `guided` each gets its unconditional row too.

        A prompt that is too long for a text encoder adds a line to `notices`.

        Raises:
          UsageError: if the model cannot take a condition.
        """
        for condition in conditions:
            self.check(condition)
        encoded = self.conditioner.encode(conditions, guided=guided)
        self.notices = (*self.outline.notices, *self.conditioner.notices)
        return encoded

    def gathered(self, rows: Sequence[Row], key: str) -> Tensor:
        """One tensor of every row (B, ...), on the network's device and in its dtype."""
        import torch

        return torch.stack([row[key] for row in rows]).to(device=self.device, dtype=self.dtype)

    def decode(self, latents: Tensor) -> Media:
        """Images (B, 3, H, W), float32 in [0, 1], of clean latents (B, C, h, w)."""
        return Media(decode(self._vae, latents, self._vae_device))

    def encode_images(self, images: Tensor, noise: Tensor) -> Tensor:
        """Clean latents (B, C, h, w), float32, of images (B, 3, H, W) in [0, 1], sampled from the VAE's posterior by `noise`."""
        return encode(self._vae, images, noise, self._vae_device).to(self.device)
