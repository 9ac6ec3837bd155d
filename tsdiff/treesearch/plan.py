"""A search, planned: every name resolved, every option checked, the cost known - before any weights load."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tsdiff.treesearch.asked import at_least, conditions_of, guidance_of, refuse_for_images, seeds_of, size_of, told_scale
from tsdiff.treesearch.budgets import budgets_of, capped, check_target, fitted, limits_of
from tsdiff.treesearch.engine import Limits
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.ledger import Cost, Spend
from tsdiff.treesearch.models import load_options, resolve_model
from tsdiff.treesearch.noise import Recipe
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
    Verifier,
)
from tsdiff.treesearch.references import resolve_verifier
from tsdiff.treesearch.resolve import Verifiers, check_needs, resolve_policy, resolve_verifiers
from tsdiff.treesearch.schedule import Schedule, SolverInfo
from tsdiff.treesearch.starts import first_noise, initial_image, tail_of

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
    extra, guidance_scale = told_scale(outline, dict(condition_extra or {}), guidance_scale, true_cfg_scale)
    if outline.media != "video":
        refuse_for_images(outline, frames=frames, fps=fps)
    elif init_image is not None:
        raise UsageError(f"init_image was given but model {outline.name!r} makes videos, which cannot start from an image; leave it out")
    if fps is not None:
        extra = {"frame_rate": fps} | extra
    base = Condition("", negative_prompt, class_label, tensors, extra)
    conditions = tuple(conditions_of(prompts, base))
    scale = outline.default_guidance_scale if guidance_scale is None else guidance_scale
    guidance = guidance_of(outline, scale, guidance_rescale, guidance_interval, explicit=guidance_scale is not None)
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
    size = size_of(outline, height, width, frames)
    info = outline.solver(solver, eta)
    whole = outline.schedule(info, outline.default_steps if steps is None else at_least("steps", steps, 1), size)
    schedule = tail_of(whole, init_image, strength)
    seeds = seeds_of(seed)
    first, given = first_noise(initial_noise, latents, outline.latent_shape(size), seeds)

    setting = Setting(schedule, info, judges[0], judges[1:], outline.media is not None, roles)
    check_needs(chosen, setting, outline.solvers)
    notices.extend(announce(judges, setting, len(conditions)))
    runs = len(conditions) * len(seeds)
    nfe, total_nfe = budgets_of(chosen, nfe, total_nfe, runs, setting)
    check_target(chosen, target, judges[0])
    if isinstance(chosen, Allocator):
        assert total_nfe is not None
        cost = chosen.forecast(total_nfe, runs, setting)
    else:
        if nfe is not None and open_size:
            chosen = fitted(chosen, nfe, total_nfe, runs, setting)
        cost = capped(chosen.cost(setting), nfe, setting)
    plain = Spend(nfe=setting.sample_cost) + setting.scoring(1, final=True) + setting.result()
    limits = limits_of(deterministic, max_batch, memory_limit, seconds)
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
        image=initial_image(init_image, size) if init_image is not None else None,
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


def _helper(name: str, reference: Any, options: LoadOptions, main: ModelOutline, schedule: Schedule, info: SolverInfo, size: Size) -> ModelOutline:
    """Another model of the search: one that shares its latents and levels."""
    outline = resolve_model(reference, dataclasses.replace(options, lora=(), x0_decoder=None))
    own = outline.schedule(outline.solver(str(info)), schedule.last, size)
    if own.key != schedule.key or outline.latent_shape(size) != main.latent_shape(size):
        raise UsageError(f"helper {name!r} does not share the latents and noise levels of model {main.name!r}; choose a model of the same family and schedule")
    return outline
