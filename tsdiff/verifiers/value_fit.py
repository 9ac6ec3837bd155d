"""Fitting a learned value: seeded, on some trees, stopped by others, and judged on trees that it has never seen."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Condition
from tsdiff.treesearch.schedule import Schedule
from tsdiff.verifiers.value_folder import Input, Target, ValueConfig, clamped_log_snr, write_folder
from tsdiff.verifiers.value_network import NUMBERS, ValueNetwork, prompt_features, unit_latents, words_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_WORDS = 4096
HELD_OUT_SHARE, STOP_SHARE = 0.2, 0.15
CHECK_EVERY, PATIENCE = 50, 10
BATCH, LEARNING_RATE, WEIGHT_DECAY = 256, 2e-3, 1e-2
LEAST_FOR_RANKS = 3  # examples of a prompt at a level
LEAST_TO_STOP = 4  # groups of trees; with fewer, all that are not held out are fitted to, for all the steps


class TreeFacts(Protocol):
    """What is known of a tree beside its nodes."""

    @property
    def condition(self) -> Condition: ...
    @property
    def schedule(self) -> Schedule: ...
    @property
    def seed(self) -> int: ...


class Examples(Protocol):
    """N nodes and what became of them.

    Attributes:
      inputs: (N, ...) float32, clean estimates or latents as `input` says.
      trees: the trees they are from.
      places: of each node, the index of its tree.
      levels: of each node.
      scores: of each node, the mean or best score of the finished samples that came of it.
      input, target, verifier, model, fingerprint: as in `ValueConfig`.
    """

    inputs: Tensor
    trees: Sequence[TreeFacts]
    places: Sequence[int]
    levels: Sequence[int]
    scores: Sequence[float]
    input: Input
    target: Target
    verifier: str
    model: str
    fingerprint: str


@dataclass(frozen=True)
class Fit:
    """A fitted value.

    Attributes:
      network: on the device of the fit.
      config: what it is; `config.held_out` has the rank correlations.
      split: by what trees were held out: "prompt" or "tree".
      counts: trees in each part: "fitted", "stopping", "held_out".
      steps: at which the network was best.
    """

    network: ValueNetwork
    config: ValueConfig
    split: str
    counts: dict[str, int]
    steps: int

    def write(self, folder: Path) -> ValueConfig:
        """Write it into a new or empty folder. Raises UsageError."""
        state = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in self.network.state_dict().items()}
        return write_folder(folder, self.config, save(state))


def fit(
    examples: Examples, *, steps: int = 2000, seed: int = 0, width: int = 64, device: str = "cpu", progress: Callable[[int, int], None] | None = None
) -> Fit:
    """Fit a network to examples.

    A fifth of the prompts (of the trees, where there are fewer than 5 prompts) is held out, and no node of theirs is seen
    before the end. Among the others a few decide when to stop. Scores are standardised; the loss is Huber's; AdamW
    (Loshchilov & Hutter 2019, arXiv 1711.05101) with a cosine schedule.

    Args:
      steps: of the optimiser, at most.
      seed: of the split, the first weights and the batches; equal seeds give equal bytes on one machine.
      width: channels or units of a layer, a multiple of 8.
      progress: called with the steps done and `steps`.

    Raises:
      UsageError: for examples of fewer than two trees, numbers that are not finite, or scores that are all the same.
    """
    if width < 8 or width % 8:
        raise UsageError(f"width is {width} but must be a multiple of 8, at least 8")
    _check(examples)
    split, parts = _split(examples, seed)
    fitted = parts["fitted"]
    config = _config(examples, fitted, seed, width)
    inputs = examples.inputs.float()
    schedules = [examples.trees[place].schedule for place in examples.places]
    if examples.input == "latent":
        inputs = unit_latents(inputs, schedules, examples.levels)
    snr = torch.tensor([clamped_log_snr(schedule, level) for schedule, level in zip(schedules, examples.levels, strict=True)])
    table = prompt_features([tree.condition for tree in examples.trees], config.words)  # one row a tree: nodes share them
    places, scores = torch.tensor(list(examples.places)), torch.tensor(list(examples.scores), dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ValueNetwork(config.latent_shape, len(config.words), width)
    _standardise(network, inputs[fitted], table[places[fitted]], scores[fitted])
    network.to(device)

    def predict(rows: Tensor) -> Tensor:
        return network.standard(inputs[rows].to(device), snr[rows].to(device), table[places[rows]].to(device))

    targets = ((scores - network.score_mean.cpu().double()) / network.score_std.cpu().double()).float()
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        best = _train(network, predict, targets, fitted, parts["stopping"], steps, seed, progress)
        held_out = _judge(examples, parts["held_out"], lambda rows: _all(predict, rows), scores, snr)
    network.eval()
    counts = {name: len({examples.places[row] for row in rows.tolist()}) for name, rows in parts.items()}
    return Fit(network, replace(config, held_out=held_out), split, counts, best)


def load_network(path: Path, config: ValueConfig, dtype: str = "float32") -> ValueNetwork:
    """The network of a folder's weights, on the CPU.

    Raises:
      UsageError: if the file cannot be read, is damaged or is not the one that the config belongs to.
    """
    import hashlib

    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"value: {str(path)!r} cannot be read ({error.strerror}); check its rights, or fit the value again") from None
    if hashlib.sha256(data).hexdigest() != config.sha256:
        raise UsageError(f"value: {str(path)!r} is damaged, or belongs to another value (its SHA-256 is not the one that {path.with_suffix('.json').name} names); fit the value again")
    network = ValueNetwork(config.latent_shape, len(config.words), config.width)
    try:
        network.load_state_dict(load(data))
    except (SafetensorError, RuntimeError) as error:
        raise UsageError(f"value: the weights {str(path)!r} are not those of this network ({' '.join(str(error).split())[:200]}); fit the value again") from None
    return network.eval().requires_grad_(False).to(getattr(torch, dtype))


# Parts ---------------------------------------------------------------------------------------------------------------


def _check(examples: Examples) -> None:
    seen = sorted(set(examples.places))
    if not seen:
        raise UsageError("no node has a finished descendant with a score, so there is nothing to fit a value to")
    if len(seen) < 2:
        raise UsageError("only one tree has scored samples, so that none could be held out; search more prompts or seeds")
    for row, fine in enumerate(examples.inputs.isfinite().flatten(1).all(1).tolist()):
        if not fine:
            raise UsageError(f"a node of tree {examples.places[row]} at level {examples.levels[row]} holds numbers that are not finite; leave that run out")
    if not np.isfinite(np.asarray(examples.scores, dtype=float)).all():
        raise UsageError("a score is not finite; leave that run out")
    if len(set(examples.scores)) == 1:
        raise UsageError(f"all scores under {examples.verifier} are {examples.scores[0]:g}, so there is nothing to learn; search with another verifier")


def prompt_key(condition: Condition) -> tuple[Hashable, ...]:
    """What makes two trees trees of one prompt."""
    return condition.prompt, condition.negative_prompt, condition.class_label


def _split(examples: Examples, seed: int) -> tuple[str, dict[str, Tensor]]:
    """By what is split, and the rows of each part. Trees of one prompt and seed share their noise, and stay together."""
    used = sorted(set(examples.places))
    by_prompt = {place: prompt_key(examples.trees[place].condition) for place in used}
    prompts = len(set(by_prompt.values())) >= 5
    keys: dict[int, tuple[Hashable, ...]] = by_prompt if prompts else {place: (*key, examples.trees[place].seed) for place, key in by_prompt.items()}
    groups = list(dict.fromkeys(keys[place] for place in used))
    if len(groups) < 2:
        raise UsageError("all trees are of one prompt and one seed, so that none could be held out; search more prompts or seeds")
    order = [groups[index] for index in np.random.default_rng(seed).permutation(len(groups))]
    held = max(1, round(HELD_OUT_SHARE * len(order)))
    stop = max(1, round(STOP_SHARE * len(order))) if len(order) >= LEAST_TO_STOP else 0
    part = {key: "held_out" if index < held else "stopping" if index < held + stop else "fitted" for index, key in enumerate(order)}
    rows = {name: [row for row, place in enumerate(examples.places) if part[keys[place]] == name] for name in ("fitted", "stopping", "held_out")}
    return "prompt" if prompts else "tree", {name: torch.tensor(own, dtype=torch.long) for name, own in rows.items()}


def _config(examples: Examples, fitted: Tensor, seed: int, width: int) -> ValueConfig:
    places = sorted({examples.places[row] for row in fitted.tolist()})
    kinds = sorted({tree.schedule.kind for tree in examples.trees})
    if len(kinds) > 1:
        raise UsageError(f"the runs have schedules of the kinds {' and '.join(kinds)}; fit one value to each")
    levels: dict[str, set[int]] = {}
    snr = []
    for row in fitted.tolist():
        schedule, level = examples.trees[examples.places[row]].schedule, examples.levels[row]
        levels.setdefault(schedule.key, set()).add(level)
        snr.append(clamped_log_snr(schedule, level))
    counted = Counter(word for place in places for word in set(words_of(examples.trees[place].condition)))
    common = sorted((word for word, count in counted.items() if count > 1), key=lambda word: (-counted[word], word))[:MOST_WORDS]
    return ValueConfig(
        input=examples.input,
        target=examples.target,
        verifier=examples.verifier,
        model=examples.model,
        fingerprint=examples.fingerprint,
        latent_shape=tuple(examples.inputs.shape[1:]),
        schedule_kind=kinds[0],
        levels={key: tuple(sorted(own)) for key, own in sorted(levels.items())},
        log_snr=(min(snr), max(snr)),
        trees=len(places),
        words=tuple(sorted(common)),
        width=width,
        seed=seed,
    )


def _standardise(network: ValueNetwork, inputs: Tensor, prompts: Tensor, scores: Tensor) -> None:
    """Set the network's buffers: per channel, per number of the prompt, and of the scores."""

    def spread(values: Tensor, dims: int | tuple[int, ...]) -> Tensor:
        std = values.double().std(dims, correction=0)
        return torch.where(std > 1e-6, std, torch.ones_like(std)).float()

    shape = network.input_mean.shape  # type: ignore[union-attr]
    dims = (0, *range(2, inputs.dim()))
    network.input_mean = inputs.double().mean(dims).float().view(shape)
    network.input_std = spread(inputs, dims).view(shape)
    numbers, there = prompts[:, -2 * NUMBERS : -NUMBERS].double(), prompts[:, -NUMBERS:].double()
    count = there.sum(0).clamp(min=1.0)
    network.number_mean = (numbers.sum(0) / count).float()
    variance = (there * (numbers - network.number_mean.double()) ** 2).sum(0) / count
    network.number_std = torch.where(variance > 1e-12, variance.sqrt(), torch.ones_like(variance)).float()
    network.score_mean = scores.mean().float()
    network.score_std = spread(scores, 0)


