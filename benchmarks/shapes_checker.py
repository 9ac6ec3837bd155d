"""How often the shapes world's checker agrees with the truth: on fresh drawings, and on drawings spoilt as by an autoencoder.

    python benchmarks/shapes_checker.py [--json] [--pictures N] [--seed S] [--autoencoder FOLDER] [--save FOLDER]

Half of the pictures of each kind show their prompt; the other half miss it in one respect. The truth comes from what was
drawn. Each picture is judged clean; spoilt by blur, ripples, noise, JPEG and rounding, to several PSNRs; and passed through
a linear autoencoder (9 principal components of each patch of 4 x 4 pixels, 2304 numbers a picture), a kind of damage that
the checker was not fitted on; and encoded and decoded by the autoencoder of the models. `--save` writes shapes_checker.json and shapes_checker.md. Intervals are Wilson's, 95 %.
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
import torch

from tsdiff.bench.statistics import wilson_interval
from tsdiff.treesearch.imports import prepare_torchvision
from tsdiff.treesearch.noise import derive, generator
from tsdiff.worlds.shapes.checker import look
from tsdiff.worlds.shapes.geometry import CANVAS, COLORS, SHAPES, Scene
from tsdiff.worlds.shapes.grammar import KINDS
from tsdiff.worlds.shapes.model import MODELS
from tsdiff.worlds.shapes.render import render
from tsdiff.worlds.shapes.scenes import draw_prompt, draw_scene, near_misses, training_example
from tsdiff.worlds.shapes.spoil import malformed, psnr, spoil

GOALS = {"clean": {"overall": 0.995, "per_kind": 0.99}, "31 dB": {"overall": 0.98}}
DECIBELS = (31, 27, 24)
PATCH, COMPONENTS = 4, 9


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
    """A share with its interval."""
    interval = wilson_interval(right, total)
    return {"right": right, "total": total, "share": round(interval.estimate, 5), "low": round(interval.low, 5), "high": round(interval.high, 5)}


class LinearAutoencoder:
    """The principal components of patches of 1,500 training pictures, and pictures passed through them."""

    def __init__(self, seed: int) -> None:
        pictures = np.stack([render(training_example(derive(seed, "linear autoencoder"), index)[1]) for index in range(1500)])
        patches = np.concatenate([self._cut(picture) for picture in pictures])[::3]
        self.mean = patches.mean(axis=0)
        self.basis = np.linalg.svd(patches - self.mean, full_matrices=False)[2][:COMPONENTS]

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """The picture as its code remembers it."""
        decoded = (self._cut(picture) - self.mean) @ self.basis.T @ self.basis + self.mean
        count = CANVAS // PATCH
        return np.clip(decoded.reshape(count, count, PATCH, PATCH, 3).transpose(0, 2, 1, 3, 4).reshape(CANVAS, CANVAS, 3), 0.0, 1.0)

    @staticmethod
    def _cut(picture: np.ndarray) -> np.ndarray:
        count = CANVAS // PATCH
        return picture.reshape(count, PATCH, count, PATCH, 3).transpose(0, 2, 1, 3, 4).reshape(count * count, -1)


class TrainedAutoencoder:
    """The autoencoder that the models of this world share, and pictures encoded to the mean and decoded by it."""

    def __init__(self, folder: Path) -> None:
        prepare_torchvision()
        from diffusers import AutoencoderKL

        self.vae = AutoencoderKL.from_pretrained(folder, local_files_only=True).eval()

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """The picture as it comes back."""
        with torch.no_grad():
            pixels = torch.from_numpy(picture).permute(2, 0, 1)[None] * 2 - 1
            decoded = self.vae.decode(self.vae.encode(pixels).latent_dist.mean).sample[0]
        return (decoded / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()


def measure(pictures: int, seed: int, autoencoder: Path) -> dict[str, object]:
    """Draw, look and compare."""
    linear, trained = LinearAutoencoder(seed), TrainedAutoencoder(autoencoder)
    states = ["clean", *(f"{decibel} dB" for decibel in DECIBELS), "linear autoencoder", "autoencoder"]
    tallies = {state: Tally() for state in states}
    ratios: dict[str, list[float]] = {state: [] for state in states[1:]}
    drawing = looking = 0.0
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
        versions = [image, *(spoil(image, rng, decibel) for decibel in DECIBELS), linear(image), trained(image)]
        for state, picture in zip(states, versions, strict=True):
            if state != "clean":
                ratios[state].append(psnr(image, picture))
            started = time.perf_counter()
            objects = look(picture)
            seen = prompt.judge(objects).satisfied
            looking += time.perf_counter() - started
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
        "mean_psnr": {state: round(float(np.mean(values)), 2) for state, values in ratios.items()},
        "render_ms": round(drawing / pictures * 1e3, 3),
        "look_ms": round(looking / (pictures * len(states)) * 1e3, 3),
        "malformed_taken_for_a_shape": share(sum(accepted), len(accepted)),
        "states": {state: tally.report() for state, tally in tallies.items()},
    }


def markdown(report: dict) -> str:  # type: ignore[type-arg]
    """The report for people."""
    states, clean = report["states"], report["states"]["clean"]

    def cell(entry: dict[str, float]) -> str:
        return f"{100 * entry['share']:.2f} % ({100 * entry['low']:.2f}-{100 * entry['high']:.2f}, n = {entry['total']})"

    junk = report["malformed_taken_for_a_shape"]
    lines = [
        "# The checker of the shapes world against the truth",
        "",
        f"`python benchmarks/shapes_checker.py --pictures {report['pictures']} --seed {report['seed']}`: {report['pictures']} fresh drawings, half of which show their "
        f"prompt and half of which miss it in one respect; each judged clean, spoilt by blur, ripples, noise, JPEG and rounding to a PSNR, passed through a linear autoencoder that keeps "
        f"{COMPONENTS} numbers of each patch of {PATCH} x {PATCH} pixels ({report['mean_psnr']['linear autoencoder']} dB) and through the autoencoder of the models ({report['mean_psnr']['autoencoder']} dB). "
        f"Agreement of the verdict (satisfied or not) with what was drawn, with 95 % intervals. Drawing took {report['render_ms']} ms a picture, checking {report['look_ms']} ms. "
        f"Of {junk['total']} malformed figures {100 * junk['share']:.1f} % were taken for a shape.",
        "",
        f"| | {' | '.join(states)} |",
        f"| --- |{' --- |' * len(states)}",
    ]
    headings = sorted(clean["agreement"], key=lambda heading: (heading != "overall", heading))
    lines += [f"| {heading} | {' | '.join(cell(state['agreement'][heading]) for state in states.values())} |" for heading in headings]
    lines += ["", "Verdicts:", "", f"| truth and answer | {' | '.join(states)} |", f"| --- |{' --- |' * len(states)}"]
    lines += [f"| {name} | {' | '.join(str(state['verdicts'][name]) for state in states.values())} |" for name in clean["verdicts"]]
    for what in ("shapes", "colors"):
        for state in states:
            table = states[state][what]
            answers = list(next(iter(table.values())))
            lines += ["", f"{what.capitalize()}, {state} (rows: drawn; columns: seen):", "", f"| | {' | '.join(answers)} |", f"| --- |{' --- |' * len(answers)}"]
            lines += [f"| {name} | {' | '.join(str(row[answer]) for answer in answers)} |" for name, row in table.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description="Agreement of the shapes world's checker with the truth.")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--pictures", type=int, default=5000, help="fresh drawings, an even number")
    parser.add_argument("--seed", type=int, default=1, help="decides the pictures")
    parser.add_argument("--save", type=Path, help="folder to write shapes_checker.json and shapes_checker.md to")
    parser.add_argument("--autoencoder", type=Path, default=MODELS / "shapes" / "vae", help="folder of the trained autoencoder")
    options = parser.parse_args()
    report = measure(options.pictures, options.seed, options.autoencoder)
    if options.save is not None:
        options.save.mkdir(parents=True, exist_ok=True)
        (options.save / "shapes_checker.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.save / "shapes_checker.md").write_text(markdown(report))
    print(json.dumps(report) if options.json else markdown(report), end="\n" if options.json else "")


if __name__ == "__main__":
    main()
