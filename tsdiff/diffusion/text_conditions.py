"""Text conditions of a model family: what may be given, checked against configs, and its rows, made by the pipeline itself.

A family says which embeddings its network takes and how its pipeline makes them of a prompt. Row tensors have the names
that diffusers' pipelines give them as arguments (`prompt_embeds`, `pooled_prompt_embeds`, ...), so a caller's own
embeddings, in `Condition.tensors`, stand in for them under the same names, with "negative_" in front for the row that
guidance leads away from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from tsdiff.diffusion.quiet import quiet_libraries
from tsdiff.diffusion.source import Source, unwrapped
from tsdiff.treesearch.errors import UsageError, unknown_name
from tsdiff.treesearch.protocols import Condition, Encoded

if TYPE_CHECKING:
    from torch import Tensor

CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
T5_TOKENIZERS = ("T5Tokenizer", "T5TokenizerFast")
NEGATIVE = "negative_"
SIDES = ("", NEGATIVE)
"""What the names of the conditional and of the unconditional row's tensors and options begin with."""


@dataclass(frozen=True)
class Option:
    """What an entry of `Condition.extra` may be: a test, and how to say it ("a text")."""

    allowed: Callable[[Any], bool]
    words: str


TEXT = Option(lambda value: isinstance(value, str), "a text")


def whole_number(low: int, high: int) -> Option:
    """A whole number in [low, high]."""
    return Option(lambda value: type(value) is int and low <= value <= high, f"a whole number between {low} and {high}")


def number_from(low: float) -> Option:
    """A finite number of at least `low`."""
    return Option(lambda value: type(value) in (int, float) and low <= value < float("inf"), f"a number of at least {low:g}")


@dataclass(frozen=True)
class TextRules:
    """What a text-to-image model can be conditioned on, from its configs.

    Attributes:
      name, family: of the model ("/models/sd3") and its family ("Stable Diffusion 3"), for messages.
      embeddings: shape of every tensor that a caller may give instead of a prompt, by name, all of them together or none;
        the axis of tokens, which may have any length, is the word "tokens".
      tokens: length of an encoded prompt under the options of a condition.
      options: what `Condition.extra` may hold.
      conditional: names of options that shape the conditional row alone.
      missing: the text encoder without which no prompt can be encoded, None if they are all there.
      refused: options of the pipeline that are not supported, and why.
    """

    name: str
    family: str
    embeddings: Mapping[str, tuple[int | str, ...]]
    tokens: Callable[[Mapping[str, Any]], int]
    options: Mapping[str, Option]
    conditional: tuple[str, ...] = ()
    missing: str | None = None
    refused: Mapping[str, str] = field(default_factory=dict)

    def check(self, condition: Condition, *, guided: bool = False) -> None:
        """Raise UsageError if the model cannot take a condition (under guidance)."""
        if condition.class_label is not None:
            raise UsageError(f"{self.name!r} is conditioned on text, not on classes; leave out class {condition.class_label!r} and give a prompt")
        for key, value in condition.extra.items():
            if key in self.refused:
                raise UsageError(f"{key} is not supported: {self.refused[key]}; leave it out")
            if key not in self.options:
                raise unknown_name(f"option of a {self.family} condition", key, self.options)
            if value is not None and not self.options[key].allowed(value):
                raise UsageError(f"{key} is {value!r} but must be {self.options[key].words}")
        known = [side + name for side in SIDES for name in self.embeddings]
        for key, tensor in condition.tensors.items():
            if key not in known:
                raise unknown_name(f"tensor of a {self.family} condition", key, known)
            self._check_shape(key, tensor)
        for side in SIDES:
            self._check_side(condition, side)
        if self.missing is not None:
            self._check_without_encoder(condition, guided=guided)
        if guided:
            lengths = [self._length(condition, side) for side in SIDES]
            if lengths[0] != lengths[1]:
                raise UsageError(f"the prompt's embedding has {lengths[0]} tokens and the negative prompt's {lengths[1]}, but they must agree; give embeddings of one length")

    def row(self) -> dict[str, Tensor]:
        """The embeddings of a prompt of usual length, of zeros."""
        import torch

        shapes = {name: [self.tokens({}) if side == "tokens" else int(side) for side in shape] for name, shape in self.embeddings.items()}
        return {name: torch.zeros(shape) for name, shape in shapes.items()}

    def _check_shape(self, key: str, tensor: Tensor) -> None:
        wanted = self.embeddings[key.removeprefix(NEGATIVE)]
        shape = tuple(tensor.shape)
        own = shape[1:] if len(shape) == len(wanted) + 1 and shape[0] == 1 else shape
        if len(own) != len(wanted) or any(want not in (size, "tokens") for size, want in zip(own, wanted, strict=True)) or 0 in own:
            words = ", ".join(map(str, wanted))
            raise UsageError(f"{key} has shape {shape} but must be ({words}{',' if len(wanted) == 1 else ''}) or (1, {words})")

    def _check_side(self, condition: Condition, side: str) -> None:
        there = [name for name in self.embeddings if side + name in condition.tensors]
        lacking = [name for name in self.embeddings if side + name not in condition.tensors]
        if there and lacking:
            raise UsageError(f"{side}{there[0]} was given without {side}{lacking[0]}; {self.family} needs both, made by the same text encoders")

    def _check_without_encoder(self, condition: Condition, *, guided: bool) -> None:
        names = {side: " and ".join(side + name for name in self.embeddings) for side in SIDES}
        first = next(iter(self.embeddings))
        if first not in condition.tensors:
            raise UsageError(f"{self.name!r} has no {self.missing}, so a prompt cannot be encoded; give {names['']} (and {names[NEGATIVE]} for guidance)")
        if (guided or condition.negative_prompt) and NEGATIVE + first not in condition.tensors:
            raise UsageError(f"{self.name!r} has no {self.missing}, so a negative prompt cannot be encoded; give {names[NEGATIVE]}, or leave out guidance and the negative prompt")

    def _length(self, condition: Condition, side: str) -> int:
        """Tokens of a side's row."""
        name = next(name for name, shape in self.embeddings.items() if shape[0] == "tokens")
        return int(condition.tensors[side + name].shape[-2]) if side + name in condition.tensors else self.tokens(condition.extra)


