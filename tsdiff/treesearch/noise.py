"""Noise: recipes instead of tensors, and the counter-based generator that makes them real.

A node never stores noise. It stores a *stream* (a 128-bit integer) or a *recipe*, and the numbers follow from them
alone: not from the batch, the order of work, the device or the process. Streams are derived by hashing:

    root i            H(seed, "draw", i)                      no prompt, policy or tree in it, so comparisons are paired
    denoise child 0   the parent's stream                     so 0 -> 20 equals 0 -> 10 -> 20
    denoise child j   H(stream, "denoise", level, j)
    renoise child j   H(stream, "renoise", from, to, j)

The numbers of a stream come from Philox-4x64-10 (Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy
as 1, 2, 3") and a Box-Muller transform in float64 on the CPU, rounded to float32 once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from tsdiff.treesearch.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[np.float32]

STREAM_BITS = 128


def derive(*parts: int | str) -> int:
    """Hash a path of integers and words to a 128-bit stream (BLAKE2b-128).

    Every part carries its type and length, so `derive(1, 23)` and `derive(12, 3)` differ, and so do 1 and "1".

    Raises:
      UsageError: if an integer is negative or needs more than 128 bits.
    """
    path: list[bytes] = []
    for part in parts:
        if isinstance(part, str):
            data = part.encode()
            path += (b"s", len(data).to_bytes(4, "little"), data)
        elif 0 <= part < 1 << STREAM_BITS:
            path += (b"i", part.to_bytes(STREAM_BITS // 8, "little"))
        else:
            raise UsageError(f"seed or stream {part} is out of range; allowed are integers from 0 to 2**128 - 1")
    return int.from_bytes(hashlib.blake2b(b"".join(path), digest_size=STREAM_BITS // 8).digest(), "little")


def philox_words(key: int, count: int) -> NDArray[np.uint64]:
    """The first `count` 64-bit words of Philox-4x64-10 under a 128-bit key, counter blocks 1, 2, 3, ...

    numpy increments its counter before the first block, hence block 1 comes first.
    """
    from numpy.random import Philox

    words: NDArray[np.uint64] = Philox(key=key, counter=0).random_raw(count)
    return words


def normals(key: int, count: int) -> NDArray[np.float32]:
    """`count` standard normal float32 numbers of a stream; a shorter draw is a prefix of a longer one.

    Each 64-bit word gives two uniforms u = (32-bit half + 1/2) / 2**32 and, by Box-Muller, two normals: the first from
    the cosine, the second from the sine. |z| is at most 6.77.
    """
    import numpy as np

    words = philox_words(key, (count + 1) // 2)
    radius = np.sqrt(-2.0 * np.log(((words >> np.uint64(32)) + 0.5) * 2.0**-32))
    angle = ((words & np.uint64(0xFFFFFFFF)) + 0.5) * (2.0 * math.pi * 2.0**-32)
    pairs = np.empty((len(words), 2), dtype=np.float32)
    pairs[:, 0] = radius * np.cos(angle)
    pairs[:, 1] = radius * np.sin(angle)
    flat: NDArray[np.float32] = pairs.reshape(-1)[:count]
    return flat


def generator(key: int) -> np.random.Generator:
    """A numpy generator for a policy's own decisions (never for latents), keyed by a stream."""
    from numpy.random import Generator, Philox

    return Generator(Philox(key=key))


# Recipes: what the unit-variance noise of a root (or of one denoise step) is made of. ------------------------------
# Recipes do not nest, but roots chain: `base`, `a`, `b` and the keys of `weights` name any earlier root, whatever its own
# recipe, and stand for its realised noise, which is always kept. So a neighbour can have neighbours of its own.


@dataclass(frozen=True, slots=True)
class Fresh:
    """Noise number `index` of the seed: the i-th first noise, the same for every prompt and policy.

    On `Denoise` it selects the `index`-th branch of the node (0 keeps the parent's stream).
    """

    index: int


@dataclass(frozen=True, slots=True)
class Rotate:
    """A spherical neighbour of root `base`'s noise: the same norm, at an angle with the given cosine.

    y = |n| (cosine * n/|n| + sqrt(1 - cosine^2) * w), w a random unit vector orthogonal to n, number `index`.
    Source: zero-order search of Ma et al. 2025 (arXiv 2501.09732), whose released neighbourhood has cosine 0.95.
    """

    base: int
    cosine: float
    index: int

    def __post_init__(self) -> None:
        if not -1.0 <= self.cosine <= 1.0:
            raise UsageError(f"Rotate: cosine is {self.cosine} but must lie in [-1, 1]")


@dataclass(frozen=True, slots=True)
class Mix:
    """A weighted sum of roots' noises, plus `fresh = (index, weight)` new noise; squared weights add up to 1.

    Unit squared weights keep the N(0, I) law of independent noises exactly (the pCN move: sqrt(1 - b^2) n + b xi).
    """

    weights: tuple[tuple[int, float], ...]
    fresh: tuple[int, float] | None = None

    def __init__(self, weights: Mapping[int, float] | Sequence[tuple[int, float]], fresh: tuple[int, float] | None = None) -> None:
        pairs = weights.items() if isinstance(weights, Mapping) else weights
        object.__setattr__(self, "weights", tuple((int(i), float(w)) for i, w in pairs))
        object.__setattr__(self, "fresh", None if fresh is None else (int(fresh[0]), float(fresh[1])))
        total = sum(w * w for _, w in self.weights) + (self.fresh[1] ** 2 if self.fresh else 0.0)
        if not abs(total - 1.0) < 1e-6:
            raise UsageError(f"Mix: the squared weights add up to {total:g} but must add up to 1 (to stay N(0, I))")


