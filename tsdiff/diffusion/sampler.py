"""The latent arithmetic of a solver on a schedule, for rows at different levels in one call."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from tsdiff.diffusion.steps import STEPS, Batch, clean_estimate, derivative, forward_kernel
from tsdiff.diffusion.tables import Tables
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Row, StepState
from tsdiff.treesearch.schedule import SolverInfo

if TYPE_CHECKING:
    from collections.abc import Iterable

_PREDICTIONS = {"abar": ("epsilon", "v_prediction", "sample"), "flow": ("flow", "sample")}


class Network(Protocol):
    """What a sampler needs of a model."""

    prediction_type: str
    device: str

    def forward(self, latents: Tensor, timesteps: Tensor, rows: Sequence[Row]) -> Tensor:
        """Raw outputs (B, ...)."""
        ...


class TableSampler:
    """A `tsdiff.treesearch.protocols.Sampler` for any model.

    Latents are float32 (B, ...) whatever the network's dtype; raw outputs are converted on the way in. A row's result
    does not depend on the other rows, bit for bit. Inputs are never modified.

    A model with a transition of its own subclasses this and overrides `advance`; `columns` and `tables` are there for
    it. Everything else (drawing, re-noising, evaluating, guidance, estimates) does not depend on the solver.
    """

    def __init__(self, model: Network, tables: Tables, solver: SolverInfo) -> None:
        if solver.kind != tables.schedule.kind:
            raise UsageError(
                f"solver {solver.name!r} is of kind {solver.kind} but the schedule is of kind {tables.schedule.kind}; one tree has one kind"
            )
        fitting = _PREDICTIONS.get(tables.family, _PREDICTIONS["abar"])
        if model.prediction_type not in fitting:
            raise UsageError(
                f"a model that predicts {model.prediction_type!r} does not fit solver {solver.name!r}; it takes {', '.join(fitting)} predictions"
            )
        self.model = model
        self.tables = tables
        self.solver = solver
        self.schedule = tables.schedule
        self._cache: dict[Hashable, tuple[float, ...]] = {}

    # Coefficients

    def columns(
        self, name: str, make: Callable[..., tuple[float, ...]], keys: Iterable[tuple[int, ...]], like: Tensor
    ) -> tuple[Tensor, ...]:
        """Coefficients of every row as float32 columns (B, 1, ..., 1) on the device of `like`, by one copy.

        Args:
          name: of the coefficients, for the cache.
          make: from the integers of a key to the coefficients of a row.
          keys: one for each row.
        """
        rows = []
        for key in keys:
            values = self._cache.get((name, key))
            if values is None:
                values = self._cache[(name, key)] = make(*key)
            rows.append(values)
        table = torch.tensor(rows, dtype=torch.float32).t().contiguous().to(like.device)  # [coefficients, B]
        shape = (like.shape[0],) + (1,) * (like.dim() - 1)
        return tuple(column.view(shape) for column in table)

    def _scales(self, level: int) -> tuple[float, ...]:
        return self.tables.scales[level]

    def _source(self, level: int, arrived: int) -> tuple[float, float]:
        return self.schedule.arrival[level] if arrived else (self.schedule.alpha[level], self.schedule.sigma[level])

    # Noise

    def draw(self, noise: Tensor, origin: Tensor | None = None) -> Tensor:
        """Latents of level 0 (B, ...) from unit noise, or around the clean latents `origin` (image-to-image)."""
        if origin is None:
            return noise * self.schedule.init_noise_sigma
        return self.add_noise(origin, [0] * noise.shape[0], noise)

    def add_noise(self, x0: Tensor, levels: Sequence[int], noise: Tensor) -> Tensor:
        """alpha * x0 + sigma * noise at the nominal scales of `levels`."""
        alpha, sigma, _ = self.columns("scales", self._scales, [(level,) for level in levels], x0)
        return alpha * x0 + sigma * noise

    def renoise(
        self, latents: Tensor, arrived: Sequence[bool], levels: Sequence[int], to: Sequence[int], noise: Tensor
    ) -> Tensor:
        """The forward kernel from `levels` up to the noisier `to`; a jump to the own level changes nothing.

        Rows that `arrived` by a denoise step start from where it landed, the others from the nominal scales.

        Raises:
          UsageError: if a target is cleaner than its start.
        """

        def kernel(level: int, target: int, landed: int) -> tuple[float, float]:
            if target > level:
                raise UsageError(f"cannot re-noise from level {level} to level {target}: that is cleaner; denoise instead")
            if target == level:
                return 1.0, 0.0
            return forward_kernel(self._source(level, landed), self._source(target, False))

        keys = [(level, target, int(landed)) for level, target, landed in zip(levels, to, arrived, strict=True)]
        ratio, std = self.columns("renoise", kernel, keys, latents)
        return ratio * latents + std * noise

    def perturb(
        self, latents: Tensor, x0: Tensor, arrived: Sequence[bool], levels: Sequence[int], scale: Sequence[float], noise: Tensor
    ) -> Tensor:
        """Replace the share `scale` of each latent's noise, keeping its level: e' = sqrt(1 - scale^2) e + scale z.

        Args:
          x0: clean estimates (B, ...) of the latents.
          scale: in [0, 1], one for each row.

        Raises:
          UsageError: for a scale out of range, or a row without noise.
        """
        for level, share, landed in zip(levels, scale, arrived, strict=True):
            if not 0.0 <= share <= 1.0:
                raise UsageError(f"the scale of a perturbation is {share} but must lie in [0, 1]")
            if self._source(level, landed)[1] <= 0.0:
                raise UsageError(f"level {level} is clean and has no noise to perturb; perturb at a lower level")
        alpha, sigma = self.columns(
            "source", self._source, [(level, int(landed)) for level, landed in zip(levels, arrived, strict=True)], latents
        )
        kept, fresh = self._weights([math.sqrt(1.0 - share**2) for share in scale], scale, like=latents)
        e = (latents - alpha * x0) / sigma
        return alpha * x0 + sigma * (kept * e + fresh * noise)

    def _weights(self, *rows: Sequence[float], like: Tensor) -> tuple[Tensor, ...]:
        table = torch.tensor([list(row) for row in rows], dtype=torch.float32).to(like.device)
        return tuple(row.view((like.shape[0],) + (1,) * (like.dim() - 1)) for row in table)

    # Network

    def evaluate(self, latents: Tensor, levels: Sequence[int], rows: Sequence[Row]) -> Tensor:
        """One network call: raw outputs (B, ...). VE latents are divided by sqrt(sigma^2 + 1) first."""
        scaled = latents
        if self.tables.family == "ve":
            scaled = latents / self.columns("scales", self._scales, [(level,) for level in levels], latents)[2]
        # Float32 for integer timesteps too: time embeddings are computed in float32 and agree.
        timesteps = torch.tensor([self.schedule.timesteps[level] for level in levels], dtype=torch.float32).to(latents.device)
        return self.model.forward(scaled, timesteps, rows)

    def guide(self, cond: Tensor, uncond: Tensor, scale: Sequence[float], rescale: Sequence[float]) -> Tensor:
        """Classifier-free guidance uncond + scale * (cond - uncond), in float32 (Ho & Salimans 2022, arXiv 2207.12598).

        Rows with `rescale` above 0 get that share of the std-matching of Lin et al. 2023 (arXiv 2305.08891); the others
        are not touched by it.
        """
        cond, uncond = cond.float(), uncond.float()
        (factor,) = self._weights(scale, like=cond)
        guided = uncond + factor * (cond - uncond)
        for index, share in enumerate(rescale):
            if share > 0.0:
                # One row at a time and from fresh memory: the order of a sum must not depend on the batch.
                row, target = guided[index].clone(), cond[index].clone()
                guided[index] = share * (row * (target.std() / row.std())) + (1.0 - share) * row
        return guided

    def x0(self, latents: Tensor, levels: Sequence[int], output: Tensor) -> Tensor:
        """The clean estimate E[x0 | x] (B, ...) of raw outputs, clipped where the scheduler's config says so."""
        columns = self.columns("scales", self._scales, [(level,) for level in levels], latents)
        return self._estimate(latents, output.to(latents.dtype), columns)

    def _estimate(self, latents: Tensor, output: Tensor, scales: Sequence[Tensor]) -> Tensor:
        alpha, sigma, norm = scales
        x0 = clean_estimate(self.model.prediction_type, latents, output, alpha, sigma, norm, ve=self.tables.family == "ve")
        return x0 if self.tables.clip is None else x0.clamp(-self.tables.clip, self.tables.clip)

    # Steps

    def advance(
        self, state: StepState, stage: int, levels: Sequence[int], nexts: Sequence[int], output: Tensor, noise: Tensor | None
    ) -> StepState:
        """One stage of a step from `levels` to `nexts`; see `tsdiff.treesearch.protocols.Sampler`.

        A step to the next level lands on `schedule.arrival`, one over several levels on the grid. History: the clean
        estimate and its level for the dpm++ solvers; between Heun's stages the start and its derivative; else none. A
        history level of -1 says that a row carries none.
        """
        if self.solver.stochastic and noise is None:
            raise ValueError(f"solver {self.solver.name} is stochastic: advance needs noise")
        output = output.to(state.latents.dtype)
        if stage == 1:
            return self._correct(state, levels, nexts, output)
        step = STEPS[self.solver.name]
        multistep = self.solver.kind == "dpm"
        before = list(state.history_levels) if multistep and state.history else [-1] * len(levels)

        def coefficients(level: int, to: int, history: int) -> tuple[float, ...]:
            return (*self._scales(level), *step.coefficients(self.tables, self.solver, level, to, history))

        columns = self.columns("step", coefficients, zip(levels, nexts, before, strict=True), state.latents)
        x0 = self._estimate(state.latents, output, columns[:3])
        batch = Batch(
            x=state.latents,
            output=output,
            x0=x0,
            prediction=self.model.prediction_type,
            alpha=columns[0],
            sigma=columns[1],
            columns=columns[3:],
            noise=noise[0] if noise is not None and self.solver.stochastic else None,
            previous=state.history[0] if max(before) >= 0 else None,
        )
        latents = step.apply(batch)
        if multistep:
            return StepState(latents, (x0,), list(levels))
        if self.solver.stages == 2:
            unfinished = [level if self.schedule.sigma[to] > 0.0 else -1 for level, to in zip(levels, nexts, strict=True)]
            if max(unfinished) >= 0:
                return StepState(latents, (state.latents, derivative(state.latents, x0, columns[1])), unfinished)
        return StepState(latents)

    def _correct(self, state: StepState, levels: Sequence[int], nexts: Sequence[int], output: Tensor) -> StepState:
        """Heun's corrector: the mean of the derivatives at both ends."""
        start, slope = state.history

        def coefficients(level: int, to: int) -> tuple[float, ...]:
            return (*self._scales(to), *STEPS["heun"].coefficients(self.tables, self.solver, level, to, -1))

        columns = self.columns("correct", coefficients, zip(levels, nexts, strict=True), start)
        x0 = self._estimate(state.latents, output, columns[:3])
        mean = (slope + derivative(state.latents, x0, columns[1])) / 2
        return StepState(start + mean * columns[3])
