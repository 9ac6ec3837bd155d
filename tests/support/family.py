"""What a model family is to the tests that all families share: how it is built, what diffusers makes of it, what it refuses.

A family's description is one file, `family_NAME.py`, and one line of `families.py`; the tests that it gets are in
tests/diffusion/test_family_*.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from damages import Damage
from mixed_levels import GUIDANCE, sample
from torch import Tensor

from tsdiff.diffusion.family import VP_SOLVERS
from tsdiff.diffusion.flow_plan import FLOW_SOLVERS
from tsdiff.diffusion.loading import load_model
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.imports import prepare_torchvision
from tsdiff.treesearch.protocols import Condition
from tsdiff.treesearch.schedule import SolverInfo
from tsdiff.treesearch.starts import tail_of

prepare_torchvision()  # so that descriptions may import diffusers after this module

PROMPTS = ("a red cube on a blue sphere", "two cats")
STRENGTH = 0.6
"""Share of the way from an image that image-to-image pipelines go."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a pipeline, ours or diffusers' own.

    Attributes:
      conditions: one for each sample of the batch.
      size: (height, width), and frames for videos.
      steps: T.
      solver: name.
      guidance: key of `mixed_levels.GUIDANCE`.
      noise: (1 + T, B, ...) in the shape of our latents: what sampling starts from, then one for each step; for a start from an
        image the second is what its latent is drawn with. None lets the pipeline draw with `seed`.
      image: (B, 3, H, W) to start from, `STRENGTH` of the way.
      output: "latent" for latents (B, ...) of our shape, "pt" for pictures (B, 3, H, W) or (B, F, 3, H, W) in [0, 1], "pil".
    """

    conditions: Sequence[Condition]
    size: tuple[int, ...]
    steps: int
    solver: str
    guidance: str = "off"
    noise: Tensor | None = None
    seed: int = 0
    image: Tensor | None = None
    output: str = "latent"

    @property
    def scale(self) -> float:
        """Of classifier-free guidance."""
        return GUIDANCE[self.guidance][0]

    @property
    def rescale(self) -> float:
        """Of classifier-free guidance."""
        return GUIDANCE[self.guidance][1]

    @property
    def sides(self) -> dict[str, int]:
        """The size by the names of a search's arguments."""
        return dict(zip(("height", "width", "frames"), self.size, strict=False))

    def texts(self) -> dict[str, Any]:
        """What the pipelines of diffusers call conditions: embeddings, or prompts; and the options, which all share."""
        first = self.conditions[0]
        if first.tensors:
            return {name: torch.stack([one.tensors[name] for one in self.conditions]) for name in first.tensors} | dict(first.extra)
        return {"prompt": [one.prompt for one in self.conditions], "negative_prompt": [one.negative_prompt for one in self.conditions]} | dict(first.extra)

    def start(self, pack: Callable[[Tensor], Tensor] = lambda latents: latents) -> dict[str, Any]:
        """What the pipelines of diffusers call the start, with latents packed as they want them."""
        if self.image is not None:
            return {"image": self.image, "strength": STRENGTH}
        return {"generator": torch.Generator().manual_seed(self.seed)} if self.noise is None else {"latents": pack(self.noise[0])}

    def drawn(self) -> list[Tensor]:
        """What diffusers should draw, in order: noise of steps; or for the latent of an image, and for the start."""
        if self.noise is None:
            return []
        return [self.noise[1], self.noise[0]] if self.image is not None else list(self.noise[1:])


