"""`tsdiff verifiers check`: whether a verifier works on this machine, told by pictures whose answers are known."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import click

from tsdiff.cli import values
from tsdiff.cli.app import FAILED
from tsdiff.cli.options import debug_option, json_option
from tsdiff.cli.output import number, plural, print_json, print_table
from tsdiff.treesearch.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from tsdiff.treesearch.node import Value
    from tsdiff.treesearch.protocols import Condition, Verifier

    Pair = tuple[Condition, Tensor, Tensor]

COLORS = {"red": (0.88, 0.14, 0.16), "green": (0.16, 0.64, 0.24), "blue": (0.16, 0.32, 0.9), "yellow": (0.94, 0.86, 0.16)}
PROMPT = "a {} circle"
ENOUGH = 5 / 6
"""Share of pairs that must come out right: an untrained network has about half of them right."""

TOLERANCE = 1e-5
BATCHES = (1, 2, 4, 8, 16)
SLOW_SECONDS = 2.0


@dataclass(frozen=True)
class Finding:
    """One line of the report; "failed" makes the exit status 1."""

    what: str
    status: Literal["ok", "failed", "skipped"]
    detail: str
    data: dict[str, Any] = field(default_factory=dict)


@click.command("verifiers")
@click.argument("action", type=click.Choice(["check"]))
@click.argument("name", metavar="NAME")
@click.option("--prompt", metavar="TEXT", help=f"What the images that are not pairs are judged by.  [default: {PROMPT.format('red')}]")
@click.option("--class", "class_label", type=values.CLASS, metavar="CLASS", help="The same, for verifiers that read a class.")
@click.option("--size", type=click.IntRange(8, 2048), default=64, show_default=True, metavar="PIXELS", help="Height and width of the images.")
@click.option("--device", type=values.DEVICE, default="auto", show_default=True, metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps.")
@json_option
@debug_option
def command(action: str, name: str, prompt: str | None, class_label: int | str | None, size: int, device: str, as_json: bool) -> int:
    """Check that a verifier works: its weights, scores and speed.

    \b
    Try:
      tsdiff verifiers check sharpness
      tsdiff verifiers check clip:model=FOLDER --size 512

    Does a matching image outscore a mismatched one, for images of coloured circles, or the verifier's own (see below)?
    Are scores of noise, plain images and checkerboards finite, equal when repeated, and the same whichever images share
    the batch? Also shown: SHA-256 of the weights, device, images per second. What cannot be checked is skipped and says
    why; the exit status is 1 if anything fails.

    A verifier may have a method examples() that returns (condition, matching image, mismatched image) triples, images
    (3, height, width) in [0, 1].
    """
    from tsdiff.treesearch.pictures import picture_device
    from tsdiff.treesearch.protocols import Condition
    from tsdiff.treesearch.references import resolve_verifier

    verifier = resolve_verifier(name)
    condition = Condition((PROMPT.format("red") if class_label is None else "") if prompt is None else prompt, class_label=class_label)
    findings = list(examine(verifier, condition, picture_device(device), size))
    if as_json:
        print_json({"ok": all(finding.status != "failed" for finding in findings), "findings": [asdict(finding) for finding in findings]})
    else:
        print_table(("", "status", "detail"), [(finding.what, finding.status, finding.detail) for finding in findings])
    return FAILED if any(finding.status == "failed" for finding in findings) else 0


def examine(verifier: Verifier, condition: Condition, device: str, size: int) -> Iterator[Finding]:
    """Every finding; weights load on the way."""
    from tsdiff.treesearch.pictures import unfit

    reason = f"{verifier.name} {unfit(verifier)}" if unfit(verifier) else ""
    if not reason and verifier.latency == "pending":
        reason = f"{verifier.name} answers later, and a person or a service would have to"
    if reason:
        yield Finding("scores", "skipped", reason)
        return
    verifier.check(condition)
    started = time.perf_counter()
    verifier.prepare(device)
    own = getattr(verifier, "device", "auto")
    yield Finding("device", "ok", f"{device if own == 'auto' else own}, ready after {time.perf_counter() - started:.1f} s")
    yield from _weights(verifier)
    yield _pairs(verifier, condition, device, size)
    yield _finite(verifier, condition, device, size)
    yield from _neighbours(verifier, condition, device, size)
    yield _speed(verifier, condition, device, size)


def _weights(verifier: Any) -> Iterator[Finding]:
    digests = getattr(verifier, "sha256", None)
    if not digests:
        yield Finding("weights", "skipped", "the verifier names no files of weights (no attribute sha256)")
        return
    for name, digest in digests.items():
        yield Finding(f"sha256 of {name}", "ok", digest)


# Pictures ------------------------------------------------------------------------------------------------------------


def circle(color: tuple[float, float, float], size: int) -> Tensor:
    """A disc of a colour on dark grey, (3, size, size)."""
    import torch

    across = torch.linspace(-1.0, 1.0, size)
    inside = across[:, None].square() + across[None, :].square() < 0.15
    return torch.where(inside, torch.tensor(color)[:, None, None], torch.full((3, 1, 1), 0.12)).contiguous()


def noise(size: int, number: int) -> Tensor:
    """Uniform noise, (3, size, size); equal numbers give equal noise."""
    import torch

    return torch.rand((3, size, size), generator=torch.Generator().manual_seed(number))


def odd_pictures(size: int) -> dict[str, Tensor]:
    """Pictures that no model should stumble over."""
    import torch

    step = torch.arange(size) // max(size // 8, 1) % 2
    return {
        "noise": noise(size, 0),
        "black": torch.zeros(3, size, size),
        "white": torch.ones(3, size, size),
        "grey": torch.full((3, size, size), 0.5),
        "checkerboard": (step[:, None] ^ step[None, :]).float().expand(3, size, size).contiguous(),
    }


# Checks --------------------------------------------------------------------------------------------------------------


def _scores(verifier: Verifier, pictures: Sequence[Tensor], conditions: Sequence[Condition], device: str, rows: int = 16) -> list[Value]:
    from tsdiff.treesearch.pictures import score_pictures

    return [values[verifier.name] for values in score_pictures([verifier], pictures, conditions, device=device, rows=rows)]


def _pairs(verifier: Verifier, condition: Condition, device: str, size: int) -> Finding:
    """Whether a matching picture outscores a mismatched one."""
    what = "matching pairs"
    own = getattr(verifier, "examples", None)
    if own is not None:
        pairs, which = list(own()), "its own examples"
    elif "conditions" not in verifier.needs:
        return Finding(what, "skipped", "the verifier does not read what an image should show, and has no examples of its own")
    elif condition.class_label is not None:
        return Finding(what, "skipped", "no image of a class can be drawn, and the verifier has no examples of its own")
    else:
        pairs, which = _circles(size), "circles of different colours"
    try:
        for wanted, _, _ in pairs:
            verifier.check(wanted)
    except UsageError as error:
        return Finding(what, "skipped", f"the verifier does not judge {which} ({error})")
    if not pairs:
        return Finding(what, "failed", "its examples() are empty")
    conditions = [wanted for wanted, _, _ in pairs]
    matching = _scores(verifier, [picture for _, picture, _ in pairs], conditions, device)
    mismatched = _scores(verifier, [picture for _, _, picture in pairs], conditions, device)
    silent = [value for value in (*matching, *mismatched) if value.score is None]
    if silent:
        return Finding(what, "failed", f"{plural(len(silent), 'image')} of {which} got no score: {silent[0].reason}")
    right = sum(_score(match) > _score(other) for match, other in zip(matching, mismatched, strict=True))
    gap = sum(_score(match) - _score(other) for match, other in zip(matching, mismatched, strict=True)) / len(pairs)
    good = right >= ENOUGH * len(pairs)
    text = f"{right} of {plural(len(pairs), 'matching image')} outscore a mismatched one ({which}), by {number(gap)} on average"
    return Finding(what, "ok" if good else "failed", text if good else f"{text}; at least {math.ceil(ENOUGH * len(pairs))} should", {"right": right, "pairs": len(pairs), "gap": gap})


def _circles(size: int) -> list[Pair]:
    """Every colour's prompt, with its own circle and each of the others."""
    from tsdiff.treesearch.protocols import Condition

    drawn = {name: circle(color, size) for name, color in COLORS.items()}
    return [(Condition(PROMPT.format(name)), drawn[name], drawn[other]) for name in COLORS for other in COLORS if other != name]


