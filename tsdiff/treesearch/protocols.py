"""What the engine is made to work with: models, samplers, verifiers, policies, recorders.

Implement one of these and register it (`tsdiff.plugin`); nothing else of tsdiff has to change. Tensors appear in
annotations only, so importing this module imports no torch. Shapes: B = rows of a batch, `...` = one latent's shape.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

from tsdiff.treesearch.ledger import Cost, Spend
from tsdiff.treesearch.node import Json, Node, Value
from tsdiff.treesearch.requests import Request
from tsdiff.treesearch.schedule import Schedule, SolverInfo

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from tsdiff.treesearch.ledger import Budget

PROTOCOL_VERSION = 1

Size: TypeAlias = tuple[int, ...] | None
"""(height, width) of the output in pixels, (height, width, frames) of a video; None where a model has no such thing."""

Row: TypeAlias = Mapping[str, "Tensor"]
"""The conditioning of one network row: named tensors without batch axis."""


# What is asked for ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Condition:
    """What a sample is conditioned on.

    Attributes:
      prompt: the text, "" for none; also what verifiers read.
      negative_prompt: text of the unconditional row under guidance.
      class_label: id or name, for class-conditional models.
      tensors: embeddings made by the caller, e.g. `prompt_embeds` (tokens, width), `negative_prompt_embeds`.
      extra: options of the model family, e.g. `clip_skip`, `cross_attention_kwargs`, `ip_adapter_image`.
      metadata: facts about the prompt for verifiers (a line of a JSONL prompt file), strict JSON.
    """

    prompt: str = ""
    negative_prompt: str = ""
    class_label: int | str | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Json] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """A short text for people: the prompt, or the class."""
        if self.prompt or self.class_label is None:
            return self.prompt
        return f"class {self.class_label}"


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: m = uncond + scale * (cond - uncond) (Ho & Salimans 2022, arXiv 2207.12598).

    Attributes:
      scale: guidance at or below 1 is off, as in diffusers: only the conditional row is evaluated.
      rescale: share in [0, 1] of the std-matching of Lin et al. 2023 (arXiv 2305.08891).
      interval: guide only where sigma/alpha lies in [low, high] (Kynkaanniemi et al. 2024, arXiv 2404.07724); None
        guides everywhere.
    """

    scale: float = 1.0
    rescale: float = 0.0
    interval: tuple[float, float] | None = None

    @property
    def on(self) -> bool:
        """Whether any level is guided."""
        return self.scale > 1.0

    def active(self, schedule: Schedule, level: int) -> bool:
        """Whether a level is guided, so that its unconditional row is evaluated too."""
        if not self.on or self.interval is None:
            return self.on
        alpha = schedule.alpha[level]
        ratio = schedule.sigma[level] / alpha if alpha > 0.0 else float("inf")
        return self.interval[0] <= ratio <= self.interval[1]


