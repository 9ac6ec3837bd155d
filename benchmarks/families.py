"""Search efficiency of every model family, at its full size with random weights on a GPU, tiny on a CPU.

    efficiency = (bare network time for the same rows, in full batches) / (search time outside decoder and verifiers)

Networks are those of the published architectures (`tsdiff.diffusion.architectures`); no weights are downloaded. On a GPU they
are bfloat16, as they are and with their repeated blocks compiled.

    python benchmarks/families.py [--json] [--families sd15 sdxl ...] [--device cuda] [--no-compiled] [--save docs/results]

`--save FOLDER` writes families.json and families.md. They hold one report for each device, so that figures of a GPU and of a CPU can
be measured on two machines; a report takes the place of that device's earlier one.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from throughput import OUTSIDE, LatentMean, processor

import tsdiff
from tsdiff.diffusion.architectures import ARCHITECTURES
from tsdiff.diffusion.flops import count, made_of_configs
from tsdiff.diffusion.memory import compile_blocks
from tsdiff.policies import Beam
from tsdiff.treesearch.protocols import Encoded

TINY_VAE = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 8, "layers_per_block": 1}
_XL = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8}
_SD3 = _XL | {"joint_attention_dim": 32, "caption_projection_dim": 32, "pooled_projection_dim": 32, "pos_embed_max_size": 8}
TINY: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 8, "block_out_channels": (32,) * 4, "cross_attention_dim": 32, "attention_head_dim": 4, "norm_num_groups": 8},
    "sdxl": {
        "sample_size": 8, "block_out_channels": (32, 32, 64), "transformer_layers_per_block": (1, 1, 1), "attention_head_dim": (2, 2, 4),
        "cross_attention_dim": 32, "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80, "norm_num_groups": 8,
    },
    "sd3": _SD3,
    "sd35-large": _SD3,
    "flux-dev": {
        "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6),
        "joint_attention_dim": 32, "pooled_projection_dim": 32,
    },
    "pixart-sigma": _XL | {"cross_attention_dim": 32, "caption_channels": 32},
    "dit-xl": _XL,
    "sit-xl": _XL,
    "ltx-video": {"num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32, "num_layers": 2, "caption_channels": 32},
}  # fmt: skip
"""Entries of the networks' configs that make them small."""

TINY_VIDEO_VAE = {"block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4, "layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5}
TINY_SIZE = {"image": (64, 64), "video": (64, 64, 9)}
LEVEL = 500.0


class Bench:
    """A family's model, with conditions of zeros.

    Args:
      name: of the architecture.
      device: where it runs; on a CPU it is made small.
    """

    def __init__(self, name: str, device: str) -> None:
        self.name, self.device = name, device
        small = device == "cpu"
        made = ARCHITECTURES[name]
        vae = TINY_VAE if made.vae_class == "AutoencoderKL" else TINY_VIDEO_VAE
        outline: Any = (made.changed(TINY[name], vae) if small else made).outline()
        self.size = outline.size(*TINY_SIZE[outline.media]) if small else outline.size(None, None)
        self.flops = count(outline, self.size)
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32 if small else torch.bfloat16)
        try:
            self.model = made_of_configs(outline, device)
        finally:
            torch.set_default_dtype(before)
        self.row = {key: tensor.to(device) for key, tensor in outline.row().items()}
        # There are no text encoders: every condition is zeros.
        self.model.check = lambda condition, *, guided=False: None
        self.model.encode = lambda conditions, *, guided: [Encoded((self.row,) * (1 + guided), name) for _ in conditions]

    def compile(self) -> None:
        """Compile the network's repeated blocks."""
        compile_blocks(self.model.network)
        self.model.constant_rows = True

    def bare(self, rows: int, batches: int) -> float:
        """Seconds of so many network calls of so many rows."""
        latents = torch.randn((rows, *self.model.latent_shape(self.size)), device=self.device)
        timesteps = torch.full((rows,), LEVEL, device=self.device)
        self.wait()
        started = time.perf_counter()
        for _ in range(batches):
            self.model.forward(latents, timesteps, [self.row] * rows)
        self.wait()
        return time.perf_counter() - started

    def search(self, rows: int, prompts: int, steps: int) -> tuple[float, Any]:
        """Seconds of a search outside decoder and verifiers, and the engine's ledger."""
        self.wait()
        started = time.perf_counter()
        conditions = [tsdiff.Condition(f"prompt {number}") for number in range(prompts)]
        sides = dict(zip(("height", "width", "frames"), self.size, strict=False))
        results = tsdiff.search(self.model, conditions, policy=Beam(), verifier=LatentMean(), steps=steps, max_batch=rows, baseline=False, **sides)
        self.wait()
        seconds = time.perf_counter() - started
        if results.failures:
            raise results.failures[0].error
        return seconds - sum(results.engine.seconds[stage] for stage in OUTSIDE), results.engine

    def wait(self) -> None:
        """Drain the device's queue."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)


def measure(bench: Bench, mode: str, rows: int, prompts: int, steps: int, repeats: int) -> dict[str, Any]:
    """Alternate bare network and search; medians."""
    bench.bare(rows, 2)  # allocates, picks kernels, compiles
    _, ledger = bench.search(rows, prompts, steps)
    calls = min(50, max(1, ledger.rows // rows))
    bare, searched = [], []
    for _ in range(repeats):
        bare.append(bench.bare(rows, calls) / calls)
        seconds, ledger = bench.search(rows, prompts, steps)
        searched.append(seconds)
    forward, seconds = statistics.median(bare), statistics.median(searched)
    return {
        "family": bench.name,
        "mode": mode,
        "pixels": list(bench.size),
        "parameters": sum(weight.numel() for weight in bench.model.network.parameters()),
        "flop_per_row": bench.flops.row,
        "forward_ms": round(1000 * forward, 2),
        "tflops": float(f"{bench.flops.row * rows / forward / 1e12:.3g}"),
        "efficiency": round(forward * ledger.rows / rows / seconds, 4),
        "rows": ledger.rows,
        "padding": ledger.padding,
        "calls": ledger.batches,
        "search_seconds": round(seconds, 4),
        "peak_memory_gb": round(torch.cuda.max_memory_allocated(bench.device) / 1e9, 2) if bench.device.startswith("cuda") else None,
    }


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description="Search efficiency of every model family, with random weights.")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--families", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES), help="architectures; all by default")
    parser.add_argument("--device", help="cpu or cuda; by default cuda where there is one")
    parser.add_argument("--batch", type=int, default=8, help="rows of a network call")
    parser.add_argument("--prompts", type=int, default=2, help="prompts searched at once")
    parser.add_argument("--steps", type=int, default=8, help="denoising steps")
    parser.add_argument("--repeats", type=int, default=3, help="alternations of bare network and search")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write families.json and families.md")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, help="measure compiled networks too; by default on GPUs")
    options = parser.parse_args()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    compiled = device != "cpu" if options.compiled is None else options.compiled
    rows = []
    for name in options.families:
        bench = Bench(name, device)
        for mode in ("eager", "compiled")[: 1 + compiled]:
            if mode == "compiled":
                bench.compile()
            rows.append(measure(bench, mode, options.batch, options.prompts, options.steps, options.repeats))
        del bench
        if device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
    report = {
        "sizes": "tiny" if device == "cpu" else "full",
        "batch": options.batch,
        "prompts": options.prompts,
        "steps": options.steps,
        "repeats": options.repeats,
        "number_format": "float32" if device == "cpu" else "bfloat16",
        "device": "cpu" if device == "cpu" else torch.cuda.get_device_name(device),
        "machine": platform.platform(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "families": rows,
    }
    if options.save is not None:
        save(report, options.save)
    print(json.dumps(report) if options.json else text(report))


def save(report: dict[str, Any], folder: Path) -> None:
    """Write a device's report beside those of others, and the page about all of them."""
    target = folder / "families.json"
    devices = json.loads(target.read_text())["devices"] if target.exists() else {}
    devices[report["device"]] = report
    folder.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"devices": devices}, indent=1) + "\n")
    target.with_suffix(".md").write_text(page(devices))


