"""What `policies.py` makes of its numbers: intervals, verdicts, NFE ratios, and the page about them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

BASE = "best-of-n"
VERDICTS = {"better": "better than best-of-n", "worse": "worse", "unclear": "no difference shown", "same": "the same scores"}


def interval(values: np.ndarray, draws: np.ndarray) -> dict[str, float]:
    """Mean of the units' values (U,) and its interval from resampled units (R, U)."""
    low, high = np.quantile(values[draws].mean(axis=1), (0.025, 0.975))
    return {"mean": round(float(values.mean()), 5), "low": round(float(low), 5), "high": round(float(high), 5)}


def needed(nfe: Sequence[float], means: Sequence[float], target: float) -> float:
    """NFE at which means at rising NFE reach a target: log-linear between the two around it; infinite if none reaches it."""
    target -= 1e-9 * max(1.0, abs(target))  # the same numbers, summed in another order, are no worse
    for place, mean in enumerate(means):
        if mean >= target:
            if place == 0:
                return float(nfe[0])
            share = (target - means[place - 1]) / (mean - means[place - 1])
            return float(nfe[place - 1] * (nfe[place] / nfe[place - 1]) ** share)
    return float("inf")


def nfe_ratio(nfe: np.ndarray, scores: np.ndarray, best: np.ndarray, best_nfe: float, draws: np.ndarray) -> dict[str, Any]:
    """NFE to reach the mean of `best`, over `best_nfe`.

    Args:
      nfe, scores: of the policy's units at each budget, (U, budgets).
      best: scores of the reference's units, (U,).
      draws: resampled units, (R, U).

    Returns:
      ratio, None where it is not reached; its interval, None where that is unbounded; reached: share of the resamples that
      reach it; at_most: whether the smallest budget reaches it already, so that the ratio may be lower.
    """
    ratio = needed(nfe.mean(axis=0), scores.mean(axis=0), best.mean()) / best_nfe
    resampled = np.array([needed(nfe[draw].mean(axis=0), scores[draw].mean(axis=0), best[draw].mean()) for draw in draws]) / best_nfe
    low, high = np.quantile(resampled, (0.025, 0.975), method="closest_observation")  # no mean of a number and infinity

    def finite(number: float) -> float | None:
        return round(float(number), 4) if np.isfinite(number) else None

    return {
        "ratio": finite(ratio),
        "low": finite(low),
        "high": finite(high),
        "reached": round(float(np.isfinite(resampled).mean()), 3),
        "at_most": bool(ratio * best_nfe <= nfe[:, 0].mean() * (1.0 + 1e-9)),
    }


def verdict(differences: np.ndarray, bounds: dict[str, float]) -> str:
    """What the units' differences to best-of-n say, and their interval: a key of `VERDICTS`."""
    if not differences.any():
        return "same"
    return "better" if bounds["low"] > 0.0 else "worse" if bounds["high"] < 0.0 else "unclear"


