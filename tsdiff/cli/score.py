"""`tsdiff score`: what verifiers think of picture files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tsdiff.cli import values
from tsdiff.cli.app import FAILED
from tsdiff.cli.options import debug_option, json_option
from tsdiff.cli.output import number, one_line, plural, print_facts, print_json, print_table, say
from tsdiff.treesearch.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from tsdiff.treesearch.node import Value
    from tsdiff.treesearch.protocols import Condition, Verifier

AT_ONCE = 64
"""Pictures in memory, at most."""

PIXELS_AT_ONCE = 1 << 24
"""Pixels in memory, unless one picture has more: 200 MB as numbers."""


@dataclass
class Scored:
    """A picture file and what became of it."""

    path: str
    values: dict[str, Value] = field(default_factory=dict)
    error: str | None = None

    @property
    def whole(self) -> bool:
        """Whether every verifier gave a score."""
        return self.error is None and all(value.score is not None for value in self.values.values())


@click.command("score")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option("--prompt", metavar="TEXT", help="What the images should show, for verifiers that read it.")
@click.option("--class", "class_label", type=values.CLASS, metavar="CLASS", help="Class id or name, for verifiers that read it.")
@click.option("--verifier", "verifiers", multiple=True, required=True, metavar="NAME", help="A name of `tsdiff list verifiers`; repeatable.")
@click.option("--device", type=values.DEVICE, default="auto", show_default=True, metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps.")
@json_option
@debug_option
def command(images: tuple[str, ...], prompt: str | None, class_label: int | str | None, verifiers: tuple[str, ...], device: str, as_json: bool) -> int:
    """Score image files.

    \b
    Try:
      tsdiff score runs/*/best.png --verifier sharpness --verifier luminance
      tsdiff score FOLDER --prompt "a red cube" --verifier clip:model=FOLDER

    An IMAGE is a file, a folder (the images in it) or a pattern such as 'out/**/*.png'. All modes become RGB:
    transparency is laid over white, 16-bit grayscale is scaled, EXIF orientation is applied. Nothing is resized; an
    image of more than 33,554,432 pixels is refused. Files that cannot be used are named and the others still scored;
    the exit status is 1 then, and where a verifier gave no score.
    """
    from tsdiff.treesearch.pictures import judges_of, picture_device

    judges = judges_of(verifiers)
    condition = condition_of(judges, prompt, class_label)
    where = picture_device(device)
    for judge in judges:
        judge.prepare(where)
    done: list[Scored] = []
    for scored in score_files(images, judges, condition, where):
        done.append(scored)
        if as_json:
            print_json(_record(scored, condition))
    if not as_json:
        _show([one for one in done if one.error is None], [judge.name for judge in judges])
    for one in done:
        if one.error is not None:
            say("failed", one.error)
        for name, value in one.values.items():
            if value.score is None:
                say("failed", f"{one.path}: {name}: {value.reason}")
    short = sum(not one.whole for one in done)
    if short and len(done) > 1:
        say("", f"{plural(len(done) - short, 'image')} of {len(done):,} scored by every verifier")
    return FAILED if short else 0


def condition_of(judges: Sequence[Verifier], prompt: str | None, class_label: int | str | None) -> Condition:
    """What images are judged by.

    Raises:
      UsageError: if a verifier reads it and there is nothing to read, or cannot judge by it.
    """
    from tsdiff.treesearch.protocols import Condition

    if prompt is not None and any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UsageError(f"prompt {prompt!r} is not UTF-8; check the terminal's encoding")
    readers = [judge.name for judge in judges if "conditions" in judge.needs and judge.latency == "immediate"]
    if prompt is None and class_label is None and readers:
        raise UsageError(f"verifier {readers[0]} reads what an image should show; give it with --prompt or --class (--prompt '' is the empty prompt)")
    condition = Condition(prompt or "", class_label=class_label)
    for judge in judges:
        judge.check(condition)
    return condition


def score_files(names: Sequence[str], judges: Sequence[Verifier], condition: Condition, device: str) -> Iterator[Scored]:
    """Read and score files in their order, as many at once as memory should hold."""
    from tsdiff.treesearch.picturefiles import PictureError, find_pictures, read_picture

    batch: list[tuple[Scored, Tensor | None]] = []
    held = 0
    for found in find_pictures(names):
        if isinstance(found, PictureError):
            batch.append((Scored(found.name, error=str(found)), None))
            continue
        try:
            picture = read_picture(found)
        except PictureError as error:
            batch.append((Scored(str(found), error=str(error)), None))
            continue
        pixels = picture[0].numel()
        if held and held + pixels > PIXELS_AT_ONCE:
            yield from _score(batch, judges, condition, device)
            batch, held = [], 0
        batch.append((Scored(str(found)), picture))
        held += pixels
        if len(batch) >= AT_ONCE:
            yield from _score(batch, judges, condition, device)
            batch, held = [], 0
    yield from _score(batch, judges, condition, device)


def _score(batch: Sequence[tuple[Scored, Tensor | None]], judges: Sequence[Verifier], condition: Condition, device: str) -> Iterator[Scored]:
    from tsdiff.treesearch.pictures import score_pictures

    read = [(scored, picture) for scored, picture in batch if picture is not None]
    answers = score_pictures(judges, [picture for _, picture in read], [condition] * len(read), device=device)
    for (scored, _), answer in zip(read, answers, strict=True):
        scored.values = {judge.name: answer[judge.name] for judge in judges}
    yield from (scored for scored, _ in batch)


def _show(done: Sequence[Scored], names: Sequence[str]) -> None:
    """One image with all the parts of its scores, or a table of several."""
    if len(done) == 1:
        (one,) = done
        facts: dict[str, Any] = {"image": one.path}
        for name in names:
            value = one.values[name]
            facts[name] = number(value.score) or "-"
            facts |= {f"- {name}: {one_line(part)}" if len(names) > 1 else f"- {one_line(part)}": number(score) for part, score in (value.parts or {}).items()}
        print_facts(facts)
    elif done:
        rows = [(one.path, *(number(one.values[name].score) for name in names)) for one in done]
        print_table(("image", *names), rows, numeric=names)


def _record(scored: Scored, condition: Condition) -> dict[str, Any]:
    """A file as one strict JSON object."""
    return {
        "image": str(Path(scored.path)),
        "prompt": condition.prompt,
        "class": condition.class_label,
        "values": {name: value.to_json() for name, value in scored.values.items()},
        "error": scored.error,
    }