class Refused(NamedTuple):
    """A condition that a family does not take, what is said of it, and whether guidance is on when it is."""

    condition: Condition
    says: str
    guided: tuple[bool, ...] = (False, True)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family.

    Attributes:
      name: of it.
      make: a tiny random pipeline, saved to a folder if one is given, with other components if they are given. None for a
        family that only has folders.
      save: writes a folder; `make` where it is None.
      reference: what diffusers' own pipeline makes of a call, with the modules of a pipeline; a monkeypatch is undone after it.
      network: the component that predicts.
      conditions: two at least; those of text have a negative prompt.
      size, other_size: of samples; None if there is one size only.
      own_size: of samples where nothing is asked for.
      latent: shape of a sample of `size`.
      multiple: what height and width must be multiples of; None if there is one size only.
      solvers: those that are compared with the pipeline; its own comes first.
      branching: a solver that adds noise.
      defaults: steps and scale where nothing is asked for.
      guidances: keys of `mixed_levels.GUIDANCE`.
      guided_by: argument of a search with the scale of classifier-free guidance.
      wide: whether latents are so wide that they are compared by their spread: random networks do not take all noise of levels
        with a sigma of 157 away again.
      close: greatest difference of decoded pictures.
      twin: the image-to-image pipeline class, None if diffusers has none.
      twin_solvers: solvers that starting from an image is tried with.
      embeddings: shapes of what a caller may give instead of prompts; empty for families of classes.
      masked: whether the network hides padding of texts, so that texts of all lengths share batches.
      optional: text encoders that prompts can be encoded without.
      bare: arguments of `make` beside no text encoders, so that negative embeddings are asked for.
      long: a prompt that is too long for its readers, and what is said of it for each of them.
      refused: conditions that are refused, beside those that every family refuses.
      damages: what is wrong with folders, beside what is wrong with those of every family.
      strangers: pipeline classes with the same components that are refused.
      saved_as: other ways in which folders of the same model were saved.
    """

    name: str
    make: Callable[..., Any] | None
    save: Callable[[Path], Any] | None = None
    reference: Callable[[Any, Call, pytest.MonkeyPatch], Any]
    network: str = "transformer"
    conditions: Sequence[Condition]
    size: tuple[int, ...] = (16, 16)
    other_size: tuple[int, ...] | None = None
    own_size: tuple[int, ...] = (16, 16)
    latent: tuple[int, ...] = (4, 8, 8)
    multiple: int | None
    solvers: Sequence[str]
    branching: str
    defaults: tuple[int, float]
    guidances: Sequence[str] = ("off", "on")
    guided_by: str = "guidance_scale"
    wide: bool = False
    close: float = 1e-6
    twin: str | None = None
    twin_solvers: Sequence[str] = ()
    embeddings: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    masked: bool = False
    optional: Sequence[str] = ()
    bare: Mapping[str, Any] = field(default_factory=dict)
    long: tuple[Condition, Sequence[str]] | None = None
    refused: Mapping[str, Refused] = field(default_factory=dict)
    damages: Mapping[str, Damage] = field(default_factory=dict)
    strangers: Sequence[str] = ()
    saved_as: Mapping[str, Callable[[Path], Any]] = field(default_factory=dict)

    @property
    def flow(self) -> bool:
        """Whether it predicts velocities."""
        return self.solvers[0] in FLOW_SOLVERS

    @property
    def offered(self) -> tuple[str, ...]:
        """Names of all its solvers."""
        return FLOW_SOLVERS if self.flow else VP_SOLVERS

    @property
    def video(self) -> bool:
        """Whether samples are videos."""
        return len(self.size) == 3

    def call(self, **changes: Any) -> Call:
        """A call with the usual size and solver, and all conditions. `noise` True draws it, for the number of steps."""
        asked = {"conditions": self.conditions, "size": self.size, "steps": 4, "solver": self.solvers[0]} | changes
        if asked.get("noise") is True:
            shape = tuple(asked.pop("latent", self.latent))
            asked["noise"] = torch.randn((1 + asked["steps"], len(asked["conditions"]), *shape), generator=torch.Generator().manual_seed(5))
        return Call(**asked)

    def guided(self, scale: float) -> dict[str, float]:
        """The argument of a search."""
        return {self.guided_by: scale}

    def given(self, seed: int, *, tokens: int | None = None, sides: Sequence[str] = ("", "negative_")) -> dict[str, Tensor]:
        """Random embeddings for one condition, with as many tokens as `embeddings` say or as are asked for; masks hide nothing."""
        generator, tensors = torch.Generator().manual_seed(seed), {}
        for side in sides:
            for name, (first, *others) in self.embeddings.items():
                mask = name.endswith("_mask")
                shape = (tokens if tokens is not None and (mask or others) else first, *others)
                tensors[side + name] = torch.ones(shape) if mask else torch.randn(shape, generator=generator)
        return tensors

    def require_equal(self, ours: Tensor, theirs: Tensor) -> None:
        """Latents are equal to 1e-4, or 1e-4 of their spread. The pipeline's batches hold other row counts, and kernels differ by the last bits."""
        assert ours.std() > 0.1
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-4 * max(1.0, float(theirs.std()) if self.wide else 0.0))