def paired_ratio(own: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Geometric mean of own/reference, pair by pair, and its 95 % interval by Student's law of the ratios' logarithms.

    Args:
      own, reference: seconds of the same repeats, at least two.
    """
    from scipy.special import stdtrit

    logs = np.log(np.asarray(own) / np.asarray(reference))
    half = float(stdtrit(len(logs) - 1, 0.975)) * float(logs.std(ddof=1)) / math.sqrt(len(logs))
    return {key: round(math.exp(float(logs.mean()) + side * half), 3) for key, side in (("ratio", 0), ("low", -1), ("high", 1))}


# The page -----------------------------------------------------------------------------------------------------------


def cell(entry: dict[str, float], scale: float = 1.0, digits: int = 3) -> str:
    """Mean and interval; minus zero is zero."""
    mean, low, high = (f"{scale * entry[key]:z.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def ratio_text(ratio: dict[str, Any]) -> str:
    """An NFE ratio with its interval."""
    if ratio["ratio"] is None:
        return "not reached"
    high = "not reached" if ratio["high"] is None else f"{ratio['high']:.2f}"
    return f"{'at most ' * ratio['at_most']}{ratio['ratio']:.2f} ({ratio['low']:.2f} to {high})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def plain_words(world: dict[str, Any]) -> list[str]:
    """What beats best-of-n and what does not, budget by budget and over all."""
    rivals = [row for row in world["rows"] if row["policy"] != BASE]
    lines = []
    for samples in map(str, world["budgets"]):
        groups = {key: [row["policy"] for row in rivals if row["budgets"][samples]["verdict"] == key] for key in VERDICTS}
        said = "; ".join(f"{VERDICTS[key]}: {', '.join(names)}" for key, names in groups.items() if names)
        lines.append(f"* {samples}x: {said}.")
    never = [row["policy"] for row in rivals if all(one["verdict"] != "better" for one in row["budgets"].values())]
    lines.append(f"* Not better than best-of-n at any of these budgets: {', '.join(never) or 'none'}.")
    return lines


def section(name: str, world: dict[str, Any]) -> list[str]:
    """One world."""
    budgets = [str(samples) for samples in world["budgets"]]
    heads = [f"{samples}x" for samples in budgets]
    rows = world["rows"]
    labels = [[row["policy"], row["solver"]] for row in rows]

    def every(text: Callable[[dict[str, Any]], str]) -> list[list[str]]:
        return [[*label, *(text(row["budgets"][samples]) for samples in budgets)] for label, row in zip(labels, rows, strict=True)]

    lines = [
        f"## {name}", "",
        f"`{world['command']}`: {world['about']}. {world['prompts']} prompts, {world['seeds']} seed(s) each, verifier `{world['verifier']}`; "
        f"the bootstrap resamples {world['units']}.", "",
        "In words, by the paired differences below:", "", *plain_words(world), "",
        "Mean score of the answer, and the NFE that reach the score of best-of-64 (same solver) as a ratio:", "",
    ]  # fmt: skip
    scores = every(lambda one: cell(one["score"]))
    ratios = [ratio_text(row["nfe_ratio"]) if "nfe_ratio" in row else "not measured" for row in rows]
    lines += table(["policy", "solver", *heads, "NFE ratio to best-of-64"], [[*row, ratio] for row, ratio in zip(scores, ratios, strict=True)])
    lines += ["", "Minus best-of-n at the same budget on the same solver, paired:", ""]
    lines += table(["policy", "solver", *heads], every(lambda one: "" if one["verdict"] == "reference" else cell(one["minus_best_of_n"])))
    for key, among in (("good", "all prompts"), ("good_focus", world["focus"])):
        if key in rows[0]["budgets"][budgets[0]]:
            lines += ["", f"Per cent of searches that succeed ({world['good']}), {among}:", ""]
            lines += table(["policy", "solver", *heads], every(lambda one, key=key: cell(one[key], 100.0, 0)))
    lines += ["", "What a search spent: NFE in samples' worth, and verifier calls, which budgets do not limit:", ""]
    lines += table(["policy", "solver", *heads], every(lambda one: f"{one['samples_worth']:.1f}, {one['verifier_calls']:.0f} calls"))
    if "seconds" in world:
        lines += ["", *seconds_section(world["seconds"])]
    return [*lines, ""]


def seconds_section(timed: dict[str, Any]) -> list[str]:
    """Seconds, which are measured on their own."""
    budgets = [str(samples) for samples in timed["budgets"]]
    rows = []
    for row in timed["rows"]:
        cells = [row["budgets"][samples] for samples in budgets]
        texts = [f"{one['mean']:.3g} s" if row["policy"] == BASE else f"{one['ratio']:.2f} ({one['low']:.2f} to {one['high']:.2f})" for one in cells]
        rows.append([row["policy"], row["solver"], *texts])
    return [
        f"Seconds a prompt of best-of-n, and of the others as ratios to best-of-n at the same budget on the same solver. "
        f"`{timed['command']}`: {timed['prompts']} prompt(s) side by side, {timed['repeats']} repeats, whose paired ratios the intervals are of; "
        f"{timed['machine']}, torch {timed['torch']}, {timed['threads']} thread(s), load {timed['load']:g} beforehand:", "",
        *table(["policy", "solver", *(f"{samples}x" for samples in budgets)], rows),
    ]  # fmt: skip


def timed_page(timed: dict[str, Any]) -> str:
    """Seconds alone, for people."""
    return "\n".join(seconds_section(timed)) + "\n"


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        "# Policies at equal compute", "",
        "Written by `benchmarks/policies.py`; figures and the words about them are computed. Every policy has its default parameters and the size "
        "that `fit` gives it for so many times the NFE of one sample (4x, ...); 95 % intervals in brackets. Policies share random numbers, and each "
        "is compared with best-of-n on its own solver. Seconds are given where they were measured on a quiet machine.", "",
    ]  # fmt: skip
    for name, world in report["worlds"].items():
        lines += section(name, world)
    return "\n".join(lines).rstrip() + "\n"
