"""What conformance runs on: the analytic model, its network under observation, and global random states held still."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal
from unittest import mock

from tsdiff.treesearch.protocols import LoadOptions, Row
from tsdiff.treesearch.registry import models

if TYPE_CHECKING:
    from torch import Tensor


def gaussian(process: Literal["vp", "ve", "flow"]) -> Any:
    """The analytic model with variance-preserving, variance-exploding or flow levels."""
    return models.load("gaussian")(f"gaussian:process={process}", LoadOptions())


def wide_gaussian(process: Literal["vp", "ve", "flow"]) -> Any:
    """The analytic model of a law in eight dimensions, where different directions differ (a plane has too few of them)."""
    model = gaussian(process)
    mixture = type(model.mixture)([0.5, 0.5], [(1.0,) * 8, (-1.0, 1.0) * 4], [0.3, 0.5])
    return type(model)(mixture, process)


@contextmanager
def global_seeds(seed: int) -> Iterator[None]:
    """The global generators of python, numpy and torch seeded within, and as they were afterwards."""
    import numpy as np
    import torch

    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - it is the global one that is held
    seed_globally(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


def seed_globally(seed: int) -> None:
    """Put the global generators of python, numpy and torch into a known state."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)


def global_states() -> dict[str, str]:
    """Fingerprints of the global generators."""
    import numpy as np
    import torch

    _, words, place, *rest = np.random.get_state()  # noqa: NPY002
    numpys = words.tobytes() + repr((place, rest)).encode()
    states = {"random": repr(random.getstate()).encode(), "numpy.random": numpys, "torch": _bytes(torch.get_rng_state())}
    return {name: hashlib.sha256(state).hexdigest() for name, state in states.items()}


@dataclass
class Network:
    """What a model's network was asked to evaluate.

    Attributes:
      seen: how often each row was asked for, by latent, timestep and conditioning.
      fail: share of the latents, chosen by their bytes, whose output is not a number.
      salt: chooses other ones.
    """

    seen: Counter[bytes] = field(default_factory=Counter)
    fail: float = 0.0
    salt: int = 0

    @property
    def rows(self) -> int:
        """Rows evaluated."""
        return sum(self.seen.values())

    @property
    def repeated(self) -> int:
        """Rows evaluated that were known already."""
        return self.rows - len(self.seen)

    def forward(self, latents: Tensor, timesteps: Tensor, rows: Sequence[Row], outputs: Tensor) -> Tensor:
        """Note a call, and spoil its outputs."""
        outputs = outputs.clone()
        for place, (latent, timestep, row) in enumerate(zip(latents, timesteps, rows, strict=True)):
            parts = [latent, timestep, *(row[name] for name in sorted(row))]
            self.seen[b"".join(_bytes(part) for part in parts)] += 1
            digest = hashlib.sha256(_bytes(latent) + bytes([self.salt])).digest()
            if int.from_bytes(digest[:4], "little") < self.fail * (1 << 32):
                outputs[place] = float("nan")
        return outputs


@contextmanager
def observed(model: Any, fail: float = 0.0, salt: int = 0) -> Iterator[Network]:
    """Observe the network of every model of a class, whoever calls it."""
    network = Network(fail=fail, salt=salt)
    original = type(model).forward

    def forward(self: Any, latents: Tensor, timesteps: Tensor, rows: Sequence[Row]) -> Tensor:
        return network.forward(latents, timesteps, rows, original(self, latents, timesteps, rows))

    with mock.patch.object(type(model), "forward", forward):
        yield network


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()
