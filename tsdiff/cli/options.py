"""The options that `search` and `plan` share, and how they become a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from tsdiff.cli import values
from tsdiff.cli.config import load_config, policy_options
from tsdiff.cli.output import say
from tsdiff.cli.prompts import read_prompts
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.registry import split_options

if TYPE_CHECKING:
    from tsdiff.treesearch.plan import Plan

_POSITIVE = click.IntRange(min=1)
_FILE = click.Path(path_type=Path)


class Sectioned(click.Command):
    """A command whose help groups its options under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, section by section."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                sections.setdefault(parameter.section if isinstance(parameter, SectionedOption) else "Output", []).append(record)
        for section, records in sections.items():
            with formatter.section(section):
                formatter.write_dl(records)


class SectionedOption(click.Option):
    """An option that knows its heading."""

    def __init__(self, *args: Any, section: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Name and help; of a flag only the side that changes something."""
        record = super().get_help_record(ctx)
        if record is None or not self.secondary_opts:
            return record
        return (self.secondary_opts if self.default is True else self.opts)[0], record[1]


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _section(title: str) -> Callable[..., Decorator]:
    def option(*names: str, **kwargs: Any) -> Decorator:
        return click.option(*names, cls=SectionedOption, section=title, **kwargs)

    return option


def _remember_debug(ctx: click.Context, _: click.Parameter, debug: bool) -> bool:
    ctx.obj.debug = debug
    return debug


_sample, _model, _sampling, _search, _output = map(_section, ("What to make", "The model", "Sampling", "The search", "Output"))

json_option = _output("--json/--no-json", "as_json", help="Results as JSON on stdout.")
debug_option = _output("--debug/--no-debug", callback=_remember_debug, is_eager=True, expose_value=False, help="Show tracebacks.")

_OPTIONS: tuple[Decorator, ...] = (
    click.argument("prompt", nargs=-1, metavar="[PROMPT]..."),
    _sample("--prompts", type=_FILE, metavar="FILE", help="Prompts from a file: one a line, or JSON lines (.jsonl) with prompt, negative_prompt, class."),
    _sample("--class", "class_label", type=values.CLASS, metavar="CLASS", help="Class id or name, for class-conditional models."),
    _sample("--negative-prompt", default="", metavar="TEXT", help="What guidance should lead away from."),
    _sample("--height", type=_POSITIVE, metavar="PIXELS", help="Of the image or video; the model's own by default."),
    _sample("--width", type=_POSITIVE, metavar="PIXELS", help="Of the image or video; the model's own by default."),
    _sample("--frames", type=_POSITIVE, metavar="N", help="Of a video; the model's own by default."),
    _sample("--fps", type=click.FloatRange(min=0.0, min_open=True), metavar="N", help="Frames per second of a video, which its network is told; the model's own by default."),
    _sample("--init-image", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE", help="Start from an image."),
    _sample("--strength", type=float, metavar="SHARE", help="How much of --init-image to remake, in (0, 1]."),
    _model("--model", metavar="NAME", help="A name of `tsdiff list models`, a diffusers folder or a hub id.  [default: the built-in shapes]"),
    _model("--device", type=values.DEVICE, default="auto", show_default=True, metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps."),
    _model("--dtype", type=click.Choice(["auto", "float32", "float16", "bfloat16", "fp16", "bf16"]), default="auto", show_default=True, help="Of the weights. auto is float32 on a CPU and the family's own elsewhere, bfloat16 where the device has it."),
    _model("--revision", metavar="NAME", help="Revision of a hub repository."),
    _model("--variant", metavar="NAME", help="Variant of the weights, e.g. fp16."),
    _model("--lora", multiple=True, metavar="PATH[:SCALE]", help="A LoRA file (.safetensors) to merge into the weights, at scale 1 or the given one; repeatable."),
    _model("--latent-dtype", type=click.Choice(["float32", "model"]), default="float32", show_default=True, help="Of latents between steps: model rounds them to the weights' format, as pipelines do."),
    _model("--offload/--no-offload", help="Keep only the components at work on the device, the others in host memory: for small GPUs."),
    _model("--vae-slicing/--no-vae-slicing", help="Decode a batch image by image: less memory."),
    _model("--vae-tiling/--no-vae-tiling", help="Decode large images in overlapping tiles: less memory, slightly other images."),
    _model("--channels-last/--no-channels-last", help="Lay out convolutions with channels last: faster on GPUs."),
    _model("--compile/--no-compile", help="Compile the network's repeated blocks: slow to begin, then faster."),
    _model("--x0-decoder", metavar="FOLDER", help="A tiny autoencoder (AutoencoderTiny) that decodes clean estimates of unfinished nodes for verifiers; finished images are always decoded by the model's own."),
    _model("--offline/--no-offline", help="Never touch the network."),
    _sampling("--steps", type=_POSITIVE, metavar="N", help="Denoising steps; the model's own by default."),
    _sampling("--solver", metavar="NAME", help="A name of `tsdiff list solvers`; the model's own by default."),
    _sampling("--eta", type=float, metavar="SHARE", help="Noise added by each step of the solvers that have it."),
    _sampling("--guidance-scale", type=float, metavar="SCALE", help="1 is no guidance; the model's own by default."),
    _sampling("--true-cfg-scale", type=float, metavar="SCALE", help="Classifier-free guidance of a model whose network is told --guidance-scale; 1 is none."),
    _sampling("--guidance-rescale", type=click.FloatRange(0.0, 1.0), default=0.0, show_default=True, metavar="SHARE", help="Std matching, 0 to 1."),
    _sampling("--guidance-interval", type=values.INTERVAL, metavar="LOW,HIGH", help="Guide only where sigma/alpha lies between."),
    _sampling("--strict-scheduler/--no-strict-scheduler", help="Refuse a scheduler that is not supported, do not replace it."),
    _search("--policy", default="beam", show_default=True, metavar="NAME", help="A name of `tsdiff list policies`."),
    _search("-P", "--policy-option", "policy_options", multiple=True, metavar="KEY=VALUE", help="A parameter of the policy, see `tsdiff describe POLICY`; repeatable."),
    _search("--verifier", "verifiers", multiple=True, metavar="[ROLE=]NAME", help="A name of `tsdiff list verifiers`; repeatable: the first steers, the others judge what is finished. With a ROLE that the policy knows, e.g. layout=NAME, it does that; the role final steers."),
    _search("--ensemble", metavar="RULE", help="Make one verifier of those without a ROLE: rank, pareto, weighted, zscore, minimum or quantile; parameters after a colon, e.g. weighted:weights=5,1. See `tsdiff describe ensemble`."),
    _search("--nfe", type=_POSITIVE, metavar="N", help="Network evaluations that each search may spend."),
    _search("--total-nfe", type=_POSITIVE, metavar="N", help="Network evaluations of all searches together, instead of --nfe: shared out by the policy adaptive, in equal parts with any other."),
    _search("--target", type=float, metavar="SCORE", help="With the policy adaptive: a score that is good enough. A prompt that has reached it gets nothing more."),
    _search("--seconds", type=click.FloatRange(min=0.0, min_open=True), metavar="S", help="Start nothing new after this time."),
    _search("--seed", type=values.SEEDS, default="0", show_default=True, metavar="SEEDS", help="One or several: 7, 0-3 or 0-3,7."),
    _search("--baseline/--no-baseline", default=True, help="Leave out the plain sample that a search is compared with."),
    _search("--deterministic/--no-deterministic", help="Equal bytes whatever the load, at some cost."),
    _search("--max-batch", type=_POSITIVE, metavar="ROWS", help="Rows in one network call at most."),
    _search("--memory-limit", type=values.BYTES, metavar="SIZE", help="Host memory for latents, e.g. 2GB; the rest goes to disk."),
    _output("--out", type=_FILE, default=Path("runs"), show_default=True, metavar="FOLDER", help="Each run makes a new folder in it."),
    _output("--keep", type=click.Choice(["all", "path", "leaves", "none"]), default="all", show_default=True, help="Whose latents stay in the run's folder: of every node, of the answer's path, of finished nodes, or of none."),
    _output("--previews", type=click.Choice(["kept", "all", "none"]), default="kept", show_default=True, help="Of which nodes that were decoded for a verifier a small picture stays: of those that --keep names, of all, or of none."),
    _output("--metadata/--no-metadata", default=True, help="Write images without their history (prompt, settings, how they were found)."),
    json_option,
    _output("--quiet/--no-quiet", help="No narration, no progress."),
    debug_option,
    _output("--config", type=_FILE, metavar="FILE", callback=load_config, is_eager=True, help="Options from a TOML file, named as here, the policy's in [policy]. The command line wins; flags are undone with --no-FLAG."),
)


def search_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command every option of a search, in the order above."""
    for decorate in reversed(_OPTIONS):
        function = decorate(function)
    return function


def make_plan(ctx: click.Context) -> Plan:
    """Resolve and check everything that was asked; no weights are loaded. Raises UsageError, SetupError."""
    from tsdiff.treesearch.plan import prepare

    params = dict(ctx.params)
    options, notice = policy_options(ctx, split_policy_options(params.pop("policy_options")))
    quiet = params.pop("quiet")
    if notice and not quiet:
        say("", notice)
    for name in ("as_json", "config", "fresh"):
        params.pop(name, None)
    params["prompts"] = _prompts(ctx, params)
    plan = prepare(policy_options=options, **params)
    if not quiet:
        for line in dict.fromkeys((*plan.model.notices, *plan.notices)):
            say("", line)
    return dataclasses.replace(plan, typed=_typed(ctx))


def _typed(ctx: click.Context) -> dict[str, Any]:
    """What the command line and the config file said, as strict JSON, for the run's record."""
    given = {}
    for name, value in ctx.params.items():
        if ctx.get_parameter_source(name) in (ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP):
            given[name] = str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
    return given


def split_policy_options(texts: tuple[str, ...]) -> dict[str, str]:
    """The options of a policy, as typed after -P. Raises UsageError for what is none."""
    options: dict[str, str] = {}
    for text in texts:
        if "=" not in text:
            raise UsageError(f"-P {text!r} is not of the form KEY=VALUE; `tsdiff describe POLICY` lists the keys")
        options |= split_options(text)
    return options


def _prompts(ctx: click.Context, params: dict[str, Any]) -> Any:
    """What to pass as prompts: typed ones, the conditions of a file, or None for the demonstration or a class alone."""
    typed, path = params.pop("prompt"), params.pop("prompts")
    if typed and path is not None:
        by_line = {name for name in ("prompt", "prompts") if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}
        if by_line != {"prompt"} and by_line != {"prompts"}:
            raise UsageError("prompts were given both one by one and as a file with --prompts; use one of them")
        typed, path = (typed, None) if by_line == {"prompt"} else ((), path)
    if path is not None:
        # The file's own lines win over these options, so they travel inside its conditions.
        return read_prompts(path, negative_prompt=params.pop("negative_prompt"), class_label=params.pop("class_label"))
    for prompt in typed:
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise UsageError(f"prompt {prompt!r} is not UTF-8; check the terminal's encoding")
    return list(typed) or None