# Models --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """A condition as the network takes it.

    Attributes:
      rows: the conditional row, then (with guidance) the unconditional one.
      bucket: rows of equal buckets fit in one batch (same keys, shapes and attention rule).
    """

    rows: tuple[Row, ...]
    bucket: Hashable


@dataclass(frozen=True)
class Media:
    """Decoded samples: `pixels` in [0, 1], (B, 3, H, W) of images, (B, F, 3, H, W) of videos with F frames."""

    pixels: Tensor
    kind: Literal["image", "video"] = "image"


@dataclass(frozen=True)
class Demo:
    """What a search does when the caller names no prompt or verifier.

    Attributes:
      prompt: shows what a search is good for.
      verifiers: the first steers; the others say of finished samples what it made of them.
    """

    prompt: str
    verifiers: tuple[str, ...]


_SHORT_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class LoadOptions:
    """How to load a model.

    Attributes:
      device: "cpu", "cuda", "cuda:1", "mps", or "auto" for the best there is.
      dtype: "float32", "float16" or "bfloat16" of the weights, "fp16" and "bf16" for short; "auto" is float32 on a CPU, and elsewhere
        what the family is used to (bfloat16, where the device has it).
      offline: never touch the network.
      revision, variant: of a hub repository, as in diffusers.
      strict_scheduler: refuse a scheduler that is not supported instead of replacing it.
      lora: files that are merged into the weights, each "PATH" or "PATH:SCALE".
      latent_dtype: "float32", or "model" to round latents to the network's number format after every step, as pipelines do.
      offload: keep only the components at work on the device, the others in host memory.
      vae_slicing: decode a batch image by image.
      vae_tiling: decode large images in overlapping tiles.
      channels_last: lay out the weights of convolutions with their channels last.
      compile: compile the network's repeated blocks; its calls then have one row count.
      x0_decoder: folder of a tiny autoencoder that decodes the clean estimates of unfinished nodes, None for the model's own.
    """

    device: str = "auto"
    dtype: str = "auto"
    offline: bool = False
    revision: str | None = None
    variant: str | None = None
    strict_scheduler: bool = False
    lora: tuple[str, ...] = ()
    latent_dtype: str = "float32"
    offload: bool = False
    vae_slicing: bool = False
    vae_tiling: bool = False
    channels_last: bool = False
    compile: bool = False
    x0_decoder: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", _SHORT_DTYPES.get(self.dtype, self.dtype))


class ModelOutline(Protocol):
    """A model before its weights are loaded: enough to check options, build schedules and count costs.

    Attributes:
      name: as the caller named it.
      solvers: names of the solvers it supports, the default first.
      default_steps, default_guidance_scale: used when the caller names none.
      media: "image", "video" (then it is a `VideoOutline`), or None where samples cannot be shown.
      guidable: whether there is an unconditional row to guide with.
      demo: a prompt and a verifier that show the model at work, or None.
      notices: lines to show the user once (e.g. a scheduler that was replaced).
    """

    @property
    def name(self) -> str: ...
    @property
    def solvers(self) -> tuple[str, ...]: ...
    @property
    def default_steps(self) -> int: ...
    @property
    def default_guidance_scale(self) -> float: ...
    @property
    def media(self) -> Literal["image", "video"] | None: ...
    @property
    def guidable(self) -> bool: ...
    @property
    def demo(self) -> Demo | None: ...
    @property
    def notices(self) -> tuple[str, ...]: ...

    def solver(self, name: str | None = None, eta: float | None = None) -> SolverInfo:
        """A supported solver; None takes the model's default. Accepts "ddim(eta=0.5)". Raises UsageError."""
        ...

    def size(self, height: int | None, width: int | None) -> Size:
        """The output size, defaults filled in. Raises UsageError if the model cannot make it."""
        ...

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Shape of one latent, without batch axis."""
        ...

    def schedule(self, solver: SolverInfo, num_steps: int, size: Size) -> Schedule:
        """The levels of a solver. Raises UsageError if the number of steps does not fit the model."""
        ...

    def check(self, condition: Condition, *, guided: bool = False) -> None:
        """Raise UsageError if the model cannot take this condition (under guidance)."""
        ...

    def load(self) -> DiffusionModel:
        """Load the weights."""
        ...


@runtime_checkable
class ToldOutline(Protocol):
    """An outline whose network may be told the guidance scale (distilled guidance), which costs no second row.

    `guidance_scale` of a search is then the option "guidance_scale" of its conditions, and `true_cfg_scale` the scale of
    classifier-free guidance beside it.

    Attributes:
      told_scale: what the network is usually told, None if this model's network is not told anything.
    """

    @property
    def told_scale(self) -> float | None: ...


@runtime_checkable
class VideoOutline(Protocol):
    """An outline whose samples are videos: it is asked for their length, and how fast they are shown.

    The option `fps` of a search is the option "frame_rate" of its conditions, for networks that are told it; a model
    whose network is not refuses it, as it does any option that it does not know.
    """

    def size(self, height: int | None, width: int | None, frames: int | None = None) -> Size:
        """(height, width, frames), defaults filled in. Raises UsageError if the model cannot make it."""
        ...

    def frame_rate(self, condition: Condition) -> float:
        """Frames per second at which samples of a condition are shown, above 0 and at most 1000."""
        ...


@runtime_checkable
class TellingOutline(Protocol):
    """An outline with something to tell whoever looks at its runs later: `run.json` keeps it as `model_facts`.

    Attributes:
      facts: strict JSON, small. {"mixture": {"weights": [...], "means": [[...], ...], "stds": [...]}} is the density of the
        data, where that is known.
    """

    @property
    def facts(self) -> Mapping[str, Json]: ...


@dataclass(frozen=True)
class Flops:
    """Floating-point operations, two for a multiply-add.

    Attributes:
      row: of a network row; an evaluation has two where it is guided.
      decode: of decoding one sample.
      x0_decode: of decoding the clean estimate of an unfinished node, where that is done by another decoder.
    """

    row: int
    decode: int
    x0_decode: int | None = None


@runtime_checkable
class CountableOutline(Protocol):
    """An outline that can tell what its network and decoder compute, from their configs alone."""

    def flops(self, size: Size) -> Flops | None:
        """What one row of a size costs; None if it is not known."""
        ...


class DiffusionModel(ModelOutline, Protocol):
    """A model ready to run.

    Attributes:
      fingerprint: names the weights: equal fingerprints give equal results on one machine.
      prediction_type: "epsilon", "v_prediction", "sample" or "flow".
      device: where latents live, e.g. "cuda:0".
    """

    @property
    def fingerprint(self) -> str: ...
    @property
    def prediction_type(self) -> str: ...
    @property
    def device(self) -> str: ...

    def sampler(self, schedule: Schedule, solver: SolverInfo) -> Sampler:
        """The latent arithmetic of a solver on a schedule of its kind (also one made for another solver of the kind)."""
        ...

    def encode(self, conditions: Sequence[Condition], *, guided: bool) -> list[Encoded]:
        """Encode conditions, in order; with `guided` each gets its unconditional row too."""
        ...

    def encode_images(self, images: Tensor, noise: Tensor) -> Tensor:
        """Clean latents (B, ...) of images (B, 3, H, W) in [0, 1]; `noise` (B, ...) feeds a sampling encoder."""
        ...

    def forward(self, latents: Tensor, timesteps: Tensor, rows: Sequence[Row]) -> Tensor:
        """The network's raw output (B, ...) for scaled latents (B, ...), timesteps (B,) and one `Row` each."""
        ...

    def decode(self, latents: Tensor) -> Media:
        """Decode clean latents (B, ...)."""
        ...


