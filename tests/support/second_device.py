"""A second device, played on the CPU: its tensors keep to themselves as an accelerator's do, and every transfer is written down.

Arithmetic is the CPU's own, so that numbers must come out equal to the last bit. What torch refuses of a real device is
refused here, too: an operation whose tensors are on two devices, or a look at numbers that have not been brought back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("mps:0")
"""Its name: of the accelerators that torch knows, one that needs no driver before a tensor says that it is there."""

aten = torch.ops.aten


class There(torch.Tensor):
    """A tensor on the second device; `numbers` is the plain tensor behind it, which only this file may look at."""

    numbers: torch.Tensor

    @staticmethod
    def __new__(cls, numbers: torch.Tensor, machine: Machine) -> There:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, numbers.size(), strides=numbers.stride(), storage_offset=numbers.storage_offset(), dtype=numbers.dtype, device=DEVICE
        )
        made.numbers, made.machine = numbers, machine
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        owner = next(leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, There))
        return owner.machine.run(func, args, kwargs or {})

    # Whoever looks at numbers waits for a transfer.
    def tolist(self) -> Any:
        return self.cpu().tolist()

    def item(self) -> Any:
        return self.cpu().item()

    def __float__(self) -> float:
        return float(self.cpu())

    def __int__(self) -> int:
        return int(self.cpu())

    def __bool__(self) -> bool:
        return bool(self.cpu())

    def __getitem__(self, index: Any) -> There:
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, list) or (isinstance(part, torch.Tensor) and not isinstance(part, There)):
                self.machine.sent.append((len(part),))  # places travel to what they are taken from
        return There(self.numbers[tree_map(_plain, index)], self.machine)

    # Torch asks for the device's driver before these.
    def __invert__(self) -> torch.Tensor:
        return self.bitwise_not()

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
        return self.clone(memory_format=memory_format)

    def __repr__(self) -> str:
        return f"There({tuple(self.shape)})"


@dataclass
class Machine(TorchDispatchMode):
    """The CPU and the second device.

    Attributes:
      sent: shape of everything that went to the second device.
      fetched: shape of everything that came back.
    """

    sent: list[tuple[int, ...]] = field(default_factory=list)
    fetched: list[tuple[int, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def forget(self) -> None:
        """Nothing has moved yet."""
        self.sent.clear()
        self.fetched.clear()

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One operation of torch."""
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = [tensor for tensor in given if isinstance(tensor, There)]
        asked = kwargs.get("device")
        if asked is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        goes = bool(there) if asked is None else asked.type == DEVICE.type
        moves = func in (aten._to_copy.default, aten.copy_.default)
        if not moves and there and any(not isinstance(tensor, There) and tensor.dim() for tensor in given):
            raise RuntimeError(f"Expected all tensors to be on the same device, but {func} was given some on {DEVICE} and some on cpu")
        if func is aten.copy_.default:
            goes = isinstance(args[0], There)
        if moves and goes != isinstance(args[1 if func is aten.copy_.default else 0], There):
            (self.sent if goes else self.fetched).append(tuple(given[-1].shape))
        plain_args, plain_kwargs = tree_map(_plain, (args, kwargs))
        answer = func(*plain_args, **plain_kwargs)
        if func._schema.is_mutable and isinstance(args[0], torch.Tensor):
            return args[0]
        return tree_map(lambda leaf: There(leaf, self) if isinstance(leaf, torch.Tensor) else leaf, answer) if goes else answer


class _Python(TorchFunctionMode):
    """What torch does before operations begin: "mps" is "mps:0", and new numbers are made on the CPU and sent."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = [_numbered(value) for value in args], {key: _numbered(value) for key, value in (kwargs or {}).items()}
        if func is torch.Tensor.new_tensor and isinstance(args[0], There):
            func, args, kwargs = torch.tensor, args[1:], {"dtype": args[0].dtype, "device": DEVICE} | kwargs
        if func is torch.tensor and kwargs.get("device") == DEVICE:
            return torch.tensor(*args, **kwargs | {"device": "cpu"}).to(DEVICE)
        return func(*args, **kwargs)


def _numbered(given: Any) -> Any:
    is_it = given == DEVICE.type if isinstance(given, str) else isinstance(given, torch.device) and given.type == DEVICE.type
    return DEVICE if is_it else given


def _plain(leaf: Any) -> Any:
    return leaf.numbers if isinstance(leaf, There) else leaf


@contextmanager
def second_device() -> Iterator[Machine]:
    """As long as it lasts, this machine has the device "mps"."""
    overwritten = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a plain parameter cannot turn into a `There`
    try:
        with pytest.MonkeyPatch.context() as patched, _Python(), Machine() as machine:
            patched.setattr(torch.backends.mps, "is_available", lambda: True)
            # It looks for the device's kernel by itself.
            patched.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *args, **kwargs: machine.run(aten.scaled_dot_product_attention.default, args, kwargs))
            yield machine
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwritten)
