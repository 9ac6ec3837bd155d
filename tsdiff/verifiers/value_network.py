"""The network behind a learned value: a small convolutional one for latents (C, H, W), a perceptron for vectors (d,).

Level and prompt steer it by feature-wise modulation (FiLM: Perez et al. 2018, "FiLM: Visual Reasoning with a General
Conditioning Layer"). The prompt is a bag of words and pairs of neighbouring words known from the fit, whose embeddings are
learned with the rest, and the first numbers in it: no text encoder is needed. Shapes: B = rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from tsdiff.treesearch.protocols import Condition
from tsdiff.treesearch.schedule import Schedule
from tsdiff.verifiers.value_folder import LOG_SNR_LIMIT

NUMBERS = 4
"""Numbers of a prompt that the network is told, in their order."""

FREQUENCIES = 6
STAGES = 3
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


# Prompts -------------------------------------------------------------------------------------------------------------


def words_of(condition: Condition) -> list[str]:
    """Words and pairs of neighbouring words of a prompt in lower case, those of the negative prompt after a "-", the class after "class:"."""
    found = []
    for prefix, text in (("", condition.prompt), ("-", condition.negative_prompt)):
        words = re.findall(r"[^\W\d_]+", _NUMBER.sub(" ", text.lower()))
        found += [prefix + word for word in words]
        found += [f"{prefix}{left} {right}" for left, right in pairwise(words)]
    if condition.class_label is not None:
        found.append(f"class:{condition.class_label}")
    return found


def numbers_in(condition: Condition) -> list[float]:
    """The first numbers of a prompt, at most `NUMBERS`."""
    return [float(text) for text in _NUMBER.findall(condition.prompt)[:NUMBERS]]


def prompt_features(conditions: Sequence[Condition], words: Sequence[str]) -> Tensor:
    """(B, len(words) + 2 * NUMBERS): each known word that occurs over the root of their number, the numbers, whether they are there.

    A word that the fit has not seen says nothing.
    """
    place = {word: index for index, word in enumerate(words)}
    features = torch.zeros(len(conditions), len(words) + 2 * NUMBERS)
    for row, condition in enumerate(conditions):
        known = sorted({place[word] for word in words_of(condition) if word in place})
        if known:
            features[row, known] = len(known) ** -0.5
        for index, number in enumerate(numbers_in(condition)):
            features[row, len(words) + index] = max(min(number, 1e6), -1e6)
            features[row, len(words) + NUMBERS + index] = 1.0
    return features


# Latents and levels --------------------------------------------------------------------------------------------------


def unit_latents(latents: Tensor, schedules: Sequence[Schedule], levels: Sequence[int]) -> Tensor:
    """Latents (B, ...) over sqrt(alpha^2 + sigma^2) of their levels, so that those of VE are as large as those of VP."""
    scales = [math.hypot(schedule.alpha[level], schedule.sigma[level]) for schedule, level in zip(schedules, levels, strict=True)]
    return latents / latents.new_tensor(scales).view(-1, *[1] * (latents.dim() - 1))


def level_features(log_snr: Tensor) -> Tensor:
    """(B, 1 + 2 * FREQUENCIES) smooth functions of clamped log-SNRs (B,)."""
    share = log_snr.unsqueeze(1) / LOG_SNR_LIMIT
    angles = share * (math.pi / 2.0) * torch.arange(1, FREQUENCIES + 1, device=log_snr.device, dtype=log_snr.dtype)
    return torch.cat([share, angles.sin(), angles.cos()], dim=1)


# The network ---------------------------------------------------------------------------------------------------------


class ValueNetwork(nn.Module):
    """From a latent or clean estimate, its level and its prompt to the score that is to be expected.

    Args:
      latent_shape: (C, H, W) or (d,).
      num_words: how many words it knows.
      width: channels or units of a layer, a multiple of 8.

    Inputs, targets and the numbers of prompts are standardised inside, by buffers that the fit sets.
    """

    def __init__(self, latent_shape: Sequence[int], num_words: int, width: int) -> None:
        super().__init__()
        channels = latent_shape[0]
        shape = (channels, *[1] * (len(latent_shape) - 1))
        self.num_words = num_words
        self.register_buffer("input_mean", torch.zeros(shape))
        self.register_buffer("input_std", torch.ones(shape))
        self.register_buffer("number_mean", torch.zeros(NUMBERS))
        self.register_buffer("number_std", torch.ones(NUMBERS))
        self.register_buffer("score_mean", torch.zeros(()))
        self.register_buffer("score_std", torch.ones(()))
        self.words = nn.Linear(num_words, width, bias=False) if num_words else None
        self.steer = nn.Sequential(nn.Linear(width * bool(num_words) + 2 * NUMBERS + 1 + 2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.body: Convolutions | Perceptron = (Convolutions if len(latent_shape) == 3 else Perceptron)(latent_shape, width)
        self.head = nn.Sequential(nn.Linear(self.body.features + width, 2 * width), nn.SiLU(), nn.Linear(2 * width, 1))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.score_mean.device  # type: ignore[union-attr]

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights."""
        return self.score_mean.dtype  # type: ignore[union-attr]

    def forward(self, inputs: Tensor, log_snr: Tensor, prompts: Tensor) -> Tensor:
        """Scores (B,) of inputs (B, ...), clamped log-SNRs (B,) and `prompt_features` (B, ...)."""
        return self.standard(inputs, log_snr, prompts) * self.score_std + self.score_mean

    def standard(self, inputs: Tensor, log_snr: Tensor, prompts: Tensor) -> Tensor:
        """Standardised scores (B,), what the fit compares with standardised targets."""
        words, numbers, there = prompts.split([self.num_words, NUMBERS, NUMBERS], dim=1)
        numbers = there * (numbers - self.number_mean) / self.number_std
        known = [] if self.words is None else [self.words(words)]
        steer = self.steer(torch.cat([*known, numbers, there, level_features(log_snr)], dim=1))
        features = self.body((inputs - self.input_mean) / self.input_std, steer)
        standard: Tensor = self.head(torch.cat([features, steer], dim=1))
        return standard.squeeze(1)


