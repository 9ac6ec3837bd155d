"""Several verifiers as one: their scores of the same candidates, combined by a rule (`ensemble_rules`)."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from tsdiff.treesearch.errors import TsdiffWarning, UsageError
from tsdiff.treesearch.parameters import parameter
from tsdiff.treesearch.protocols import BoundVerifier, CalibratedVerifier, Candidates, Condition, Need, Pool, Scores, Verifier
from tsdiff.treesearch.references import resolve_verifier
from tsdiff.treesearch.registry import split_elements, split_options
from tsdiff.treesearch.schedule import Schedule
from tsdiff.verifiers.ensemble_rules import Pareto, Rank, make_rule
from tsdiff.verifiers.ensemble_tables import LEAST_SCORES, Calibration
from tsdiff.verifiers.views import View, numbers_of

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 16
"""Rows that a member of scope "row" is given at most in one call, where the set to be ranked is larger."""


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """Several verifiers as one, whose scores of a candidate become one score by a rule.

    On the command line `--verifier clip --verifier sharpness --ensemble rank`, in Python `ensemble="rank"`; or as one
    reference, with the members' own options in brackets:

      ensemble:rule=weighted,weights=5,1,members=[clip:model=FOLDER,scale=logit],sharpness

    Rules, with their parameters after a colon (`--ensemble weighted:weights=5,1`):
      rank       share of candidates beaten, by the mean rank (Ma et al. 2025, arXiv 2501.09732); weights
      pareto     non-dominated front, then crowding distance (Deb et al. 2002, NSGA-II)
      weighted   weighted sum of the scores themselves; weights
      zscore     mean standard score among plain samples of the same level; weights, over=base|set, samples, levels
      minimum    worst standard score; sharpness (of a soft minimum), over=base|set, samples, levels
      quantile   mean place among plain samples of the same level; combine_by=mean|geometric|minimum, weights, samples, levels

    rank, pareto and over=set compare the candidates of one request, so that policies which back scores up or weight
    particles by them refuse them; the others score each candidate by itself. zscore, minimum and quantile compare with
    plain samples of the same model, schedule and prompts. Those are made and scored before the search (`samples` of them,
    at `levels` levels), booked on a line of their own, and kept in a cache folder.

    Each member's score is a part of the ensemble's by the member's name, its own parts by "member/part". Where a member
    has no score, rank and pareto put the candidate last under that member and say why; the others have no score for it.
    A member that could score no candidate of a set leaves the whole set without scores. With a member that judges final
    samples only, so does the ensemble; with one of scope "set", or one whose answers come later, so do the ensemble's,
    unless plain samples are to be scored.

    Raises:
      UsageError: for a wrong rule or parameter, fewer than two members, two of one name, or members that the rule cannot
        use.
    """

    members: tuple[Any, ...] = parameter((), help="two or more verifiers: [NAME:key=value,...],[NAME],NAME")
    rule: Any = parameter("rank", help="rank, pareto, weighted, zscore, minimum or quantile")  # noqa: RUF009 (a field)
    name: str = parameter("", help="what its scores are called; RULE(MEMBER+MEMBER) if none is given")
    _state: dict[str, Any] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        members = split_elements(self.members) if isinstance(self.members, str) else self.members
        object.__setattr__(self, "members", tuple(resolve_verifier(member) for member in members))
        object.__setattr__(self, "rule", make_rule(self.rule))
        names = [member.name for member in self.members]
        if not self.name:
            object.__setattr__(self, "name", f"{self.rule.name}({'+'.join(names)})")
        if any(character in self.name for character in ":=,@ \t\n"):
            raise UsageError(f"ensemble: name is {self.name!r} but must not contain ':', '=', ',', '@' or spaces")
        self._check_members(names)

    @classmethod
    def from_reference(cls, text: str) -> Ensemble:
        """From what follows "ensemble:": rule, members and name, and the rule's own parameters."""
        options = split_options(text)
        members, rule, name = (options.pop(key, default) for key, default in (("members", ""), ("rule", "rank"), ("name", "")))
        return cls(members=tuple(split_elements(members)), rule=make_rule(rule, options), name=name)

    def _check_members(self, names: Sequence[str]) -> None:
        if len(names) < 2:
            raise UsageError(f"ensemble {self.rule.name} has {len(names)} members but needs at least two; write members=[NAME:key=value,...],[NAME]")
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise UsageError(f"ensemble {self.rule.name}: two members are called {twice[0]!r}; give one of them another name (NAME:name=...)")
        if self.rule.num_weights not in (0, len(names)):
            raise UsageError(f"ensemble {self.rule.name}: {self.rule.num_weights} weights were given for {len(names)} members; give one for each")
        for member in self.members:
            if isinstance(member, CalibratedVerifier) and member.pool is not None:
                raise UsageError(f"ensemble {self.rule.name}: member {member.name} compares with plain samples itself, and only the outermost verifier may; name its members instead")
            if self.rule.calibrated and (member.scope == "set" or member.latency == "pending"):
                why = "scores whole sets" if member.scope == "set" else "answers later"
                raise UsageError(
                    f"ensemble {self.rule.name}: member {member.name} {why}, so that no table of plain samples can be made for it; "
                    "use rule rank, pareto or weighted, or over=set"
                )
        if isinstance(self.rule, Pareto) and len(names) > 3:
            warnings.warn(TsdiffWarning(f"{self.name}: with {len(names)} members hardly any candidate is dominated; pareto tells two or three apart best"), stacklevel=4)

    # What it is -------------------------------------------------------------------------------------------------------

    @property
    def needs(self) -> frozenset[Need]:
        """What any member reads."""
        return frozenset().union(*(member.needs for member in self.members))

    @property
    def scope(self) -> Literal["row", "set"]:
        """ "set" if the rule or a member compares candidates."""
        return "set" if self.rule.scope == "set" or any(member.scope == "set" for member in self.members) else "row"

    @property
    def latency(self) -> Literal["immediate", "pending"]:
        """ "pending" if a member is."""
        return "pending" if any(member.latency == "pending" for member in self.members) else "immediate"

    @property
    def judges(self) -> Literal["any", "final"]:
        """ "final" if a member judges final samples only."""
        return "final" if any(member.judges == "final" for member in self.members) else "any"

    @property
    def differentiable(self) -> bool:
        """Whether the rule and every member are."""
        return self.rule.differentiable and all(member.differentiable for member in self.members)

    @property
    def pool(self) -> Pool | None:
        """The plain samples that it compares with, if its rule does."""
        if not self.rule.calibrated:
            return None
        return Pool(self.members, self.rule.samples, 1 if self.judges == "final" else self.rule.levels)

    def require_model(self, fingerprint: str, latent_shape: tuple[int, ...], schedule_kind: str) -> None:
        """Raise UsageError if a member was made for another model."""
        for member in self.members:
            if isinstance(member, BoundVerifier):
                member.require_model(fingerprint, latent_shape, schedule_kind)

    def prepare(self, device: str) -> None:
        """Load the members' weights."""
        for member in self.members:
            member.prepare(device)

    def check(self, condition: Condition) -> None:
        """Raise UsageError if a member cannot judge samples of this condition."""
        for member in self.members:
            member.check(condition)

    def calibrate(self, schedule: Schedule, scores: Mapping[str, Mapping[int, Sequence[float]]]) -> None:
        """Take the members' scores of plain samples, by member and level of the schedule.

        Raises:
          UsageError: if a member has too few at the last level.
        """
        for member in self.members:
            count = len(scores[member.name].get(schedule.last, ()))
            if count < LEAST_SCORES:
                raise UsageError(f"{self.name}: member {member.name} could score {count} finished plain samples, but its table needs at least {LEAST_SCORES}")
        self._state["calibration"] = Calibration(schedule, {member.name: scores[member.name] for member in self.members})

    # Scores -----------------------------------------------------------------------------------------------------------

    def score(self, candidates: Candidates) -> Scores:
        """Ask every member, combine by the rule.

        Raises:
          UsageError: if the rule compares with plain samples and none were scored for the candidates' schedule.
        """
        sheet = Sheet(len(candidates))
        for member in self.members:
            self._ask_member(member, candidates, sheet)
        return self._combined(candidates, sheet, range(len(candidates)))

    def _ask_member(self, member: Verifier, candidates: Candidates, sheet: Sheet) -> None:
        """Write down a member's answer.

        The engine gives rows of scope "row" in batches of its own, and narrows an error down to its rows. Within a set
        that is done here, so that one bad row does not spoil the set.
        """
        if self.scope == "row" or member.scope == "set":
            sheet.write(member, range(len(candidates)), member.score(candidates))
            return
        for start in range(0, len(candidates), ROWS):
            self._ask_rows(member, candidates, range(start, min(start + ROWS, len(candidates))), sheet)

    def _ask_rows(self, member: Verifier, candidates: Candidates, rows: range, sheet: Sheet) -> None:
        import torch

        try:
            sheet.write(member, rows, member.score(View(candidates, rows)))
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            if len(rows) == 1:
                sheet.fail(member, rows[0], f"{type(error).__name__}: {error}")
                return
            for row in rows:
                self._ask_rows(member, candidates, range(row, row + 1), sheet)

    def _combined(self, candidates: Candidates, sheet: Sheet, rows: Sequence[int]) -> Scores:
        """The rule's scores of some rows, with everything that is known about them."""
        import torch

        rows = list(rows)
        scores = torch.stack([sheet.columns[member.name] for member in self.members], dim=1)[rows]
        failed = scores.detach().isnan()
        levels = [candidates.levels[row] for row in rows]
        calibration = self._calibration(candidates) if self.rule.calibrated else None
        values = self.rule.combine(scores, levels, calibration)
        if isinstance(self.rule, (Rank, Pareto)) and failed.all(0).any():
            values = values * math.nan
        reasons = {}
        for i, row in enumerate(rows):
            said = [f"{member.name}: {sheet.reason(member, row)}" for member, null in zip(self.members, failed[i].tolist(), strict=True) if null]
            if calibration is not None and not said:
                said = [f"{name}: no plain sample could be scored at level {levels[i]}" for name in calibration.missing(levels[i])]
            if said:
                reasons[i] = "; ".join(said)
            elif values[i].detach().isnan():
                reasons[i] = "a member could score no candidate of the set"
        parts = {name: column[rows].detach() for name, column in (sheet.columns | sheet.parts).items()}
        return Scores(values, parts, reasons)

    def _calibration(self, candidates: Candidates) -> Calibration:
        calibration: Calibration | None = self._state.get("calibration")
        strangers = [schedule for schedule in candidates.schedules if calibration is None or schedule.key != calibration.key]
        if calibration is None or strangers:
            raise UsageError(
                f"{self.name} compares with plain samples, and none were scored {'yet' if calibration is None else 'on this schedule'}; "
                "a search makes its table first, elsewhere use rule rank, pareto or weighted"
            )
        return calibration

    # Answers that come later ------------------------------------------------------------------------------------------

    def ask(self, candidates: Candidates, answer: Callable[..., None]) -> None:
        """Ask members that answer at once and those that do not; `answer` when a row has all of its scores (a set: when all have)."""
        sheet = Sheet(len(candidates))
        later = [member for member in self.members if member.latency == "pending"]
        for member in self.members:
            if member not in later:
                self._ask_member(member, candidates, sheet)
        places: dict[str, list[int]] = {}
        for row, node_id in enumerate(candidates.node_ids):
            places.setdefault(node_id, []).append(row)
        open_rows = {row: len(later) for row in range(len(candidates))}
        lock = threading.Lock()

        def deliver(rows: Sequence[int]) -> None:
            verdict = self._combined(candidates, sheet, rows)
            for i, (row, value) in enumerate(zip(rows, verdict.values, strict=True)):
                parts = {name: float(column[i]) for name, column in verdict.parts.items()}
                answer(candidates.node_ids[row], float(value), verdict.reasons.get(i), parts)

        def arrived(member: Verifier, node_id: str, score: float | None, reason: str | None = None, parts: Mapping[str, float] | None = None) -> None:
            with lock:  # answers come from any thread
                rows = [row for row in places.get(node_id, []) if sheet.unanswered(member, row)]
                for row in rows:
                    sheet.answer(member, row, score, reason, parts or {})
                    open_rows[row] -= 1
                if self.scope == "row":
                    ready = rows[:1] if rows and not open_rows[rows[0]] else []  # rows of one node have one answer
                else:
                    ready = list(open_rows) if rows and not any(open_rows.values()) else []
            if ready:
                deliver(ready)

        for member in later:
            member.ask(candidates, lambda *given, member=member: arrived(member, *given))  # type: ignore[attr-defined]


