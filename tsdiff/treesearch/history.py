"""What an image says of itself: how it was made and found, as texts that PNG files carry.

"parameters" is the text that other image tools write and read: the prompt, then a line `Negative prompt: ...`, then one line
`Steps: 20, Sampler: DDIM, CFG scale: 7.5, Seed: 1, Size: 512x512, Model: NAME, ...`. "tsdiff" is strict JSON with all that
the search knows of the image (`docs/run-format.md`). Both follow from the search alone: no time, no machine, no user, and
of file names the last part only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from tsdiff.treesearch.strictjson import encode

if TYPE_CHECKING:
    from tsdiff.treesearch.node import Node
    from tsdiff.treesearch.results import Result

FORMAT = 1

SAMPLERS = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "euler": "Euler",
    "euler-ancestral": "Euler a",
    "heun": "Heun",
    "dpm++2m": "DPM++ 2M",
    "dpm++2m-sde": "DPM++ 2M SDE",
}
"""What other tools call solvers; the rest keep their names."""

ETAS = {"ddim": "Eta DDIM", "euler-ancestral": "Eta"}

TEXTS = frozenset({"prompt", "prompts", "negative_prompt"})
"""Keys under which text is what a person wrote, and never a file name."""

_FILE = re.compile(r"""(?<![^\s=:,;"'(\[{])(?:~[\w.-]*|[A-Za-z]:|\\)?[/\\](?=\S)[^,;"'\n]*""")
"""An absolute file name in a text: at its beginning, or after what separates one option from the next."""

_UNWRITABLE = re.compile("[\0\ud800-\udfff]")
_PLAIN = re.compile(r"""(?![\s"{])[^,:\n"\\]*(?<!\s)""")


@dataclass(frozen=True)
class Origin:
    """Where a result comes from, beside its tree. Strict JSON.

    Attributes:
      options: of the search, as they were resolved.
      arguments: what the search was called with, as far as it differs from the defaults.
      fingerprint: of the model.
      run: name of the run folder.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None
    run: str | None = None


def image_texts(result: Result, origin: Origin, size: tuple[int, int]) -> dict[str, str]:
    """The texts that the image of a result carries, by keyword.

    Args:
      size: width and height in pixels.
    """
    facts = nameless(_facts(result, origin))
    return {"parameters": parameters(*_settings(result, origin, size)), "tsdiff": encode(facts).decode()}


def _facts(result: Result, origin: Origin) -> dict[str, Any]:
    """All that is known of a result."""
    from tsdiff import __version__

    condition, node = result.tree.condition, result.node
    return {
        "format": FORMAT,
        "version": __version__,
        "run": origin.run,
        "tree": result.tree.line,
        "prompt": condition.prompt,
        "negative_prompt": condition.negative_prompt,
        "class_label": condition.class_label,
        "seed": result.seed,
        "model": result.model,
        "fingerprint": origin.fingerprint,
        "policy": result.policy,
        "verifier": result.tree.verifier,
        "score": result.score,
        "scores": {name: value.to_json() for name, value in sorted(node.values.items())},
        "relative": result.relative,
        "truncated": result.truncated,
        "node": node.index,
        "path": [_step(one) for one in node.path()],
        "nodes": len(result.tree.nodes),
        "cost": result.ledger.to_json(),
        "options": dict(origin.options),
        "arguments": dict(origin.arguments),
    }


def _step(node: Node) -> dict[str, Any]:
    """How a node was made from the one before it."""
    data = node.to_json()
    return {name: data[name] for name in ("index", "id", "stream", "move", "level", "nfe")}


def _settings(result: Result, origin: Origin, size: tuple[int, int]) -> tuple[str, str, dict[str, Any]]:
    """Prompt, negative prompt and settings, as other tools know them."""
    from tsdiff import __version__

    condition, solver, steps = result.tree.condition, result.tree.solver, result.tree.schedule.last
    scale, arguments = origin.options.get("guidance_scale"), origin.arguments
    strength = None
    if "init_image" in arguments:  # then the schedule is the tail of a longer one, which its key tells
        tail = re.search(r"(?:\+\d+)*$", result.tree.schedule.key)
        steps += sum(int(start) for start in tail[0].split("+")[1:]) if tail else 0
        strength = arguments.get("strength") or 0.8
    settings = {
        "Steps": steps,
        "Sampler": SAMPLERS.get(solver.name, solver.name),
        "CFG scale": scale,
        "Seed": result.seed,
        "Size": f"{size[0]}x{size[1]}",
        "Model": nameless(result.model),
        "Class": condition.class_label,
        "Denoising strength": strength,
        ETAS.get(solver.name, "Solver eta"): solver.eta or None,
        "Policy": result.policy if result.tree.line == "search" else None,
        "Verifier": nameless(result.tree.verifier),
        "Score": result.score,
        "NFE": result.ledger.nfe,
        "Version": f"tsdiff {__version__}",
    }
    return condition.prompt, condition.negative_prompt, settings


def parameters(prompt: str, negative_prompt: str, settings: Mapping[str, Any]) -> str:
    """The text of a "parameters" chunk; settings that are None are left out.

    Where a line of a prompt would be taken for the beginning of another part, the prompt is put on one line. Characters that
    no text can hold become U+FFFD.
    """
    line = ", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items() if value is not None)
    return f"{_text(prompt)}\nNegative prompt: {_text(negative_prompt)}\n{line}"


def _text(text: str) -> str:
    text = _UNWRITABLE.sub("\ufffd", text)
    first, *rest = text.split("\n")
    if any(line.strip().startswith(("Negative prompt:", "Steps:")) for line in rest):
        return " ".join([first, *rest])
    return text


def _quoted(value: Any) -> str:
    """A setting as its readers take it: JSON text where it holds what separates settings."""
    text = f"{value:.6g}" if isinstance(value, float) else _UNWRITABLE.sub("\ufffd", str(value))
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def nameless(value: Any, key: str = "") -> Any:
    """Strict JSON in which absolute file names, which tell of a user's machine, are cut to their last part."""
    if isinstance(value, str):
        return value if key in TEXTS else _FILE.sub(_last_part, value)
    if isinstance(value, Mapping):
        return {_FILE.sub(_last_part, name): nameless(item, name) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return list(map(partial(nameless, key=key), value))
    return value


def _last_part(match: re.Match[str]) -> str:
    parts = [part for part in re.split(r"[/\\]", match[0]) if part]
    return parts[-1] if parts else ""
