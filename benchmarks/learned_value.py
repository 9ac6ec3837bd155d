"""Does a learned value rank nodes half-way as well as the verifier on their decoded clean estimates, and how much faster?

    python benchmarks/learned_value.py [--json] [--save FOLDER]
    python benchmarks/learned_value.py --model FOLDER --suite NAME --verifier shapes-clip --verifier shapes-oracle

Plain trajectories of a suite's prompts are saved, a value is fitted to those of three prompts in four (`fit-value`), and all
are judged on trajectories of other seeds: of those prompts (a third of which the fit itself sets aside, to stop by and to
judge by), and of the others. At half the trajectory (by levels)
nodes are ranked within each prompt by the learned value, and by the verifier on the clean estimate, decoded if it reads
images; Spearman's correlation with the verifier's score of the finished sample is averaged over prompts, with 95 %
bootstrap intervals over prompts. Time per node is that of full batches, decoding included, the median of several.

Success on a set of prompts: the whole interval of the learned value's correlation lies above 0, that of its difference from
the verifier's does not lie wholly below 0, and a node costs less time. Failure is reported as such.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import tsdiff
from tsdiff.bench.statistics import mean_interval, spearman
from tsdiff.cli.value_examples import SavedExamples, find_runs, read_examples
from tsdiff.policies.best_of_n import BestOfN
from tsdiff.treesearch.models import resolve_model
from tsdiff.treesearch.protocols import Condition, DiffusionModel, TreeView, Verifier
from tsdiff.treesearch.references import resolve_verifier
from tsdiff.treesearch.registry import suites
from tsdiff.treesearch.requests import Denoise, Draw, Score
from tsdiff.verifiers.value import Value

ROWS = 16  # of the timed batches
REPEATS = 9
FRESH = 1_000_000  # seeds of the trajectories that judge
HALF = 0.5  # of the trajectory: where nodes are judged


@dataclass(frozen=True, kw_only=True)
class Trajectories(BestOfN):
    """Best of n whose samples are also scored half-way, by each verifier; every level is kept."""

    judges: tuple[str, ...] = ()

    def search(self, tree: TreeView) -> Any:
        """n independent trajectories."""
        roots = yield Draw(self.n)
        last = tree.schedule.last
        nodes = roots
        for level in range(1, last + 1):
            nodes = yield Denoise(nodes, to=level)
            if level == int(HALF * last):
                for judge in self.judges:
                    yield Score(nodes, verifier=judge)
        yield Score(nodes)
        return tree.best()


def condition_key(condition: Condition) -> tuple[Any, ...]:
    """What a saved tree still knows of its condition."""
    return condition.prompt, condition.negative_prompt, condition.class_label


def save(options: argparse.Namespace, judges: Sequence[Verifier], conditions: Sequence[Condition], seeds: Sequence[int], folder: Path) -> None:
    """Search with `Trajectories` into a folder."""
    policy = Trajectories(n=options.samples, judges=tuple(judge.name for judge in judges))
    results = tsdiff.search(
        options.model, list(conditions), policy=policy, verifier=list(judges), seed=list(seeds), steps=options.steps, solver=options.solver,
        guidance_scale=options.guidance_scale, device=options.device, baseline=False, out=folder,
    )  # fmt: skip
    for failure in results.failures:
        raise failure.error


def half_way(examples: SavedExamples) -> dict[tuple[Any, ...], list[int]]:
    """Rows that stand half-way, by condition."""
    rows: dict[tuple[Any, ...], list[int]] = {}
    for row, (place, level) in enumerate(zip(examples.places, examples.levels, strict=True)):
        tree = examples.trees[place]
        if level == int(HALF * tree.schedule.last):
            rows.setdefault(condition_key(tree.condition), []).append(row)
    return rows


def estimate(examples: SavedExamples, row: int, judge: str) -> float | None:
    """The verifier's own score of a row's clean estimate."""
    return examples.trees[examples.places[row]].nodes[examples.nodes[row]].score(judge)


def batch(examples: SavedExamples, rows: Sequence[int], model: DiffusionModel, conditions: dict[tuple[Any, ...], Condition]) -> SimpleNamespace:
    """What a verifier is given of some rows; `images` are decoded when they are asked for."""
    trees = [examples.trees[examples.places[row]] for row in rows]
    x0 = examples.inputs[list(rows)].to(model.device)

    class Batch(SimpleNamespace):
        @property
        def images(self) -> torch.Tensor:
            return model.decode(x0).pixels

    return Batch(
        x0=x0, levels=[examples.levels[row] for row in rows], schedules=[tree.schedule for tree in trees],
        conditions=[conditions[condition_key(tree.condition)] for tree in trees],
    )  # fmt: skip


def milliseconds(call: Callable[[], Any]) -> float:
    """Median time of a call for each of its rows, after one to warm up."""

    def once() -> float:
        started = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return 1000.0 * (time.perf_counter() - started) / ROWS

    once()
    return statistics.median(once() for _ in range(REPEATS))


def judged(examples: SavedExamples, judge: Verifier, value: Value, model: DiffusionModel, conditions: dict[tuple[Any, ...], Condition]) -> dict[str, Any]:
    """Correlations and times on one set of trajectories."""
    learned, plain = [], []
    with torch.no_grad():
        for rows in half_way(examples).values():
            own = {row: score for row in rows if (score := estimate(examples, row, judge.name)) is not None}
            rows = list(own)
            if not rows:
                continue
            values = value.score(batch(examples, rows, model, conditions)).values.tolist()
            final = [examples.scores[row] for row in rows]
            pair = spearman(values, final), spearman(list(own.values()), final)
            if None not in pair:  # a prompt whose samples all score the same ranks nothing
                learned.append(pair[0])
                plain.append(pair[1])
        rows = [row for group in half_way(examples).values() for row in group][:ROWS]
        timed = batch(examples, (rows * ROWS)[:ROWS], model, conditions)
        times = {"learned": milliseconds(lambda: value.score(timed)), "verifier": milliseconds(lambda: judge.score(timed))}
    report: dict[str, Any] = {
        "prompts": len(learned),
        "prompts_that_rank_nothing": len(half_way(examples)) - len(learned),
        "milliseconds_per_node": {name: round(taken, 4) for name, taken in times.items()},
    }
    if learned:
        report["learned"] = mean_interval(learned).to_json()
        report["verifier"] = mean_interval(plain).to_json()
        report["difference"] = mean_interval([left - right for left, right in zip(learned, plain, strict=True)]).to_json()
        report["success"] = report["learned"]["low"] > 0.0 and report["difference"]["high"] >= 0.0 and times["learned"] < times["verifier"]
    else:
        report["success"] = False
    return report


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every verifier."""
    suite = suites.load(options.suite)
    conditions = list(suite.conditions())
    count = min(options.prompts or len(conditions), len(conditions))
    conditions = [conditions[place * len(conditions) // count] for place in range(count)]
    known = {condition_key(condition): condition for condition in conditions}
    fitted = [condition for index, condition in enumerate(conditions) if index % 4 != 3]
    unseen = [condition for index, condition in enumerate(conditions) if index % 4 == 3]
    judges = [resolve_verifier(name) for name in options.verifier]
    model = resolve_model(options.model).load()
    for judge in judges:
        judge.prepare(model.device)
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        sets = {"fit": (fitted, range(options.seeds)), "fitted prompts": (fitted, range(FRESH, FRESH + 2)), "unseen prompts": (unseen, range(FRESH, FRESH + 2))}
        for number, (chosen, seeds) in enumerate(sets.values()):
            save(options, judges, chosen, seeds, root / str(number))
        trees = {name: find_runs([root / str(number)]) for number, name in enumerate(sets)}
        for number, judge in enumerate(judges):
            examples = {
                name: read_examples(own, verifier=judge.name, target="mean", input="x0", model=model, levels=None if name == "fit" else (HALF,))
                for name, own in trees.items()
            }
            done = Value.fit(examples["fit"], steps=options.fit_steps, width=options.width, device=model.device)
            done.write(root / f"value-{number}")
            value = Value(path=str(root / f"value-{number}"))
            value.prepare(model.device)
            report[judge.name] = {
                "nodes": len(examples["fit"].scores),
                "fit_steps": done.steps,
                **{name: judged(examples[name], judge, value, model, known) for name in ("fitted prompts", "unseen prompts")},
            }
    return {
        "machine": platform.platform(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": model.device,
        "model": options.model,
        "suite": options.suite,
        "prompts": {"fitted": len(fitted), "unseen": len(unseen)},
        "seeds": options.seeds,
        "samples": options.samples,
        "steps": options.steps,
        "success": all(entry[name]["success"] for entry in report.values() for name in ("fitted prompts", "unseen prompts")),
        "verifiers": report,
    }


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""

    def cell(entry: dict[str, float] | None) -> str:
        return "-" if entry is None else f"{entry['estimate']:.3f} ({entry['low']:.3f} to {entry['high']:.3f})"

    lines = [
        "# A learned value against its verifier, half-way",
        "",
        f"`python benchmarks/learned_value.py --model {report['model']} --suite {report['suite']}`: {report['seeds']} seeds of {report['samples']} trajectories "
        f"of {report['steps']} steps for each of {report['prompts']['fitted']} prompts to fit to; judged on other seeds. Spearman's rank correlation with the "
        "score of the finished sample, within prompts, with 95 % intervals over prompts; milliseconds for each node in batches of "
        f"{ROWS}, decoding included, on {report['device']} with {report['threads']} threads.",
        "",
        f"Success: {'yes' if report['success'] else 'no'}.",
        "",
        "| verifier | judged on | prompts | learned value | verifier on the clean estimate | difference | ms learned | ms verifier | success |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for judge, entry in report["verifiers"].items():
        for name in ("fitted prompts", "unseen prompts"):
            row = entry[name]
            times = row["milliseconds_per_node"]
            cells = " | ".join(cell(row.get(key)) for key in ("learned", "verifier", "difference"))
            lines.append(f"| {judge} | {name} | {row['prompts']} | {cells} | {times['learned']:.3f} | {times['verifier']:.3f} | {'yes' if row['success'] else 'no'} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description="A learned value against its verifier on decoded clean estimates, half-way.")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--model", default="gaussian", help="a name, a folder or a hub id")
    parser.add_argument("--suite", default="gaussian/rare-mode", help="whose prompts: a name of `tsdiff list suites`")
    parser.add_argument("--verifier", action="append", help="whose scores are learned; repeatable (gaussian-target)")
    parser.add_argument("--prompts", type=int, help="evenly spread over the suite; all by default")
    parser.add_argument("--seeds", type=int, default=8, help="of the trajectories fitted to")
    parser.add_argument("--samples", type=int, default=16, help="trajectories of a prompt and seed")
    parser.add_argument("--steps", type=int, default=20, help="of a trajectory")
    parser.add_argument("--solver", help="the model's own by default")
    parser.add_argument("--guidance-scale", type=float, help="the model's own by default")
    parser.add_argument("--fit-steps", type=int, default=2000, help="of the optimiser, at most")
    parser.add_argument("--width", type=int, default=64, help="of the network")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--save", type=Path, help="folder to write learned_value.json and learned_value.md to")
    options = parser.parse_args()
    options.verifier = options.verifier or ["gaussian-target"]
    report = measure(options)
    if options.save is not None:
        options.save.mkdir(parents=True, exist_ok=True)
        (options.save / "learned_value.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.save / "learned_value.md").write_text(markdown(report))
    print(json.dumps(report) if options.json else markdown(report), end="\n" if options.json else "")


if __name__ == "__main__":
    main()
