"""Fill in what docs/verifiers.md takes from measured results.

    python docs/make_verifier_figures.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

TARGET = Path(__file__).with_name("verifiers.md")
RESULTS = Path(__file__).with_name("results")
_BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def speed(report: dict[str, Any]) -> str:
    """A sentence about batches against single pictures."""
    threads = "one thread" if report["threads"] == 1 else f"{report['threads']} threads"
    return (
        f"Sharing batches and reading prompts once makes scoring {report['batched_over_single']:.1f} times as fast as a loop over PIL pictures with the same\n"
        f"weights, and {report['batched_over_single_texts_once']:.1f} times as fast as such a loop that keeps text features too: {report['images']} pictures of "
        f"{report['size'][0]}x{report['size'][1]} under\n`{report['model']}`, {report['device']}, {threads} ([figures](results/verifiers.json); `benchmarks/verifiers.py`).\n"
    )


def learned(report: dict[str, Any]) -> str:
    """A table of a learned value against its verifier, and what came of it in words."""
    lines = [
        "| verifier | trajectories of | learned value | the verifier on the estimate | difference | ms a node, learned | ms a node, verifier |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    failures = []
    for judge, entry in report["verifiers"].items():
        for name in ("fitted prompts", "unseen prompts"):
            row = entry[name]
            cells = [_interval(row.get(key)) for key in ("learned", "verifier", "difference")]
            times = row["milliseconds_per_node"]
            lines.append(f"| `{judge}` | {name} | {' | '.join(cells)} | {times['learned']:.2f} | {times['verifier']:.2f} |")
            failures += [] if row["success"] else [f"`{judge}` on {name}"]
    verdict = "It succeeded in all of these" if not failures else f"It failed for {', '.join(failures)}"
    prompts = report["prompts"]
    return "\n".join(lines) + (
        f"\n\nFitted to {report['seeds']} seeds of {report['samples']} plain trajectories for each of {prompts['fitted']} prompts of `{report['suite']}`, and judged on other seeds "
        f"of them and of {prompts['unseen']} prompts beside. {verdict}; success means that the whole interval of the learned value's correlation lies above 0, "
        "that it is not shown to be worse than the verifier, and that a node costs less time.\n"
    )


def _interval(entry: dict[str, float] | None) -> str:
    return "-" if entry is None else f"{entry['estimate']:.2f} ({entry['low']:.2f} to {entry['high']:.2f})"


def page(text: str) -> str:
    """The page with its blocks filled in."""
    made = {
        "speed": speed(json.loads((RESULTS / "verifiers.json").read_text(encoding="utf-8"))),
        "learned": learned(json.loads((RESULTS / "learned_value.json").read_text(encoding="utf-8"))),
    }
    return _BLOCK.sub(lambda match: match[1] + made[match[2]] + match[3], text)


if __name__ == "__main__":
    TARGET.write_text(page(TARGET.read_text(encoding="utf-8")), encoding="utf-8")
