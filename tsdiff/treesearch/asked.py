"""What samples are asked for, checked: prompts, seeds, size, guidance."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Condition, Guidance, ModelOutline, Size, ToldOutline, VideoOutline


def conditions_of(prompts: Any, base: Condition) -> list[Condition]:
    """What each sample is conditioned on; a `Condition` has its own, else what all have (`base`)."""
    several = [None] if prompts is None else [prompts] if isinstance(prompts, (str, Condition)) else list(prompts)
    if not several:
        raise UsageError("the list of prompts is empty; give at least one")
    made = []
    for prompt in several:
        if isinstance(prompt, Condition):
            made.append(dataclasses.replace(
                prompt,
                negative_prompt=prompt.negative_prompt or base.negative_prompt,
                class_label=base.class_label if prompt.class_label is None else prompt.class_label,
                tensors={**base.tensors, **prompt.tensors},
                extra={**base.extra, **prompt.extra},
            ))
        elif prompt is None or isinstance(prompt, str):
            made.append(dataclasses.replace(base, prompt=prompt or ""))
        else:
            raise UsageError(f"prompt {prompt!r} is neither text nor a Condition")
    return made


def seeds_of(seed: int | Sequence[int]) -> tuple[int, ...]:
    """The seeds of one or several, each once."""
    several = seed if isinstance(seed, Iterable) and not isinstance(seed, str) else (seed,)
    seeds = tuple(whole("seed", one) for one in several)
    if not seeds:
        raise UsageError("the list of seeds is empty; give at least one")
    bad = [one for one in seeds if not 0 <= one < 1 << 64]
    if bad:
        raise UsageError(f"seed {bad[0]} is out of range; allowed are integers from 0 to 2**64 - 1")
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"seeds {list(seeds)} name one twice; each makes one run")
    return seeds


def size_of(outline: ModelOutline, height: int | None, width: int | None, frames: int | None) -> Size:
    """The output size, of a video with its frames."""
    if outline.media != "video":
        return outline.size(height, width)
    if not isinstance(outline, VideoOutline):
        raise UsageError(f"model {outline.name!r} says that it makes videos but not how fast they are shown; it needs a method frame_rate")
    return outline.size(height, width, None if frames is None else at_least("frames", frames, 1))


def told_scale(outline: ModelOutline, extra: dict[str, Any], scale: float | None, true_cfg_scale: float | None) -> tuple[dict[str, Any], float | None]:
    """The options of conditions and the scale of classifier-free guidance: some networks are told the guidance scale instead."""
    told = outline.told_scale if isinstance(outline, ToldOutline) else None
    if told is not None:
        return {"guidance_scale": told if scale is None else scale} | extra, 1.0 if true_cfg_scale is None else true_cfg_scale
    if true_cfg_scale is not None:
        raise UsageError(f"true_cfg_scale is {true_cfg_scale:g} but the network of model {outline.name!r} is not told a guidance scale, so that there is one kind of guidance only; give guidance_scale")
    return extra, scale


def guidance_of(outline: ModelOutline, scale: float, rescale: float, interval: tuple[float, float] | None, *, explicit: bool) -> Guidance:
    """Guidance in its ranges; off for a model that has none, unless it was asked for (`explicit`), which is refused."""
    if not 0.0 <= scale < float("inf"):
        raise UsageError(f"guidance_scale is {scale:g} but must be a number of at least 0 (at or below 1 guidance is off)")
    if not 0.0 <= rescale <= 1.0:
        raise UsageError(f"guidance_rescale is {rescale:g} but must lie in [0, 1]")
    if interval is not None and not 0.0 <= interval[0] < interval[1]:
        raise UsageError(f"guidance_interval is {interval} but must be LOW,HIGH with 0 <= LOW < HIGH, in units of sigma/alpha")
    if scale > 1.0 and not outline.guidable:
        if explicit:
            raise UsageError(f"guidance_scale is {scale:g} but model {outline.name!r} has no unconditional branch to guide with; leave it out")
        scale = 1.0
    return Guidance(scale, rescale, interval)


def refuse_for_images(outline: ModelOutline, **options: Any) -> None:
    """Raise UsageError for options of videos that were given to a model of something else."""
    for name, value in options.items():
        if value is not None:
            raise UsageError(f"{name} is {value} but model {outline.name!r} makes {'images' if outline.media == 'image' else 'no pictures'}, not videos; leave it out")


def whole(name: str, value: Any) -> int:
    """An option that is a whole number, as an int."""
    if not isinstance(value, Integral):
        raise UsageError(f"{name} is {value!r} but must be a whole number")
    return int(value)


def at_least(name: str, value: Any, low: int) -> int:
    """An option that is a whole number from `low` on, as an int."""
    if whole(name, value) < low:
        raise UsageError(f"{name} is {value} but must be at least {low}")
    return int(value)