# The fit itself ------------------------------------------------------------------------------------------------------


def _train(
    network: ValueNetwork,
    predict: Callable[[Tensor], Tensor],
    targets: Tensor,
    fitted: Tensor,
    stopping: Tensor,
    steps: int,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> int:
    """Train in place, back to the best weights at the end; returns the step that made them."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    loss = nn.HuberLoss()
    best: tuple[float, int, dict[str, Any]] | None = None
    for step in range(1, steps + 1):
        rows = fitted[torch.randint(len(fitted), (min(BATCH, len(fitted)),), generator=generator)]
        optimizer.zero_grad()
        predicted = predict(rows)
        loss(predicted, targets[rows].to(predicted.device)).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step, steps)
        if len(stopping) and (step % CHECK_EVERY == 0 or step == steps):
            current = float(loss(_all(predict, stopping), targets[stopping]))
            if best is None or current < best[0]:
                best = current, step, copy.deepcopy(network.state_dict())
            elif step - best[1] >= PATIENCE * CHECK_EVERY:
                break
    if best is None:
        return steps
    network.load_state_dict(best[2])
    return best[1]


@torch.no_grad()
def _all(predict: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Predictions of any number of rows, on the CPU."""
    return torch.cat([predict(part).cpu() for part in rows.split(4 * BATCH)])


# Rank correlations ---------------------------------------------------------------------------------------------------


def spearman(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties sharing their mean rank; None where one side is constant or shorter than 2."""
    from scipy.stats import rankdata

    if len(left) < 2 or len(set(left)) == 1 or len(set(right)) == 1:
        return None
    ranks: NDArray[np.float64] = np.corrcoef(rankdata(left), rankdata(right))
    return float(np.clip(ranks[0, 1], -1.0, 1.0))


def _judge(examples: Examples, rows: Tensor, predict: Callable[[Tensor], Tensor], scores: Tensor, snr: Tensor) -> tuple[dict[str, Any], ...]:
    """Rank correlations with the true scores at every level of every schedule: within prompts, averaged, and over all nodes."""
    values = dict(zip(rows.tolist(), predict(rows).tolist(), strict=True))
    at: dict[tuple[int, str, int], list[int]] = {}
    for row in values:
        schedule, level = examples.trees[examples.places[row]].schedule, examples.levels[row]
        at.setdefault((schedule.last, schedule.key, level), []).append(row)
    table = []
    for (last, key, level), own in sorted(at.items()):
        prompts: dict[tuple[Hashable, ...], list[int]] = {}
        for row in own:
            prompts.setdefault(prompt_key(examples.trees[examples.places[row]].condition), []).append(row)
        within = [_ranks(values, scores, group) for group in prompts.values() if len(group) >= LEAST_FOR_RANKS]
        known = [one for one in within if one is not None]
        table.append(
            {
                "level": level,
                "of": last,
                "schedule": key,
                "log_snr": round(float(snr[own[0]]), 6),
                "nodes": len(own),
                "prompts": len(known),
                "within": None if not known else float(np.mean(known)),
                "pooled": _ranks(values, scores, own),
            }
        )
    return tuple(table)


def _ranks(values: dict[int, float], scores: Tensor, rows: Sequence[int]) -> float | None:
    return spearman([values[row] for row in rows], scores[list(rows)].tolist())
