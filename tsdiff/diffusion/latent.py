"""What the loaded models of latent families share: a network that predicts, and an autoencoder between latents and images."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from tsdiff.diffusion.family import PipelineModel, PipelineOutline
from tsdiff.diffusion.fingerprint import fingerprint
from tsdiff.diffusion.lora import lora_facts, merge_loras
from tsdiff.diffusion.memory import Stages, apply_memory, is_compiled, load_tiny
from tsdiff.diffusion.pipelines import device_of, load_pipeline
from tsdiff.diffusion.vae import decode, encode, needs_upcast, upcast
from tsdiff.treesearch.protocols import Condition, Encoded, Media, Row, Sampler
from tsdiff.treesearch.schedule import Schedule, SolverInfo

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
      constant_rows: whether the network is compiled, so that its calls should have one row count.

    Raises:
      UsageError, SetupError: if the weights cannot be loaded.
    """

    conditioner: Conditioner
    parts: tuple[str, ...]

    def __init__(self, outline: PipelineOutline, pipeline_class: str, network: str, **without: Any) -> None:
        import torch

        source, options = outline.source, outline.source.options
        pipeline, device = load_pipeline(source, pipeline_class, usual_dtype=outline.usual_dtype, **without)
        self._network = network
        own, vae = getattr(pipeline, network), pipeline.vae
        super().__init__(outline, pipeline, device if options.offload else str(device_of(own, device)))
        self.dtype = own.dtype  # diffusers walks through all parameters to tell it, which takes a millisecond
        self._tiny = load_tiny(source, self.device, self.dtype)
        if options.lora:
            # Named before they are merged: merged weights have other last bits on every kind of machine.
            _ = self.fingerprint
            merge_loras(pipeline, outline.name, options.lora)
        if source.pipeline is None:
            apply_memory(source, pipeline, own)
        self.constant_rows = is_compiled(own)
        self._vae_device = torch.device(device) if options.offload else device_of(vae, device)
        self._vae = upcast(vae) if needs_upcast(vae) else vae

    @property
    def network(self) -> Any:
        """The component that predicts, as the pipeline has it now, on its device."""
        if self._stages is not None:
            self._stages.bring("network")
        return getattr(self.pipeline, self._network)

    @cached_property
    def _stages(self) -> Stages | None:
        """Which components are on the device, where they take turns."""
        if not self.outline.source.options.offload:
            return None
        encoders = [part for name, part in self.pipeline.components.items() if name.startswith(("text_encoder", "image_encoder"))]
        return Stages({"text": encoders, "network": [getattr(self.pipeline, self._network)], "vae": [self._vae]}, self.device)

    @cached_property
    def fingerprint(self) -> str:
        """Names the weights, configs and adapters: equal fingerprints give equal results on one machine."""
        plan = self.outline.plan
        parts = {name: getattr(self.pipeline, name) for name in self.parts}
        return fingerprint(parts, scheduler=plan.config, scheduler_class=plan.class_name, **self.named_facts())

    def named_facts(self) -> dict[str, Any]:
        """Further plain data that results depend on, for the fingerprint. (`facts` is what an outline tells of itself.)"""
        options = self.outline.source.options
        facts: dict[str, Any] = {}
        if options.lora:
            facts["lora"] = lora_facts(options.lora)
        if options.vae_tiling:
            facts["vae_tiling"] = True
        if self._rounds:
            facts["latent_dtype"] = "model"
        if self._tiny is not None:
            facts["x0_decoder"] = fingerprint({"vae": self._tiny})
        return facts

    @property
    def _rounds(self) -> bool:
        """Whether latents are rounded to the network's number format."""
        import torch

        return self.outline.source.options.latent_dtype == "model" and self.dtype != torch.float32

    def sampler(self, schedule: Schedule, solver: SolverInfo) -> Sampler:
        """The latent arithmetic of a solver on a schedule of this model (or of its outline), tails included."""
        return self.rounded(super().sampler(schedule, solver))

    def rounded(self, sampler: Sampler) -> Sampler:
        """A sampler as it is, or with latents in the network's number format, if that was asked for."""
        if not self._rounds:
            return sampler
        from tsdiff.diffusion.precision import RoundedSampler

        return RoundedSampler(sampler, self.dtype)

    def encode(self, conditions: Sequence[Condition], *, guided: bool) -> list[Encoded]:
        """Encode conditions, in order; with `guided` each gets its unconditional row too.

        A prompt that is too long for a text encoder adds a line to `notices`.

        Raises:
          UsageError: if the model cannot take a condition.
        """
        for condition in conditions:
            self.check(condition)
        with nullcontext() if self._stages is None else self._stages.during("text"):  # whose encoders are not needed any more
            encoded = self.conditioner.encode(conditions, guided=guided)
        self.notices = (*self.outline.notices, *self.conditioner.notices)
        return encoded

    def gathered(self, rows: Sequence[Row], key: str) -> Tensor:
        """One tensor of every row (B, ...), on the network's device and in its dtype."""
        import torch

        return torch.stack([row[key] for row in rows]).to(device=self.device, dtype=self.dtype)

    def decode(self, latents: Tensor) -> Media:
        """Images (B, 3, H, W), float32 in [0, 1], of clean latents (B, C, h, w)."""
        return Media(decode(self._autoencoder(), latents, self._vae_device))

    @property
    def estimate_decoder(self) -> str | None:
        """The folder of the tiny autoencoder, None if there is none."""
        return self.outline.source.options.x0_decoder

    def decode_estimates(self, x0: Tensor) -> Media:
        """Images as of `decode`, by the tiny autoencoder if there is one: for verifiers to look at unfinished nodes."""
        return self.decode(x0) if self._tiny is None else Media(decode(self._tiny, x0, self._tiny.device))

    def encode_images(self, images: Tensor, noise: Tensor) -> Tensor:
        """Clean latents (B, C, h, w), float32, of images (B, 3, H, W) in [0, 1], sampled from the VAE's posterior by `noise`."""
        return encode(self._autoencoder(), images, noise, self._vae_device).to(self.device)

    def _autoencoder(self) -> Any:
        if self._stages is not None:
            self._stages.bring("vae")
        return self._vae
