"""What Stable Diffusion XL is conditioned on: two texts, a pooled embedding, time ids, and image prompts.

As in the pipeline, a negative prompt that is not there is not an empty text: its embeddings are zeros, if the pipeline says
so (`force_zeros_for_empty_prompt`, as the published model does).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tsdiff.diffusion.ip_adapters import IMAGE_OPTIONS, check_image_prompt, image_embeddings
from tsdiff.diffusion.pipelines import device_of
from tsdiff.diffusion.quiet import quiet_libraries
from tsdiff.diffusion.source import Source
from tsdiff.diffusion.text_conditions import (
    CLIP_TOKENIZERS,
    NEGATIVE,
    SIDES,
    TEXT,
    Option,
    TextConditioner,
    TextRules,
    hooks_kept,
    number_from,
    whole_number,
)
from tsdiff.diffusion.told_guidance import TOLD, refuse_guidance, scale_embedding
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Condition, Encoded

if TYPE_CHECKING:
    from torch import Tensor

ENCODERS = {
    "text_encoder": ("CLIPTextModel", CLIP_TOKENIZERS),
    "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_TOKENIZERS),
}
SIZES = ("original_size", "crops_coords_top_left", "target_size")
"""What the time ids say, in order, each (height, width) or (top, left) in pixels."""

TIME_IDS, IMAGE = "time_ids", "image_embeds"

_TEXT_OPTIONS = ("prompt_2", "negative_prompt_2", "clip_skip")
_PAIR = Option(
    lambda value: isinstance(value, (tuple, list)) and len(value) == 2 and all(type(side) is int and side >= 0 for side in value),
    "two whole numbers of pixels, vertical first",
)
_ANYTHING = Option(lambda value: True, "anything")
_REFINER = "only a refiner reads it, and refiners are not supported"
_SPLIT = "it splits the work between a base model and a refiner, and refiners are not supported"
_REFUSED = {
    "aesthetic_score": _REFINER,
    "negative_aesthetic_score": _REFINER,
    "denoising_end": _SPLIT,
    "denoising_start": _SPLIT,
    "cross_attention_kwargs": "adapters have the scale that they were loaded with",
}


def setting(source: Source, name: str, usual: bool) -> bool:
    """A setting of the pipeline itself."""
    settings = source.entries if source.pipeline is None else source.pipeline.config
    return bool(settings.get(name, usual))


@dataclass(frozen=True)
class ConditionRules(TextRules):
    """What a Stable Diffusion XL model can be conditioned on, from its configs.

    Attributes:
      zeros: whether a negative prompt that is not given means embeddings of zeros.
      adapter: whether an IP adapter is loaded, which then must be given an image.
      told_scale: the guidance scale that the UNet is usually told instead of being guided, None if it is not told any.
    """

    zeros: bool = True
    adapter: bool = False
    told_scale: float | None = None

    @classmethod
    def of(cls, source: Source, missing: str | None, *, pooled: int, told_scale: float | None) -> ConditionRules:
        """The rules of a pipeline.

        Args:
          source: of it.
          missing: a text encoder that it lacks.
          pooled: width of the pooled embedding.
          told_scale: what its UNet is usually told, None if it takes no guidance scale.

        Raises:
          UsageError: if the text encoders do not fit the UNet.
        """
        taken = source.entry("unet", "cross_attention_dim")
        width = int(taken if isinstance(taken, int) else taken[0])
        options = dict.fromkeys(("prompt_2", "negative_prompt_2"), TEXT)
        options |= {side + size: _PAIR for side in SIDES for size in SIZES} | dict.fromkeys(IMAGE_OPTIONS, _ANYTHING)
        if told_scale is not None:
            options["guidance_scale"] = number_from(0.0)
        tokens = 77
        if missing is None:
            options["clip_skip"] = whole_number(0, min(int(source.entry(name, "num_hidden_layers")) for name in ENCODERS) - 1)
            tokens = int(source.entry("text_encoder", "max_position_embeddings"))
            made = sum(int(source.entry(name, "hidden_size")) for name in ENCODERS)
            if made != width:
                raise UsageError(f"the text encoders of {source.name!r} make embeddings of width {made} but its UNet takes {width}; they do not belong together")
        return cls(
            source.name,
            "Stable Diffusion XL",
            {"prompt_embeds": ("tokens", width), "pooled_prompt_embeds": (pooled,)},
            lambda extra: tokens,
            options,
            conditional=("clip_skip",),
            missing=missing,
            refused=_REFUSED | ({} if told_scale is not None else {"guidance_scale": "this model's network is not told a guidance scale; give it to the search"}),
            zeros=setting(source, "force_zeros_for_empty_prompt", True),
            adapter=source.config("unet").get("encoder_hid_dim_type") == "ip_image_proj",
            told_scale=told_scale,
        )

    def check(self, condition: Condition, *, guided: bool = False) -> None:
        """Raise UsageError if the model cannot take a condition (under guidance)."""
        if guided:
            refuse_guidance(self.name, self.told_scale)
        super().check(self.completed(condition, "cpu") if guided else condition, guided=guided)
        check_image_prompt(self.name, condition.extra, adapter=self.adapter)
        given = [NEGATIVE + size for size in SIZES if condition.extra.get(NEGATIVE + size) is not None]
        lacking = [NEGATIVE + size for size in (SIZES[0], SIZES[2]) if NEGATIVE + size not in given]
        if given and lacking:
            raise UsageError(f"{given[0]} is given without {' and '.join(lacking)}, and would not be heeded; give negative_original_size and negative_target_size, or none of them")

    def completed(self, condition: Condition, device: str) -> Condition:
        """A condition with zeros in place of a negative prompt that is not there, where the pipeline does so."""
        tensors = condition.tensors
        there = condition.negative_prompt or condition.extra.get("negative_prompt_2") or any(NEGATIVE + name in tensors for name in self.embeddings)
        if there or not self.zeros:
            return condition
        shapes = {name: tuple(self._length(condition, "") if side == "tokens" else int(side) for side in shape) for name, shape in self.embeddings.items()}
        return replace(condition, tensors={**tensors, **{NEGATIVE + name: _zeros(shape, device) for name, shape in shapes.items()}})


class Conditioner(TextConditioner):
    """Rows of Stable Diffusion XL.

    Row tensors: `prompt_embeds` (tokens, width), `pooled_prompt_embeds` (width,); `time_ids` (6,), with nan where the side of
    the image at hand is meant; `timestep_cond` (width,) if the UNet is told a guidance scale; and `image_embeds.I`
    (images, ...) for the I-th IP adapter.

    Args:
      pipeline, device, rules: see `TextConditioner`.
      told_width: of the embedding of a guidance scale, None if the UNet takes none.
    """

    rules: ConditionRules

    def __init__(self, pipeline: Any, device: str, rules: ConditionRules, told_width: int | None) -> None:
        super().__init__(pipeline, device, rules)
        self.told_width = told_width

    def embed(self, prompt: str, options: Mapping[str, Any]) -> dict[str, Tensor]:
        """See `TextConditioner`."""
        pipeline = self.pipeline
        second = options.get("prompt_2") or prompt
        for text, tokenizer, reader in ((prompt, pipeline.tokenizer, "CLIP"), (second, pipeline.tokenizer_2, "the second CLIP")):
            self.note_length(pipeline.maybe_convert_prompt(text, tokenizer), tokenizer, tokenizer.model_max_length, reader)
        with hooks_kept(pipeline.text_encoder, pipeline.text_encoder_2):
            embeds, _, pooled, _ = pipeline.encode_prompt(
                prompt,
                second,
                device=device_of(pipeline.text_encoder, self.device),
                do_classifier_free_guidance=False,
                clip_skip=options.get("clip_skip"),
            )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def encode(self, conditions: Sequence[Condition], *, guided: bool) -> list[Encoded]:
        """See `TextConditioner`."""
        import torch

        texts = super().encode([self._texts_of(condition, guided=guided) for condition in conditions], guided=guided)
        memo: dict[Hashable, Any] = {}
        with torch.no_grad(), quiet_libraries():
            return [self._with_facts(text, condition.extra, memo, guided=guided) for text, condition in zip(texts, conditions, strict=True)]

    def _texts_of(self, condition: Condition, *, guided: bool) -> Condition:
        """The part of a condition that the text encoders read."""
        plain = replace(condition, extra={name: value for name, value in condition.extra.items() if name in _TEXT_OPTIONS})
        return self.rules.completed(plain, self.device) if guided else plain

    def _with_facts(self, text: Encoded, extra: Mapping[str, Any], memo: dict[Hashable, Any], *, guided: bool) -> Encoded:
        import torch

        told: dict[str, Tensor] = {}
        if self.told_width is not None:
            scale = self.rules.told_scale if extra.get("guidance_scale") is None else extra["guidance_scale"]
            told[TOLD] = scale_embedding(self.pipeline, scale, self.told_width, self.device)
        images = image_embeddings(self.pipeline, extra, self.device, memo, guided=guided)
        rows = []
        for number, row in enumerate(text.rows):  # the conditional one first
            own = {f"{IMAGE}.{index}": pair[1 - number] for index, pair in enumerate(images)}
            rows.append({**row, **own, **told, TIME_IDS: torch.tensor(_time_ids(extra, SIDES[number]), device=self.device)})
        shapes = [tuple(positive.shape) for _, positive in images]
        return Encoded(tuple(rows), (text.bucket, *shapes))


def _time_ids(extra: Mapping[str, Any], side: str) -> list[float]:
    """The six numbers of a row; the unconditional one has those of the conditional one unless its own sizes are given."""
    own = side if extra.get(side + SIZES[0]) is not None else ""
    usual = {"crops_coords_top_left": (0.0, 0.0)}
    pairs = [extra.get(own + size) or usual.get(size, (float("nan"),) * 2) for size in SIZES]
    return [float(number) for pair in pairs for number in pair]


@lru_cache(maxsize=8)
def _zeros(shape: tuple[int, ...], device: str) -> Tensor:
    """Zeros that conditions share."""
    import torch

    return torch.zeros(shape, device=device)