def ours(model: Any, call: Call, *, stagger: int = 0) -> Tensor:
    """What our sampler makes of a call, in one batch; row i starts `i * stagger` steps after row 0."""
    info: SolverInfo = model.solver(call.solver)
    schedule = model.schedule(info, call.steps, call.size)
    noise, origin = call.noise, None
    assert noise is not None
    if call.image is not None:
        schedule = tail_of(schedule, call.image, STRENGTH)
        origin = model.encode_images(call.image, noise[1])
    encoded = model.encode(call.conditions, guided=call.scale > 1)
    assert all(len(one.rows) == 1 + (call.scale > 1) for one in encoded)
    return sample(model, schedule, info, model.sampler(schedule, info).draw(noise[0], origin), encoded, noise[1:], call.guidance, stagger=stagger)


def other_class(pipe: Any, name: str) -> Any:
    """The components of a pipeline in another pipeline class of diffusers."""
    import diffusers

    settings = {key: pipe.config[key] for key in ("requires_safety_checker", "force_zeros_for_empty_prompt") if key in pipe.config}
    return getattr(diffusers, name)(**pipe.components, **settings)


def require_embeddings_asked_for(plan: Any, family: Family) -> None:
    """A model that lacks a text encoder takes embeddings, and says which."""
    names = {side: " and ".join(side + name for name in family.embeddings) for side in ("", "negative_")}
    with pytest.raises(UsageError, match=rf"no text.encoder\w*, so a prompt cannot be encoded; give {names['']}"):
        plan.check(Condition("a cat"))
    half = family.given(2, sides=("",))
    plan.check(Condition(tensors=half))
    with pytest.raises(UsageError, match=r"negative.prompt"):
        plan.check(Condition(tensors=half), guided=True)
    with pytest.raises(UsageError, match=f"cannot be encoded; give {names['negative_']}"):
        plan.check(Condition(negative_prompt="bad", tensors=half))


def refusal(call: Callable[[], Any]) -> str:
    """What is said of a call that must not succeed, in one line."""
    said = "(it was taken)"
    try:
        call()
    except UsageError as error:
        said = str(error)
    assert "\n" not in said
    return said


class Shelf:
    """The tiny pipeline, folder and model of each family, made once. Tests must not change them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[tuple[str, str], Any] = {}

    def _once(self, what: str, family: Family, make: Callable[[], Any]) -> Any:
        if (what, family.name) not in self._made:
            self._made[what, family.name] = make()
        return self._made[what, family.name]

    def pipe(self, family: Family) -> Any:
        """A pipeline object; the one inside the model of a family that only has folders."""
        make = family.make
        return self.model(family).pipeline if make is None else self._once("pipe", family, make)

    def folder(self, family: Family) -> Path:
        """Where it is saved."""
        return self._once("folder", family, lambda: self._saved(family))

    def model(self, family: Family) -> Any:
        """A model, loaded from the object if there is one."""
        return self.loaded(family) if family.make is None else self._once("model", family, lambda: load_model(self.pipe(family)))

    def loaded(self, family: Family) -> Any:
        """A model, loaded from the folder."""
        return self._once("loaded", family, lambda: load_model(self.folder(family), device="cpu"))

    def searched(self, family: Family) -> Any:
        """What a search takes: the object, or else the model."""
        return self.model(family) if family.make is None else self.pipe(family)

    def _saved(self, family: Family) -> Path:
        folder = self._root / family.name
        save = family.save or family.make
        assert save is not None
        save(folder)
        return folder
