"""Samples of a diffusion model on their way in one batch, whatever their levels, as an engine would move them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tsdiff.treesearch.protocols import Encoded, StepState
from tsdiff.treesearch.schedule import Schedule, SolverInfo

GUIDANCE = {"off": (1.0, 0.0), "on": (5.0, 0.0), "rescaled": (5.0, 0.7)}
"""Name -> (scale, rescale)."""


@dataclass
class Track:
    """One sample on its way, as an engine would keep it."""

    latents: Tensor
    level: int = 0
    history: tuple[Tensor, ...] = ()
    history_level: int = -1


def tick(sampler: Any, tracks: list[Track], encoded: list[Encoded], noises: list[Tensor], scale: float, rescale: float) -> None:
    """One step of every track, all of them in one batch whatever their levels."""
    levels = [track.level for track in tracks]
    nexts = [level + 1 for level in levels]
    width = max(len(track.history) for track in tracks)
    blank = torch.zeros_like(tracks[0].latents)
    history = tuple(torch.cat([track.history[i] if track.history else blank for track in tracks]) for i in range(width))
    state = StepState(torch.cat([track.latents for track in tracks]), history, [track.history_level for track in tracks])

    def guided(latents: Tensor, at: list[int], which: list[int]) -> Tensor:
        cond = sampler.evaluate(latents, at, [encoded[i].rows[0] for i in which])
        if scale <= 1.0:
            return cond
        uncond = sampler.evaluate(latents, at, [encoded[i].rows[1] for i in which])
        return sampler.guide(cond, uncond, [scale] * len(at), [rescale] * len(at))

    everyone = list(range(len(tracks)))
    output = guided(state.latents, levels, everyone)
    noise = torch.stack([torch.cat(noises)]) if sampler.solver.stochastic else None
    state = sampler.advance(state, 0, levels, nexts, output, noise)
    latents = [state.latents[i : i + 1] for i in everyone]
    unfinished = [i for i in everyone if sampler.solver.stages == 2 and sampler.schedule.sigma[nexts[i]] > 0]
    if unfinished:
        part = StepState(state.latents[unfinished], tuple(h[unfinished] for h in state.history), [state.history_levels[i] for i in unfinished])
        at, to = [levels[i] for i in unfinished], [nexts[i] for i in unfinished]
        corrected = sampler.advance(part, 1, at, to, guided(part.latents, to, unfinished), None).latents
        for place, i in enumerate(unfinished):
            latents[i] = corrected[place : place + 1]
    for i, track in enumerate(tracks):
        track.latents, track.level = latents[i], nexts[i]
        if sampler.solver.stages == 1 and state.history:
            track.history, track.history_level = tuple(h[i : i + 1] for h in state.history), state.history_levels[i]


def sample(
    model: Any, schedule: Schedule, solver: SolverInfo, latents: Tensor, encoded: list[Encoded], noises: Tensor, guidance: str, stagger: int = 0
) -> Tensor:
    """Denoise latents (B, ...) in one batch; row i starts `i * stagger` ticks after row 0. `noises` is (T, B, ...)."""
    sampler = model.sampler(schedule, solver)
    tracks = [Track(row[None]) for row in latents]
    time = 0
    while any(track.level < schedule.last for track in tracks):
        rows = [i for i, track in enumerate(tracks) if time >= i * stagger and track.level < schedule.last]
        tick(
            sampler,
            [tracks[i] for i in rows],
            [encoded[i] for i in rows],
            [noises[tracks[i].level, i : i + 1] for i in rows],
            *GUIDANCE[guidance],
        )
        time += 1
    return torch.cat([track.latents for track in tracks])
