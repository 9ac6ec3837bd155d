"""Fill in what docs/policies.md takes from the program, every policy's parameters and measured results, and check the rest.

    python docs/make_policy_reference.py

The page is written by hand but for the blocks between `<!-- generated: NAME -->` and `<!-- end -->`. A section says in fixed
lines what can be checked: Paper, File, Pinned by, and formulas of the cost, as Python expressions in the symbols below.
"""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from tsdiff.cli.describe import describe
from tsdiff.treesearch.ledger import Cost
from tsdiff.treesearch.protocols import Allocator, Setting

TARGET = Path(__file__).with_name("policies.md")
RESULTS = Path(__file__).with_name("results") / "policies.json"
RUNS = 5  # searches that an allocator's budget is for, when its formula is checked
_VERDICTS = {"better": "better", "worse": "worse", "unclear": "no difference shown", "same": "the same"}
_BLOCK = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


# What the page says --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Formula:
    """A formula of the cost.

    Attributes:
      what: "nfe" or "verifier_calls".
      bound: "exactly", "at most" or "at least".
      text: a Python expression.
    """

    what: str
    bound: str
    text: str

    def value(self, symbols: dict[str, Any]) -> int:
        """The expression's value. Raises NameError for a symbol that there is not."""
        return int(eval(self.text, {"__builtins__": {}}, {"sum": sum, "len": len, "max": max, "min": min, **symbols}))

    def holds(self, cost: Cost, symbols: dict[str, Any]) -> bool:
        """Whether the program agrees."""
        low, high, said = getattr(cost.lower, self.what), getattr(cost.upper, self.what), self.value(symbols)
        return {"exactly": low == said == high, "at most": high <= said, "at least": low >= said}[self.bound]


@dataclass(frozen=True)
class Entry:
    """What a policy's section says.

    Attributes:
      papers: arXiv ids.
      files: paths from the root of the repository.
      tests: (name, path) pairs.
    """

    papers: list[str]
    files: list[str]
    tests: list[tuple[str, str]]
    formulas: list[Formula]


def entries(page: str) -> dict[str, Entry]:
    """The sections by policy."""
    parts = re.split(r"^## `([\w-]+)`$", page, flags=re.MULTILINE)[1:]
    return {name: _entry(text) for name, text in zip(parts[::2], parts[1::2], strict=True)}


def _entry(text: str) -> Entry:
    lines: dict[str, list[str]] = {}
    for label, rest in re.findall(r"^\* ([\w ]+): (.*(?:\n  .*)*)", text, re.MULTILINE):
        lines.setdefault(label, []).append(" ".join(rest.split()))
    formulas = []
    for label, several in lines.items():
        match = re.fullmatch(r"(NFE|Verifier calls)(?: (at most|at least))?", label)
        if match:
            what = {"NFE": "nfe", "Verifier calls": "verifier_calls"}[match[1]]
            formulas += [Formula(what, match[2] or "exactly", re.findall(r"`([^`]+)`", rest)[0]) for rest in several]
    linked = r"\[`([^`]+)`\]\(\.\./([^)]+)\)"
    return Entry(
        papers=re.findall(r"arXiv (\d{4}\.\d{5})", " ".join(lines.get("Paper", []))),
        files=[path for _, path in re.findall(linked, " ".join(lines.get("File", [])))],
        tests=re.findall(linked, " ".join(lines.get("Pinned by", []))),
        formulas=formulas,
    )


# What the symbols of formulas mean -----------------------------------------------------------------------------------


def symbols(policy: Any, setting: Setting) -> dict[str, Any]:
    """S, every parameter by its symbol or name, and what a policy makes of its parameters on a schedule."""
    known: dict[str, Any] = {"S": setting.sample_cost}
    for field in fields(policy):
        symbol = field.metadata.get("symbol", "")
        usable = symbol.isidentifier() and not keyword.iskeyword(symbol)
        known[symbol if usable else field.name] = getattr(policy, field.name)
    return known | _DERIVED.get(policy.name, lambda *_: {})(policy, setting)


def cost_of(policy: Any, setting: Setting) -> Cost:
    """What the program says: of one search, or of each of the searches that an allocator's budget is for."""
    return policy.forecast(total(setting), RUNS, setting) if isinstance(policy, Allocator) else policy.cost(setting)


def total(setting: Setting) -> int:
    """The budget that an allocator's formula is checked with."""
    return 24 * RUNS * setting.sample_cost


