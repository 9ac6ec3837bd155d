"""Search efficiency: how much of a search's time is the network's own.

    efficiency = (bare network time for the same rows, in full batches) / (search time outside decoder and verifiers)

The network is a random UNet of diffusers in a Stable Diffusion pipeline, large enough that a full batch takes 20 ms or
more; the search is a beam with guidance, for one prompt and for several at once. Bare runs and searches alternate, and
medians are reported, so that a change of the machine's speed hits both alike.

    python benchmarks/throughput.py [--json] [--profile]
"""

from __future__ import annotations

import argparse
import cProfile
import json
import platform
import pstats
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

import tsdiff
from tsdiff.policies import Beam
from tsdiff.treesearch.imports import prepare_torchvision

GOALS = {1: 0.85, 8: 0.95}
LEAST_FORWARD_SECONDS = 0.02
MOST_BARE_BATCHES = 100  # of one bare run; more would not change its mean
TOKENS, WIDTH, SIDE = 16, 64, 16  # of the prompt embeddings, and of a latent
OUTSIDE = ("decode", "verify")  # stages that the definition leaves out
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}


@dataclass(frozen=True)
class LatentMean:
    """A verifier that costs next to nothing: the mean of the clean estimate."""

    name: ClassVar[str] = "latent-mean"
    needs: ClassVar[frozenset[str]] = frozenset({"x0"})
    scope: ClassVar[str] = "row"
    latency: ClassVar[str] = "immediate"
    judges: ClassVar[str] = "any"
    differentiable: ClassVar[bool] = True

    def prepare(self, device: str) -> None:
        """Nothing to load."""

    def check(self, condition: Any) -> None:
        """Any condition will do."""

    def score(self, candidates: Any) -> Any:
        """(B, C, h, w) -> (B,)."""
        from tsdiff.plugin import Scores

        return Scores(candidates.x0.flatten(1).mean(1))


