"""The folder of a learned value: `value.json`, strict JSON, and `value.safetensors`. Read and written without torch.

    value.json          what the network is, what it was fitted to, and how well it ranks trees that it has not seen
    value.safetensors   its weights, float32

Nothing is pickled. Equal examples, options and seed give equal bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.schedule import Schedule

FORMAT = 1
CONFIG, WEIGHTS = "value.json", "value.safetensors"

Input: TypeAlias = Literal["x0", "latent"]
Target: TypeAlias = Literal["mean", "best"]

LOG_SNR_LIMIT = 15.0
"""Log-SNRs are clamped to plus or minus this: pure noise and clean samples have infinite ones."""


def clamped_log_snr(schedule: Schedule, level: int) -> float:
    """What the network is told of a level, comparable across solvers and numbers of steps."""
    return min(max(schedule.log_snr(level), -LOG_SNR_LIMIT), LOG_SNR_LIMIT)


@dataclass(frozen=True, kw_only=True)
class ValueConfig:
    """What a learned value is, and what it was fitted to.

    Attributes:
      input: what the network reads of a node: its clean estimate ("x0") or its latent at its own level ("latent").
      target: of the scores of the finished samples that came of a node, the "mean" or the "best".
      verifier: whose scores they were.
      model: the model's name in the runs.
      fingerprint: of its weights.
      latent_shape: of one latent.
      schedule_kind: "ddim", "euler", "dpm", "flow".
      levels: of each schedule seen (its key), the levels.
      log_snr: the noisiest and the cleanest level seen, as `clamped_log_snr`.
      trees: how many the network was fitted to.
      words: what of a prompt the network knows, see `tsdiff.verifiers.value_network.words_of`.
      width: channels, or units, of a layer.
      seed: of the fit.
      held_out: rank correlations on trees that the fit has not seen, by level.
      sha256: of the weights' file.
    """

    input: Input
    target: Target
    verifier: str
    model: str
    fingerprint: str
    latent_shape: tuple[int, ...]
    schedule_kind: str
    levels: dict[str, tuple[int, ...]]
    log_snr: tuple[float, ...]
    trees: int
    words: tuple[str, ...]
    width: int
    seed: int
    held_out: tuple[dict[str, Any], ...] = ()
    sha256: str = ""

    def to_json(self) -> dict[str, Any]:
        """Strict JSON."""
        return {"format": FORMAT, **dataclasses.asdict(self)}


def write_folder(folder: Path, config: ValueConfig, weights: bytes) -> ValueConfig:
    """Write both files, each whole or not at all, into a folder that is new or empty; returns the config with its digest.

    Raises:
      UsageError: if the folder holds anything, or cannot be written.
    """
    config = dataclasses.replace(config, sha256=hashlib.sha256(weights).hexdigest())
    text = json.dumps(config.to_json(), indent=1, allow_nan=False, ensure_ascii=False, sort_keys=True) + "\n"
    claim(folder)
    try:
        for name, data in ((WEIGHTS, weights), (CONFIG, text.encode())):
            part = folder / f"{name}.part"
            part.write_bytes(data)
            os.replace(part, folder / name)
    except OSError as error:
        raise UsageError(f"cannot write the value to {str(folder)!r} ({error.strerror}); choose another folder") from None
    return config


def claim(folder: Path) -> None:
    """Make the folder, if it is not there. Raises UsageError if it holds anything, or cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = any(folder.iterdir())
    except OSError as error:
        raise UsageError(f"cannot write the value to {str(folder)!r} ({error.strerror}); choose another folder") from None
    if taken:
        raise UsageError(f"the folder {str(folder)!r} is not empty; nothing is ever overwritten, choose a new one")


def read_config(folder: Path) -> ValueConfig:
    """The config of a folder, checked.

    Raises:
      UsageError: if the folder is not there, holds no learned value, or its config is damaged or of another format.
    """
    path = folder / CONFIG
    if not path.is_file() or not (folder / WEIGHTS).is_file():
        missing = CONFIG if not path.is_file() else WEIGHTS
        raise UsageError(f"value: {str(folder)!r} holds no learned value (there is no {missing}); give a folder that `tsdiff fit-value` wrote")
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"value: {str(path)!r} is not strict JSON ({error}); fit the value again") from None
    if not isinstance(data, dict):
        raise UsageError(f"value: {str(path)!r} holds no JSON object; fit the value again")
    if data.get("format") != FORMAT:
        raise UsageError(f"value: {str(path)!r} has format {data.get('format')!r}, but this tsdiff reads format {FORMAT}; fit the value again")
    hints = get_type_hints(ValueConfig)
    strangers = sorted(data.keys() - hints.keys() - {"format"})
    missing_keys = sorted(hints.keys() - data.keys())
    if strangers or missing_keys:
        raise UsageError(f"value: {str(path)!r} is damaged ({'unknown' if strangers else 'missing'}: {', '.join(strangers or missing_keys)}); fit the value again")
    try:
        config = ValueConfig(**{name: _typed(name, data[name], kind) for name, kind in hints.items()})
        if len(config.log_snr) != 2 or len(config.latent_shape) not in (1, 3) or min(config.latent_shape) < 1 or config.width < 1:
            raise ValueError("log_snr, latent_shape or width is out of range")
    except ValueError as error:
        raise UsageError(f"value: {str(path)!r} is damaged ({error}); fit the value again") from None
    return config


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not allowed")


def _typed(name: str, value: Any, kind: Any) -> Any:
    """A JSON value as the field's type. Raises ValueError if it is another."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal and value in args:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_typed(name, item, args[0]) for item in value)
    if origin is dict and isinstance(value, dict):
        return {key: item if args[1] is Any else _typed(name, item, args[1]) for key, item in value.items()}
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if kind in (int, str) and type(value) is kind:
        return value
    raise ValueError(f"{name} is {value!r:.60}")
