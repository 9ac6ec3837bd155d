"""What costs depend on: `Setting`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tsdiff.treesearch.ledger import Spend
from tsdiff.treesearch.protocols.verifiers import Verifier, pictures
from tsdiff.treesearch.schedule import Schedule, SolverInfo


@dataclass(frozen=True)
class Setting:
    """What a policy's cost depends on.

    Attributes:
      schedule, solver: of the search.
      verifier: the one that steers.
      others: the ones that score finished samples, and nodes for the policy where they have a role.
      media: whether samples can be decoded (each result is decoded once).
      roles: the verifier in each role that the policy knows; a role that is not here is taken by the one that steers.
    """

    schedule: Schedule
    solver: SolverInfo
    verifier: Verifier
    others: tuple[Verifier, ...] = ()
    media: bool = True
    roles: Mapping[str, Verifier] = field(default_factory=dict, hash=False)

    @property
    def sample_cost(self) -> int:
        """NFE of one plain sample."""
        return self.denoise_cost(0, self.schedule.last)

    def denoise_cost(self, start: int, to: int, num_steps: int | None = None) -> int:
        """NFE of a denoise, the start's own prediction included."""
        return self.schedule.span_cost(self.schedule.span(start, to, num_steps), self.solver.stages)

    def scoring(self, count: int, *, final: bool, role: str | None = None) -> Spend:
        """Decodes and verifier calls of scoring `count` nodes (their predictions not included).

        Nodes on the way are scored by the verifier in a role (None for the one that steers). Finished samples (`final`)
        are scored by every verifier and decoded once for all of them, and so are the ancestors that they are compared
        with. A node above such an ancestor's level costs neither that decode nor the call. A steering verifier of scope
        "set" ranks finished samples once more, as one set, for the answer.
        """
        judges = self._finished if final else (self.verifier if role is None else self.roles.get(role, self.verifier),)
        again = [self.verifier] if final and self.verifier.scope == "set" else []
        return Spend(decodes=count * (pictures(judges) + pictures(again)), verifier_calls=count * (len(judges) + len(again)))

    def result(self) -> Spend:
        """The decode of the answer, where scoring it has not decoded it already."""
        # The last to score a finished sample is its decode's last reader: the ranking of all of them, if there is one.
        judges = (self.verifier,) if self.verifier.scope == "set" else self._finished
        seen = any("images" in judge.needs for judge in judges)
        return Spend(decodes=int(self.media and not seen))

    @property
    def _finished(self) -> tuple[Verifier, ...]:
        """Who scores finished samples: a verifier of scope "set" that does not steer has no set of them to judge."""
        return (self.verifier, *(judge for judge in self.others if judge.scope == "row"))