@runtime_checkable
class CompiledModel(Protocol):
    """A model that may want all network calls to have one row count.

    Attributes:
      constant_rows: whether it does, because its network is compiled for the shapes that it meets.
    """

    @property
    def constant_rows(self) -> bool: ...


@runtime_checkable
class EstimateDecoder(Protocol):
    """A model that may have another, cheaper decoder for the clean estimates of unfinished nodes.

    Attributes:
      estimate_decoder: names it; None where the model's own decodes everything.
    """

    @property
    def estimate_decoder(self) -> str | None: ...

    def decode_estimates(self, x0: Tensor) -> Media:
        """Decode clean estimates (B, ...), for verifiers only."""
        ...


@dataclass
class StepState:
    """A batch of latents on their way, with what a multi-step or multi-stage solver remembers.

    Attributes:
      latents: (B, ...).
      history: tensors (B, ...) carried along; rows without history hold anything finite.
      history_levels: level of each row's history, -1 for none.
    """

    latents: Tensor
    history: tuple[Tensor, ...] = ()
    history_levels: Sequence[int] = ()


class Sampler(Protocol):
    """All arithmetic on latents, vectorised over rows at different levels. Levels are plain integers, one per row."""

    @property
    def schedule(self) -> Schedule: ...
    @property
    def solver(self) -> SolverInfo: ...

    def draw(self, noise: Tensor, origin: Tensor | None = None) -> Tensor:
        """Latents of level 0 (B, ...) from unit noise, around the clean latents `origin` if there are any."""
        ...

    def add_noise(self, x0: Tensor, levels: Sequence[int], noise: Tensor) -> Tensor:
        """alpha * x0 + sigma * noise at the nominal scales of `levels`."""
        ...

    def renoise(self, latents: Tensor, arrived: Sequence[bool], levels: Sequence[int], to: Sequence[int], noise: Tensor) -> Tensor:
        """The forward kernel from `levels` (where a denoise step landed, if `arrived`) up to the noisier `to`."""
        ...

    def perturb(self, latents: Tensor, x0: Tensor, arrived: Sequence[bool], levels: Sequence[int], scale: Sequence[float], noise: Tensor) -> Tensor:
        """Replace the share `scale` of each latent's noise by `noise`, at the same level."""
        ...

    def evaluate(self, latents: Tensor, levels: Sequence[int], rows: Sequence[Row]) -> Tensor:
        """One network call: raw outputs (B, ...). Scales the input as the solver's coordinates need."""
        ...

    def guide(self, cond: Tensor, uncond: Tensor, scale: Sequence[float], rescale: Sequence[float]) -> Tensor:
        """Classifier-free guidance of raw outputs, per row."""
        ...

    def x0(self, latents: Tensor, levels: Sequence[int], output: Tensor) -> Tensor:
        """The clean estimate E[x0 | x] that a raw output stands for."""
        ...

    def advance(
        self, state: StepState, stage: int, levels: Sequence[int], nexts: Sequence[int], output: Tensor, noise: Tensor | None
    ) -> StepState:
        """One stage of a step from `levels` to `nexts`.

        Args:
          state: the latents and history before this stage.
          stage: 0, or 1 for a corrector; the latents returned by stage 0 are then evaluated at `nexts` first. The
            corrector of a step that ends at sigma 0 is never called.
          output: raw (guided) network output for `state.latents`, (B, ...).
          noise: (num_noise, B, ...) for stochastic solvers, None otherwise.
        """
        ...


