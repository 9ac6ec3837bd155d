"""Saved runs to fit values to: plain trajectories of the analytic world, every level of which is kept."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import tsdiff
from tsdiff.policies.best_of_n import BestOfN
from tsdiff.treesearch.protocols import Condition
from tsdiff.treesearch.requests import Denoise, Draw, Score


@dataclass(frozen=True, kw_only=True)
class Trajectories(BestOfN):
    """Best of n, with a node at every level on the way."""

    def search(self, tree):
        roots = yield Draw(self.n)
        last = tree.schedule.last
        yield Denoise(roots, to=last, via=tuple(range(1, last)))
        yield Score([node for node in tree.nodes if node.level == last])
        return tree.best()


def save_runs(folder, prompts=("near (3, 2.4)",), seeds=range(8), n=24, steps=6, model="gaussian", solver="exact", **options):
    """Search with `Trajectories` into a folder; returns the results."""
    options = {"verifier": "gaussian-target", "baseline": False} | options
    return tsdiff.search(model, list(prompts), policy=Trajectories(n=n), seed=list(seeds), steps=steps, solver=solver, out=folder, **options)


def candidates(trees, places, levels, *, x0, latents):
    """What a verifier is given of saved nodes."""
    return SimpleNamespace(
        x0=x0,
        latents=latents,
        levels=list(levels),
        schedules=[trees[place].schedule for place in places],
        conditions=[trees[place].condition for place in places],
    )


def synthetic(shape, count, prompts, score, *, seed=0, schedule=None):
    """Examples of random clean latents: `count` trees of 8 nodes each, scored by `score(latents, prompt)`."""
    import torch

    from tsdiff.treesearch.schedule import Schedule

    schedule = schedule or Schedule("ddim", "made", (1.0, 0.5), (0.1, 0.7, 1.0), (0.99, 0.7, 0.0), ((0.1, 0.99), (0.7, 0.7), (1.0, 0.0)), 1.0)
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn((count * 8, *shape), generator=generator)
    trees = [SimpleNamespace(condition=Condition(prompts[i % len(prompts)]), schedule=schedule, seed=i) for i in range(count)]
    places = [row // 8 for row in range(count * 8)]
    scores = [float(score(latents, trees[place].condition.prompt)) for latents, place in zip(inputs, places, strict=True)]
    return SimpleNamespace(
        inputs=inputs, trees=trees, places=places, levels=[1 + row % 2 for row in range(count * 8)], scores=scores,
        input="x0", target="mean", verifier="made", model="none", fingerprint="0",
    )  # fmt: skip