class Sheet:
    """Members' scores of some candidates, their parts, and why scores are missing; B = rows.

    Attributes:
      columns: float64 (B,) on the CPU by member, NaN where there is no score.
      parts: likewise, by "member/part".
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.columns: dict[str, Tensor] = {}
        self.parts: dict[str, Tensor] = {}
        self._reasons: dict[tuple[str, int], str] = {}
        self._answered: set[tuple[str, int]] = set()

    def write(self, member: Verifier, rows: Sequence[int], scores: Scores) -> None:
        """A member's answer for some rows. Raises UsageError if it has not one number for each."""
        self._set(self.columns, member.name, rows, numbers_of(member, scores.values, len(rows)))
        for name, column in scores.parts.items():
            self._set(self.parts, f"{member.name}/{name}", rows, numbers_of(member, column, len(rows)))
        self._reasons |= {(member.name, rows[i]): reason for i, reason in scores.reasons.items()}

    def answer(self, member: Verifier, row: int, score: float | None, reason: str | None, parts: Mapping[str, float]) -> None:
        """A pending member's answer for one row."""
        self._answered.add((member.name, row))
        self.write(member, [row], Scores([math.nan if score is None else score], {name: [part] for name, part in parts.items()}, {0: reason} if reason else {}))

    def unanswered(self, member: Verifier, row: int) -> bool:
        """Whether a pending member has not answered for a row."""
        return (member.name, row) not in self._answered

    def fail(self, member: Verifier, row: int, reason: str) -> None:
        """A member cannot score a row."""
        self.write(member, [row], Scores([math.nan], reasons={0: reason}))

    def reason(self, member: Verifier, row: int) -> str:
        """Why a member has no score for a row."""
        return self._reasons.get((member.name, row), "no finite score")

    def _set(self, columns: dict[str, Tensor], name: str, rows: Sequence[int], numbers: Tensor) -> None:
        import torch

        before = columns.get(name)
        if before is None:
            before = torch.full((self.rows,), math.nan, dtype=torch.float64)
        columns[name] = before.index_put((torch.tensor(list(rows)),), numbers)
