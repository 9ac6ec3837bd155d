"""The command line of training: `python -m tsdiff.worlds.shapes.train MODEL`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import click
import torch

from tsdiff.treesearch.errors import UsageError
from tsdiff.worlds.shapes.train.loop import Recipe, Training, account, finish, train

RELATIONS = {"single_object": 0.05, "colors": 0.05, "two_object": 0.05, "counting": 0.06, "position": 0.22, "color_attr": 0.05, "color_position": 0.42, "color_count": 0.05, "three_objects": 0.05}
"""Shares of the kinds in the second part of training: mostly what the first part has not learned at all."""

HARD = {"single_object": 0.05, "colors": 0.05, "two_object": 0.07, "counting": 0.09, "position": 0.2, "color_attr": 0.08, "color_position": 0.3, "color_count": 0.09, "three_objects": 0.07}
"""Shares of the kinds in the last part."""


def recipes(runs: Path) -> dict[str, Recipe]:
    """Every recipe by name. Later ones find the models they build on under `runs`."""
    from tsdiff.worlds.shapes.train.autoencoder import Autoencoder
    from tsdiff.worlds.shapes.train.contrast import Contrast
    from tsdiff.worlds.shapes.train.denoiser import Denoiser
    from tsdiff.worlds.shapes.train.features import Classifier

    latents = runs / "autoencoder" / "model"
    numbers = {"batch": 32, "rate": 7e-4, "warmup": 500, "average": 0.9995}
    contrast = {"batch": 96, "rate": 1e-3, "warmup": 400, "decay": 0.05, "betas": (0.9, 0.98), "average": 0.998}
    made: list[Recipe] = [
        Autoencoder(),
        Denoiser("shapes-first", (32, 96, 160), latents, Training(steps=20_000, **numbers)),
        Denoiser("shapes-second", (32, 96, 160), latents, Training(steps=1250, **numbers | {"rate": 5e-4, "cooldown": 0.0}), RELATIONS, layout=2.0, first=runs / "shapes-first"),
        Denoiser("shapes-third", (32, 96, 160), latents, Training(steps=625, **numbers | {"batch": 64, "warmup": 100, "cooldown": 0.0, "average": 0.998}), RELATIONS, layout=1.0, cover=1.0, early=0.6, first=runs / "shapes-second"),
        Denoiser("shapes", (32, 96, 160), latents, Training(steps=2400, **numbers | {"rate": 5e-4, "warmup": 100, "average": 0.999}), HARD, layout=0.5, cover=0.5, first=runs / "shapes-third"),
        # The small one need not learn to read again: what fits it of the large one is the text encoder.
        Denoiser("shapes-small", (16, 32, 80), latents, Training(steps=5000, **numbers | {"warmup": 200, "average": 0.999}), HARD, layout=0.5, cover=0.5, early=0.2, first=runs / "shapes"),
        Contrast("shapes-clip-first", Training(steps=4000, **contrast)),
        Contrast("shapes-clip-second", Training(steps=3000, **contrast | {"rate": 5e-4}), swaps=4.0, layout=0.5, first=runs / "shapes-clip-first"),
        Contrast("shapes-clip", Training(steps=900, **contrast | {"rate": 5e-4, "warmup": 100, "average": 0.995}), RELATIONS, swaps=8.0, layout=0.5, first=runs / "shapes-clip-second"),
        Classifier(),
    ]
    return {recipe.name: recipe for recipe in made}


def lineage(recipe: Recipe, known: Mapping[str, Recipe], folder: Path) -> list[Path]:
    """The folders of the runs whose weights a recipe's are built on, from the first to its own."""
    first: Path | None = getattr(recipe, "first", None)
    return [*(lineage(known[first.name], known, first) if first is not None else []), folder]


@click.command()
@click.argument("model")
@click.option("--runs", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/shapes"), show_default=True, help="Folder of checkpoints, one below it for each model.")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True, help="Threads; results depend on their number in the last bits.")
@click.option("--every", type=click.IntRange(1), default=250, show_default=True, help="Steps between checkpoints.")
@click.option("--until", type=click.IntRange(1), help="Stop at this step, to go on later.")
@click.option("--export", "export_now", is_flag=True, help="Train no further: export what the last checkpoint holds.")
def main(model: str, runs: Path, threads: int, every: int, until: int | None, export_now: bool) -> None:
    """Train MODEL, or go on training it, and export it to RUNS/MODEL/model."""
    torch.set_num_threads(threads)
    known = recipes(runs)
    if model not in known:
        raise click.UsageError(f"there is no model {model!r}; it must be one of {', '.join(known)}")
    recipe, folder = known[model], runs / model
    try:
        trained = finish(recipe, folder) if export_now else train(recipe, folder, every=every, until=until)
    except UsageError as error:
        raise click.ClickException(str(error)) from error
    if until is None or until >= recipe.training.steps or export_now:
        recipe.export(trained, folder / "model")
        parts = [account(part) for part in lineage(recipe, known, folder)]
        (folder / "model" / "training.json").write_text(json.dumps({"parts": parts}, indent=1) + "\n")
        click.echo(f"wrote {folder / 'model'}")


if __name__ == "__main__":
    main()
