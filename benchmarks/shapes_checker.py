"""How often the shapes world's checker agrees with the truth: on fresh drawings, and on drawings spoilt as by an autoencoder.

    python benchmarks/shapes_checker.py [--json] [--pictures N] [--decibel D] [--seed S] [--save FOLDER]

Half of the pictures of each kind show their prompt; the other half miss it in one respect. The truth comes from what was
drawn. `--save` writes shapes_checker.json and shapes_checker.md. Intervals are Wilson's, 95 %.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tsdiff.treesearch.noise import derive, generator
from tsdiff.worlds.shapes.checker import look
from tsdiff.worlds.shapes.geometry import COLORS, SHAPES, Scene
from tsdiff.worlds.shapes.grammar import KINDS
from tsdiff.worlds.shapes.render import render
from tsdiff.worlds.shapes.scenes import draw_prompt, draw_scene, near_misses
from tsdiff.worlds.shapes.spoil import malformed, psnr, spoil

GOALS = {"clean": {"overall": 0.995, "per_kind": 0.99}, "spoilt": {"overall": 0.98}}


@dataclass
class Tally:
    """Agreements counted under several headings."""

    right: Counter[str] = field(default_factory=Counter)
    total: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[tuple[bool, bool]] = field(default_factory=Counter)
    shapes: Counter[tuple[str, str]] = field(default_factory=Counter)
    colors: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, headings: list[str], truth: bool, seen: bool) -> None:
        """One verdict."""
        self.verdicts[truth, seen] += 1
        for heading in headings:
            self.total[heading] += 1
            self.right[heading] += truth == seen

    def match(self, scene: Scene, objects: list) -> None:  # type: ignore[type-arg]
        """What each drawn thing was taken for: the object within 3 pixels of it, or nothing."""
        for thing in scene.things:
            near = [item for item in objects if math.hypot(item.x - thing.x, item.y - thing.y) < 3.0]
            found = near[0] if len(near) == 1 else None
            self.shapes[thing.shape, "missed" if found is None else found.shape or "unclear"] += 1
            self.colors[thing.color, "missed" if found is None else found.color or "unclear"] += 1

    def report(self) -> dict[str, object]:
        """Shares with intervals, and confusion tables."""
        return {
            "agreement": {heading: share(self.right[heading], total) for heading, total in self.total.items()},
            "verdicts": {f"{'satisfied' if truth else 'missed'} taken for {'satisfied' if seen else 'missed'}": self.verdicts[truth, seen] for truth in (True, False) for seen in (True, False)},
            "shapes": {name: {answer: self.shapes[name, answer] for answer in (*SHAPES, "unclear", "missed")} for name in SHAPES},
            "colors": {name: {answer: self.colors[name, answer] for answer in (*COLORS, "unclear", "missed")} for name in COLORS},
        }


def share(right: int, total: int) -> dict[str, float]:
    """A share with Wilson's 95 % interval (Wilson 1927, "Probable inference, the law of succession")."""
    z, p = 1.959964, right / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return {"right": right, "total": total, "share": round(p, 5), "low": round(max(0.0, centre - half), 5), "high": round(min(1.0, centre + half), 5)}


