"""A learned value: what score will the sample get that this node leads to? Fitted to saved trees by `tsdiff fit-value`."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.parameters import parameter
from tsdiff.treesearch.protocols import Candidates, Scores
from tsdiff.treesearch.registry import split_options
from tsdiff.verifiers.neural import Neural
from tsdiff.verifiers.value_folder import CONFIG, WEIGHTS, ValueConfig, clamped_log_snr, read_config

if TYPE_CHECKING:
    from collections.abc import Callable

    from tsdiff.verifiers.value_fit import Examples, Fit
    from tsdiff.verifiers.value_network import ValueNetwork

NOISIER = "its level is noisier than any that the value was fitted to"
NOT_FINITE = "its latent holds numbers that are not finite"
_TOLERANCE = 1e-3  # of log-SNRs


@dataclass(frozen=True, kw_only=True)
class Value(Neural):
    """The score that is to be expected of the sample that a node leads to, by a small network fitted to saved trees.

    `--verifier value:FOLDER`, with the folder that `tsdiff fit-value` has written. It reads the clean estimate (or the
    latent), the level and the prompt, and nothing is decoded: nodes are ranked early, for microseconds each. Such values
    replace the score of the clean estimate in particle methods, beams and trees (SVDD-MC: Li et al. 2024, arXiv
    2408.08252; on diffusion latents: Zhang et al. 2025, arXiv 2502.01051).

    A value belongs to the model, the shape of its latents and the kind of its schedule; another shape or kind is refused by
    name. Any prompt will do, but of a prompt only the words of the fit are known. A node that is noisier than every level of
    the fit has no value. The network answers for what it has seen: score the samples by the real verifier as well
    (`--verifier value:FOLDER --verifier NAME`), or search finds what the network likes.

    Raises:
      UsageError: for a folder that holds no learned value, or a damaged one.
    """

    path: str = parameter("", help="the folder that `tsdiff fit-value` wrote; value:FOLDER is short for value:path=FOLDER")

    def __post_init__(self) -> None:
        if not self.path:
            raise UsageError("value: the folder is missing; write value:FOLDER with a folder that `tsdiff fit-value` wrote")
        folder = Path(self.path).expanduser()
        config = self._state["config"] = read_config(folder)
        if not self.name:
            object.__setattr__(self, "name", f"value({re.sub('[:=,@ ]', '-', config.verifier)})")
        super().__post_init__()

    @classmethod
    def from_reference(cls, text: str) -> Value:
        """From what follows "value:": the folder alone, or path=FOLDER and other options."""
        known = [field.name for field in dataclasses.fields(cls) if field.init]
        if not any(text.startswith(f"{name}=") for name in known):
            return cls(path=text)
        from tsdiff.treesearch.parameters import build

        return build(cls, split_options(text))

    @staticmethod
    def fit(examples: Examples, *, progress: Callable[[int, int], None] | None = None, **options: Any) -> Fit:
        """Fit a value to examples, see `tsdiff.verifiers.value_fit.fit`."""
        from tsdiff.verifiers.value_fit import fit

        return fit(examples, progress=progress, **options)

    @property
    def config(self) -> ValueConfig:
        """What it is, and what it was fitted to."""
        config: ValueConfig = self._state["config"]
        return config

    @property
    def needs(self) -> frozenset[str]:
        """Latents and prompts; never images."""
        return frozenset({"x0" if self.config.input == "x0" else "latents", "levels", "conditions"})

    @property
    def files(self) -> tuple[Path, ...]:
        """Weights and config."""
        folder = Path(self.path).expanduser()
        return folder / WEIGHTS, folder / CONFIG

    def _find(self) -> None:
        """The config has been read already."""

    def _load(self) -> ValueNetwork:
        from tsdiff.verifiers.value_fit import load_network

        return load_network(self.files[0], self.config, self.dtype)

    def require_model(self, fingerprint: str, latent_shape: tuple[int, ...], schedule_kind: str) -> None:
        """Refuse a model that the value was not fitted to.

        Raises:
          UsageError: if the weights, the shape of latents or the kind of schedule are others.
        """
        config = self.config
        self._require("latents of shape", tuple(config.latent_shape), tuple(latent_shape))
        self._require("a schedule of kind", config.schedule_kind, schedule_kind)
        if fingerprint != config.fingerprint:
            raise UsageError(
                f"{self.name} was fitted to the model {config.model!r} ({config.fingerprint}), but this one has other weights ({fingerprint}); "
                "fit a value to runs of this model"
            )

    def _require(self, what: str, own: object, given: object) -> None:
        if own != given:
            raise UsageError(f"{self.name} was fitted to {what} {own}, but these are {given}; fit a value to runs of this model")

    def score(self, candidates: Candidates) -> Scores:
        """Values (B,) of nodes at any levels of any trees, differentiable in the clean estimates or latents.

        A row whose numbers are not finite, or that is noisier than the fit's levels, fails alone.

        Raises:
          UsageError: for latents of another shape, or a schedule of another kind.
        """
        import torch

        from tsdiff.verifiers.value_network import prompt_features, unit_latents

        network, config = self._network, self.config
        inputs = candidates.x0 if config.input == "x0" else candidates.latents
        self._require("latents of shape", tuple(config.latent_shape), tuple(inputs.shape[1:]))
        for schedule in candidates.schedules:
            self._require("a schedule of kind", config.schedule_kind, schedule.kind)
        snr = [clamped_log_snr(schedule, level) for schedule, level in zip(candidates.schedules, candidates.levels, strict=True)]
        inputs = inputs.to(network.device, network.dtype)
        if config.input == "latent":
            inputs = unit_latents(inputs, candidates.schedules, candidates.levels)
        finite = inputs.detach().isfinite().flatten(1).all(1)
        inputs = torch.where(finite.view(-1, *[1] * (inputs.dim() - 1)), inputs, torch.zeros_like(inputs))
        prompts = prompt_features(candidates.conditions, config.words).to(inputs)
        values = network(inputs, inputs.new_tensor(snr), prompts)
        reasons = {row: NOISIER for row, own in enumerate(snr) if own < config.log_snr[0] - _TOLERANCE}
        reasons |= {row: NOT_FINITE for row, fine in enumerate(finite.tolist()) if not fine}
        failed = torch.tensor([row in reasons for row in range(len(snr))], device=values.device)
        return Scores(values.masked_fill(failed, math.nan), reasons=reasons)
