"""Flat memory and cheap recording: what a large tree needs, and what writing it down costs.

    rss_growth_mb            peak memory of a search of many nodes less that of a search of few, each in a process of its own
    journal_share            time inside the recorder over wall time, where a network does the work
    recorded_over_unrecorded CPU time of a search with a run folder over that without, where there is no network to speak of

    python benchmarks/memory.py [--json] [--nodes FEW MANY] [--policy NAME] [--keep WHAT]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

GOALS = {"rss_growth_mb": 200.0, "journal_share": 0.03}
PROMPT = "near (3, 2.4)"
NEIGHBOURS = 32  # samples of a round of zero-order search, and simulations in flight of DTS


def policy(name: str, nodes: int) -> tuple[Any, dict[str, Any]]:
    """A policy that makes about so many nodes, and the other options of its search."""
    if name == "zero-order":  # gives up all but the best as it goes
        from tsdiff.policies.zero_order import ZeroOrder

        return ZeroOrder(neighbours=NEIGHBOURS, rounds=max(1, nodes // (2 * NEIGHBOURS))), {"steps": 4}
    if name == "dts":  # may go on from any node at any time
        from tsdiff.policies.dts import DTS

        return DTS(simulations=max(1, nodes // 3), in_flight=NEIGHBOURS, exponent=0.5), {"steps": 10, "eta": 1.0}
    raise SystemExit(f"--policy {name}: choose zero-order or dts")


def grow(name: str, nodes: int, keep: str, folder: str | None) -> dict[str, Any]:
    """Search in this process; returns what it took."""
    import torch

    import tsdiff

    torch.set_num_threads(1)
    chosen, options = policy(name, nodes)
    begun, used = time.perf_counter(), time.process_time()
    result = tsdiff.search("gaussian", PROMPT, policy=chosen, out=folder, keep=keep, **options)
    seconds, cpu = time.perf_counter() - begun, time.process_time() - used
    made = len(result.tree.nodes)
    report = {
        "nodes": made,
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10), 1),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "cpu_microseconds_a_node": round(1e6 * cpu / made, 1),
    }
    if result.path is not None:
        report["disk_mb"] = {path.name: round(path.stat().st_size / 1e6, 1) for path in sorted(result.path.iterdir()) if path.suffix in (".jsonl", ".json", ".safetensors")}
    return report


def grown(name: str, nodes: int, keep: str) -> dict[str, Any]:
    """The same in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--grow", str(nodes), "--policy", name, "--keep", keep, "--out", folder]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


# Cost of recording -----------------------------------------------------------------------------------------------------