def _score(value: Value) -> float:
    assert value.score is not None
    return value.score


def _finite(verifier: Verifier, condition: Condition, device: str, size: int) -> Finding:
    """Whether odd pictures have scores."""
    odd = odd_pictures(size)
    scored = dict(zip(odd, _scores(verifier, list(odd.values()), [condition] * len(odd), device), strict=True))
    failed = [f"{name}: {value.reason}" for name, value in scored.items() if value.score is None]
    if failed:
        return Finding("finite scores", "failed", "; ".join(failed))
    return Finding("finite scores", "ok", ", ".join(f"{name} {number(value.score)}" for name, value in scored.items()), {name: value.score for name, value in scored.items()})


def _neighbours(verifier: Verifier, condition: Condition, device: str, size: int) -> Iterator[Finding]:
    """Whether a picture's score depends on the batch that it is in, and whether it repeats itself."""
    pictures = [picture for index, color in enumerate(COLORS.values()) for picture in (noise(size, index + 1), circle(color, size))]
    conditions = [condition] * len(pictures)
    together = _scores(verifier, pictures, conditions, device, len(pictures))
    backwards = _scores(verifier, pictures[::-1], conditions, device, len(pictures))[::-1]
    alone = _scores(verifier, pictures, conditions, device, 1)
    again = _scores(verifier, pictures, conditions, device, len(pictures))
    yield _same("repeats itself", f"the same {len(pictures)} images twice", [(together, again)])
    yield _same("batch neighbours", f"images alone, in a batch of {len(pictures)} and in one turned round", [(alone, together), (alone, backwards)])


