"""Every policy at equal compute: what each reaches with 4, 16 and 64 times the evaluations of one sample.

    python benchmarks/policies.py [--world gaussian] [--policies NAME ...] [--budgets 4 16 64] [--seeds N]
    python benchmarks/policies.py --world shapes [--model FOLDER] [--prompts 30]
    python benchmarks/policies.py --world shapes --timed [--prompts 3] [--seeds 5]

All policies have their default parameters and the size that `fit` gives them. They share random numbers: a seed has the same
first noises for every policy and prompt. Policies that need a stochastic solver run on one; best-of-n runs on both, and each
policy is compared with it on its own solver. Intervals are 95 %, by a bootstrap that resamples the same seeds (gaussian, whose
prompts are fixed) or prompts (shapes) for all policies. `nfe_ratio_to_best_of_64` is the NFE at which a policy's mean score
reaches that of best-of-64, divided by the NFE of best-of-64: log-linear between budgets, null if the largest does not reach it.

`--timed` measures seconds and nothing else, so fewer prompts will do; only for a quiet machine. Every policy is timed once for
each seed, and so is best-of-n at the same budget on the same solver: the ratio is the geometric mean of these paired ratios, its
interval Student's over their logarithms.

`--save FOLDER` writes policies.json and policies.md; it replaces what they say of this world and keeps what they say of others.
With `--timed` it keeps this world's scores too, and replaces its seconds alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from policies_report import BASE, interval, markdown, nfe_ratio, paired_ratio, timed_page, verdict

import tsdiff
from tsdiff.treesearch import registry
from tsdiff.treesearch.protocols import Allocator, Condition
from tsdiff.treesearch.search import prepare

REFERENCE = 64  # of the NFE ratio, in samples
RESAMPLES = 2000
TIMED = (3, 5)  # prompts and seeds where seconds are measured


@dataclass(frozen=True)
class World:
    """What is searched.

    Attributes:
      solvers: for policies that work with any, and for those that need a stochastic one.
      prompts, seeds: how many by default.
      units: what a bootstrap resamples.
      kind: of a prompt. Prompts are taken from all kinds alike.
      focus: a kind to report on its own, or none; only where seeds are resampled.
      good: the score from which a search counts as successful, and what that is called.
    """

    about: str
    model: str
    verifier: str
    solvers: tuple[str, str]
    guidance: float | None
    prompts: int
    seeds: int
    units: Literal["seeds", "prompts"]
    conditions: Callable[[], list[Condition]]
    kind: Callable[[Condition], str]
    focus: str | None
    good: tuple[float, str]

    def chosen(self, count: int) -> list[Condition]:
        """`count` prompts, evenly spread over the kinds and within each."""
        kinds: dict[str, list[Condition]] = {}
        for condition in self.conditions():
            kinds.setdefault(self.kind(condition), []).append(condition)
        sizes = [count // len(kinds) + (place < count % len(kinds)) for place in range(len(kinds))]
        return [group[i * len(group) // size] for group, size in zip(kinds.values(), sizes, strict=True) for i in range(size)]


def gaussian() -> World:
    """Half of the prompts ask for the rare mode, half for others."""
    return World(
        "prompts that ask for the rare mode (one sample in fifty) and for other modes of a mixture in the plane; a score of -0.5 is half a unit away",
        "gaussian", "gaussian-target", ("ddim", "ddim(eta=1)"), None, 6, 32, "seeds",
        registry.suites.load("gaussian/rare-mode").conditions,
        lambda condition: "rare mode" if condition.metadata["mode"] == "rare" else "other modes",
        "rare mode", (-0.5, "within half a unit of the point"),
    )  # fmt: skip


def shapes() -> World:
    """Prompts that training never showed."""
    from tsdiff.worlds.shapes.suites import unseen

    return World(
        "compositions that training never showed; a score is the share of the prompt's facts that the oracle finds in the picture",
        "shapes", unseen.verifier, ("ddim", "ddim(eta=1)"), 3.0, 30, 1, "prompts",
        unseen.conditions, lambda condition: str(condition.metadata["tag"]), None, (1.0, "all facts found"),
    )  # fmt: skip


WORLDS = {"gaussian": gaussian, "shapes": shapes}

# Measuring -----------------------------------------------------------------------------------------------------------


def entries(world: World, policies: Sequence[str]) -> list[tuple[str, str]]:
    """(policy, solver) pairs, best-of-n on each solver that is used before the policies on it."""
    by_solver: dict[str, list[str]] = {solver: [] for solver in world.solvers}
    for name in policies:
        stochastic = "stochastic" in registry.policies.load(name)().needs
        by_solver[world.solvers[stochastic]].append(name)
    return [(name, solver) for solver, names in by_solver.items() if names for name in [BASE, *(name for name in names if name != BASE)]]


def search(world: World, conditions: list[Condition], policy: str, solver: str, samples: int, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Search all prompts in one engine; scores, NFE and verifier calls by prompt, and seconds in all."""
    plain = prepare(options.model, conditions[:1], policy=BASE, verifiers=world.verifier, solver=solver, steps=options.steps)
    nfe = samples * plain.setting.sample_cost
    shared = isinstance(registry.policies.load(policy)(), Allocator)
    budget = {"total_nfe": nfe * len(conditions)} if shared else {"nfe": nfe}
    results = tsdiff.search(
        options.model, conditions, policy=policy, verifier=world.verifier, solver=solver, steps=options.steps, guidance_scale=world.guidance,
        seed=seed, device=options.device, baseline=False, **budget,
    )  # fmt: skip
    if results.failures:
        raise results.failures[0].error
    if not all(result.complete for result in results):
        raise SystemExit(f"{policy}: an answer without a score; means would not compare")
    return {
        "score": [result.score for result in results],
        "nfe": [result.ledger.nfe for result in results],
        "verifier_calls": [result.ledger.verifier_calls.total() for result in results],
        # Loading is before the trees' time; choosing the batch size is no part of a search.
        "seconds": max(result.seconds for result in results) - results.engine.seconds.get("calibrate", 0.0),
        "one": nfe // samples,
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every policy at every budget."""
    world = WORLDS[options.world]()
    conditions = world.chosen(options.prompts)
    pairs = entries(world, options.policies)
    found: dict[tuple[str, str], dict[int, list[dict[str, Any]]]] = {pair: {samples: [] for samples in options.budgets} for pair in pairs}
    for seed in range(options.seeds):
        for samples in options.budgets:
            for policy, solver in pairs:
                found[policy, solver][samples].append(search(world, conditions, policy, solver, samples, seed, options))
        print(f"seed {seed + 1} of {options.seeds}", file=sys.stderr, flush=True)
    return summarise(world, [world.kind(condition) for condition in conditions], found, options)


# Summing up ----------------------------------------------------------------------------------------------------------


def summarise(world: World, kinds: list[str], found: dict[tuple[str, str], dict[int, list[dict[str, Any]]]], options: argparse.Namespace) -> dict[str, Any]:
    """Means and intervals of what was found."""
    axis = 1 if world.units == "seeds" else 0  # of (seeds, prompts), averaged away
    count = options.seeds if world.units == "seeds" else len(kinds)
    draws = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    focus = np.array([kind == world.focus for kind in kinds])

    def units(pair: tuple[str, str], samples: int, what: str) -> np.ndarray:
        return np.array([one[what] for one in found[pair][samples]], dtype=float).mean(axis=axis)

    def successes(pair: tuple[str, str], samples: int, among: np.ndarray) -> dict[str, float]:
        good = np.array([one["score"] for one in found[pair][samples]]) >= world.good[0]
        return interval(good[:, among].mean(axis=axis), draws)

    rows = []
    for pair in found:
        base = (BASE, pair[1])
        cells = {}
        for samples in options.budgets:
            runs = found[pair][samples]
            differences = units(pair, samples, "score") - units(base, samples, "score")
            bounds = interval(differences, draws)
            cell = {
                "score": interval(units(pair, samples, "score"), draws),
                "minus_best_of_n": bounds,
                "verdict": "reference" if pair == base else verdict(differences, bounds),
                "good": successes(pair, samples, np.ones(len(kinds), bool)),
                "samples_worth": round(float(units(pair, samples, "nfe").mean()) / runs[0]["one"], 2),
                "verifier_calls": round(float(units(pair, samples, "verifier_calls").mean()), 1),
            }
            if world.focus in kinds:
                cell["good_focus"] = successes(pair, samples, focus)
            cells[str(samples)] = cell
        row: dict[str, Any] = {"policy": pair[0], "solver": pair[1], "budgets": cells}
        if REFERENCE in options.budgets:
            nfe, scores = (np.stack([units(pair, samples, what) for samples in options.budgets], axis=1) for what in ("nfe", "score"))
            row["nfe_ratio"] = nfe_ratio(nfe, scores, units(base, REFERENCE, "score"), units(base, REFERENCE, "nfe").mean(), draws)
        rows.append(row)
    return {
        "command": command(options, world),
        **machine(),
        "about": world.about,
        "verifier": world.verifier,
        "units": world.units,
        "prompts": len(kinds),
        "seeds": options.seeds,
        "budgets": options.budgets,
        "focus": world.focus,
        "good": world.good[1],
        "rows": rows,
    }


# Seconds -------------------------------------------------------------------------------------------------------------


def clock(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every policy at every budget, seed by seed, so that a drift of the machine hits all alike."""
    world = WORLDS[options.world]()
    conditions = world.chosen(options.prompts)
    pairs = entries(world, options.policies)
    load = os.getloadavg()[0]
    seconds: dict[tuple[str, str], dict[int, list[float]]] = {pair: {samples: [] for samples in options.budgets} for pair in pairs}
    for pair in pairs:  # what a process does once is done before
        search(world, conditions, *pair, options.budgets[0], 0, options)
    for seed in range(options.seeds):
        for samples in options.budgets:
            for pair in pairs[:: -1 if seed % 2 else 1]:  # nobody always goes first
                seconds[pair][samples].append(search(world, conditions, *pair, samples, seed, options)["seconds"])
        print(f"seed {seed + 1} of {options.seeds}", file=sys.stderr, flush=True)
    rows = [
        {
            "policy": policy,
            "solver": solver,
            "budgets": {
                str(samples): {"mean": round(sum(own) / len(own) / len(conditions), 5), **paired_ratio(own, seconds[BASE, solver][samples])}
                for samples, own in several.items()
            },
        }
        for (policy, solver), several in seconds.items()
    ]
    head = {"command": command(options, world), **machine(), "load": round(load, 2)}
    return head | {"prompts": len(conditions), "repeats": options.seeds, "budgets": options.budgets, "rows": rows}


# The report ----------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Where it was measured."""
    import torch

    return {"machine": platform.platform(), "torch": torch.__version__, "threads": torch.get_num_threads()}


def command(options: argparse.Namespace, world: World) -> str:
    """What was asked for, as typed; a model's folder by its name alone."""
    model = "" if options.model == world.model else f" --model {Path(options.model).name}"
    policies = "" if options.policies == registry.policies.names() else f" --policies {' '.join(options.policies)}"
    steps = "" if options.steps is None else f" --steps {options.steps}"
    sizes = f" --budgets {' '.join(map(str, options.budgets))} --prompts {options.prompts} --seeds {options.seeds}"
    return f"python benchmarks/policies.py --world {options.world}{model}{policies}{sizes}{steps}{' --timed' * options.timed}"


def merged(report: dict[str, Any], worlds: dict[str, Any]) -> dict[str, Any]:
    """The reports of all worlds, with every policy's NFE ratio in each."""
    together = {name: worlds[name] for name in WORLDS if name in worlds} | report
    ratios = {
        name: {row["policy"]: row["nfe_ratio"] for row in reversed(one["rows"]) if "nfe_ratio" in row}  # best-of-n: the first solver's
        for name, one in together.items()
    }
    return {"nfe_ratio_to_best_of_64": ratios, "worlds": {name: together[name] for name in WORLDS if name in together}}


def saved(target: Path | None) -> dict[str, Any]:
    """What a policies.json says of each world; nothing where there is no file."""
    worlds: dict[str, Any] = {} if target is None or not target.exists() else json.loads(target.read_text())["worlds"]
    return worlds


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description="Every policy at equal compute.")
    parser.add_argument("--world", choices=tuple(WORLDS), default="gaussian")
    parser.add_argument("--model", help="the world's model by another name, e.g. the folder of a pipeline")
    parser.add_argument("--policies", nargs="+", metavar="NAME", help="registered policies; all by default")
    parser.add_argument("--budgets", nargs="+", type=int, default=[4, 16, 64], help="in NFE of one sample")
    parser.add_argument("--seeds", type=int, help="with --timed: how often everything is timed")
    parser.add_argument("--prompts", type=int, help="evenly spread over the kinds of the world's suite")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--timed", action="store_true", help="measure seconds alone; only on a quiet machine")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write policies.json and policies.md")
    options = parser.parse_args(arguments)
    world = WORLDS[options.world]()
    options.model = options.model or world.model
    options.policies = options.policies or registry.policies.names()
    options.budgets = sorted(set(options.budgets))
    prompts, seeds = TIMED if options.timed else (world.prompts, world.seeds)
    options.prompts, options.seeds = options.prompts or prompts, options.seeds or seeds
    units = "seeds" if options.timed else world.units
    if getattr(options, units) < 2:
        parser.error(f"an interval needs at least two {units}")
    import torch

    torch.set_num_threads(options.threads)
    target = None if options.save is None else options.save / "policies.json"
    if options.timed and target is not None and options.world not in saved(target):
        parser.error(f"--timed adds to the scores of a world, but {target} has none of {options.world}; measure them first, without --timed")
    measured = clock(options) if options.timed else measure(options)
    worlds = saved(target)  # as they are now: another measurement may have been saved meanwhile
    if not options.timed:
        report = merged({options.world: measured}, worlds)
    elif target is not None:
        report = merged({options.world: worlds[options.world] | {"seconds": measured}}, worlds)
    else:
        print(json.dumps(measured) if options.json else timed_page(measured), end="\n" if options.json else "")
        return
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(report, indent=1) + "\n")
        target.with_suffix(".md").write_text(markdown(report))
    print(json.dumps(report) if options.json else markdown(report), end="\n" if options.json else "")


if __name__ == "__main__":
    main()
