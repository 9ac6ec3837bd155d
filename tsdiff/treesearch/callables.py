"""Plain functions as verifiers: anything that maps images and prompts to one score per image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Candidates, Condition, Scores

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CallableVerifier:
    """A function `(images, prompts) -> scores` as a verifier.

    The function is given images (B, 3, H, W) in [0, 1] on the model's device and B prompts, and returns B scores,
    higher is better: a tensor (B,) or (B, 1), a numpy array, or a list of numbers (None or NaN where an image cannot be
    scored). A row's score must depend on its own image and prompt alone.

    Args:
      function: what to call.
      name: what its scores are called; "" takes the function's own name.
    """

    function: Callable[[Tensor, list[str]], Any]
    name: str = ""
    needs: frozenset[str] = field(default=frozenset({"images", "conditions"}), init=False)
    scope: Literal["row", "set"] = field(default="row", init=False)
    latency: Literal["immediate", "pending"] = field(default="immediate", init=False)
    judges: Literal["any", "final"] = field(default="any", init=False)
    differentiable: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise UsageError(f"verifier {self.function!r} is not callable; give a function (images, prompts) -> scores, or a verifier's name")
        if not self.name:
            own = getattr(self.function, "__name__", type(self.function).__name__)
            object.__setattr__(self, "name", "callable" if own == "<lambda>" else own)

    def prepare(self, device: str) -> None:
        """The function looks after its own weights."""

    def check(self, condition: Condition) -> None:
        """Any condition will do; the function sees its prompt."""

    def score(self, candidates: Candidates) -> Scores:
        """Call the function once for the batch.

        Raises:
          UsageError: if it does not return one number for every image.
        """
        prompts = [condition.prompt for condition in candidates.conditions]
        returned = self.function(candidates.images, prompts)
        return Scores(self._one_each(returned, len(prompts)))

    def _one_each(self, returned: Any, count: int) -> Tensor:
        import torch

        if isinstance(returned, Sequence) and not isinstance(returned, str):
            returned = [float("nan") if value is None else value for value in returned]
        try:
            values = torch.as_tensor(returned).detach().float()
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"verifier {self.name!r} returned {type(returned).__name__} but must return {count} numbers, one for each image, "
                f"as a tensor, an array or a list ({error})"
            ) from error
        if tuple(values.shape) not in ((count,), (count, 1)):
            raise UsageError(
                f"verifier {self.name!r} returned scores of shape {tuple(values.shape)} for {count} images; return one number for each image, "
                f"of shape ({count},)"
            )
        return values.reshape(count)