class Modulation(nn.Module):
    """A gain and an offset for every channel, from what steers; the identity at first."""

    def __init__(self, steer: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(steer, 2 * channels)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor, steer: Tensor) -> Tensor:
        gain, offset = self.linear(steer).view(len(steer), 2, -1, *[1] * (hidden.dim() - 2)).unbind(1)
        return hidden * (1.0 + gain) + offset


class Perceptron(nn.Module):
    """Three layers of units, for vectors (d,). They see what steers from the start: products of both matter."""

    def __init__(self, latent_shape: Sequence[int], width: int) -> None:
        super().__init__()
        self.features = 2 * width
        sizes = [latent_shape[0] + width, *[self.features] * STAGES]
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(sizes))
        self.modulations = nn.ModuleList(Modulation(width, self.features) for _ in range(STAGES))

    def forward(self, inputs: Tensor, steer: Tensor) -> Tensor:
        hidden = torch.cat([inputs, steer], dim=1)
        for layer, modulation in zip(self.layers, self.modulations, strict=True):
            hidden = functional.silu(modulation(layer(hidden), steer))
        return hidden


class Convolutions(nn.Module):
    """Residual stages, each half the size of the one before while at least 8 pixels remain; then means of the quarters, and maxima.

    Two channels hold the place itself. They and the quarters let "left of" be learned.
    """

    def __init__(self, latent_shape: Sequence[int], width: int) -> None:
        super().__init__()
        channels, height, side = latent_shape
        places = torch.stack(torch.meshgrid(torch.linspace(-1.0, 1.0, height), torch.linspace(-1.0, 1.0, side), indexing="ij"))
        self.register_buffer("places", places, persistent=False)
        halvings = sum(min(height, side) >> stage >= 8 for stage in range(STAGES))
        self.quarters = 2 if min(height, side) > 1 else 1
        self.features = width * (self.quarters**2 + 1)
        self.stem = nn.Conv2d(channels + 2, width, 3, padding=1)
        self.shrink = nn.ModuleList(nn.Conv2d(width, width, 3, stride=2 if stage < halvings else 1, padding=1) for stage in range(STAGES))
        self.refine = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(STAGES))
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(STAGES))
        self.modulations = nn.ModuleList(Modulation(width, width) for _ in range(STAGES))

    def forward(self, inputs: Tensor, steer: Tensor) -> Tensor:
        hidden = self.stem(torch.cat([inputs, self.places.expand(len(inputs), -1, -1, -1)], dim=1))  # type: ignore[operator]
        for shrink, refine, norm, modulation in zip(self.shrink, self.refine, self.norms, self.modulations, strict=True):
            hidden = shrink(functional.silu(hidden))
            hidden = hidden + refine(functional.silu(modulation(norm(hidden), steer)))
        return torch.cat([functional.adaptive_avg_pool2d(hidden, self.quarters).flatten(1), hidden.amax((2, 3))], dim=1)
