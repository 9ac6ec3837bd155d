"""What Stable Diffusion is conditioned on: checked against the configs, then encoded by the pipeline's own methods."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from tsdiff.diffusion.ip_adapters import IMAGE_OPTIONS, check_image_prompt, image_embeddings
from tsdiff.diffusion.pipelines import device_of, lora_scales_kept
from tsdiff.diffusion.quiet import quiet_libraries
from tsdiff.diffusion.source import unwrapped
from tsdiff.diffusion.told_guidance import TOLD, refuse_guidance, scale_embedding
from tsdiff.treesearch.errors import UsageError, unknown_name
from tsdiff.treesearch.protocols import Condition, Encoded, Row

if TYPE_CHECKING:
    from torch import Tensor

TENSORS = ("prompt_embeds", "negative_prompt_embeds")
EXTRAS = ("clip_skip", "cross_attention_kwargs", *IMAGE_OPTIONS)

SCALE = "guidance_scale"
"""An option where the UNet is told a guidance scale."""

TEXT = "encoder_hidden_states"
IMAGE = "image_embeds"
KWARGS = "cross_attention_kwargs"


@dataclass(frozen=True)
class ConditionRules:
    """What a Stable Diffusion model can be conditioned on, from its configs.

    Attributes:
      name: of the model.
      text_layers: layers of its text encoder, None if it has no text encoder.
      width: of a token's embedding.
      ip_adapter: whether an IP adapter is loaded, which then must be given an image.
      told_scale: the guidance scale that the UNet is usually told instead of being guided, None if it is not told any.
      tokens: length of an encoded prompt.
    """

    name: str
    text_layers: int | None
    width: int
    ip_adapter: bool
    told_scale: float | None = None
    tokens: int = 77

    def check(self, condition: Condition, *, guided: bool = False) -> None:
        """Raise UsageError if the model cannot take a condition (under guidance)."""
        if guided:
            refuse_guidance(self.name, self.told_scale)
        if condition.class_label is not None:
            raise UsageError(f"{self.name!r} is conditioned on text, not on classes; leave out class {condition.class_label!r} and give a prompt")
        for kind, given, known in (("tensor", condition.tensors, TENSORS), ("option", condition.extra, EXTRAS if self.told_scale is None else (*EXTRAS, SCALE))):
            for key in given:
                if key not in known:
                    raise unknown_name(f"{kind} of a Stable Diffusion condition", key, known)
        for key, tensor in condition.tensors.items():
            if tensor.ndim not in (2, 3) or (tensor.ndim == 3 and tensor.shape[0] != 1) or tensor.shape[-1] != self.width or 0 in tensor.shape:
                raise UsageError(f"{key} has shape {tuple(tensor.shape)} but must be (tokens, {self.width}) or (1, tokens, {self.width})")
        if self.text_layers is None:
            self._check_without_encoder(condition, guided=guided)
        if guided:
            lengths = [condition.tensors[name].shape[-2] if name in condition.tensors else self.tokens for name in TENSORS]
            if lengths[0] != lengths[1]:
                raise UsageError(f"the prompt's embedding has {lengths[0]} tokens and the negative prompt's {lengths[1]}, but they must agree; give embeddings of one length")
        skip = condition.extra.get("clip_skip")
        if skip is not None and self.text_layers is not None and not (isinstance(skip, int) and 0 <= skip < self.text_layers):
            raise UsageError(f"clip_skip is {skip!r} but must be a whole number between 0 and {self.text_layers - 1}")
        options = condition.extra.get("cross_attention_kwargs")
        if options is not None and not isinstance(options, Mapping):
            raise UsageError(f"cross_attention_kwargs is a {type(options).__name__} but must be a dictionary, e.g. {{'scale': 0.8}}")
        scale = condition.extra.get(SCALE)
        if scale is not None and not (type(scale) in (int, float) and 0 <= scale < float("inf")):
            raise UsageError(f"guidance_scale is {scale!r} but must be a number of at least 0")
        check_image_prompt(self.name, condition.extra, adapter=self.ip_adapter)

    def _check_without_encoder(self, condition: Condition, *, guided: bool) -> None:
        if "prompt_embeds" not in condition.tensors:
            raise UsageError(f"{self.name!r} has no text encoder, so a prompt cannot be encoded; give prompt_embeds (and negative_prompt_embeds for guidance)")
        if guided and "negative_prompt_embeds" not in condition.tensors:
            raise UsageError(f"{self.name!r} has no text encoder, so guidance needs negative_prompt_embeds beside prompt_embeds; give both, or guidance_scale=1")
        if condition.negative_prompt and "negative_prompt_embeds" not in condition.tensors:
            raise UsageError(f"{self.name!r} has no text encoder, so the negative prompt cannot be encoded; give negative_prompt_embeds")
        if condition.extra.get("clip_skip") is not None:
            raise UsageError(f"clip_skip needs a text encoder, and {self.name!r} has none; leave it out")


class Conditioner:
    """Encodes conditions one prompt a call, so that an embedding never depends on its neighbours.

    Args:
      pipeline: whose text encoder and IP adapters are used; nothing of it stays changed.
      device: where rows are put.
      told_scale: the guidance scale that the UNet is usually told, None if it is not told any.

    Attributes:
      notices: a line for each prompt that was too long.
    """

    def __init__(self, pipeline: Any, device: str, told_scale: float | None = None) -> None:
        self.pipeline = pipeline
        self.device = device
        self.told_scale = told_scale
        self.notices: list[str] = []
        self._kwargs: list[dict[str, Any]] = []
        # Weak, so that an embedding lives as long as a search uses it: a thousand trees hold one negative prompt.
        self._texts: WeakValueDictionary[tuple[str, int | None, float | None], Tensor] = WeakValueDictionary()

    def encode(self, conditions: Sequence[Condition], *, guided: bool) -> list[Encoded]:
        """The rows of conditions, in order; equal prompts share their tensors, also with earlier calls still in use.

        Row tensors: `encoder_hidden_states` (tokens, width); `image_embeds.I` (images, ...) for the I-th IP adapter;
        `timestep_cond` (width,) if the UNet is told a guidance scale; and `cross_attention_kwargs`, a CPU integer that
        `attention_kwargs` takes.
        """
        import torch

        memo: dict[Hashable, Any] = {}
        with torch.no_grad(), quiet_libraries():
            return [self._encode(condition, guided, memo) for condition in conditions]

    def attention_kwargs(self, row: Row) -> dict[str, Any] | None:
        """The `cross_attention_kwargs` of a row, None if it has none; equal for all rows of a bucket."""
        return self._kwargs[int(row[KWARGS])] if KWARGS in row else None

    def scale_kept(self, scale: float | None) -> AbstractContextManager[None]:
        """Around a call with a LoRA scale, so that it leaves nothing behind; None is a call without one."""
        return nullcontext() if scale is None else lora_scales_kept(self.pipeline)

    def _encode(self, condition: Condition, guided: bool, memo: dict[Hashable, Any]) -> Encoded:
        import torch
        from diffusers.utils.constants import USE_PEFT_BACKEND

        options = condition.extra.get("cross_attention_kwargs")
        # Without peft there are no LoRA layers to scale, and the pipeline fails looking for some in the flat CLIP modules
        # of transformers 5.
        scale = options.get("scale") if options and USE_PEFT_BACKEND else None
        tensors = condition.tensors
        # clip_skip shapes the conditional row alone, as in the pipeline.
        cond = {TEXT: self._text(condition.prompt, tensors.get("prompt_embeds"), condition.extra.get("clip_skip"), scale)}
        uncond: dict[str, Tensor] = {}
        if guided:
            uncond[TEXT] = self._text(condition.negative_prompt, tensors.get("negative_prompt_embeds"), None, scale)
            if cond[TEXT].shape != uncond[TEXT].shape:
                raise UsageError(f"the prompt's embedding has shape {tuple(cond[TEXT].shape)} and the negative prompt's {tuple(uncond[TEXT].shape)}, but they must agree; give negative_prompt_embeds of the same length")
        for index, (negative, positive) in enumerate(image_embeddings(self.pipeline, condition.extra, self.device, memo, guided=guided)):
            cond[f"{IMAGE}.{index}"] = positive
            if guided:
                uncond[f"{IMAGE}.{index}"] = negative
        if self.told_scale is not None:
            told = self.told_scale if condition.extra.get(SCALE) is None else condition.extra[SCALE]
            cond[TOLD] = scale_embedding(self.pipeline, told, self.pipeline.unet.config.time_cond_proj_dim, self.device)
        bucket: tuple[Hashable, ...] = ("stable-diffusion", *sorted((key, tuple(tensor.shape)) for key, tensor in cond.items()))
        if options:
            number = self._number(dict(options))
            cond[KWARGS] = uncond[KWARGS] = torch.tensor(number)
            bucket = (*bucket, number)
        return Encoded((cond, uncond) if guided else (cond,), bucket)

    def _text(self, prompt: str, embeds: Tensor | None, skip: int | None, scale: float | None) -> Tensor:
        """The embedding (tokens, width) of a prompt, or of the caller's own tensor."""
        pipeline = self.pipeline
        if embeds is not None:
            batch = embeds if embeds.ndim == 3 else embeds[None]
            given, _ = pipeline.encode_prompt(None, self.device, 1, False, prompt_embeds=batch)
            own: Tensor = given[0]
            return own
        if pipeline.text_encoder is None:
            raise UsageError("guidance needs negative_prompt_embeds, because the pipeline has no text encoder; give them, or guidance_scale=1")
        found = self._texts.get((prompt, skip, scale))
        if found is None:
            self._note_length(prompt)
            device = device_of(pipeline.text_encoder, self.device)
            with self.scale_kept(scale), _HiddenStates(unwrapped(pipeline.text_encoder), skip) as skipped:
                encoded, _ = pipeline.encode_prompt(prompt, device, 1, False, lora_scale=scale)
            encoded = encoded if skip is None else skipped.normalised().to(encoded)
            found = self._texts[prompt, skip, scale] = encoded[0].to(self.device)
        return found

    def _note_length(self, prompt: str) -> None:
        tokenizer = self.pipeline.tokenizer
        limit = tokenizer.model_max_length
        dropped = len(tokenizer(self.pipeline.maybe_convert_prompt(prompt, tokenizer)).input_ids) - limit
        if dropped > 0:
            notice = f"prompt {prompt[:40]!r}... is {dropped} tokens longer than the {limit} that the text encoder reads; its last {dropped} tokens are dropped"
            if notice not in self.notices:
                self.notices.append(notice)

    def _number(self, options: dict[str, Any]) -> int:
        """The place of `cross_attention_kwargs` in our list; equal plain values share one, tensors are told by identity."""
        for number, known in enumerate(self._kwargs):
            if known.keys() == options.keys() and all(_same(known[key], options[key]) for key in known):
                return number
        self._kwargs.append(options)
        return len(self._kwargs) - 1