def build_pipeline(channels: int) -> Any:
    """A random Stable Diffusion pipeline without text encoder: latents (4, 16, 16), images (3, 32, 32)."""
    prepare_torchvision()
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.utils import logging

    logging.set_verbosity_error()
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=SIDE,
        layers_per_block=1,
        block_out_channels=(channels, 2 * channels),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 16),
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    pipe = StableDiffusionPipeline(
        vae=vae.eval(), unet=unet.eval(), text_encoder=None, tokenizer=None, scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Bench:
    """One pipeline, its bare network and its searches.

    Args:
      device: where both run.
      channels: size of the network.
      batch: rows of a full batch.
    """

    def __init__(self, device: str, channels: int, batch: int) -> None:
        self.device, self.batch = device, batch
        self.pipe = build_pipeline(channels).to(device)
        self.embeds = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))

    def bare(self, batches: int) -> float:
        """Seconds that the network itself takes for so many full batches."""
        latents = torch.randn(self.batch, 4, SIDE, SIDE, device=self.device)
        timesteps = torch.full((self.batch,), 500, device=self.device)
        hidden = self.embeds[:1].expand(self.batch, -1, -1).to(self.device)
        self.wait()
        started = time.perf_counter()
        with torch.no_grad():
            for _ in range(batches):
                self.pipe.unet(latents, timesteps, encoder_hidden_states=hidden, return_dict=False)
        self.wait()
        return time.perf_counter() - started

    def search(self, prompts: int) -> tuple[float, Any]:
        """Seconds of a search outside decoder and verifiers, and the engine's ledger."""
        conditions = [tsdiff.Condition(f"prompt {i}", tensors={"prompt_embeds": self.embeds[0], "negative_prompt_embeds": self.embeds[1]}) for i in range(prompts)]
        self.wait()
        started = time.perf_counter()
        results = tsdiff.search(self.pipe, conditions, policy=Beam(), verifier=LatentMean(), guidance_scale=7.5, steps=20, max_batch=self.batch, baseline=False)
        self.wait()
        seconds = time.perf_counter() - started
        if results.failures:
            raise results.failures[0].error
        return seconds - sum(results.engine.seconds[stage] for stage in OUTSIDE), results.engine

    def wait(self) -> None:
        """Drain the device's queue."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)


def choose_batch(bench: Bench) -> int:
    """The batch that the engine itself would choose: the smallest within 95 % of the best throughput.

    Not below what takes `LEAST_FORWARD_SECONDS`, where launching would be measured instead of the network.
    """
    from tsdiff.treesearch.calibrate import calibrate

    def probe(rows: int) -> None:
        bench.batch = rows
        bench.bare(1)

    rows = calibrate(probe, device=bench.device)
    bench.batch = rows
    while min(bench.bare(1) for _ in range(3)) < LEAST_FORWARD_SECONDS:
        bench.batch *= 2
    return bench.batch


def measure(bench: Bench, prompts: int, repeats: int) -> dict[str, Any]:
    """Alternate bare and search `repeats` times."""
    bare, searched, stages = [], [], []
    ledger = None
    for _ in range(repeats):
        batches = MOST_BARE_BATCHES if ledger is None else max(1, min(MOST_BARE_BATCHES, ledger.rows // bench.batch))
        bare.append(bench.bare(batches) / batches)
        seconds, ledger = bench.search(prompts)
        searched.append(seconds)
        inside = {stage: value for stage, value in ledger.seconds.items() if stage not in OUTSIDE}
        stages.append(inside | {"between stages": seconds - sum(inside.values())})
    efficiencies = [forward * ledger.rows / bench.batch / seconds for forward, seconds in zip(bare, searched, strict=True)]
    forward, seconds = statistics.median(bare), statistics.median(searched)
    ideal = forward * ledger.rows / bench.batch
    return {
        "prompts": prompts,
        "efficiency": round(ideal / seconds, 4),
        "efficiency_range": [round(min(efficiencies), 4), round(max(efficiencies), 4)],
        "rows": ledger.rows,
        "padding_probe_retried": [ledger.padding, ledger.probe, ledger.retried],
        "network_calls": ledger.batches,
        "rows_per_call": round(ledger.rows / ledger.batches, 2),
        "forward_ms": round(1000 * forward, 2),
        "bare_seconds": round(ideal, 4),
        "search_seconds": round(seconds, 4),
        "stage_seconds": {stage: round(statistics.median(one.get(stage, 0.0) for one in stages), 4) for stage in sorted(stages[0])},
        "decode_and_verify_seconds": round(sum(ledger.seconds[stage] for stage in OUTSIDE), 4),
    }


def profile(bench: Bench, prompts: int) -> None:
    """Print what the time goes into, on stderr: our own functions with what they call, then everything by itself."""
    profiler = cProfile.Profile()
    profiler.enable()
    bench.search(prompts)
    profiler.disable()
    stats = pstats.Stats(profiler, stream=sys.stderr)
    stats.sort_stats("cumulative").print_stats("tsdiff/", 45)
    stats.sort_stats("tottime").print_stats(25)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description="Search efficiency of beam on a small Stable Diffusion network.")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--prompts", type=int, nargs="+", default=list(GOALS), help="numbers of prompts searched at once")
    parser.add_argument("--repeats", type=int, default=5, help="alternations of bare network and search")
    parser.add_argument("--batch", type=int, help="rows of a full batch; measured by default")
    parser.add_argument("--channels", type=int, default=32, help="size of the network")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--profile", action="store_true", help="also profile one search of each kind, on stderr")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    bench = Bench(options.device, options.channels, options.batch or 1)
    if options.batch is None:
        choose_batch(bench)
    bench.search(1)  # the first search imports what the later ones find
    details = [measure(bench, prompts, options.repeats) for prompts in options.prompts]
    for prompts in options.prompts if options.profile else ():
        profile(bench, prompts)
    report = {f"search_efficiency_{one['prompts']}": one["efficiency"] for one in details} | {
        "goals": {str(prompts): goal for prompts, goal in GOALS.items()},
        "batch": bench.batch,
        "channels": options.channels,
        "repeats": options.repeats,
        "device": torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else "cpu",
        "machine": platform.platform(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "details": details,
    }
    print(json.dumps(report) if options.json else text(report))


def processor() -> str:
    """The CPU's name, as far as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), platform.machine())
    except OSError:
        return platform.processor() or platform.machine()


def text(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"{report['processor']}, {report['threads']} threads, {report['device']}, torch {report['torch']}, batch {report['batch']}"]
    for one in report["details"]:
        goal = report["goals"].get(str(one["prompts"]))
        low, high = one["efficiency_range"]
        lines.append("")
        lines.append(f"{one['prompts']} prompt{'s' * (one['prompts'] > 1)}: efficiency {one['efficiency']:.3f} (runs {low:.3f} to {high:.3f}{f', goal {goal}' if goal else ''})")
        lines.append(f"  {one['rows']} rows in {one['network_calls']} calls ({one['rows_per_call']} a call), a full batch {one['forward_ms']} ms")
        lines.append(f"  bare {one['bare_seconds']:.3f} s, search {one['search_seconds']:.3f} s; by stage: " + ", ".join(f"{stage} {seconds:.3f}" for stage, seconds in one["stage_seconds"].items()))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