def _beam(policy: Any, setting: Setting) -> dict[str, Any]:
    stops = policy.stops(setting.schedule)
    (distance,) = {level - start for start, level in stops} or {0}  # where rounding makes them differ, there is no one J
    return {"c": len(stops), "J": distance}


def _paths(policy: Any, setting: Setting) -> dict[str, Any]:
    rounds = policy.rounds(setting.schedule)
    return {"a": rounds[0][0], "legs": [min(policy.num_steps or setting.schedule.last, stop - back) for _, back, stop in rounds]}


def _hierarchical(policy: Any, setting: Setting) -> dict[str, Any]:
    last = setting.schedule.last
    _, rounds = policy.rounds(setting.schedule, setting.solver)
    steps = [len(setting.schedule.span(one.start, one.stop, one.stage.num_steps)) - 1 for one in rounds]
    values = [0 if one.stop == last else min(one.stage.lookahead, last - one.stop) or 1 for one in rounds]
    return {"stages": list(zip([one.children for one in rounds], steps, values, strict=True))}


def _mcts(policy: Any, setting: Setting) -> dict[str, Any]:
    stops, last = policy.stops(setting.schedule), setting.schedule.last
    legs = [stop - (policy.back(start, last) if start else 0) for start, stop in pairwise(stops)]
    return {
        "l": stops[1],
        "g": max(legs),
        "v": policy.lookahead_steps if policy.value == "lookahead" else 1,
        "c": len(stops) - 2 if policy.with_prior else 0,
    }


_DERIVED: dict[str, Callable[[Any, Setting], dict[str, Any]]] = {
    "beam": _beam,
    "paths": _paths,
    "hierarchical": _hierarchical,
    "mcts": _mcts,
    "smc": lambda policy, setting: {"c": len(policy.levels(setting.schedule))},
    "adaptive": lambda policy, setting: {"B": total(setting), "k": RUNS, "m": policy.pilot_size(total(setting), RUNS, setting)},
}


# What the program says -----------------------------------------------------------------------------------------------


def filled_in(page: str, results: dict[str, Any]) -> str:
    """The page with its generated blocks as they should be."""
    return _BLOCK.sub(lambda block: f"{block[1]}\n{parameters(block[2])}\n\n{measured(block[2], results)}\n\n{block[3]}", page)


def parameters(name: str) -> str:
    """The parameters that `tsdiff describe` shows, as a table."""
    rows = [[f"`{row['name']}`", row["symbol"], row["default"], row["range"], row["help"]] for row in describe("policies", name)["parameters"]]
    cells = [["parameter", "symbol", "default", "range", "meaning"], ["---"] * 5, *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells)


def measured(name: str, results: dict[str, Any]) -> str:
    """Mean scores at the largest budget beside best-of-n's, and the NFE ratio, in every world that was measured."""
    said = []
    for world, report in results["worlds"].items():
        row = next((row for row in report["rows"] if row["policy"] == name), None)
        if row is None:
            continue
        base = next(one for one in report["rows"] if (one["policy"], one["solver"]) == ("best-of-n", row["solver"]))
        most = str(report["budgets"][-1])
        own, other = (one["budgets"][most]["score"] for one in (row, base))
        text = f"on `{world}` with {row['solver']}, at {most}x, a mean score of {_interval(own)}"
        if row is not base:
            verdicts = ", ".join(f"{samples}x {_VERDICTS[one['verdict']]}" for samples, one in row["budgets"].items())
            text += f"; best-of-n has {_interval(other)}. Against best-of-n: {verdicts}"
            if "nfe_ratio" in row:
                text += f". NFE to reach best-of-64, as a ratio: {_ratio(row['nfe_ratio'])}"
        said.append(text + ".")
    return f"Measured ([all results](results/policies.md)): {' '.join(said)}" if said else "Not measured yet."


def _interval(score: dict[str, float]) -> str:
    mean, low, high = (f"{score[key]:z.3f}" for key in ("mean", "low", "high"))  # z: minus zero is zero
    return f"{mean} ({low} to {high})"


def _ratio(ratio: dict[str, Any]) -> str:
    if ratio["ratio"] is None:
        return "not reached"
    return f"{'at most ' * ratio['at_most']}{ratio['ratio']:.2f} ({ratio['low']:.2f} to {'not reached' if ratio['high'] is None else format(ratio['high'], '.2f')})"


if __name__ == "__main__":
    TARGET.write_text(filled_in(TARGET.read_text(encoding="utf-8"), json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")
    print(TARGET)
