"""What writes down what happens: `Recorder`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from tsdiff.treesearch.node import Node, Value
from tsdiff.treesearch.requests import Request

if TYPE_CHECKING:
    from torch import Tensor


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
