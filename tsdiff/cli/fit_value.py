"""`tsdiff fit-value`: from saved trees to a verifier that ranks nodes early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tsdiff.cli import values
from tsdiff.cli.counting import counting
from tsdiff.cli.options import debug_option, json_option
from tsdiff.cli.output import number, plural, print_facts, print_json, print_table
from tsdiff.treesearch import registry
from tsdiff.treesearch.errors import UsageError

_COLUMNS = ("level", "of", "log-SNR", "nodes", "prompts", "within prompts", "pooled")
_PATH = click.Path(path_type=Path)


@click.command("fit-value")
@click.argument("runs", nargs=-1, required=True, type=_PATH, metavar="RUN...")
@click.option("--out", type=_PATH, default=Path("value"), show_default=True, metavar="FOLDER", help="New folder of the value.")
@click.option("--target-verifier", metavar="NAME", help="Whose scores to learn; the one that steered by default.")
@click.option("--target", type=click.Choice(["mean", "best"]), default="mean", show_default=True, help="Of the scores of the finished samples that came of a node.")
@click.option("--input", "input_", type=click.Choice(["x0", "latent"]), default="x0", show_default=True, help="What the network reads. x0: the clean estimate; the model evaluates every saved node once more. latent: the node's own latent.")
@click.option("--steps", type=click.IntRange(min=1), default=2000, show_default=True, metavar="N", help="Steps of the optimiser, at most.")
@click.option("--width", type=click.IntRange(min=8), default=64, show_default=True, metavar="N", help="Channels or units of a layer, a multiple of 8.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="Of the split, the weights and the batches.")
@click.option("--device", type=values.DEVICE, default="auto", show_default=True, metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--plot", type=_PATH, metavar="FILE", help="Draw the rank correlations (.png, .pdf or .svg); needs matplotlib.")
@json_option
@click.option("--quiet/--no-quiet", help="No narration, no progress.")
@debug_option
def command(runs: tuple[Path, ...], out: Path, target_verifier: str | None, plot: Path | None, as_json: bool, quiet: bool, **options: Any) -> int:
    """Fit a verifier that ranks nodes early to saved trees.

    \b
    Try:
      tsdiff search --prompts FILE --policy beam --seed 0-3
      tsdiff fit-value runs --out value
      tsdiff search --policy beam --verifier value:value --verifier shapes-clip

    RUN is a run folder, a folder of such, or all of `runs`. A small network learns what score the sample will get that a
    node leads to, from the node's clean estimate (or latent), its level and the prompt. The folder written is a verifier,
    `--verifier value:FOLDER`, that scores nodes without decoding them. It belongs to the model of the runs.

    Printed is how well it ranks the nodes of trees that were held out, by level: Spearman's rank correlation with the true
    scores within each prompt, averaged, and over all nodes. A fifth of the prompts is held out, or of the trees where there
    are fewer than 5 prompts. Search with policies that keep nodes on the way (beam, svdd, mcts, dts).
    """
    from tsdiff.bench.plots import check_plot
    from tsdiff.cli.value_examples import choose_verifier, find_runs, read_examples

    if plot is not None:
        check_plot(plot)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out} is there already; nothing is ever overwritten, choose a new folder")
    if options["width"] % 8:
        raise UsageError(f"--width is {options['width']} but must be a multiple of 8")
    saved = find_runs(runs)
    verifier = choose_verifier([run.tree for run in saved], target_verifier)
    input_, target, device = options.pop("input_"), options.pop("target"), options.pop("device")
    with counting(quiet, "reading trees") as read:
        examples = read_examples(saved, verifier=verifier, target=target, input=input_, device=device, progress=read)
    with counting(quiet, "fitting") as fitting:
        fit = registry.verifiers.load("value").fit(examples, device=examples.device, progress=fitting, **options)
    config = fit.write(out)
    if plot is not None:
        _draw(config.held_out, verifier, plot)
    document = {
        "value": str(out),
        "verifier": verifier,
        "target": target,
        "input": input_,
        "model": config.model,
        "fingerprint": config.fingerprint,
        "nodes": len(examples.scores),
        "trees": fit.counts,
        "split": fit.split,
        "steps": fit.steps,
        "held_out": list(config.held_out),
        "plot": None if plot is None else str(plot),
    }
    if as_json:
        print_json(document)
    else:
        _print(document, out)
    return 0


def _print(document: dict[str, Any], out: Path) -> None:
    counts = document["trees"]
    print_facts(
        {
            "value": document["value"],
            "use": f"--verifier value:{out}",
            "learned": f"{document['target']} {document['verifier']} from {document['input']}, {plural(document['nodes'], 'node')}",
            "trees": f"{counts['fitted']} fitted to, {counts['stopping']} to stop by, {counts['held_out']} held out (by {document['split']})",
            "steps": f"{document['steps']:,}",
            "plot": document["plot"],
        }
    )
    click.echo()
    rows = [
        (row["level"], row["of"], number(row["log_snr"]), row["nodes"], row["prompts"], number(row["within"]), number(row["pooled"])) for row in document["held_out"]
    ]
    print_table(_COLUMNS, rows, title="rank correlation on held-out trees", numeric=_COLUMNS)
    if all(row["within"] is None for row in document["held_out"]):
        click.echo("within prompts: too few nodes of one prompt were held out; fit to more prompts or seeds to know")


# The plot ------------------------------------------------------------------------------------------------------------


def _draw(held_out: tuple[dict[str, Any], ...], verifier: str, plot: Path) -> None:
    """Rank correlations against log-SNR; one curve pair for each number of steps."""
    from tsdiff.bench.plots import new_figure

    with new_figure(plot) as figure:
        axes = figure.add_subplot(xlabel="log-SNR (noisy to clean)", ylabel="Spearman's rank correlation", title=f"Learned value of {verifier}, held-out trees", ylim=(-1.05, 1.05))
        axes.axhline(0.0, color="0.7", linewidth=0.8)
        for of in sorted({row["of"] for row in held_out}):
            for kind, style in (("within", "o-"), ("pooled", "s--")):
                points = [(row["log_snr"], row[kind]) for row in held_out if row["of"] == of and row[kind] is not None]
                if points:
                    axes.plot(*zip(*sorted(points), strict=True), style, label=f"{'within prompts' if kind == 'within' else 'over all nodes'}, {of} steps")
        if axes.lines[1:]:
            axes.legend()