# Verifiers -----------------------------------------------------------------------------------------------------------

Need: TypeAlias = str
"""What a verifier reads: "images", "x0", "latents", "levels", "conditions", "node_ids", "ancestor_x0@RATIO" or
"ancestor_images@RATIO", where RATIO is the sigma/alpha of the ancestor whose clean estimate, or its picture, is wanted; and
"pages", which only searches that are recorded in a folder have."""


class Page(Protocol):
    """The page of a candidate's run (`tsdiff view`), where a person can be asked about the candidate."""

    def ask(self, who: str, picture: bytes, *, low: float, high: float, heard: Callable[[float | None], None]) -> None:
        """Put a question: how good is this picture, from `low` to `high`? To be called by the thread that `PendingVerifier.ask` is called by.

        Args:
          who: name of the verifier that asks; it asks once about a candidate.
          picture: a PNG file.
          heard: called once, by that thread, with the score; None where the person gave none. At once if the question was
            answered before an interruption.

        Raises:
          UsageError, SetupError: if the question cannot be written into the run's folder.
        """
        ...


class Candidates(Protocol):
    """What a verifier is given; everything is made on first access, in row order."""

    @property
    def images(self) -> Tensor:
        """(B, 3, H, W) in [0, 1], decoded from `x0`.

        Of videos, one key frame: `score` is called for the first, the middle and the last one, and the mean counts; `ask`
        once, with the middle one.
        """
        ...

    @property
    def x0(self) -> Tensor:
        """(B, ...) clean estimates; at level T the latents themselves."""
        ...

    @property
    def latents(self) -> Tensor:
        """(B, ...) at their own levels."""
        ...

    @property
    def levels(self) -> list[int]:
        """Level of each row."""
        ...

    @property
    def schedules(self) -> list[Schedule]:
        """Schedule of each row's tree."""
        ...

    @property
    def conditions(self) -> list[Condition]:
        """Condition of each row."""
        ...

    @property
    def node_ids(self) -> list[str]:
        """Hexadecimal id of each row's node."""
        ...

    @property
    def pages(self) -> Sequence[Page]:
        """Where a person can be asked about each row. Raises UsageError where the search is not recorded."""
        ...

    def ancestor_x0(self, ratio: float) -> Tensor:
        """(B, ...) clean estimates of each row's ancestor at sigma/alpha `ratio`, for a declared need."""
        ...

    def ancestor_images(self, ratio: float) -> Tensor:
        """(B, 3, H, W) in [0, 1], decoded from `ancestor_x0(ratio)`, for a declared need."""
        ...

    def __len__(self) -> int: ...