@dataclass(frozen=True, slots=True)
class Slerp:
    """Spherical interpolation between the noises of roots `a` (t = 0) and `b` (t = 1); norms interpolate linearly."""

    a: int
    b: int
    t: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.t <= 1.0:
            raise UsageError(f"Slerp: t is {self.t} but must lie in [0, 1]")


@dataclass(frozen=True, slots=True)
class Given:
    """Noise that the caller handed over as `latents=`, named by the sha256 of its float32 bytes."""

    sha256: str


@dataclass(frozen=True, slots=True)
class Torch:
    """`torch.randn` under `torch.Generator().manual_seed(seed)`: what a diffusers pipeline draws. Root 0 only."""

    seed: int


Recipe: TypeAlias = Fresh | Rotate | Mix | Slerp | Given | Torch
_KINDS: dict[str, Any] = {kind.__name__.lower(): kind for kind in (Fresh, Rotate, Mix, Slerp, Given, Torch)}


def recipe_to_json(recipe: Recipe) -> dict[str, Any]:
    """A recipe as strict JSON; `recipe_from_json` turns it back into an equal recipe."""
    fields = {name: getattr(recipe, name) for name in recipe.__dataclass_fields__}
    return {"kind": type(recipe).__name__.lower()} | {
        name: [list(v) if isinstance(v, tuple) else v for v in value] if isinstance(value, tuple) else value
        for name, value in fields.items()
    }


def recipe_from_json(data: Mapping[str, Any]) -> Recipe:
    """The inverse of `recipe_to_json`."""
    fields = {name: value for name, value in data.items() if name != "kind"}
    recipe: Recipe = _KINDS[data["kind"]](**fields)
    return recipe


def roots_of(recipe: Recipe) -> tuple[int, ...]:
    """The indices of the roots whose noise a recipe is made of."""
    if isinstance(recipe, Rotate):
        return (recipe.base,)
    if isinstance(recipe, Mix):
        return tuple(index for index, _ in recipe.weights)
    if isinstance(recipe, Slerp):
        return (recipe.a, recipe.b)
    return ()


def realize(recipe: Recipe, *, seed: int, shape: Sequence[int], roots: Mapping[int, Array], given: Array | None = None) -> Array:
    """Make the unit-variance noise of a recipe.

    Geometry (norms, angles) is done in float64 and rounded to float32 once.

    Args:
      recipe: what to make.
      seed: the run's seed.
      shape: shape of one latent, without batch axis.
      roots: realised noises, of `shape`, of every root in `roots_of(recipe)`.
      given: the caller's noise, for `Given`.

    Returns:
      float32 array of `shape`.
    """
    import numpy as np

    count = math.prod(shape)

    def fresh(*path: int | str) -> NDArray[np.float64]:
        return normals(derive(*path), count).astype(np.float64).reshape(shape)

    if isinstance(recipe, Fresh):
        return initial_noise(derive(seed, "draw", recipe.index), shape)
    if isinstance(recipe, Given):
        assert given is not None, "a Given recipe needs the caller's latents"
        return given
    if isinstance(recipe, Torch):
        import torch

        noise: Array = torch.randn((1, *shape), generator=torch.Generator().manual_seed(recipe.seed))[0].numpy()
        return noise
    if isinstance(recipe, Rotate):
        base = roots[recipe.base].astype(np.float64)
        direction = fresh(seed, "direction", recipe.index)
        norm = float(np.linalg.norm(base))
        unit = base / norm
        direction -= unit * float(np.sum(unit * direction))
        direction /= float(np.linalg.norm(direction))
        result = norm * (recipe.cosine * unit + math.sqrt(1.0 - recipe.cosine**2) * direction)
    elif isinstance(recipe, Mix):
        result = np.zeros(tuple(shape), dtype=np.float64)
        for index, weight in recipe.weights:
            result += weight * roots[index]
        if recipe.fresh is not None:
            result += recipe.fresh[1] * fresh(seed, "direction", recipe.fresh[0])
    else:
        result = _slerp(roots[recipe.a].astype(np.float64), roots[recipe.b].astype(np.float64), recipe.t)
    rounded: Array = result.astype(np.float32)
    return rounded


def _slerp(a: NDArray[np.float64], b: NDArray[np.float64], t: float) -> NDArray[np.float64]:
    import numpy as np

    norm_a, norm_b = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    cosine = max(-1.0, min(1.0, float(np.sum(a * b)) / (norm_a * norm_b)))
    angle = math.acos(cosine)
    norm = (1.0 - t) * norm_a + t * norm_b
    if math.sin(angle) < 1e-6:  # parallel (or opposite): the great circle is not determined by the two points
        blended: NDArray[np.float64] = (1.0 - t) * a + t * b
        return blended
    unit: NDArray[np.float64] = (
        math.sin((1.0 - t) * angle) / math.sin(angle) * (a / norm_a) + math.sin(t * angle) / math.sin(angle) * (b / norm_b)
    )
    return norm * unit


def initial_noise(stream: int, shape: Sequence[int]) -> Array:
    """The first noise of a root with this stream, float32 of `shape`."""
    return normals(derive(stream, "initial"), math.prod(shape)).reshape(shape)


def step_noise(stream: int, level: int, shape: Sequence[int], num_noise: int = 1) -> Array:
    """The noise that lands on `level` while denoising: float32 of shape (num_noise, *shape)."""
    return normals(derive(stream, "step", level), num_noise * math.prod(shape)).reshape(num_noise, *shape)


def move_noise(stream: int, shape: Sequence[int]) -> Array:
    """The noise of the renoise, perturb or start move that made the node with this stream, float32 of `shape`."""
    return normals(derive(stream, "move"), math.prod(shape)).reshape(shape)
