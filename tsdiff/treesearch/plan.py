"""A search, planned: every name resolved, every option checked, the cost known - before any weights load."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tsdiff.treesearch.engine import Limits
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.ledger import Cost, Spend
from tsdiff.treesearch.models import load_options, resolve_model
from tsdiff.treesearch.noise import Given, Recipe, Torch
from tsdiff.treesearch.pools import announce, pools
from tsdiff.treesearch.previews import SHOWS, Show
from tsdiff.treesearch.protocols import (
    Allocator,
    Condition,
    Demo,
    Guidance,
    LoadOptions,
    ModelOutline,
    Policy,
    Setting,
    Size,
    ToldOutline,
    Verifier,
    VideoOutline,
)
from tsdiff.treesearch.references import resolve_verifier
from tsdiff.treesearch.resolve import Verifiers, check_needs, resolve_policy, resolve_verifiers
from tsdiff.treesearch.schedule import Schedule, SolverInfo

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_MODEL = "shapes"

Keep: TypeAlias = Literal["all", "path", "leaves", "none"]
EMBEDDINGS = tuple(f"{side}{name}" for name in ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask") for side in ("", "negative_"))
"""Arguments that are tensors of every condition."""

KEEPS: tuple[Keep, ...] = ("all", "path", "leaves", "none")


@dataclass(frozen=True)
class Plan:
    """What `prepare` has resolved; `execute` carries it out.

    Attributes:
      model: the model's outline; weights are not loaded.
      conditions, seeds: every condition is searched under every seed.
      policy: fitted to the budget where its size was left open; or an allocator, which shares `total_nfe` among all searches.
      verifiers: the first steers.
      roles: the one in each role that the policy knows.
      cost: of one search (bounds, where it depends on values), limited by the budget.
      baseline_cost: of the plain sample beside each search, None without.
      nfe: the budget of one search, None for none (or where an allocator decides).
      total_nfe: the budget of all searches together, None for none.
      target: the score that an allocator need not exceed, None for none.
      is_demo: whether the prompt is the model's own demonstration.
      notices: lines to show the user.
      typed: the options as the caller gave them.
      keep_latents: whose latents are kept of nodes that will not be grown any more: all, those on the path to the answer,
        finished ones, or none.
      previews: of which decoded nodes small pictures are kept: those whose latents are, all, or none.
      metadata: whether images carry their history.
      arguments: what `prepare` was called with.
      extra: options of the model family that every condition has unless it has its own, a told guidance scale included.
    """

    model: ModelOutline
    conditions: tuple[Condition, ...]
    seeds: tuple[int, ...]
    policy: Policy | Allocator
    verifiers: tuple[Verifier, ...]
    roles: Mapping[str, Verifier]
    schedule: Schedule
    solver: SolverInfo
    guidance: Guidance
    size: Size
    cost: Cost
    baseline_cost: Spend | None
    nfe: int | None
    limits: Limits
    out: Path | None
    is_demo: bool
    notices: tuple[str, ...]
    image: Any = None
    first: Recipe | None = None
    given: Tensor | None = None
    helpers: Mapping[str, ModelOutline] = field(default_factory=dict)
    keep_latents: Keep = "all"
    previews: Show = "kept"
    metadata: bool = True
    typed: Mapping[str, Any] = field(default_factory=dict)
    total_nfe: int | None = None
    target: float | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def setting(self) -> Setting:
        """What costs depend on."""
        return Setting(self.schedule, self.solver, self.verifiers[0], self.verifiers[1:], self.model.media is not None, self.roles)

    @property
    def calibration_cost(self) -> Spend | None:
        """What making the plain samples spends that verifiers compare with, unless their scores are cached; None if none do."""
        costs = [pool.cost(self.setting, len(self.conditions)) for _, pool in pools(self.verifiers)]
        return sum(costs, Spend()) if costs else None

    @property
    def num_runs(self) -> int:
        """Searches to run."""
        return len(self.conditions) * len(self.seeds)

    @property
    def nfe_upper(self) -> int:
        """NFE of everything, baselines included, at most."""
        searches = self.total_nfe if self.total_nfe is not None and isinstance(self.policy, Allocator) else self.num_runs * self.cost.upper.nfe
        return searches + self.num_runs * (self.baseline_cost.nfe if self.baseline_cost else 0)

    @property
    def rows_upper(self) -> int:
        """Network rows of everything, at most: guided levels have two rows."""
        return self.nfe_upper * (2 if self.guidance.on else 1)

    def to_json(self) -> dict[str, Any]:
        """The resolved options and the cost as strict JSON."""
        return {
            "model": self.model.name,
            "prompts": [condition.label for condition in self.conditions],
            "seeds": list(self.seeds),
            "policy": {"name": self.policy.name} | policy_options(self.policy),
            "verifiers": [verifier.name for verifier in self.verifiers],
            "roles": {role: verifier.name for role, verifier in self.roles.items()},
            "solver": str(self.solver),
            "steps": self.schedule.last,
            "guidance_scale": self.guidance.scale,
            "guidance_rescale": self.guidance.rescale,
            "guidance_interval": None if self.guidance.interval is None else list(self.guidance.interval),
            "condition_extra": _extra(self.extra) or None,
            "x0_decoder": None if self.arguments.get("x0_decoder") is None else str(self.arguments["x0_decoder"]),
            "size": None if self.size is None else list(self.size),
            "nfe_budget": self.nfe,
            "total_nfe": self.total_nfe,
            "target": self.target,
            "runs": self.num_runs,
            "cost": {"lower": dataclasses.asdict(self.cost.lower), "upper": dataclasses.asdict(self.cost.upper), "exact": self.cost.exact},
            "baseline_cost": None if self.baseline_cost is None else dataclasses.asdict(self.baseline_cost),
            "calibration_cost": None if self.calibration_cost is None else dataclasses.asdict(self.calibration_cost),
            "nfe_upper": self.nfe_upper,
            "rows_upper": self.rows_upper,
            "deterministic": self.limits.deterministic,
            "keep": self.keep_latents,
            "previews": self.previews,
            "metadata": self.metadata,
            "rows_per_call": {"network": self.limits.network, "decode": self.limits.decode, "verify": self.limits.verify},
            "seconds_limit": self.limits.seconds,
            "notices": list(self.notices),
        }


def policy_options(policy: Any) -> dict[str, Any]:
    """A policy's hyperparameters as strict JSON; a policy among them has its name there."""
    if not dataclasses.is_dataclass(policy):
        return {}
    return {item.name: _plain(getattr(policy, item.name)) for item in dataclasses.fields(policy)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return ({"name": value.name} if hasattr(value, "name") else {}) | policy_options(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def _extra(value: Any) -> Any:
    """Options of a condition as strict JSON; of pictures and tensors only what they are."""
    if isinstance(value, Mapping):
        return {str(key): _extra(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_extra(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else type(value).__name__


def prepare(
    model: Any = None,
    prompts: str | Condition | Sequence[str | Condition] | None = None,
    *,
    policy: str | Policy | Allocator = "beam",
    policy_options: Mapping[str, Any] | None = None,
    verifiers: Verifiers = (),
    ensemble: str | None = None,
    nfe: int | None = None,
    total_nfe: int | None = None,
    target: float | None = None,
    seconds: float | None = None,
    seed: int | Sequence[int] = 0,
    steps: int | None = None,
    solver: str | None = None,
    eta: float | None = None,
    guidance_scale: float | None = None,
    true_cfg_scale: float | None = None,
    guidance_rescale: float = 0.0,
    guidance_interval: tuple[float, float] | None = None,
    negative_prompt: str = "",
    class_label: int | str | None = None,
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    pooled_prompt_embeds: Tensor | None = None,
    negative_pooled_prompt_embeds: Tensor | None = None,
    prompt_attention_mask: Tensor | None = None,
    negative_prompt_attention_mask: Tensor | None = None,
    condition_extra: Mapping[str, Any] | None = None,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    fps: float | None = None,
    init_image: Any = None,
    strength: float | None = None,
    latents: Tensor | None = None,
    initial_noise: Literal["portable", "torch"] = "portable",
    helpers: Mapping[str, Any] | None = None,
    baseline: bool = True,
    deterministic: bool = False,
    max_batch: int | None = None,
    memory_limit: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    offline: bool = False,
    revision: str | None = None,
    variant: str | None = None,
    strict_scheduler: bool = False,
    lora: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    latent_dtype: str = "float32",
    offload: bool = False,
    vae_slicing: bool = False,
    vae_tiling: bool = False,
    channels_last: bool = False,
    compile: bool = False,
    x0_decoder: str | os.PathLike[str] | None = None,
    keep: Keep = "all",
    previews: Show = "kept",
    metadata: bool = True,
    out: str | Path | None = None,
) -> Plan:
    """Resolve and check everything that `tsdiff.search` takes (see there), without loading weights.

    Raises:
      UsageError, SetupError: for whatever cannot be done as asked.
    """
    arguments = dict(locals())
    if keep not in KEEPS:
        raise UsageError(f"keep is {keep!r} but must be one of {', '.join(KEEPS)}")
    if previews not in SHOWS:
        raise UsageError(f"previews is {previews!r} but must be one of {', '.join(SHOWS)}")
    options = load_options(arguments)
    outline = resolve_model(DEFAULT_MODEL if model is None else model, options)
    notices = list(outline.notices)
    if model is None:
        notices.append(f"no model was named: searching the embedded model {outline.name!r}")
    tensors = {name: arguments[name] for name in EMBEDDINGS if arguments[name] is not None}
    is_demo = prompts is None and class_label is None and not tensors
    if is_demo:
        if outline.demo is None:
            raise UsageError(f"no prompt was given and model {outline.name!r} has no demonstration; give a prompt")
        prompts = outline.demo.prompt
        notices.append(f"no prompt was given: searching the demonstration prompt {outline.demo.prompt!r}")
    extra, guidance_scale = _told(outline, dict(condition_extra or {}), guidance_scale, true_cfg_scale)
    if outline.media != "video":
        _refuse_for_images(outline, frames=frames, fps=fps)
    elif init_image is not None:
        raise UsageError(f"init_image was given but model {outline.name!r} makes videos, which cannot start from an image; leave it out")
    if fps is not None:
        extra = {"frame_rate": fps} | extra
    base = Condition("", negative_prompt, class_label, tensors, extra)
    conditions = tuple(_conditions(prompts, base))
    scale = outline.default_guidance_scale if guidance_scale is None else guidance_scale
    guidance = _guidance(outline, scale, guidance_rescale, guidance_interval, explicit=guidance_scale is not None)
    for condition in conditions:
        outline.check(condition, guided=guidance.on)
    if not verifiers and not callable(verifiers):
        if outline.demo is None:
            raise UsageError("no verifier was given, so there is nothing to search for; name one (--verifier), `tsdiff list verifiers` lists all")
        verifiers, missing = _usual_verifiers(outline.demo, conditions)
        notices.append(f"no verifier was given: using {' and '.join(map(repr, verifiers))}")
        notices.extend(missing)
    chosen, open_size = resolve_policy(policy, policy_options or {})
    judges, roles = resolve_verifiers(verifiers, chosen, ensemble)
    for judge in judges:
        if "images" in judge.needs and outline.media is None:
            raise UsageError(f"verifier {judge.name!r} looks at images, but model {outline.name!r} makes none")
        if "pages" in judge.needs and out is None:
            raise UsageError(f"verifier {judge.name!r} asks a person in the page of the run, but this search is not recorded; give it a folder: out=FOLDER (--out)")
        for condition in conditions:
            judge.check(condition)
    size = _size(outline, height, width, frames)
    info = outline.solver(solver, eta)
    whole = outline.schedule(info, outline.default_steps if steps is None else _at_least("steps", steps, 1), size)
    schedule = _tail(whole, init_image, strength)
    seeds = _seeds(seed)
    first, given = _first_noise(initial_noise, latents, outline.latent_shape(size), seeds)

    setting = Setting(schedule, info, judges[0], judges[1:], outline.media is not None, roles)
    check_needs(chosen, setting, outline.solvers)
    notices.extend(announce(judges, setting, len(conditions)))
    runs = len(conditions) * len(seeds)
    nfe, total_nfe = _budgets(chosen, nfe, total_nfe, runs, setting)
    _check_target(chosen, target, judges[0])
    if isinstance(chosen, Allocator):
        assert total_nfe is not None
        cost = chosen.forecast(total_nfe, runs, setting)
    else:
        if nfe is not None and open_size:
            chosen = _fitted(chosen, nfe, total_nfe, runs, setting)
        cost = capped(chosen.cost(setting), nfe, setting)
    if seconds is not None and not (isinstance(seconds, Real) and seconds > 0):
        raise UsageError(f"seconds is {seconds!r} but must be a number above 0")
    plain = Spend(nfe=setting.sample_cost) + setting.scoring(1, final=True) + setting.result()
    limits = _limits(deterministic, max_batch, memory_limit, seconds)
    return Plan(
        model=outline,
        conditions=conditions,
        seeds=seeds,
        policy=chosen,
        verifiers=judges,
        roles=roles,
        schedule=schedule,
        solver=info,
        guidance=guidance,
        size=size,
        cost=cost,
        baseline_cost=plain if baseline else None,
        nfe=nfe,
        limits=limits,
        out=None if out is None else Path(out),
        is_demo=is_demo,
        notices=tuple(notices),
        image=_image(init_image, size) if init_image is not None else None,
        first=first,
        given=given,
        extra=extra,
        helpers={name: _helper(name, helper, options, outline, whole, info, size) for name, helper in (helpers or {}).items()},
        keep_latents=keep,
        previews=previews,
        metadata=metadata,
        total_nfe=total_nfe,
        target=target,
        arguments=arguments,
    )


def _usual_verifiers(demo: Demo, conditions: Sequence[Condition]) -> tuple[list[str], list[str]]:
    """The verifiers of a model's demonstration, and a line for each that cannot judge these conditions: the first must."""
    steering, *others = demo.verifiers
    chosen, missing = [steering], []
    for name in others:
        judge = resolve_verifier(name)
        try:
            for condition in conditions:
                judge.check(condition)
            chosen.append(name)
        except UsageError as error:
            missing.append(f"{name!r} is left out: {error}")
    return chosen, missing


def _limits(deterministic: bool, max_batch: int | None, memory_limit: int | None, seconds: float | None) -> Limits:
    """Rows a call and bytes of latents; in deterministic mode the row counts are fixed, and fewer only if asked."""
    usual = Limits(deterministic)
    most = None if max_batch is None else _at_least("max_batch", max_batch, 1)
    size = usual.host_bytes if memory_limit is None else _at_least("memory_limit", memory_limit, 1)

    def capped(rows: int | None) -> int | None:
        return most if rows is None else rows if most is None else min(rows, most)

    return dataclasses.replace(
        usual,
        network=capped(usual.network),
        decode=capped(usual.decode) or usual.decode,
        verify=capped(usual.verify) or usual.verify,
        host_bytes=size,
        device_bytes=size,
        seconds=seconds,
    )


def _conditions(prompts: Any, base: Condition) -> list[Condition]:
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


def _whole(name: str, value: Any) -> int:
    if not isinstance(value, Integral):
        raise UsageError(f"{name} is {value!r} but must be a whole number")
    return int(value)


def _at_least(name: str, value: Any, low: int) -> int:
    if _whole(name, value) < low:
        raise UsageError(f"{name} is {value} but must be at least {low}")
    return int(value)


def _seeds(seed: int | Sequence[int]) -> tuple[int, ...]:
    several = seed if isinstance(seed, Iterable) and not isinstance(seed, str) else (seed,)
    seeds = tuple(_whole("seed", one) for one in several)
    if not seeds:
        raise UsageError("the list of seeds is empty; give at least one")
    bad = [one for one in seeds if not 0 <= one < 1 << 64]
    if bad:
        raise UsageError(f"seed {bad[0]} is out of range; allowed are integers from 0 to 2**64 - 1")
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"seeds {list(seeds)} name one twice; each makes one run")
    return seeds


def _guidance(outline: ModelOutline, scale: float, rescale: float, interval: tuple[float, float] | None, *, explicit: bool) -> Guidance:
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


def _size(outline: ModelOutline, height: int | None, width: int | None, frames: int | None) -> Size:
    if outline.media != "video":
        return outline.size(height, width)
    if not isinstance(outline, VideoOutline):
        raise UsageError(f"model {outline.name!r} says that it makes videos but not how fast they are shown; it needs a method frame_rate")
    return outline.size(height, width, None if frames is None else _at_least("frames", frames, 1))


def _refuse_for_images(outline: ModelOutline, **options: Any) -> None:
    """Raise UsageError for options of videos that were given to a model of something else."""
    for name, value in options.items():
        if value is not None:
            raise UsageError(f"{name} is {value} but model {outline.name!r} makes {'images' if outline.media == 'image' else 'no pictures'}, not videos; leave it out")


def _told(outline: ModelOutline, extra: dict[str, Any], scale: float | None, true_cfg_scale: float | None) -> tuple[dict[str, Any], float | None]:
    """The options of conditions and the scale of classifier-free guidance: some networks are told the guidance scale instead."""
    told = outline.told_scale if isinstance(outline, ToldOutline) else None
    if told is not None:
        return {"guidance_scale": told if scale is None else scale} | extra, 1.0 if true_cfg_scale is None else true_cfg_scale
    if true_cfg_scale is not None:
        raise UsageError(f"true_cfg_scale is {true_cfg_scale:g} but the network of model {outline.name!r} is not told a guidance scale, so that there is one kind of guidance only; give guidance_scale")
    return extra, scale


def _first_noise(initial_noise: str, latents: Tensor | None, shape: tuple[int, ...], seeds: Sequence[int]) -> tuple[Recipe | None, Tensor | None]:
    """The recipe of root 0 and the caller's own noise."""
    if initial_noise not in ("portable", "torch"):
        raise UsageError(f"initial_noise is {initial_noise!r} but must be 'portable' or 'torch'")
    if latents is None:
        return (Torch(-1) if initial_noise == "torch" else None), None  # the seed is filled in for each run
    if initial_noise == "torch":
        raise UsageError("latents and initial_noise='torch' both say what the first noise is; give one")
    if len(seeds) > 1:
        raise UsageError(f"latents are one first noise but there are {len(seeds)} seeds; give one seed")
    own = latents.detach().float().cpu()
    if own.dim() == len(shape) + 1 and own.shape[0] == 1:
        own = own[0]
    if tuple(own.shape) != tuple(shape):
        raise UsageError(f"latents have shape {tuple(latents.shape)} but this model and size need {tuple(shape)} (unit-variance noise, as pipelines take)")
    return Given(hashlib.sha256(own.contiguous().numpy().tobytes()).hexdigest()), own.contiguous()


def _helper(name: str, reference: Any, options: LoadOptions, main: ModelOutline, schedule: Schedule, info: SolverInfo, size: Size) -> ModelOutline:
    """Another model of the search: one that shares its latents and levels."""
    outline = resolve_model(reference, dataclasses.replace(options, lora=(), x0_decoder=None))
    own = outline.schedule(outline.solver(str(info)), schedule.last, size)
    if own.key != schedule.key or outline.latent_shape(size) != main.latent_shape(size):
        raise UsageError(f"helper {name!r} does not share the latents and noise levels of model {main.name!r}; choose a model of the same family and schedule")
    return outline


def _tail(schedule: Schedule, init_image: Any, strength: float | None) -> Schedule:
    """The levels below the starting noise of an initial image, as image-to-image pipelines choose it."""
    if init_image is None:
        if strength is not None:
            raise UsageError("strength was given without an initial image; give both or none")
        return schedule
    strength = 0.8 if strength is None else strength
    if not 0.0 < strength <= 1.0:
        raise UsageError(f"strength is {strength:g} but must lie in (0, 1]")
    # Image-to-image pipelines of flow models round towards remaking more, those of diffusion models towards less.
    remade = schedule.last * strength
    start = int(schedule.last - remade) if schedule.kind == "flow" else schedule.last - min(int(remade), schedule.last)
    if start == schedule.last:
        raise UsageError(f"strength {strength:g} leaves none of {schedule.last} steps; use at least {1 / schedule.last:g}")
    return schedule.tail(start)


def _image(source: Any, size: Size) -> Any:
    """An initial image as a PIL image of the search's size."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(source, (str, Path)):
        try:
            with Image.open(source) as opened:
                image = opened.convert("RGB")
        except FileNotFoundError:
            raise UsageError(f"the initial image {str(source)!r} does not exist") from None
        except (UnidentifiedImageError, OSError) as error:
            raise UsageError(f"the initial image {str(source)!r} cannot be read: {error}") from None
    elif isinstance(source, Image.Image):
        image = source.convert("RGB")
    else:
        raise UsageError(f"init_image is {type(source).__name__} but must be a file name or a PIL image")
    if size is not None and image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return image


def _budgets(policy: Policy | Allocator, nfe: int | None, total_nfe: int | None, runs: int, setting: Setting) -> tuple[int | None, int | None]:
    """The budget of each search, and that of all together: an allocator shares it out, other policies have equal parts of it."""
    least = setting.sample_cost
    sample = f"one sample with {setting.solver} and {setting.schedule.last} steps costs {least}"
    if total_nfe is not None:
        total_nfe = _whole("total_nfe", total_nfe)
        if nfe is not None:
            raise UsageError(f"nfe={nfe} and total_nfe={total_nfe} were both given; nfe is the budget of each search, total_nfe that of all together: give one")
        several = f" and there are {runs} searches" if runs > 1 else ""
        if total_nfe < runs * least:
            raise UsageError(f"total_nfe is {total_nfe} but {sample}{several}; the smallest total is {runs * least}")
        return (None if isinstance(policy, Allocator) else total_nfe // runs), total_nfe
    if isinstance(policy, Allocator):
        same = "" if nfe is None else f"; nfe={nfe} for each of {runs} is total_nfe={nfe * runs}"
        raise UsageError(f"policy {policy.name} shares one budget among all searches; give it as total_nfe (--total-nfe), at least {runs * least}{same}")
    if nfe is not None:
        nfe = _whole("nfe", nfe)
        if nfe < least:
            raise UsageError(f"nfe is {nfe} but {sample}; the smallest budget is {least}")
    return nfe, None


def _fitted(policy: Policy, nfe: int, total_nfe: int | None, runs: int, setting: Setting) -> Policy:
    try:
        return policy.fit(nfe, setting)
    except UsageError as error:
        if total_nfe is None:
            raise
        raise UsageError(f"{error} (total_nfe={total_nfe} is {nfe} for each of {runs} searches)") from None


def _check_target(policy: Policy | Allocator, target: float | None, verifier: Verifier) -> None:
    if target is None:
        return
    if verifier.scope == "set":
        raise UsageError(f"a target was given, but verifier {verifier.name} scores relative to each set, so that no number is good enough; choose a verifier of scope 'row'")
    if not isinstance(target, Real) or not math.isfinite(target):
        raise UsageError(f"target is {target!r} but must be a finite number, a score that is good enough")
    if not isinstance(policy, Allocator):
        raise UsageError(f"a target was given, but policy {policy.name} spends its budget whatever it finds; policies that share one budget stop there, e.g. adaptive with total_nfe")


def capped(cost: Cost, nfe: int | None, setting: Setting) -> Cost:
    """A policy's cost under a budget: what exceeds it ends with the engine finishing one sample."""
    if nfe is None or cost.upper.nfe <= nfe:
        return cost
    lower = cost.lower if cost.lower.nfe <= nfe else Spend(nfe=setting.sample_cost) + setting.scoring(1, final=True)
    return Cost(lower, dataclasses.replace(cost.upper, nfe=nfe))
