"""How fast the parts of the shapes world are: milliseconds a row in full batches, parameters and FLOPs.

    python benchmarks/shapes_speed.py [--json] [--threads 2] [--batch 64] [--rounds 5] [--save FOLDER]

For each model the denoiser (one row is one latent with one caption) and the decoder, then the verifiers. The time is the
median of the rounds, on a machine with nothing else to do. FLOPs are counted by torch on one row. `--save` writes
shapes_speed.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from tsdiff import load_model
from tsdiff.treesearch.pictures import judges_of, score_pictures
from tsdiff.treesearch.protocols import Condition

PROMPT = Condition("a red circle left of a blue square")


def median_ms(call: Callable[[], object], rounds: int) -> float:
    """Median time of a call in milliseconds, after one that is not counted."""
    call()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def model_line(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """Denoiser and decoder of a model."""
    model: Any = load_model(name, device="cpu", dtype="float32")
    (encoded,) = model.encode([PROMPT], guided=True)
    latents = torch.randn(batch, *model.latent_shape(model.size(None, None)), generator=torch.Generator().manual_seed(0))
    timesteps = torch.linspace(1, 999, batch)
    rows = [encoded.rows[0]] * batch
    with FlopCounterMode(display=False) as counter:
        model.forward(latents[:1], timesteps[:1], rows[:1])
    return {
        "name": name,
        "forward_ms": round(median_ms(lambda: model.forward(latents, timesteps, rows), rounds) / batch, 3),
        "decode_ms": round(median_ms(lambda: model.decode(latents), rounds) / batch, 3),
        "gflops": round(counter.get_total_flops() / 1e9, 4),
        "parameters": sum(value.numel() for value in model.pipeline.unet.parameters()),
    }


def verifier_line(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """A verifier on pictures of noise."""
    (judge,) = judges_of([name])
    judge.prepare("cpu")
    pictures = list(torch.rand(batch, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    return {"name": name, "score_ms": round(median_ms(lambda: score_pictures([judge], pictures, [PROMPT] * batch, device="cpu", rows=batch), rounds) / batch, 3)}


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description="Speed of the shapes world's parts.")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64, help="rows in a call")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=["shapes", "shapes-small"])
    parser.add_argument("--verifiers", nargs="+", default=["shapes-clip", "shapes-oracle"])
    parser.add_argument("--save", type=Path, help="folder to write shapes_speed.json to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = {
        "machine": platform.platform(),
        "threads": options.threads,
        "batch": options.batch,
        "models": [model_line(name, options.batch, options.rounds) for name in options.models],
        "verifiers": [verifier_line(name, options.batch, options.rounds) for name in options.verifiers],
    }
    if options.save is not None:
        options.save.mkdir(parents=True, exist_ok=True)
        (options.save / "shapes_speed.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report) if options.json else json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
