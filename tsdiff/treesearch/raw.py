"""A tensor as bytes: what segments store. Neither torch nor numpy is imported before a tensor or array is asked for."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tsdiff.treesearch.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
"""Bytes of one element of each type that can be stored, by the name that torch has for it."""


@dataclass(frozen=True, eq=False)
class Raw:
    """A tensor's elements in row-major order.

    Attributes:
      dtype: a key of `ITEM_BYTES`.
      shape: without limits; () is a scalar, and a 0 in it means that there are no elements.
      data: little-endian bytes, one-dimensional.
    """

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise UsageError(f"tensors of type {self.dtype!r} cannot be stored; allowed are {', '.join(ITEM_BYTES)}")
        wanted = math.prod(self.shape) * ITEM_BYTES[self.dtype]
        if min(self.shape, default=0) < 0 or self.data.nbytes != wanted:
            raise UsageError(f"a {self.dtype} tensor of shape {self.shape} does not have {self.data.nbytes} bytes")

    @staticmethod
    def of_tensor(tensor: Tensor) -> Raw:
        """The bytes of a torch tensor, on any device. Those of a contiguous one on the CPU are not copied."""
        import torch

        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in ITEM_BYTES:
            raise UsageError(f"tensors of type {dtype!r} cannot be stored; allowed are {', '.join(ITEM_BYTES)}")
        elements = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        return Raw(dtype, tuple(tensor.shape), _swapped(elements.data, ITEM_BYTES[dtype]))

    @staticmethod
    def of_tensors(tensors: Sequence[Tensor]) -> list[Raw]:
        """The bytes of many torch tensors; those of one type and shape leave their device together."""
        import torch

        alike: dict[tuple[Any, ...], list[int]] = {}
        for index, tensor in enumerate(tensors):
            alike.setdefault((tensor.dtype, tensor.shape, tensor.device), []).append(index)
        raws: dict[int, Raw] = {}
        for indices in alike.values():
            if len(indices) == 1:
                raws[indices[0]] = Raw.of_tensor(tensors[indices[0]])
                continue
            together = Raw.of_tensor(torch.stack([tensors[index].detach() for index in indices]))
            shape, size = together.shape[1:], together.data.nbytes // len(indices)
            for place, index in enumerate(indices):
                raws[index] = Raw(together.dtype, shape, together.data[place * size : (place + 1) * size])
        return [raws[index] for index in range(len(tensors))]

    @staticmethod
    def of_array(array: NDArray[Any]) -> Raw:
        """The bytes of a numpy array."""
        import numpy as np

        dtype = array.dtype.name
        if dtype not in ITEM_BYTES:
            raise UsageError(f"arrays of type {dtype!r} cannot be stored; allowed are {', '.join(ITEM_BYTES)}")
        elements = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")).reshape(-1).view(np.uint8)
        return Raw(dtype, array.shape, _swapped(elements.data, ITEM_BYTES[dtype]))

    def tensor(self) -> Tensor:
        """A torch tensor on the CPU; it shares memory with `data` where that can be written to."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        data = _swapped(self.data, ITEM_BYTES[self.dtype])
        if not data.nbytes:
            return torch.empty(self.shape, dtype=dtype)
        return torch.frombuffer(bytearray(data) if data.readonly else data, dtype=torch.uint8).view(dtype).reshape(self.shape)

    def array(self) -> NDArray[Any]:
        """A numpy array. Raises UsageError for bfloat16, which numpy does not have."""
        import numpy as np

        if self.dtype == "bfloat16":
            raise UsageError("numpy has no bfloat16; read it as a tensor instead")
        data = _swapped(self.data, ITEM_BYTES[self.dtype])
        return np.frombuffer(data, dtype=self.dtype).reshape(self.shape)


def _swapped(data: memoryview, item: int) -> memoryview:
    """Little-endian bytes from the machine's own, or back."""
    if sys.byteorder == "little" or item == 1:
        return data
    import numpy as np

    return np.frombuffer(data, dtype=f"u{item}").byteswap().view(np.uint8).data
