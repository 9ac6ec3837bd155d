"""What the models of the shapes world can do: share of prompts obeyed, by kind, guidance, steps and search.

    python benchmarks/shapes_models.py samples [--models shapes shapes-small] [--guidance 1 2 3 4] [--steps 20] [--seeds 3]
    python benchmarks/shapes_models.py search [--models shapes] [--guidance 3] [--seeds 1]

`samples` draws one sample for each prompt and seed. `search` draws 16 and lets a verifier choose among the first 1, 4 and 16.
A prompt is obeyed if the world's checker finds all of its facts. Common random numbers throughout; intervals are 95 %, Wilson's,
over prompts (samples of one prompt are not independent). `--save FILE` writes JSON, and Markdown beside it; what the file
says of other models, guidance scales and steps stays.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import tsdiff
from tsdiff.treesearch.node import Node
from tsdiff.treesearch.protocols import Condition
from tsdiff.worlds.shapes.suites import seen, unseen

ORACLE = "shapes-oracle"
COUNTS = (1, 4, 16)


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean of per-prompt shares and its 95 % interval: Wilson's, each prompt counted as one trial however many seeds it has.

    That is wider than need be where seeds differ, and honest where all prompts are obeyed, which a bootstrap is not.
    """
    share, count, z = float(np.mean(values)), len(values), 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return {"share": round(share, 4), "low": round(max(0.0, middle - half), 4), "high": round(min(1.0, middle + half), 4), "prompts": count}


def by_kind(conditions: Sequence[Condition], shares: Sequence[float]) -> dict[str, dict[str, float]]:
    """Intervals for each kind and for all prompts."""
    kinds: dict[str, list[float]] = defaultdict(list)
    for condition, share in zip(conditions, shares, strict=True):
        kinds[condition.metadata["tag"]].append(share)
    return {kind: interval(values) for kind, values in kinds.items()} | {"all": interval(shares)}


def obeyed(leaf: Node) -> float:
    """1 if the oracle found every fact, otherwise 0; a leaf without a score has failed."""
    value = leaf.values.get(ORACLE)
    return value.parts.get("satisfied", 0.0) if value is not None and value.score is not None else 0.0


def grow(model: str, conditions: Sequence[Condition], verifiers: Sequence[str], *, count: int, guidance: float, steps: int, seeds: int) -> tuple[list[list[Node]], float]:
    """Finished leaves by prompt and seed, seeds innermost, in drawing order; and the seconds it took."""
    started = time.perf_counter()
    results = tsdiff.search(
        model, list(conditions), policy="best-of-n", policy_options={"n": count}, verifier=list(verifiers),
        guidance_scale=guidance, steps=steps, seed=list(range(seeds)), baseline=False,
    )
    assert not results.failures, results.failures[0].error
    leaves = [[node for node in result.tree.nodes if node.level == result.tree.schedule.last] for result in results]
    return leaves, time.perf_counter() - started


def samples(options: argparse.Namespace, conditions: Sequence[Condition]) -> list[dict[str, Any]]:
    """One line for each model, guidance scale and number of steps."""
    lines = []
    for model in options.models:
        for steps in options.steps:
            for guidance in options.guidance:
                leaves, seconds = grow(model, conditions, [ORACLE], count=1, guidance=guidance, steps=steps, seeds=options.seeds)
                shares = np.array([obeyed(group[0]) for group in leaves]).reshape(len(conditions), options.seeds).mean(axis=1)
                lines.append({"model": model, "steps": steps, "guidance": guidance, "seeds": options.seeds, "kinds": by_kind(conditions, shares.tolist()), "ms_a_sample": round(seconds / len(leaves) * 1e3, 1)})
                print(line_of(lines[-1]), flush=True)
    return lines