@dataclass
class Scores:
    """A verifier's answer.

    Attributes:
      values: (B,) scores, a tensor or floats; higher is better. NaN and infinities count as failures of their row.
      parts: named components, (B,) each.
      reasons: why a row failed, by row.
    """

    values: Tensor | Sequence[float]
    parts: Mapping[str, Tensor | Sequence[float]] = field(default_factory=dict)
    reasons: Mapping[int, str] = field(default_factory=dict)


class Verifier(Protocol):
    """Scores samples. Construct cheaply; load weights in `prepare`.

    Attributes:
      name: what its scores are called.
      needs: what it reads of the candidates.
      scope: "row" if a score depends on its own row alone, "set" if on the whole set (ranks).
      latency: "immediate", or "pending" for people and remote services (then `ask` is called instead of `score`).
      judges: "any" level's x0 estimate, or "final" samples only.
      differentiable: whether gradients flow through `score`.
    """

    @property
    def name(self) -> str: ...
    @property
    def needs(self) -> frozenset[Need]: ...
    @property
    def scope(self) -> Literal["row", "set"]: ...
    @property
    def latency(self) -> Literal["immediate", "pending"]: ...
    @property
    def judges(self) -> Literal["any", "final"]: ...
    @property
    def differentiable(self) -> bool: ...

    def prepare(self, device: str) -> None:
        """Load weights; called once, after every option has been checked."""
        ...

    def check(self, condition: Condition) -> None:
        """Raise UsageError if the verifier cannot judge samples of this condition."""
        ...

    def score(self, candidates: Candidates) -> Scores:
        """Score a batch."""
        ...


@runtime_checkable
class PendingVerifier(Protocol):
    """A verifier whose answers arrive later, from any thread."""

    def ask(self, candidates: Candidates, answer: Callable[..., None]) -> None:
        """Ask for scores; call `answer(node_id, score, reason)` once for each candidate, whenever it is known.

        A fourth argument may be its parts, a number by name.
        """
        ...