def measure(pictures: int, decibel: float, seed: int) -> dict[str, object]:
    """Draw, look and compare."""
    tallies = {"clean": Tally(), "spoilt": Tally()}
    drawing = looking = 0.0
    noise_ratios, looked = [], 0
    for index in range(pictures):
        rng = generator(derive(seed, "checker benchmark", index))
        kind = list(KINDS)[index // 2 % len(KINDS)]
        prompt = draw_prompt(kind, rng, held_out=True)
        name, shown = "shown", prompt
        if index % 2:
            misses = sorted(near_misses(prompt).items())
            name, shown = misses[int(rng.integers(len(misses)))]
        scene = draw_scene(shown, rng, held_out=True)
        started = time.perf_counter()
        image = render(scene)
        drawing += time.perf_counter() - started
        truth = prompt.judge(scene.things).satisfied
        assert truth == (name == "shown"), (prompt, shown)
        bad = spoil(image, rng, decibel)
        noise_ratios.append(psnr(image, bad))
        for state, picture in (("clean", image), ("spoilt", bad)):
            started = time.perf_counter()
            objects = look(picture)
            seen = prompt.judge(objects).satisfied
            looking += time.perf_counter() - started
            looked += 1
            tallies[state].add(["overall", f"kind {kind}", f"kind {kind}, {'shown' if truth else 'near miss'}", f"respect: {name}"], truth, seen)
            tallies[state].match(scene, objects)
    rng = generator(derive(seed, "checker benchmark", "malformed"))
    accepted = [any(item.shape is not None for item in look(malformed(rng))) for _ in range(1000)]
    return {
        "machine": platform.platform(),
        "python": platform.python_version(),
        "pictures": pictures,
        "seed": seed,
        "goals": GOALS,
        "spoilt_decibel": round(float(np.mean(noise_ratios)), 2),
        "render_ms": round(drawing / pictures * 1e3, 3),
        "look_ms": round(looking / looked * 1e3, 3),
        "malformed_taken_for_a_shape": share(sum(accepted), len(accepted)),
    } | {state: tally.report() for state, tally in tallies.items()}


def markdown(report: dict) -> str:  # type: ignore[type-arg]
    """The report for people."""
    clean, spoilt = report["clean"], report["spoilt"]

    def cell(entry: dict[str, float]) -> str:
        return f"{100 * entry['share']:.2f} % ({100 * entry['low']:.2f}-{100 * entry['high']:.2f}, n = {entry['total']})"

    junk = report["malformed_taken_for_a_shape"]
    lines = [
        "# The checker of the shapes world against the truth",
        "",
        f"`python benchmarks/shapes_checker.py --pictures {report['pictures']} --seed {report['seed']}`: {report['pictures']} fresh drawings, half of which show their "
        f"prompt and half of which miss it in one respect; each clean, and spoilt by blur, ripples, noise, JPEG and rounding to {report['spoilt_decibel']} dB. "
        f"Agreement of the verdict (satisfied or not) with what was drawn, with 95 % intervals. Drawing took {report['render_ms']} ms a picture, checking {report['look_ms']} ms. "
        f"Of {junk['total']} malformed figures {100 * junk['share']:.1f} % were taken for a shape.",
        "",
        "| | clean | spoilt |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {heading} | {cell(entry)} | {cell(spoilt['agreement'][heading])} |" for heading, entry in sorted(clean["agreement"].items(), key=lambda item: (item[0] != "overall", item[0]))]
    lines += ["", "Verdicts:", "", "| truth and answer | clean | spoilt |", "| --- | --- | --- |"]
    lines += [f"| {name} | {count} | {spoilt['verdicts'][name]} |" for name, count in clean["verdicts"].items()]
    for what in ("shapes", "colors"):
        for state in ("clean", "spoilt"):
            table = report[state][what]
            answers = list(next(iter(table.values())))
            lines += ["", f"{what.capitalize()}, {state} (rows: drawn; columns: seen):", "", f"| | {' | '.join(answers)} |", f"| --- |{' --- |' * len(answers)}"]
            lines += [f"| {name} | {' | '.join(str(row[answer]) for answer in answers)} |" for name, row in table.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description="Agreement of the shapes world's checker with the truth.")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--pictures", type=int, default=5000, help="fresh drawings, an even number")
    parser.add_argument("--decibel", type=float, default=31.0, help="PSNR of the spoilt ones")
    parser.add_argument("--seed", type=int, default=1, help="decides the pictures")
    parser.add_argument("--save", type=Path, help="folder to write shapes_checker.json and shapes_checker.md to")
    options = parser.parse_args()
    report = measure(options.pictures, options.decibel, options.seed)
    if options.save is not None:
        options.save.mkdir(parents=True, exist_ok=True)
        (options.save / "shapes_checker.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.save / "shapes_checker.md").write_text(markdown(report))
    print(json.dumps(report) if options.json else markdown(report), end="\n" if options.json else "")


if __name__ == "__main__":
    main()
