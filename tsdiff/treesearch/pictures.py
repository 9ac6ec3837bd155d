"""Scoring pictures that no search has made, on the path that a search's own take: the same batches, the same values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from tsdiff.treesearch.batches import Batches, Limits
from tsdiff.treesearch.errors import SetupError, UsageError
from tsdiff.treesearch.ledger import EngineLedger
from tsdiff.treesearch.node import Move, Value
from tsdiff.treesearch.protocols import CalibratedVerifier, Condition, NullRecorder, PendingVerifier, Verifier
from tsdiff.treesearch.references import VerifierLike, resolve_verifier
from tsdiff.treesearch.run import Run
from tsdiff.treesearch.schedule import Schedule, SolverInfo
from tsdiff.treesearch.stopwatch import Stopwatch
from tsdiff.treesearch.tree import Tree
from tsdiff.treesearch.work import Candidate, Judgement

if TYPE_CHECKING:
    from torch import Tensor

KNOWN = frozenset({"images", "conditions", "levels", "node_ids"})
"""What there is of a picture without a search."""

_SOLVER = SolverInfo("none", "none")
_SCHEDULE = Schedule("none", "none", (0.0,), (0.0, 1.0), (1.0, 0.0), ((0.0, 1.0), (1.0, 0.0)), 1.0)


def judges_of(verifiers: Sequence[VerifierLike]) -> tuple[Verifier, ...]:
    """The verifiers that references name, with different names.

    Raises:
      UsageError: for an unknown name or parameter, or a verifier that cannot score a picture by itself.
    """
    judges = tuple(resolve_verifier(verifier) for verifier in verifiers)
    for judge in judges:
        reason = unfit(judge)
        if reason:
            raise UsageError(f"verifier {judge.name} {reason}")
    names = [judge.name for judge in judges]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"verifier {twice[0]!r} is given twice; scores are kept by name, so name each once")
    return judges


def unfit(judge: Verifier) -> str:
    """Why a verifier cannot score a picture by itself; "" if it can."""
    missing = sorted(judge.needs - KNOWN)
    if missing:
        return f"reads {', '.join(missing)} of a search, which a picture does not have; choose one that reads images"
    if judge.scope == "set":
        return "scores relative to a whole set, so that a picture has no score of its own; choose one of scope 'row'"
    if isinstance(judge, CalibratedVerifier) and judge.pool is not None:
        return "compares with plain samples of a search, which a picture does not have; choose one that scores by itself"
    if judge.latency == "pending" and not isinstance(judge, PendingVerifier):
        return "says that its latency is pending but has no method `ask`"
    return ""


def picture_device(name: str = "auto") -> str:
    """Where pictures are scored: `name`, or the best device there is. Raises SetupError if it is not there."""
    import torch

    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = [f"cuda:{index}" for index in range(cuda)] + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    device = here[0] if name == "auto" else "cuda:0" if name == "cuda" else name
    if device not in here:
        raise SetupError(f"device {name!r} is not there; this machine has {', '.join(here)}")
    return device


class _Sitter:
    """What batches ask of a run, for the pictures of one condition."""

    def __init__(self, condition: Condition, verifier: str) -> None:
        self.tree = Tree(_SCHEDULE, _SOLVER, condition, seed=0, verifier=verifier)

    def blame(self, error: Exception) -> None:
        """The reason is in the value of each picture."""


def score_pictures(judges: Sequence[Verifier], pictures: Sequence[Tensor], conditions: Sequence[Condition], *, device: str, rows: int = 16) -> list[dict[str, Value]]:
    """Score pictures by prepared verifiers, pictures of one size together.

    Args:
      pictures: each (3, H, W) in [0, 1].
      conditions: what each is judged by.
      device: where the verifiers get to see them.
      rows: pictures in one call, at most.

    Returns:
      For each picture its values, by verifier. A verifier that fails gives a value without score, which says why.
    """
    import torch

    ledger = EngineLedger()
    batches = Batches(Limits(verify=rows), device, ledger, NullRecorder(), Stopwatch(ledger.seconds))
    sitters: dict[int, _Sitter] = {}
    values: list[dict[str, Value]] = [{} for _ in pictures]
    sizes: dict[tuple[int, ...], list[int]] = {}
    for row, picture in enumerate(pictures):
        sizes.setdefault(tuple(picture.shape), []).append(row)
    with torch.no_grad():
        for same in sizes.values():
            for row in same:
                sitter = sitters.setdefault(id(conditions[row]), _Sitter(conditions[row], judges[0].name))
                candidate = _candidate(sitter, pictures[row].to(device))
                for judge in judges:
                    batches.judge(Judgement(judge, [candidate], _keep(values[row], judge.name)))
            while batches.launch(full=False):
                pass
        while batches.hear(wait=True):
            pass
    return values


def _keep(values: dict[str, Value], name: str) -> Any:
    def then(scored: list[Value]) -> None:
        values[name] = scored[0]

    return then


def _candidate(sitter: _Sitter, picture: Tensor) -> Candidate:
    """A finished sample of which only the picture is known."""
    node = sitter.tree.add_root(Move("draw", (_SCHEDULE.last,)), _SCHEDULE.last)
    nothing = cast("Tensor", None)
    return Candidate(cast(Run, sitter), node, node.level, nothing, nothing, {"images": picture}, {})
