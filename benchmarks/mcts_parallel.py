"""Does `mcts` search as well with 8 simulations in flight as with one after the other, and how full do its batches get?

    python benchmarks/mcts_parallel.py [--json] [--seeds N] [--simulations N] [--save FOLDER]

On the analytic world `gaussian` (one sample in fifty comes near the prompt's point), at equal numbers of simulations. The
i-th first noise and every branch's noise follow from the seed, so that runs of one seed are paired. The value of a run is
the score of its answer, at most 0. Batches are measured with one tree alone and at most 8 rows a network call: rows that
other trees could fill are not counted. `--save` writes mcts_parallel.json and mcts_parallel.md. Nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import tsdiff
from tsdiff.policies.mcts import MCTS

ROWS = 8  # simulations in flight, and rows of a network call
ALONE = 16  # seeds whose tree is also searched alone, for the batches
STEPS = 20
SEARCHES = {
    "clean estimates, default widening": MCTS(value="x0"),
    "clean estimates, narrow": MCTS(value="x0", widening=1.0, exponent=0.5),
    "rollouts, narrow": MCTS(value="rollout", widening=1.0, exponent=0.5),
    "rollouts, narrow, mean back-up": MCTS(value="rollout", widening=1.0, exponent=0.5, backup="mean"),
    "rollouts, Gumbel": MCTS(value="rollout", selection="gumbel", widening=1.0, exponent=0.5),
}
FLIGHTS = {
    "sequential": {"in_flight": 1},
    f"{ROWS} in flight, unobserved counts": {"in_flight": ROWS, "parallel": "unobserved"},
    f"{ROWS} in flight, virtual loss": {"in_flight": ROWS, "parallel": "virtual-loss"},
}


def interval(numbers: list[float]) -> dict[str, float]:
    """The mean and its 95 % interval (normal approximation)."""
    mean, half = statistics.fmean(numbers), 1.959964 * statistics.stdev(numbers) / math.sqrt(len(numbers))
    return {"mean": round(mean, 4), "low": round(mean - half, 4), "high": round(mean + half, 4)}


def run(policy: MCTS, seeds: list[int]) -> Any:
    """Search the world's own prompt under several seeds, all in one engine."""
    results = tsdiff.search("gaussian", policy=policy, verifier="gaussian-target", seed=seeds, steps=STEPS, max_batch=ROWS if len(seeds) == 1 else None, baseline=False)
    if results.failures:
        raise results.failures[0].error
    return results


def measure(seeds: int, simulations: int) -> dict[str, Any]:
    """Every search with every kind of flight."""
    searches = {}
    for name, policy in SEARCHES.items():
        first: list[float] = []
        rows = {}
        for flight, options in FLIGHTS.items():
            chosen = replace(policy, simulations=simulations, **options)
            results = run(chosen, list(range(seeds)))
            values = [result.score for result in results]
            first = first or values
            alone = [run(chosen, [seed]) for seed in range(min(ALONE, seeds))]
            for one, value in zip(alone, values, strict=False):
                assert one[0].score == value, "a tree does not depend on what runs beside it"
            per_call = sum(one.engine.rows for one in alone) / sum(one.engine.batches for one in alone)
            rows[flight] = {
                "value": interval(values),
                "minus_sequential": interval([value - before for value, before in zip(values, first, strict=True)]),
                "nfe": round(statistics.fmean(result.ledger.nfe for result in results), 1),
                "rows_per_call": round(per_call, 3),
                "batch_fill": round(per_call / ROWS, 4),
            }
        low = rows["sequential"]["value"]["low"]
        for row in rows.values():
            row["reaches_sequential"] = row["value"]["mean"] >= low
        searches[name] = rows
    return {
        "machine": platform.platform(),
        "torch": torch.__version__,
        "seeds": seeds,
        "simulations": simulations,
        "steps": STEPS,
        "rows": ROWS,
        "reached": all(row["reaches_sequential"] for rows in searches.values() for row in rows.values()),
        "searches": searches,
    }


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""

    def cell(entry: dict[str, float], digits: int = 3) -> str:
        return f"{entry['mean']:.{digits}f} ({entry['low']:.{digits}f} to {entry['high']:.{digits}f})"

    lines = [
        f"# Monte Carlo tree search with {report['rows']} simulations in flight",
        "",
        f"`python benchmarks/mcts_parallel.py --seeds {report['seeds']} --simulations {report['simulations']}`: the world `gaussian`, "
        f"its own prompt and verifier, {report['steps']} steps of DDIM, re-noising; {report['simulations']} simulations each. Values are scores of "
        f"the answer (at most 0; -0.5 is half a unit from the wanted point), means over {report['seeds']} seeds with 95 % intervals; differences are "
        "paired by seed. Reached: the mean is not below the interval of the sequential search. Batches: rows of an average network call, "
        f"of {report['rows']} possible, one tree alone.",
        "",
        f"All reached: {'yes' if report['reached'] else 'no'}. {paired(report)}",
        "",
        "| search | simulations | value | minus sequential | NFE | rows a call | batch fill | reached |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, rows in report["searches"].items():
        for flight, row in rows.items():
            difference = "" if flight == "sequential" else cell(row["minus_sequential"])
            lines.append(
                f"| {name} | {flight} | {cell(row['value'])} | {difference} | {row['nfe']:.0f} | {row['rows_per_call']:.2f} | "
                f"{100 * row['batch_fill']:.0f} % | {'yes' if row['reaches_sequential'] else 'no'} |"
            )
    return "\n".join(lines) + "\n"


def paired(report: dict[str, Any]) -> str:
    """What the paired differences say, which see more than the intervals of the means."""
    differences = {
        f"{name}, {flight}": row["minus_sequential"] for name, rows in report["searches"].items() for flight, row in rows.items() if flight != "sequential"
    }
    equal = [name for name, entry in differences.items() if entry["low"] == entry["high"] == 0.0]
    worse = [name for name, entry in differences.items() if entry["high"] < 0.0]
    better = [name for name, entry in differences.items() if entry["low"] > 0.0]
    return (
        f"Of {len(differences)} paired differences, {len(worse)} lie wholly below 0 ({'; '.join(worse) or 'none'}), {len(better)} wholly above "
        f"({'; '.join(better) or 'none'}) and {len(equal)} are 0 in every run, because values did not decide where children were opened "
        f"({'; '.join(equal) or 'none'})."
    )


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description="mcts with simulations in flight against one after the other.")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--seeds", type=int, default=128, help="paired runs of each search, at least 2")
    parser.add_argument("--simulations", type=int, default=48, help="of each run")
    parser.add_argument("--save", type=Path, help="folder to write mcts_parallel.json and mcts_parallel.md to")
    options = parser.parse_args()
    report = measure(options.seeds, options.simulations)
    if options.save is not None:
        options.save.mkdir(parents=True, exist_ok=True)
        (options.save / "mcts_parallel.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.save / "mcts_parallel.md").write_text(markdown(report))
    print(json.dumps(report) if options.json else markdown(report), end="\n" if options.json else "")


if __name__ == "__main__":
    main()