class Timed:
    """Wall time inside all methods of the recorders that a search makes."""

    METHODS = ("begin", "recorded", "commit", "answer", "answered", "refuse", "end", "close")

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> Timed:
        from tsdiff.treesearch import search
        from tsdiff.treesearch.recorder import FileRecorder

        timed = {name: self._timed(getattr(FileRecorder, name)) for name in self.METHODS}
        self._original, search.FileRecorder = FileRecorder, type("TimedRecorder", (FileRecorder,), timed)  # type: ignore[misc]
        return self

    def __exit__(self, *error: object) -> None:
        from tsdiff.treesearch import search

        search.FileRecorder = self._original  # type: ignore[misc]

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            begun = time.perf_counter()
            try:
                return method(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - begun

        return call


def share(model: str | None, repeats: int) -> dict[str, Any]:
    """Share of the recorder in searches of a Stable Diffusion network: a random one, or a model that is named."""
    import torch

    import tsdiff
    from tsdiff.policies import Beam

    if model is None:
        from throughput import TOKENS, WIDTH, LatentMean, build_pipeline

        made, source = build_pipeline(32), "a random UNet, 32 channels, latents (4, 16, 16)"
        embeds = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
        prompt: Any = tsdiff.Condition("a prompt", tensors={"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]})
        options: dict[str, Any] = {"model": made, "prompts": prompt, "verifier": LatentMean()}
    else:
        source, options = model, {"model": model, "prompts": "a red circle", "verifier": "luminance"}
    shares, stores, rows, walls = [], [], 0, []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder, Timed() as timed:
            begun = time.perf_counter()
            results = tsdiff.search(policy=Beam(), seed=[0], steps=20, guidance_scale=7.5, out=folder, **options)
            wall = time.perf_counter() - begun
        rows = results.engine.network_rows
        walls.append(wall)
        shares.append(timed.seconds / wall)
        stores.append(results.engine.seconds["store"] / wall)
    return {
        "model": source,
        "journal_share": round(statistics.median(shares), 4),
        "journal_share_range": [round(min(shares), 4), round(max(shares), 4)],
        "with_final_files": round(statistics.median(stores), 4),
        "seconds": round(statistics.median(walls), 2),
        "milliseconds_a_row": round(1e3 * statistics.median(walls) / rows, 2),
        "nodes": sum(len(result.tree.nodes) for result in results),
    }


def ratio(repeats: int) -> dict[str, Any]:
    """CPU time of searches of the analytic model, recorded over unrecorded."""
    import tsdiff
    from tsdiff.policies import Beam

    def seconds(folder: str | None, seeds: int) -> float:
        used = time.process_time()
        tsdiff.search("gaussian", PROMPT, policy=Beam(width=4, branch=16), seed=list(range(seeds)), baseline=False, steps=20, out=folder)
        return time.process_time() - used

    ratios = {}
    for seeds in (1, 8):
        plain, recorded = [], []
        for number in range(repeats + 1):
            with tempfile.TemporaryDirectory() as folder:
                pair = seconds(None, seeds), seconds(folder, seeds)
            if number:  # the first imports what the others find
                plain.append(pair[0])
                recorded.append(pair[1])
        ratios[f"{seeds} at once"] = round(statistics.median(recorded) / statistics.median(plain), 3)
    return {"recorded_over_unrecorded": ratios["8 at once"], "by_trees": ratios}


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description="Memory of large trees, and the cost of recording.")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--nodes", type=int, nargs=2, default=[1_000, 100_000], metavar=("FEW", "MANY"), help="sizes of the two trees")
    parser.add_argument("--policy", default="zero-order", help="zero-order (gives up nodes as it goes) or dts (may go on from any)")
    parser.add_argument("--keep", default="all", choices=["all", "path", "leaves", "none"], help="whose latents stay in the run's folder")
    parser.add_argument("--model", help="a model whose network does the work for journal_share; by default a random one is built")
    parser.add_argument("--repeats", type=int, default=5, help="searches of each kind for the cost of recording")
    parser.add_argument("--only", choices=["memory", "cost"], help="measure one of the two")
    parser.add_argument("--grow", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.grow is not None:
        print(json.dumps(grow(options.policy, options.grow, options.keep, options.out)))
        return
    report: dict[str, Any] = {"goals": GOALS, "machine": platform.platform(), "python": platform.python_version(), "load": os.getloadavg()}
    if options.only != "cost":
        few, many = (grown(options.policy, nodes, options.keep) for nodes in options.nodes)
        report |= {"rss_growth_mb": round(many["peak_rss_mb"] - few["peak_rss_mb"], 1), "policy": options.policy, "keep": options.keep, "few": few, "many": many}
    if options.only != "memory":
        cost = share(options.model, options.repeats)
        report |= {"journal_share": cost["journal_share"], "recording": cost | ratio(options.repeats)}
        report["recorded_over_unrecorded"] = report["recording"]["recorded_over_unrecorded"]
    print(json.dumps(report) if options.json else text(report))


def text(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"{report['machine']}, Python {report['python']}, load {report['load'][0]:.1f}"]
    if "few" in report:
        lines.append(f"peak memory grows by {report['rss_growth_mb']:.0f} MB (goal: below {GOALS['rss_growth_mb']:.0f}); {report['policy']}, --keep {report['keep']}")
        for one in (report["few"], report["many"]):
            lines.append(f"  {one['nodes']:>7,} nodes: {one['peak_rss_mb']:.0f} MB, {one['cpu_microseconds_a_node']:.0f} microseconds of CPU a node, files {one['disk_mb']} MB")
    if "recording" in report:
        one = report["recording"]
        low, high = one["journal_share_range"]
        lines.append(f"recording takes {one['journal_share']:.2%} of the time (runs {low:.2%} to {high:.2%}, goal: below {GOALS['journal_share']:.0%}); {one['model']}, {one['milliseconds_a_row']} ms a row")
        lines.append(f"  with the files at the end {one['with_final_files']:.2%}, {one['nodes']} nodes in {one['seconds']} s")
        lines.append(f"without a network, recorded over unrecorded CPU time: {', '.join(f'{name} {value:.2f}' for name, value in one['by_trees'].items())}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