class _HiddenStates:
    """While entered, keeps what a CLIP text encoder's layer `skip` from the end puts out; with None it does nothing.

    The same as `encode_prompt(clip_skip=...)`, which fails with the flat CLIP modules of transformers 5, and whose
    `output_hidden_states=True` would leave hooks on the caller's modules. Ours is gone on leaving.
    """

    def __init__(self, encoder: Any, skip: int | None) -> None:
        self.text_model = getattr(encoder, "text_model", encoder)
        self.skip = skip
        self.states: Tensor | None = None

    def __enter__(self) -> _HiddenStates:
        if self.skip is not None:
            layers = self.text_model.encoder.layers
            self.hook = layers[len(layers) - 1 - self.skip].register_forward_hook(self._keep)
        return self

    def __exit__(self, *error: object) -> None:
        if self.skip is not None:
            self.hook.remove()

    def _keep(self, module: Any, inputs: Any, output: Any) -> None:
        self.states = output[0] if isinstance(output, tuple) else output

    def normalised(self) -> Tensor:
        """The states after the encoder's final normalisation."""
        assert self.states is not None, "the text encoder ran without its layers (compiled?)"
        states: Tensor = self.text_model.final_layer_norm(self.states)
        return states


def _same(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, (int, float, str)) and isinstance(b, (int, float, str)) and a == b)
