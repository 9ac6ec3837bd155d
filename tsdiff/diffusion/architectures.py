"""The architectures of well-known models, as facts: what their configs say of networks and autoencoders, without weights.

For counting operations (`flops.py`) and for benchmarks at full size with random weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tsdiff.diffusion.loading import outline_of
from tsdiff.diffusion.source import Source
from tsdiff.treesearch.protocols import LoadOptions, ModelOutline


@dataclass(frozen=True)
class Architecture:
    """A model without weights.

    Attributes:
      title: what people call it.
      pipeline: class of its pipeline.
      network: (component, class, config) of what predicts.
      vae: config of its autoencoder.
      scheduler: (class, config).
      vae_class: class of its autoencoder.
    """

    title: str
    pipeline: str
    network: tuple[str, str, Mapping[str, Any]]
    vae: Mapping[str, Any]
    scheduler: tuple[str, Mapping[str, Any]]
    vae_class: str = "AutoencoderKL"

    def outline(self, name: str | None = None) -> ModelOutline:
        """The model's outline."""
        component, network, config = self.network
        components = {component: ("diffusers", network), "vae": ("diffusers", self.vae_class), "scheduler": ("diffusers", self.scheduler[0])}
        configs = {component: config, "vae": self.vae, "scheduler": self.scheduler[1]}
        return outline_of(Source(name or self.title, self.pipeline, LoadOptions(), components, _configs=configs))

    def changed(self, network: Mapping[str, Any], vae: Mapping[str, Any]) -> Architecture:
        """The same with other entries in its configs."""
        component, class_name, config = self.network
        return replace(self, network=(component, class_name, {**config, **network}), vae={**self.vae, **vae})


def _vae(channels: int, scale: float, shift: float | None = None, **more: Any) -> dict[str, Any]:
    return {
        "in_channels": 3, "out_channels": 3, "latent_channels": channels, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4, "norm_num_groups": 32, "sample_size": 512,
        "scaling_factor": scale, "shift_factor": shift, **more,
    }  # fmt: skip


_SCALED_LINEAR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1, "clip_sample": False, "timestep_spacing": "leading"}
_LINEAR = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": False}
_FLOW = "FlowMatchEulerDiscreteScheduler"
_NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}

_XL = {
    "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": 28, "sample_size": 32, "patch_size": 2,
    "num_embeds_ada_norm": 1000, "activation_fn": "gelu-approximate", "attention_bias": True, "norm_type": "ada_norm_zero", "norm_elementwise_affine": False,
}  # fmt: skip
_SD3 = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64,
    "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
}  # fmt: skip

ARCHITECTURES = {
    "sd15": Architecture(
        "Stable Diffusion 1.5",
        "StableDiffusionPipeline",
        ("unet", "UNet2DConditionModel", {
            "sample_size": 64, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "block_out_channels": (320, 640, 1280, 1280),
            "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"), "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
            "cross_attention_dim": 768, "attention_head_dim": 8,
        }),
        _vae(4, 0.18215),
        ("DDIMScheduler", _SCALED_LINEAR | {"set_alpha_to_one": False}),
    ),
    "sdxl": Architecture(
        "Stable Diffusion XL",
        "StableDiffusionXLPipeline",
        ("unet", "UNet2DConditionModel", {
            "sample_size": 128, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048, "use_linear_projection": True, "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
        }),
        _vae(4, 0.13025, sample_size=1024),
        ("EulerDiscreteScheduler", _SCALED_LINEAR),
    ),
    "sd3": Architecture("Stable Diffusion 3 medium", "StableDiffusion3Pipeline", ("transformer", "SD3Transformer2DModel", _SD3), _vae(16, 1.5305, 0.0609, **_NO_QUANT), (_FLOW, {"shift": 3.0})),
    "sd35-large": Architecture(
        "Stable Diffusion 3.5 large",
        "StableDiffusion3Pipeline",
        ("transformer", "SD3Transformer2DModel", _SD3 | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"}),
        _vae(16, 1.5305, 0.0609, **_NO_QUANT),
        (_FLOW, {"shift": 3.0}),
    ),
    "flux-dev": Architecture(
        "FLUX.1 dev",
        "FluxPipeline",
        ("transformer", "FluxTransformer2DModel", {
            "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24, "attention_head_dim": 128,
            "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": (16, 56, 56),
        }),
        _vae(16, 0.3611, 0.1159, **_NO_QUANT),
        (_FLOW, {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}),
    ),
    "pixart-sigma": Architecture(
        "PixArt-Sigma XL",
        "PixArtSigmaPipeline",
        ("transformer", "PixArtTransformer2DModel", {
            "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": 28, "cross_attention_dim": 1152,
            "sample_size": 128, "patch_size": 2, "caption_channels": 4096, "interpolation_scale": 2, "norm_type": "ada_norm_single",
            "use_additional_conditions": False,
        }),
        _vae(4, 0.13025, sample_size=1024),
        ("DPMSolverMultistepScheduler", _LINEAR | {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    ),
    "dit-xl": Architecture("DiT-XL/2", "DiTPipeline", ("transformer", "DiTTransformer2DModel", _XL), _vae(4, 0.18215), ("DDIMScheduler", _LINEAR)),
    "sit-xl": Architecture("SiT-XL/2", "SiTPipeline", ("transformer", "DiTTransformer2DModel", _XL | {"out_channels": 4}), _vae(4, 0.18215), (_FLOW, {"shift": 1.0})),
    "ltx-video": Architecture(
        "LTX-Video 2B",
        "LTXPipeline",
        ("transformer", "LTXVideoTransformer3DModel", {
            "in_channels": 128, "out_channels": 128, "patch_size": 1, "patch_size_t": 1, "num_attention_heads": 32, "attention_head_dim": 64,
            "cross_attention_dim": 2048, "num_layers": 28, "caption_channels": 4096,
        }),
        {
            "in_channels": 3, "out_channels": 3, "latent_channels": 128, "block_out_channels": (128, 256, 512, 512),
            "decoder_block_out_channels": (128, 256, 512, 512), "layers_per_block": (4, 3, 3, 3, 4), "decoder_layers_per_block": (4, 3, 3, 3, 4),
            "spatio_temporal_scaling": (True, True, True, False), "decoder_spatio_temporal_scaling": (True, True, True, False),
            "patch_size": 4, "patch_size_t": 1, "scaling_factor": 1.0,
        },
        (_FLOW, {
            "shift": 1.0, "use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024, "max_image_seq_len": 4096,
            "shift_terminal": 0.1,
        }),
        "AutoencoderKLLTXVideo",
    ),
}  # fmt: skip
"""By short name."""