@dataclass(frozen=True)
class Pool:
    """Plain samples whose scores a verifier must know before it can score anything.

    Attributes:
      verifiers: whose scores; all of scope "row" and latency "immediate".
      samples: how many, of all prompts of a search together.
      levels: at how many levels their clean estimates are scored, evenly spread, the last among them; 0 is all.
    """

    verifiers: tuple[Verifier, ...]
    samples: int
    levels: int

    def at(self, last: int) -> tuple[int, ...]:
        """The levels, of a schedule that ends at `last`."""
        steps = last if self.levels == 0 else min(self.levels - 1, last)
        return tuple((2 * i * last + steps) // (2 * steps) for i in range(steps + 1)) if steps else (last,)

    def cost(self, setting: Setting, prompts: int) -> Spend:
        """What making and scoring them spends: every verifier reads the same decode, and the call counts once for all."""
        seen = _pictures(self.verifiers)
        count = self.samples * len(self.at(setting.schedule.last))
        answers = 0 if seen or not setting.media else min(prompts, self.samples)  # the engine decodes the best of every tree
        return Spend(self.samples * setting.sample_cost, count * seen + answers, count)


@runtime_checkable
class BoundVerifier(Protocol):
    """A verifier that belongs to one model: it reads latents, which mean nothing in another model's space."""

    def require_model(self, fingerprint: str, latent_shape: tuple[int, ...], schedule_kind: str) -> None:
        """Raise UsageError unless this is the model that it was made for. Called when the model has loaded, before `prepare`."""
        ...


@runtime_checkable
class CalibratedVerifier(Protocol):
    """A verifier that compares scores with those of plain samples of the same model, schedule and prompts.

    The engine makes them before the search, or finds their scores in the user's cache.

    Attributes:
      pool: which; None if as configured it needs none.
    """

    @property
    def pool(self) -> Pool | None: ...

    def calibrate(self, schedule: Schedule, scores: Mapping[str, Mapping[int, Sequence[float]]]) -> None:
        """Take the pool's scores, by verifier and level; failed ones are left out. Called once, after `prepare`.

        Raises:
          TsdiffError: if they are too few.
        """
        ...


# Policies ------------------------------------------------------------------------------------------------------------

FINAL = "final"
"""The verifier role that every policy knows: the one that steers the answer."""


@dataclass(frozen=True)
class Setting:
    """What a policy's cost depends on.

    Attributes:
      schedule, solver: of the search.
      verifier: the one that steers.
      others: the ones that score finished samples, and nodes for the policy where they have a role.
      media: whether samples can be decoded (each result is decoded once).
      roles: the verifier in each role that the policy knows; a role that is not here is taken by the one that steers.
    """

    schedule: Schedule
    solver: SolverInfo
    verifier: Verifier
    others: tuple[Verifier, ...] = ()
    media: bool = True
    roles: Mapping[str, Verifier] = field(default_factory=dict, hash=False)

    @property
    def sample_cost(self) -> int:
        """NFE of one plain sample."""
        return self.denoise_cost(0, self.schedule.last)

    def denoise_cost(self, start: int, to: int, num_steps: int | None = None) -> int:
        """NFE of a denoise, the start's own prediction included."""
        return self.schedule.span_cost(self.schedule.span(start, to, num_steps), self.solver.stages)

    def scoring(self, count: int, *, final: bool, role: str | None = None) -> Spend:
        """Decodes and verifier calls of scoring `count` nodes (their predictions not included).

        Nodes on the way are scored by the verifier in a role (None for the one that steers). Finished samples (`final`)
        are scored by every verifier and decoded once for all of them, and so are the ancestors that they are compared
        with. A node above such an ancestor's level costs neither that decode nor the call. A steering verifier of scope
        "set" ranks finished samples once more, as one set, for the answer.
        """
        judges = self._finished if final else (self.verifier if role is None else self.roles.get(role, self.verifier),)
        again = [self.verifier] if final and self.verifier.scope == "set" else []
        return Spend(decodes=count * (_pictures(judges) + _pictures(again)), verifier_calls=count * (len(judges) + len(again)))

    def result(self) -> Spend:
        """The decode of the answer, where scoring it has not decoded it already."""
        # The last to score a finished sample is its decode's last reader: the ranking of all of them, if there is one.
        judges = (self.verifier,) if self.verifier.scope == "set" else self._finished
        seen = any("images" in judge.needs for judge in judges)
        return Spend(decodes=int(self.media and not seen))

    @property
    def _finished(self) -> tuple[Verifier, ...]:
        """Who scores finished samples: a verifier of scope "set" that does not steer has no set of them to judge."""
        return (self.verifier, *(judge for judge in self.others if judge.scope == "row"))


def _pictures(judges: Sequence[Verifier]) -> int:
    """Decodes of a node that some verifiers look at: its own, and one for each ancestor."""
    return len({need for judge in judges for need in judge.needs if need == "images" or need.startswith("ancestor_images@")})


class TreeView(Protocol):
    """What a policy sees of its tree: never a model, a device, a clock or a tensor."""

    @property
    def schedule(self) -> Schedule: ...
    @property
    def solver(self) -> SolverInfo: ...
    @property
    def condition(self) -> Condition: ...
    @property
    def budget(self) -> Budget: ...
    @property
    def nodes(self) -> Sequence[Node]: ...

    def best(self, verifier: str | None = None) -> Node | None:
        """The finished node with the highest score (ties: the oldest); None while there is none."""
        ...

    def rng(self, *purpose: int | str) -> np.random.Generator:
        """A random generator of the policy's own; the same stateful object for the same purpose."""
        ...

    def note(self, node: Node | None = None, **facts: Json) -> None:
        """Write facts on a node, or on the tree."""
        ...


Search: TypeAlias = Generator[Request, Any, Node | None]


class Policy(Protocol):
    """A search algorithm: a frozen dataclass of hyperparameters (`tsdiff.treesearch.parameters`) with a generator.

    Attributes:
      name: as registered.
      needs: of "stochastic" (solver), "gradient", "flow" (schedule), "absolute" (scores comparable across sets).
      size_parameters: names of the parameters that set how much is spent; when the caller sets none of them and gives
        a budget, `fit` chooses them.
      roles: optional; names for verifiers that the policy scores with (`Score(nodes, verifier="layout")`), so that the
        caller can say which (`--verifier layout=NAME`). Every policy knows "final", the one that steers, which also
        stands in where a role is not given.
    """

    @property
    def name(self) -> str: ...
    @property
    def size_parameters(self) -> tuple[str, ...]: ...
    @property
    def needs(self) -> frozenset[str]: ...

    def search(self, tree: TreeView) -> Search:
        """Yield requests, receive replies, return the answer: a finished node, normally `tree.best()`."""
        ...

    def cost(self, setting: Setting) -> Cost:
        """What one search spends, its answer's decode included."""
        ...

    def fit(self, nfe: int, setting: Setting) -> Policy:
        """The largest configuration that spends at most `nfe`. Raises UsageError naming the smallest budget."""
        ...


# Allocators ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Grant:
    """Search a tree with a policy, for at most this many NFE.

    The policy sees the tree as if it were new: its own nodes, first noises that no earlier grant has used, and a budget
    of `nfe`. The samples of all grants compete for the tree's answer.

    Attributes:
      tree: one of the forest's trees.
      policy: what searches, fitted to `nfe` beforehand (`Policy.fit`).
      nfe: at least 1; while the tree has no finished sample, it has to pay for one.
    """

    tree: TreeView
    policy: Policy
    nfe: int


@dataclass(frozen=True)
class Outcome:
    """What came of a grant.

    Attributes:
      nfe: what was spent of it; the rest is back in the forest's budget.
      scores: of the samples that it finished, in the order of their making; None where scoring failed.
      failed: the tree has ended with an error; further grants to it come back like this one, at no cost.
    """

    nfe: int
    scores: tuple[float | None, ...] = ()
    failed: bool = False


class ForestView(Protocol):
    """What an allocator sees: every tree of the search, and the one budget that they share.

    Attributes:
      trees: one for each prompt and seed, prompt-major.
      setting: what costs depend on, the same for all trees.
      budget: of all trees together; `spent` counts what their requests were granted.
      target: a score that is good enough: a tree whose best sample reaches it stops at once, in the middle of a policy
        too. None for none.
    """

    @property
    def trees(self) -> Sequence[TreeView]: ...
    @property
    def setting(self) -> Setting: ...
    @property
    def budget(self) -> Budget: ...
    @property
    def target(self) -> float | None: ...

    def note(self, **facts: Json) -> None:
        """Write down why something was decided, as strict JSON."""
        ...


Allocation: TypeAlias = Generator[Sequence[Grant], list[Outcome], None]


@runtime_checkable
class Allocator(Protocol):
    """Shares one budget among many searches: stands above policies, and is named like one.

    A frozen dataclass of hyperparameters. It may have a class method `from_options(options)` that makes one from typed
    or textual values, where its fields alone do not say how; and `roles`, as policies have.

    Attributes:
      name: as registered.
      needs: as a policy's: what the policies that it grants need, and "absolute" where it compares scores.
    """

    @property
    def name(self) -> str: ...
    @property
    def needs(self) -> frozenset[str]: ...

    def search(self, forest: ForestView) -> Allocation:
        """Yield grants, to different trees, that are searched at once; receive what came of them, in order.

        The outcomes come when all of these searches are done, so that decisions do not depend on which was first. The
        list is granted whole or refused whole: `BudgetExhausted` is thrown if it would leave too little to finish one
        sample of every tree that has none. Return to end: each tree answers with the best sample of its grants, and one
        that was never granted anything makes a plain sample.
        """
        ...

    def forecast(self, total_nfe: int, runs: int, setting: Setting) -> Cost:
        """Bounds on what one of `runs` searches spends of `total_nfe`. Raises UsageError naming the smallest total."""
        ...


# Recording -----------------------------------------------------------------------------------------------------------


class Recorder(Protocol):
    """Writes down what happens, in an order that can be repeated. Called by the engine's loop only.

    A `run` is a tree on its way through the engine (`tsdiff.treesearch.run`), a group one of its granted requests.
    """

    def begin(self, run: Any) -> None:
        """A tree is about to start; called before its policy does."""
        ...

    def recorded(self, run: Any, request: Request) -> Any:
        """What was written down about the policy's next request; None where the record ends, and the tree goes on live.

        Raises:
          UsageError: if another request was written down.
        """
        ...

    def commit(self, groups: Sequence[Any]) -> None:
        """Completed groups, before their replies reach the policies."""
        ...

    def answer(self, run: Any, node: Node, key: str, value: Value) -> None:
        """A pending verifier's answer, on arrival; `key` is what the node's value will be called."""
        ...

    def answered(self, run: Any, node: Node, key: str) -> Value | None:
        """An answer that was written down, but whose group was not, so that nobody is asked twice; None to ask."""
        ...

    def refuse(self, run: Any, request: Request, why: Exception) -> None:
        """A request that was not granted."""
        ...

    def decoded(self, run: Any, node: Node, pixels: Tensor) -> None:
        """A node's clean estimate (or finished sample) was decoded for whatever reason: pixels in [0, 1], (3, H, W), or (F, 3, H, W) of a video."""
        ...

    def end(self, run: Any) -> None:
        """A tree has ended; its latents are still there."""
        ...


class NullRecorder:
    """Writes nothing down."""

    def begin(self, run: Any) -> None:
        """Nothing was recorded."""

    def recorded(self, run: Any, request: Request) -> Any:
        """Nothing was recorded."""
        return None

    def commit(self, groups: Sequence[Any]) -> None:
        """Nothing is recorded."""

    def answer(self, run: Any, node: Node, key: str, value: Value) -> None:
        """Nothing is recorded."""

    def answered(self, run: Any, node: Node, key: str) -> Value | None:
        """Nothing was recorded."""
        return None

    def refuse(self, run: Any, request: Request, why: Exception) -> None:
        """Nothing is recorded."""

    def decoded(self, run: Any, node: Node, pixels: Tensor) -> None:
        """Nothing is recorded."""

    def end(self, run: Any) -> None:
        """Nothing is recorded."""
