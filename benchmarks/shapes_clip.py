"""How often the shapes world's CLIP tells a caption, or a picture, from near misses of it.

    python benchmarks/shapes_clip.py [--json] [--prompts N] [--seed S] [--verifier NAME] [--save FOLDER]

For each kind of prompt, N are drawn; each comes with its near misses: colours or sides swapped, a count off by one, an
object more or less, a wrong colour, shape or relation. *Captions*: of a fresh drawing, is the score under its own caption
above the scores under all near misses? *Pictures*: under a caption, does the drawing that shows it score above drawings
of all near misses? Both are also counted miss by miss ("pairs"); chance is 50 % there. Half of the drawings are passed
through the autoencoder of the models, since decoded pictures are what the verifier gets to see. `--save` writes
shapes_clip.json and shapes_clip.md. Intervals are Wilson's, 95 %.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from shapes_checker import TrainedAutoencoder, share

from tsdiff.treesearch.noise import derive, generator
from tsdiff.treesearch.pictures import judges_of, score_pictures
from tsdiff.treesearch.protocols import Condition
from tsdiff.worlds.shapes.grammar import KINDS, MOST_THINGS, Prompt
from tsdiff.worlds.shapes.model import MODELS
from tsdiff.worlds.shapes.render import render
from tsdiff.worlds.shapes.scenes import draw_prompt, draw_scene, near_misses


def examples(kind: str, count: int, seed: int, autoencoder: TrainedAutoencoder) -> list[tuple[list[str], list[Prompt], list[torch.Tensor]]]:
    """For each prompt: what sets each entry apart ("shown" first), the prompts, and a picture (3, 64, 64) of each."""
    made = []
    for index in range(count):
        rng = generator(derive(seed, "clip benchmark", kind, index))
        prompt = draw_prompt(kind, rng, held_out=True)
        misses = {name: miss for name, miss in near_misses(prompt).items() if miss.total <= MOST_THINGS and len(miss.groups) <= (2 if miss.links else 3)}
        entries = {"shown": prompt} | misses
        pictures = [render(draw_scene(entry, rng, held_out=True)) for entry in entries.values()]
        if index % 2:
            pictures = [autoencoder(picture) for picture in pictures]
        made.append((list(entries), list(entries.values()), [torch.from_numpy(picture).permute(2, 0, 1) for picture in pictures]))
    return made


def measure(verifier: str, count: int, seed: int, autoencoder: Path) -> dict[str, Any]:
    """Draw, score and compare."""
    (judge,) = judges_of([verifier])
    judge.prepare("cpu")
    decoder = TrainedAutoencoder(autoencoder)
    right: Counter[tuple[str, str]] = Counter()
    total: Counter[tuple[str, str]] = Counter()

    def add(table: str, heading: str, outcome: bool) -> None:
        right[table, heading] += outcome
        total[table, heading] += 1

    for kind in KINDS:
        for names, prompts, pictures in examples(kind, count, seed, decoder):
            own = Condition(prompts[0].text)
            others = [Condition(prompt.text) for prompt in prompts[1:]]
            tasks = [(pictures[0], own), *((pictures[0], other) for other in others), *((picture, own) for picture in pictures[1:])]
            answers = score_pictures([judge], [picture for picture, _ in tasks], [condition for _, condition in tasks], device="cpu", rows=64)
            scores = [answer[judge.name].score for answer in answers]
            assert None not in scores, answers
            best, captions, drawings = scores[0], scores[1 : 1 + len(others)], scores[1 + len(others) :]
            for what, rest in (("captions", captions), ("pictures", drawings)):
                for heading in (kind, "all"):
                    add(what, heading, all(best > score for score in rest))
                for name, score in zip(names[1:], rest, strict=True):
                    add(f"{what}, pairs", name, best > score)
    tables = sorted({table for table, _ in total})
    return {
        "machine": platform.platform(),
        "verifier": verifier,
        "prompts": count,
        "seed": seed,
        "tables": {table: {heading: share(right[table, heading], total[table, heading]) for one, heading in sorted(total, key=last) if one == table} for table in tables},
    }


def last(entry: tuple[str, str]) -> bool:
    """Sorts the total to the end and leaves the rest as it is."""
    return entry[1] == "all"


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    tables = report["tables"]
    lines = [
        "# The CLIP of the shapes world against near misses",
        "",
        f"`python benchmarks/shapes_clip.py --prompts {report['prompts']} --seed {report['seed']}`, verifier `{report['verifier']}`: per cent right, with 95 % intervals. "
        "Half of the drawings came through the autoencoder.",
    ]
    for left, heading, about in (
        ("", "kind", "Above all near misses of the prompt:"),
        (", pairs", "near miss", "One near miss at a time (chance is 50 %):"),
    ):
        lines += ["", about, "", f"| {heading} | captions | pictures | n |", "| --- | --- | --- | --- |"]
        captions, pictures = tables[f"captions{left}"], tables[f"pictures{left}"]
        lines += [f"| {name} | {cell(captions[name])} | {cell(pictures[name])} | {captions[name]['total']} |" for name in captions]
    return "\n".join(lines) + "\n"


def cell(entry: dict[str, float]) -> str:
    """ "93.5 (91.0-95.3)"."""
    return f"{100 * entry['share']:.1f} ({100 * entry['low']:.1f}-{100 * entry['high']:.1f})"


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description="Retrieval accuracy of the shapes world's CLIP on hard negatives.")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--prompts", type=int, default=200, help="of each kind")
    parser.add_argument("--seed", type=int, default=1, help="decides prompts and pictures")
    parser.add_argument("--verifier", default="shapes-clip", help="any verifier of pictures")
    parser.add_argument("--autoencoder", type=Path, default=MODELS / "shapes" / "vae", help="folder of the trained autoencoder")
    parser.add_argument("--save", type=Path, help="folder to write shapes_clip.json and shapes_clip.md to")
    options = parser.parse_args()
    report = measure(options.verifier, options.prompts, options.seed, options.autoencoder)
    if options.save is not None:
        options.save.mkdir(parents=True, exist_ok=True)
        (options.save / "shapes_clip.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.save / "shapes_clip.md").write_text(markdown(report))
    print(json.dumps(report) if options.json else markdown(report), end="\n" if options.json else "")


if __name__ == "__main__":
    main()
