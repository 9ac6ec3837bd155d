"""Fit the checker's network on drawings, and write it where the package reads it.

    python -m tsdiff.worlds.shapes.fit_checker [--pictures 20000] [--seed 20260]

About two minutes on one core; the same seed, library versions and thread count give the same file. Nothing but drawings
is ever used: a checker tuned on what models generate would judge them by themselves.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tsdiff.treesearch.noise import derive, generator
from tsdiff.worlds.shapes.checker import CLASSES, WEIGHTS_FILE, Network, regions
from tsdiff.worlds.shapes.facts import Group
from tsdiff.worlds.shapes.geometry import COLORS, SHAPES
from tsdiff.worlds.shapes.grammar import Prompt
from tsdiff.worlds.shapes.render import render
from tsdiff.worlds.shapes.scenes import draw_scene
from tsdiff.worlds.shapes.spoil import malformed, spoil

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray

HIDDEN = 64
WORST, BEST = 27.0, 40.0
"""Range of the PSNR of spoilt pictures, in decibel."""


def examples(pictures: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Features (n, f) and classes (n,) of the regions of drawn pictures.

    One picture in six is a malformed figure; of all, one third stays clean and the others are spoilt. Regions that do
    not match exactly one thing (merged by blur, or specks) are left out.
    """
    features, classes = [], []
    for index in range(pictures):
        rng = generator(derive(seed, "fit checker", index))
        if rng.random() < 1 / 6:
            found = regions(_perhaps_spoilt(malformed(rng), rng))
            if len(found) == 1:
                features.append(found[0].features)
                classes.append(CLASSES.index(None))
            continue
        scene = draw_scene(_any_things(rng), rng, held_out=True)
        for region in regions(_perhaps_spoilt(render(scene), rng)):
            near = [thing for thing in scene.things if np.hypot(thing.x - region.x, thing.y - region.y) < 2.0]
            if len(near) == 1:
                features.append(region.features)
                classes.append(CLASSES.index(near[0].shape))
        if sys.stderr.isatty() and index % 500 == 0:
            print(f"\r{index}/{pictures} pictures", end="", file=sys.stderr)
    return np.stack(features), np.array(classes)


def _any_things(rng: Generator) -> Prompt:
    """1 to 5 things of any shapes and colours."""
    count = int(rng.integers(1, 6))
    return Prompt(tuple(Group(SHAPES[int(rng.integers(len(SHAPES)))], COLORS[int(rng.integers(len(COLORS)))]) for _ in range(count)))


def _perhaps_spoilt(image: NDArray[np.float32], rng: Generator) -> NDArray[np.float32]:
    return image if rng.random() < 1 / 3 else spoil(image, rng, float(rng.uniform(WORST, BEST)))


def fit(features: NDArray[np.float32], classes: NDArray[np.int64], seed: int, epochs: int = 40) -> Network:
    """Fit by cross-entropy: AdamW with weight decay 0.05 and a cosine rate from 2e-3, batches of 256."""
    import torch
    from torch import nn

    torch.manual_seed(seed)
    mean, scale = features.mean(axis=0), np.maximum(features.std(axis=0), 0.02)
    x, y = torch.from_numpy((features - mean) / scale), torch.from_numpy(classes)
    net = nn.Sequential(nn.Linear(x.shape[1], HIDDEN), nn.ReLU(), nn.Dropout(0.1), nn.Linear(HIDDEN, len(CLASSES)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(256):
            loss = nn.functional.cross_entropy(net(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        rate.step()
    fitted = {name: tensor.double().numpy() for name, tensor in net.state_dict().items()}
    return Network(
        mean=mean.astype(np.float64),
        scale=scale.astype(np.float64),
        hidden=fitted["0.weight"].T,
        hidden_bias=fitted["0.bias"],
        out=fitted["3.weight"].T,
        out_bias=fitted["3.bias"],
    )


def main() -> None:
    """Fit and save."""
    parser = argparse.ArgumentParser(description="Fit the network of the shapes world's checker on drawings.")
    parser.add_argument("--pictures", type=int, default=20000, help="how many pictures to draw")
    parser.add_argument("--seed", type=int, default=20260, help="decides pictures and fit")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / WEIGHTS_FILE, help="where to write")
    options = parser.parse_args()
    from safetensors.numpy import save_file

    features, classes = examples(options.pictures, options.seed)
    last = len(features) // 10
    network = fit(features[last:], classes[last:], options.seed)
    right = float((network(features[:last]).argmax(axis=1) == classes[:last]).mean())
    arrays = {name: np.ascontiguousarray(getattr(network, name), dtype=np.float32) for name in Network.__dataclass_fields__}
    save_file(arrays, options.out)
    print(f"{len(features) - last} regions fitted; {right:.4f} of {last} others told right; {options.out} has {options.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
