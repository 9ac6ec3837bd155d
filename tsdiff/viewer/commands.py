"""The commands that make a run again, continue it, show it or grow it, as one would type them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tsdiff.treesearch.saved import SavedRun
from tsdiff.viewer.plainjson import mapping

_VALUES = (
    "height", "width", "strength", "model", "device", "dtype", "revision", "variant", "steps", "solver", "eta", "guidance_scale",
    "true_cfg_scale", "guidance_rescale", "guidance_interval", "policy", "ensemble", "nfe", "total_nfe", "target", "seconds",
    "max_batch", "memory_limit", "keep", "previews",
)  # fmt: skip
_FLAGS = ("strict_scheduler", "deterministic", "baseline", "metadata", "offline")
_SEVERAL = {"verifiers": "--verifier", "verifier": "--verifier", "lora": "--lora"}
_OWN = ("prompts", "seed", "policy_options", "class_label", "negative_prompt", "out")  # told from the run itself, or not needed


def quoted(value: object) -> str:
    """One word of a POSIX shell. Control characters are written as escapes, so that a pasted command cannot steer a terminal."""
    text = str(value)
    if all(character.isprintable() for character in text):
        return shlex.quote(text)
    escaped = "".join(_escaped(character) for character in text)
    return f"$'{escaped}'"


def _escaped(character: str) -> str:
    if character in "\\'":
        return "\\" + character
    if character.isprintable():
        return character
    code = ord(character)
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogatepass")) if code > 0x7F else f"\\x{code:02x}"


def folder_word(path: Path) -> str:
    """A run's folder as one types it from where this process runs."""
    short = os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
    return quoted(f"./{short}" if short.startswith("-") else short)


def run_commands(run: SavedRun) -> dict[str, str | None]:
    """What can be typed for a run; None where there is no such command."""
    folder = folder_word(run.path)
    return {
        "search": search_command(run),
        "resume": f"tsdiff resume {folder}" if run.status in ("interrupted", "killed") else None,
        "show": f"tsdiff show {folder}",
    }


def node_commands(path: Path, index: int) -> dict[str, str]:
    """What can be typed for a node."""
    folder = folder_word(path)
    return {"show": f"tsdiff show {folder} --node {index}", "expand": f"tsdiff expand {folder} {index} --children 8 --renoise 0.5"}


def search_command(run: SavedRun) -> str | None:
    """The search of this prompt and seed; None where it was asked for with objects, files beside it, or options of another version."""
    arguments = run.arguments
    if not run.facts.get("arguments") or run.facts.get("alone") is False:
        return None
    try:
        words = [*_words(arguments)]
    except _Untypable:
        return None
    head = run.tree.head
    sample = [quoted(run.prompt)] if run.prompt and not run.prompt.startswith("-") else ["--", quoted(run.prompt)] if run.prompt else []
    own = [f"--class {quoted(head['class'])}"] if head.get("class") is not None else []
    own += [f"--negative-prompt {quoted(head['negative_prompt'])}"] if head.get("negative_prompt") else []
    own += [f"--seed {run.seed}"] if run.seed is not None else []
    if head.get("class") is not None:
        sample = []
    before, after = ([], sample) if sample[:1] == ["--"] else (sample, [])
    return " ".join(("tsdiff search", *before, *words, *own, *after))


class _Untypable(Exception):
    """An argument that no command says."""


def _words(arguments: Mapping[str, Any]) -> Iterator[str]:
    for name, value in arguments.items():
        option = f"--{name.replace('_', '-')}"
        if value is None or name in _OWN:
            continue
        if name in _SEVERAL:
            for one in value if isinstance(value, list) else [value]:
                yield f"{_SEVERAL[name]} {quoted(_typed(one))}"
        elif name in _FLAGS and isinstance(value, bool):
            yield option if value else f"--no-{option[2:]}"
        elif name in _VALUES:
            yield f"{option} {quoted(_typed(value))}"
        else:
            raise _Untypable
    for name, value in mapping(arguments.get("policy_options")).items():
        yield f"-P {quoted(f'{name}={_typed(value)}')}"
    prompts = arguments.get("prompts")
    for one in prompts if isinstance(prompts, list) else [prompts]:
        condition = mapping(mapping(one).get("@condition", one))
        if any(value for name, value in condition.items() if name not in ("prompt", "negative_prompt", "class_label")):
            raise _Untypable


def _typed(value: Any) -> str:
    """A plain value as options are typed; one that is none raises `_Untypable`."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, int, float)):
        return str(value)
    if isinstance(value, list) and value and all(isinstance(item, (str, int, float)) for item in value):
        return ",".join(map(_typed, value))
    raise _Untypable
