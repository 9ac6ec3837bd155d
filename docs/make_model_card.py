"""Fill in the tables of the shapes world's model card, and the README's, from the results of its benchmarks, and draw its picture of samples.

    python docs/make_model_card.py [--picture]

The card is written by hand but for the blocks between `<!-- generated: NAME -->` and `<!-- end -->`. `--picture` draws
docs/images/shapes_samples.png anew: one sample of each kind and seed, none chosen, with what the checker says of it.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tsdiff.worlds.shapes.grammar import KINDS
from tsdiff.worlds.shapes.model import MODELS

TARGET = MODELS / "MODEL_CARD.md"
DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"
RESULTS = DOCS / "results"
PICTURE = DOCS / "images" / "shapes_samples.png"
SEEDS = range(8)
_BLOCK = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_SOURCES = {"autoencoder": "vae/training.json", "shapes": "training.json", "shapes-small": "training.json", "shapes-clip": "training.json", "shapes-features": "training.json"}


def results(name: str) -> dict[str, Any]:
    """What a benchmark has saved."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def cell(entry: dict[str, float]) -> str:
    """ "93.5 (91-95.3)", per cent."""
    return f"{100 * entry['share']:.3g} ({100 * entry['low']:.3g}-{100 * entry['high']:.3g})"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def samples() -> str:
    """Model, guidance scale and steps by kinds."""
    lines = results("shapes_samples")["lines"]
    rows = [[f"`{line['model']}`, {line['guidance']:g}, {line['steps']}", *(cell(line["kinds"][kind]) for kind in (*KINDS, "all"))] for line in lines]
    return table(["model, guidance, steps", *KINDS, "all"], rows)


def unseen() -> str:
    """The kinds that have held-out compositions, where none and where all prompts name one."""
    held, usual = results("shapes_unseen")["lines"], results("shapes_samples")["lines"]
    rows = []
    for line in held:
        same = next(other for other in usual if all(other[key] == line[key] for key in ("model", "steps", "guidance")))
        rows += [[f"{line['model']}: {kind}", cell(same["kinds"][kind]), cell(entry)] for kind, entry in line["kinds"].items() if kind != "all"]
    return table(["kind", "seen", "unseen"], rows)


def search() -> str:
    """Kinds by verifier and number of samples to choose from; the README shows this one too."""
    lines = results("shapes_search")["lines"]
    first = lines[0]
    columns = [line for line in lines if line["samples"] > 1]
    head = ["kind", "one sample", *(f"best of {line['samples']}, `{line['verifier']}`" for line in columns)]
    return table(head, [[kind, cell(first["kinds"][kind]), *(cell(line["kinds"][kind]) for line in columns)] for kind in (*KINDS, "all")])


def clip() -> str:
    """Retrieval among near misses."""
    tables = results("shapes_clip")["tables"]
    parts = []
    for heading, left in (("kind", ""), ("near miss", ", pairs")):
        captions, pictures = tables[f"captions{left}"], tables[f"pictures{left}"]
        parts.append(table([heading, "captions", "pictures", "n"], [[name, cell(captions[name]), cell(pictures[name]), str(captions[name]["total"])] for name in captions]))
    return "\n".join(parts)


def checker() -> str:
    """Agreement of the checker with the truth, and what it takes shapes and colours for after the autoencoder."""
    states = results("shapes_checker")["states"]
    chosen = ("clean", "autoencoder")
    headings = ["overall", *(f"kind {kind}" for kind in KINDS)]
    parts = [table(["pictures", *chosen], [[heading, *(cell(states[state]["agreement"][heading]) for state in chosen)] for heading in headings])]
    for what in ("shapes", "colors"):
        counts = states["autoencoder"][what]
        answers = list(next(iter(counts.values())))
        parts.append(table([f"{what}: drawn, and seen as", *answers], [[name, *(str(row[answer]) for answer in answers)] for name, row in counts.items()]))
    return "\n".join(parts)


def speed() -> str:
    """Milliseconds, parameters and FLOPs."""
    found = results("shapes_speed")
    rows = [[f"`{line['name']}`, denoiser", f"{line['forward_ms']:.2f}", f"{line['parameters'] / 1e6:.2f} M", f"{line['gflops']:.3f}"] for line in found["models"]]
    rows += [[f"`{line['name']}`, decoder", f"{line['decode_ms']:.2f}", "", ""] for line in found["models"][:1]]
    rows += [[f"`{line['name']}`", f"{line['score_ms']:.2f}", "", ""] for line in found["verifiers"]]
    return table(["part", f"ms a row, batch {found['batch']}, {found['threads']} threads", "parameters", "GFLOPs a row"], rows)


def training() -> str:
    """What each run was; parts of one model in the order in which they were made."""
    rows = []
    for name, file in _SOURCES.items():
        path = (MODELS / "shapes" if name == "autoencoder" else MODELS / name) / file
        for said in json.loads(path.read_text())["parts"]:
            numbers = said["training"]
            row = [f"`{said['name']}`", f"{said['steps']:,}", str(numbers["batch"]), f"{numbers['rate']:g}", f"{said['seconds'] / 60:.0f}", f"{said['last_loss']:.3g}"]
            if row not in rows:  # parts that two models have in common
                rows.append(row)
    return table(["run", "steps", "batch", "highest rate", "minutes", "loss at the end"], rows)


BLOCKS: dict[str, Callable[[], str]] = {"samples": samples, "unseen": unseen, "search": search, "clip": clip, "checker": checker, "speed": speed, "training": training}


def filled(page: str) -> str:
    """The page with its blocks made anew."""
    return _BLOCK.sub(lambda match: match[1] + BLOCKS[match[2]]() + match[3], page)


def draw() -> None:
    """One sample of each kind (rows) and seed (columns): the first prompt of the kind in `shapes/seen`."""
    from matplotlib.figure import Figure

    import tsdiff
    from tsdiff.worlds.shapes.suites import seen

    first = {condition.metadata["tag"]: condition for condition in reversed(seen.conditions())}
    conditions = [first[kind] for kind in KINDS]
    found = tsdiff.search("shapes", conditions, policy="best-of-n", policy_options={"n": 1}, verifier="shapes-oracle", baseline=False, seed=list(SEEDS))
    figure = Figure(figsize=(len(SEEDS) * 1.0, len(KINDS) * 1.22), dpi=110)
    panels = figure.subplots(len(KINDS), len(SEEDS), squeeze=False)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.975, wspace=0.05, hspace=0.3)
    for index, result in enumerate(found):
        row, column = divmod(index, len(SEEDS))
        axes = panels[row][column]
        axes.imshow(result.image, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        obeyed = result.node.values["shapes-oracle"].parts["satisfied"] == 1.0
        for spine in axes.spines.values():
            spine.set(color="tab:green" if obeyed else "tab:red", linewidth=2.5)
        if column == 0:
            axes.text(0, 1.08, conditions[row].prompt, fontsize=8, transform=axes.transAxes)
    figure.savefig(PICTURE)


def main() -> None:
    """Write the pages."""
    parser = argparse.ArgumentParser(description="Fill in the tables of the model card.")
    parser.add_argument("--picture", action="store_true", help="draw the samples anew")
    if parser.parse_args().picture:
        draw()
    for page in (TARGET, README):
        page.write_text(filled(page.read_text()))


if __name__ == "__main__":
    main()