def search(options: argparse.Namespace, conditions: Sequence[Condition]) -> list[dict[str, Any]]:
    """One line for each model, verifier and number of samples to choose from."""
    lines = []
    for model in options.models:
        for guidance in options.guidance:
            for steps in options.steps:
                leaves, seconds = grow(model, conditions, options.verifiers, count=max(COUNTS), guidance=guidance, steps=steps, seeds=options.seeds)
                for verifier in options.verifiers:
                    for count in COUNTS:
                        chosen = [max(group[:count], key=score_under(verifier)) for group in leaves]
                        shares = np.array([obeyed(leaf) for leaf in chosen]).reshape(len(conditions), options.seeds).mean(axis=1)
                        lines.append({
                            "model": model, "steps": steps, "guidance": guidance, "seeds": options.seeds, "verifier": verifier, "samples": count,
                            "kinds": by_kind(conditions, shares.tolist()), "ms_a_sample": round(seconds / len(leaves) / max(COUNTS) * 1e3, 1),
                        })  # fmt: skip
                        print(line_of(lines[-1]), flush=True)
    return lines


def score_under(verifier: str) -> Callable[[Node], tuple[float, int]]:
    """Order of leaves: by score, then the older first; a leaf without a score is last."""

    def key(leaf: Node) -> tuple[float, int]:
        value = leaf.score(verifier)
        return (float("-inf") if value is None else value, -leaf.index)

    return key


def line_of(line: dict[str, Any]) -> str:
    """One row of the Markdown table."""
    what = f"{line['verifier']}, best of {line['samples']}" if "verifier" in line else f"guidance {line['guidance']:g}, {line['steps']} steps"
    cells = [f"{100 * entry['share']:.0f} ({100 * entry['low']:.0f}-{100 * entry['high']:.0f})" for entry in line["kinds"].values()]
    return f"| {line['model']}: {what}, {line['seeds']} seed(s) | " + " | ".join(cells) + " |"


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    kinds = list(report["lines"][0]["kinds"])
    head = [f"| | {' | '.join(kinds)} |", f"| --- |{' --- |' * len(kinds)}"]
    made = " and ".join(f"`{command}`" for command in report["commands"])
    about = f"{made}: per cent of prompts obeyed, with 95 % intervals; suite {report['suite']}."
    return "\n".join([about, "", *head, *map(line_of, report["lines"])]) + "\n"


def joined(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A report together with what an older one on the same suite says that the new one does not."""
    if old["suite"] != new["suite"]:
        return new
    measured = {same(line) for line in new["lines"]}
    kept = [line for line in old["lines"] if same(line) not in measured]
    lines = sorted([*kept, *new["lines"]], key=same)
    return new | {"commands": [*old["commands"], *new["commands"]] if kept else new["commands"], "lines": lines}


def same(line: dict[str, Any]) -> tuple[Any, ...]:
    """What a line is about."""
    return line["model"], line["steps"], line["guidance"], line.get("verifier", "") == "shapes-clip", line.get("samples", 1)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description="Share of prompts that the shapes world's models obey.")
    parser.add_argument("what", choices=("samples", "search"))
    parser.add_argument("--models", nargs="+", default=["shapes"], help="names, or folders of pipelines")
    parser.add_argument("--suite", choices=("seen", "unseen"), default="seen")
    parser.add_argument("--guidance", nargs="+", type=float, default=[3.0])
    parser.add_argument("--steps", nargs="+", type=int, default=[20])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--verifiers", nargs="+", default=[ORACLE, "shapes-clip"], help=f"for `search`; {ORACLE} must be among them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", type=Path, help="file.json to write, and file.md beside it")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    suite = {"seen": seen, "unseen": unseen}[options.suite]
    lines = {"samples": samples, "search": search}[options.what](options, suite.conditions())
    arguments = [f"{options.what}", f"--suite {options.suite}", "--models " + " ".join(options.models), "--guidance " + " ".join(f"{g:g}" for g in options.guidance), "--steps " + " ".join(map(str, options.steps)), f"--seeds {options.seeds}"]
    report = {"commands": [f"python benchmarks/shapes_models.py {' '.join(arguments)}"], "machine": platform.platform(), "suite": suite.name, "lines": lines}
    if options.save is not None:
        if options.save.exists():
            report = joined(json.loads(options.save.read_text()), report)
        options.save.parent.mkdir(parents=True, exist_ok=True)
        options.save.write_text(json.dumps(report, indent=1) + "\n")
        options.save.with_suffix(".md").write_text(markdown(report))


if __name__ == "__main__":
    main()