def _same(what: str, which: str, answers: Sequence[tuple[list[Value], list[Value]]]) -> Finding:
    gaps = []
    for before, after in answers:
        for one, other in zip(before, after, strict=True):
            if (one.score is None) != (other.score is None):
                return Finding(what, "failed", f"{which}: an image has a score in one batch and none in another ({one.reason or other.reason})")
            if one.score is not None and other.score is not None:
                gaps.append(abs(one.score - other.score) / max(1.0, abs(one.score)))
    if not gaps:
        return Finding(what, "failed", f"{which}: no image got a score ({answers[0][0][0].reason})")
    worst = max(gaps)
    text = f"{which}: scores differ by {worst:.1e} at most"
    good = worst <= TOLERANCE
    return Finding(what, "ok" if good else "failed", text if good else f"{text}; {TOLERANCE:g} is allowed", {"difference": worst})


def _speed(verifier: Verifier, condition: Condition, device: str, size: int) -> Finding:
    """Images per second, by batch size, as long as a batch does not take long."""
    rates: dict[str, float] = {}
    for rows in BATCHES:
        pictures, conditions = [noise(size, index) for index in range(rows)], [condition] * rows
        first = _scores(verifier, pictures, conditions, device, rows)  # allocates, picks kernels
        if all(value.score is None for value in first):
            return Finding("images per second", "skipped", f"no image got a score ({first[0].reason})")
        seconds = min(_seconds(verifier, pictures, conditions, device, rows) for _ in range(2))
        rates[str(rows)] = rows / seconds
        if seconds > SLOW_SECONDS:
            break
    text = ", ".join(f"{rate:.3g} by {rows}" for rows, rate in rates.items())
    return Finding("images per second", "ok", f"{text} ({size} x {size})", rates)


def _seconds(verifier: Verifier, pictures: Sequence[Tensor], conditions: Sequence[Condition], device: str, rows: int) -> float:
    started = time.perf_counter()
    _scores(verifier, pictures, conditions, device, rows)
    return max(time.perf_counter() - started, 1e-9)
