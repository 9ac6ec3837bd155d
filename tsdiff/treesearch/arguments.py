"""What `prepare` was called with, as a file, so that a run can be continued by calling it again.

Plain values are strict JSON. Conditions and tensors are marked by a key that starts with "@"; tensors and the initial
image are files beside it. What cannot be written down (a pipeline, a verifier made in Python) is marked too, and has to
be passed again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdiff.treesearch import registry
from tsdiff.treesearch.errors import TsdiffError, UsageError, unknown_name
from tsdiff.treesearch.parameters import build
from tsdiff.treesearch.plan import Plan, policy_options
from tsdiff.treesearch.protocols import Condition

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

INPUTS = "inputs.safetensors"
IMAGE = "init.png"
OWN = ("out",)
"""Not part of a run: where it is."""

CHANGEABLE = ("max_batch", "memory_limit", "seconds", "previews", "metadata")
"""Arguments that may change while a run lasts."""


@dataclass
class Written:
    """Arguments as strict JSON, and what goes into files beside.

    Attributes:
      tensors: for `INPUTS`.
      image: for `IMAGE`.
    """

    data: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    image: Image | None = None


def write_arguments(arguments: Mapping[str, Any], image: Image | None, defaults: Mapping[str, Any] | None = None) -> Written:
    """Arguments of `prepare`, without those that are `defaults` (None takes its own).

    `image` is the initial image, already of the search's size.
    """
    from tsdiff.treesearch.plan import prepare

    defaults = prepare.__kwdefaults__ or {} if defaults is None else defaults
    written = Written({}, image=image)
    for name, value in arguments.items():
        if name in OWN or (name in defaults and _same(value, defaults[name])):
            continue
        if name == "policy":
            written.data |= _policy(value)
        elif name == "init_image":
            written.data[name] = {"@image": IMAGE}
        else:
            written.data[name] = _plain(name, value, written)
    return written


def prepare_again(data: Mapping[str, Any], options: Mapping[str, Any], folder: Path, given: Mapping[str, Any], **more: Any) -> Plan:
    """`prepare` with the arguments of a saved run, and more.

    A run that named no model keeps the one that was the default when it began, as its options tell.

    Args:
      data, folder, given: as for `read_arguments`.
      options: of the run, as resolved.

    Raises:
      UsageError, SetupError: for whatever cannot be done as asked.
    """
    from tsdiff.treesearch.plan import prepare

    known = {"model", "prompts", *(prepare.__kwdefaults__ or {})} - set(OWN)
    for name in given:
        if name not in known:
            raise unknown_name("option", name, known - {"verifiers"} | {"verifier", "callback"})
    if strange := [name for name in data if name not in known]:
        raise UsageError(f"{str(folder)!r} was searched with {', '.join(map(repr, strange))}, which this tsdiff does not know; continue it with the tsdiff that began it, or undo what was changed in its files")
    arguments = read_arguments(data, folder, given)
    with _making_sense(folder, given):
        if arguments.get("model") is not None:
            return prepare(**arguments, **more)
        plan = prepare(**arguments | {"model": options["model"]}, **more)
    return dataclasses.replace(plan, arguments={**plan.arguments, "model": None})


def read_arguments(data: Mapping[str, Any], folder: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments to call `prepare` with.

    Args:
      data: as written.
      folder: where the files beside are.
      given: arguments passed now, which win.

    Raises:
      UsageError: if something that could not be written down is not given.
    """
    missing = [name for name, value in data.items() if name not in given and object_in(value)]
    if missing:
        described = ", ".join(f"{name} ({object_in(data[name])})" for name in missing)
        raise UsageError(f"{str(folder)!r} was made with objects that no file holds: {described}; continue it from Python: tsdiff.resume({str(folder)!r}, {', '.join(f'{name}=...' for name in missing)})")
    with _making_sense(folder, {}):
        arguments = {name: _restore(value, folder) for name, value in data.items() if name not in given} | dict(given)
    if "policy" in given and "policy_options" not in given and not isinstance(given["policy"], str):
        arguments.pop("policy_options", None)  # the object has its own
    return arguments


@contextmanager
def _making_sense(folder: Path, given: Mapping[str, Any]) -> Iterator[None]:
    """Files may hold anything once somebody has edited them: what cannot be understood is a UsageError, unless an object that is `given` may be at fault."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        if isinstance(error, TsdiffError) or given.keys() - set(CHANGEABLE):
            raise
        why = " ".join(str(error).split())
        raise UsageError(f"{str(folder)!r} cannot be continued: what its files say of the search makes no sense ({type(error).__name__}: {why})") from error


def _policy(policy: Any) -> dict[str, Any]:
    """A policy object as its name and options, where that makes an equal one."""
    if isinstance(policy, str):
        return {"policy": policy}
    try:
        options = policy_options(policy)
        cls: Any = registry.policies.load(policy.name)
        if type(policy) is cls and build(cls, options) == policy:
            return {"policy": policy.name, "policy_options": options}
    except (TsdiffError, TypeError):  # not a registered one, or one with parameters that are no plain values
        pass
    return {"policy": _object(policy)}


def _plain(name: str, value: Any, written: Written) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(f"{name}.{i}", item, written) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {str(key): _plain(f"{name}.{key}", item, written) for key, item in value.items()}
    if isinstance(value, Condition):
        fields = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
        return {"@condition": {key: _plain(f"{name}.{key}", item, written) for key, item in fields.items()}}
    if hasattr(value, "detach"):
        written.tensors[name] = value.detach().cpu().contiguous()
        return {"@tensor": name}
    if hasattr(value, "item"):
        return value.item()
    return _object(value)


def _object(value: Any) -> dict[str, Any]:
    name = getattr(value, "name", None) or getattr(value, "__name__", None)
    return {"@object": type(value).__name__ if not isinstance(name, str) else f"{type(value).__name__} {name}"}


def _restore(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_restore(item, folder) for item in value]
    if not isinstance(value, dict):
        return value
    readers: dict[str, Callable[[Any], Any]] = {
        "@image": lambda name: folder / name,
        "@tensor": lambda name: _tensor(folder / INPUTS, name),
        "@condition": lambda fields: Condition(**{key: _restore(item, folder) for key, item in fields.items()}),
    }
    if len(value) == 1 and (mark := next(iter(value))) in readers:
        return readers[mark](value[mark])
    return {key: _restore(item, folder) for key, item in value.items()}


def _tensor(path: Path, name: str) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{str(path)!r} cannot be read ({error}); the run cannot be continued without it") from None


def object_in(value: Any) -> str:
    """What the first object is that could not be written down; "" if there is none."""
    if isinstance(value, dict):
        if value.keys() == {"@object"}:
            return str(value["@object"])
        value = list(value.values())
    if isinstance(value, list):
        return next(filter(None, map(object_in, value)), "")
    return ""


def _same(value: Any, default: Any) -> bool:
    return value is default or (type(value) is type(default) and isinstance(value, (bool, int, float, str, tuple)) and value == default)