def page(devices: dict[str, dict[str, Any]]) -> str:
    """The page, in Markdown: how it was measured on each device, and one table."""
    lines = [
        "# Search efficiency of every model family",
        "",
        "`python benchmarks/families.py`: the time that the bare network takes for the same rows in full batches, divided by the search's time "
        "outside decoder and verifiers. Networks of the published architectures with random weights; guided beams of the default settings; bare "
        "runs and searches alternate, and medians are given. FLUX.1 dev is told its guidance, so that its evaluations are one row. A tiny network "
        "takes milliseconds, so that what a search does besides weighs more there than at full size.",
        "",
    ]
    for name, one in devices.items():
        lines += [
            f"* {name}: {one['sizes']} sizes, {one['number_format']}; {one['batch']} rows a call, prompts at once: {one['prompts']}, steps: {one['steps']}, "
            f"medians of {one['repeats']}; {one['processor']}, threads: {one['threads']}, torch {one['torch']}."
        ]
    head = ("device", "family", "network", "pixels", "parameters", "GFLOP a row", "ms a call", "TFLOP/s", "rows", "padding", "calls", "peak memory", "efficiency")
    lines += ["", f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * 4 + ['---:'] * 9)} |"]
    for name, report in devices.items():
        for one in report["families"]:
            memory = "" if one["peak_memory_gb"] is None else f"{one['peak_memory_gb']:.3g} GB"
            cells = (name, *cells_of(one)[:-1], memory, cells_of(one)[-1])
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def cells_of(one: dict[str, Any]) -> tuple[Any, ...]:
    """A family's figures, as a table shows them."""
    pixels = "x".join(map(str, one["pixels"]))
    numbers = (f"{one['parameters'] / 1e6:.4g} M", f"{one['flop_per_row'] / 1e9:.3g}", one["forward_ms"], one["tflops"], one["rows"], one["padding"], one["calls"])
    return (one["family"], one["mode"], pixels, *numbers, f"{one['efficiency']:.3f}")


def text(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"{report['processor']}, {report['device']}, torch {report['torch']}, {report['sizes']} sizes, {report['batch']} rows a call"]
    head = ("family", "mode", "pixels", "parameters", "GFLOP/row", "ms/call", "TFLOP/s", "rows", "padding", "calls", "efficiency")
    lines.append("  ".join(name.rjust(12) for name in head))
    for one in report["families"]:
        lines.append("  ".join(str(cell).rjust(12) for cell in cells_of(one)))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
