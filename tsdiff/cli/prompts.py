"""Prompt files: text with one prompt a line, or JSON lines.

Text: blank lines and lines that start with "#" are skipped. JSON lines (`.jsonl`, `.ndjson`, `.json`): each line is an
object with "prompt" or "class" or both, optionally "negative_prompt"; every other key is a fact about the prompt that
verifiers may read (`Condition.metadata`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Condition

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


def read_prompts(path: Path, *, negative_prompt: str = "", class_label: int | str | None = None) -> list[Condition]:
    """Read a prompt file.

    Args:
      path: a UTF-8 file, with or without byte-order mark.
      negative_prompt, class_label: for the lines that name none of their own.

    Raises:
      UsageError: naming the file and the line, if it cannot be read, is not UTF-8, holds no prompt or a bad line.
    """
    is_json = path.suffix.lower() in JSON_SUFFIXES
    conditions = []
    # Only \n ends a line: prompts may hold the other separators that str.splitlines knows.
    for index, line in enumerate(_read_text(path).split("\n"), start=1):
        line = line.strip()
        if not line or (not is_json and line.startswith("#")):
            continue
        where = f"{path}, line {index}"
        fields = _parse_line(where, line) if is_json else {"prompt": line}
        conditions.append(Condition(**({"negative_prompt": negative_prompt, "class_label": class_label} | fields)))
    if not conditions:
        raise UsageError(f"{path} holds no prompt; write one {'JSON object' if is_json else 'prompt'} a line")
    return conditions


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"prompt file {path} cannot be read ({error.strerror}); check its name and its rights") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UsageError(f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8") from error


def _parse_line(where: str, line: str) -> dict[str, Any]:
    """The fields of a `Condition` that one JSON line names."""
    try:
        data = json.loads(line, parse_constant=_refuse_constant)
    except ValueError as error:
        problem = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise UsageError(f'{where}: not JSON ({problem}); write one object a line, e.g. {{"prompt": "a red cube"}}') from error
    if not isinstance(data, dict):
        raise UsageError(f'{where}: {type(data).__name__} instead of an object; write e.g. {{"prompt": "a red cube"}}')
    if "prompt" not in data and "class" not in data:
        raise UsageError(f'{where}: neither "prompt" nor "class"; one of them is needed')
    fields: dict[str, Any] = {}
    for key in ("prompt", "negative_prompt"):
        if key in data:
            fields[key] = data.pop(key)
            if not isinstance(fields[key], str):
                raise UsageError(f'{where}: "{key}" is {json.dumps(fields[key])} but must be a string')
    if "class" in data:
        fields["class_label"] = data.pop("class")
        if isinstance(fields["class_label"], bool) or not isinstance(fields["class_label"], (int, str)):
            raise UsageError(f'{where}: "class" is {json.dumps(fields["class_label"])} but must be an id or a name')
    return fields | {"metadata": data}


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
