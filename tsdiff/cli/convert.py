"""`tsdiff convert`: from a checkpoint of published code to a model folder."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from tsdiff.cli.options import debug_option, json_option
from tsdiff.cli.output import print_facts, print_json
from tsdiff.treesearch import registry
from tsdiff.treesearch.errors import unknown_name

_PATH = click.Path(path_type=Path)


@click.command("convert")
@click.argument("format_", metavar="FORMAT")
@click.argument("checkpoint", type=_PATH)
@click.argument("out", type=_PATH)
@click.option("--vae", type=_PATH, metavar="FOLDER", help="The autoencoder whose latents the model makes: the folder of an AutoencoderKL of diffusers, or of a pipeline with one. It is copied.")
@click.option("--heads", type=click.IntRange(min=1), metavar="N", help="Attention heads, which a checkpoint does not tell; needed for other widths than the published.")
@json_option
@debug_option
def command(format_: str, checkpoint: Path, out: Path, vae: Path | None, heads: int | None, as_json: bool) -> None:
    """Make a model folder of a published checkpoint.

    \b
    Try:
      tsdiff convert sit SiT-XL-2-256.pt models/sit --vae models/sd-vae-ft-ema
      tsdiff search --model models/sit --class 207 --verifier sharpness

    FORMAT sit: CHECKPOINT is a file of SiT's training code (.pt: the averaged weights, or weights alone) or the same tensors
    as .safetensors, of a model that predicts the velocity of a linear path. OUT is a new folder. No code of a checkpoint is
    run. A checkpoint that lacks a tensor, or has one more or of another shape, is refused.
    """
    if format_ not in registry.converters:
        raise unknown_name("checkpoint format", format_, registry.converters.names())
    facts = registry.converters.load(format_)(checkpoint, out, vae=vae, heads=heads)
    if as_json:
        print_json(facts)
        return
    print_facts({name: _text(value) for name, value in facts.items()} | {"use": f"--model {shlex.quote(str(out))}"})


def _text(value: Any) -> Any:
    if isinstance(value, list):
        return " x ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else value