class TextConditioner(ABC):
    """Encodes conditions one prompt a call, so that an embedding never depends on its neighbours.

    Args:
      pipeline: whose text encoders are used; nothing of it stays changed.
      device: where rows are put.
      rules: of the model; conditions are checked before they are encoded.

    Attributes:
      notices: a line for each prompt that was too long.
    """

    def __init__(self, pipeline: Any, device: str, rules: TextRules) -> None:
        self.pipeline = pipeline
        self.device = device
        self.rules = rules
        self.notices: list[str] = []
        # Weak, so that an embedding lives as long as a search uses it: a thousand trees hold one negative prompt.
        self._texts: WeakValueDictionary[Hashable, Tensor] = WeakValueDictionary()

    @abstractmethod
    def embed(self, prompt: str, options: Mapping[str, Any]) -> dict[str, Tensor]:
        """The embeddings of a prompt, with a batch axis of one, named as in the rules.

        Args:
          prompt: positive or negative.
          options: of the side that it is for: `prompt_2` is the condition's `negative_prompt_2` for a negative prompt, and
            options that shape the conditional row alone are not there.
        """

    def facts(self, options: Mapping[str, Any]) -> dict[str, Tensor]:
        """Further row tensors, without batch axis, that both rows of a condition share."""
        return {}

    def encode(self, conditions: Sequence[Condition], *, guided: bool) -> list[Encoded]:
        """The rows of conditions, in order; equal prompts share their tensors, also with earlier calls still in use."""
        import torch

        with torch.no_grad(), quiet_libraries():
            return [self._encode(condition, guided) for condition in conditions]

    def note_length(self, prompt: str, tokenizer: Any, limit: int, reader: str) -> None:
        """Add a notice if a text encoder does not read the whole of a prompt."""
        dropped = len(tokenizer(prompt).input_ids) - limit
        notice = f"prompt {prompt[:40]!r}... is {dropped} tokens longer than the {limit} that {reader} reads; its last {dropped} tokens are dropped there"
        if dropped > 0 and notice not in self.notices:
            self.notices.append(notice)

    def _encode(self, condition: Condition, guided: bool) -> Encoded:
        options = {key: value for key, value in condition.extra.items() if value is not None}
        facts = {name: tensor.to(self.device) for name, tensor in self.facts(options).items()}
        sides = zip(SIDES[: 1 + guided], (condition.prompt, condition.negative_prompt), strict=False)
        rows = tuple({**self._row(prompt, side, condition, options), **facts} for side, prompt in sides)
        shapes = [sorted((name, tuple(tensor.shape)) for name, tensor in row.items()) for row in rows]
        if shapes[0] != shapes[-1]:  # of a tokenizer that disagrees with the configs
            raise UsageError(f"the prompt's embeddings have shapes {dict(shapes[0])} and the negative prompt's {dict(shapes[-1])}, but they must agree; give embeddings of one length")
        return Encoded(rows, (self.rules.family, *shapes[0]))

    def _row(self, prompt: str, side: str, condition: Condition, options: Mapping[str, Any]) -> dict[str, Tensor]:
        names = self.rules.embeddings
        if side + next(iter(names)) in condition.tensors:
            given = {name: condition.tensors[side + name] for name in names}
            return {name: tensor.reshape(tensor.shape[-len(names[name]) :]).to(self.device) for name, tensor in given.items()}
        own = self._own(side, options)
        key = (prompt, tuple(sorted(own.items())))
        found = {name: tensor for name in names if (tensor := self._texts.get((key, name))) is not None}
        if len(found) < len(names):
            found = {name: tensor[0].to(self.device) for name, tensor in self.embed(prompt, own).items()}
            self._texts.update({(key, name): tensor for name, tensor in found.items()})
        return found

    def _own(self, side: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of one side, under the names of the conditional one."""
        paired = {name for name in self.rules.options if NEGATIVE + name in self.rules.options}
        others = paired | set(self.rules.conditional if side else ())
        common = {key: value for key, value in options.items() if key not in others and not key.startswith(NEGATIVE)}
        return common | {name: options[side + name] for name in paired if side + name in options}


def require_encoders(source: Source, encoders: Mapping[str, tuple[str, tuple[str, ...]]], *, optional: tuple[str, ...] = ()) -> str | None:
    """Check a pipeline's text encoders and the tokenizers that belong to them.

    Args:
      source: of the pipeline.
      encoders: class of each text encoder, and classes that its tokenizer may have. The tokenizer of "text_encoder_2" is
        the component "tokenizer_2".
      optional: names of encoders that the pipeline can encode prompts without.

    Returns:
      An encoder that is not there, although prompts cannot be encoded without it; None if there is none.

    Raises:
      UsageError: for an encoder or tokenizer of another class, or an encoder without its tokenizer.
    """
    missing = None
    for name, (class_name, tokenizers) in encoders.items():
        if name in source.components:
            source.require(name, class_name)
            source.require(name.replace("text_encoder", "tokenizer"), *tokenizers)
        elif missing is None and name not in optional:
            missing = name
    return missing


@contextmanager
def hooks_kept(*modules: Any) -> Iterator[None]:
    """Take away the hooks that transformers leaves on modules whose hidden states were asked for.

    Args:
      modules: None among them is skipped.
    """
    installed = "_output_capturing_hooks_installed"
    parts = [part for module in modules if module is not None for part in unwrapped(module).modules()]
    hooks = [(part, set(part._forward_hooks), installed in vars(part)) for part in parts]
    try:
        yield
    finally:
        for part, before, was_installed in hooks:
            for key in [key for key in part._forward_hooks if key not in before]:
                del part._forward_hooks[key]
            if not was_installed:
                vars(part).pop(installed, None)
