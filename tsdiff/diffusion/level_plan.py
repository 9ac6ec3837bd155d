"""A pipeline's solvers and schedules: what the plans of all model families have in common.

A plan is made from the config of the pipeline's own scheduler and knows which solvers fit the model. It makes a schedule
once for each solver, number of steps and shift, and keeps the tables behind it for the samplers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tsdiff.diffusion.quiet import quiet_libraries
from tsdiff.diffusion.solvers import solver_info
from tsdiff.diffusion.tables import Tables, scheduler_tables
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.schedule import Schedule, SolverInfo


class LevelPlan:
    """The solvers and schedules of a pipeline; a subclass reads them from the config of its scheduler.

    Args:
      class_name: the scheduler of diffusers that the config belongs to, None where it was replaced.
      config: what the tables are made from.
      solvers: names of the solvers on offer, the pipeline's own first.
      prediction_type: "epsilon", "v_prediction", "sample" or "flow".
      notices: a line if the scheduler was replaced.

    Every argument is an attribute, too.
    """

    def __init__(
        self, class_name: str | None, config: Mapping[str, Any], *, solvers: tuple[str, ...], prediction_type: str, notices: tuple[str, ...] = ()
    ) -> None:
        self.class_name = class_name
        self.config = dict(config)
        self.solvers = solvers
        self.prediction_type = prediction_type
        self.notices = notices
        self._tables: dict[str, Tables] = {}
        self._keys: dict[tuple[SolverInfo, int, float | None], str] = {}

    def solver(self, name: str | None, eta: float | None) -> SolverInfo:
        """One of the solvers on offer."""
        return solver_info(self.solvers[0] if name is None else name, eta, self.solvers)

    def shift(self, tokens: int | None) -> float | None:
        """What the size of an image does to the schedule, as the scheduler takes it (`mu`); None if nothing.

        Args:
          tokens: length of the network's image sequence, None where the family has no such thing.
        """
        return None

    def sigmas(self, num_steps: int) -> list[float] | None:
        """What the pipeline hands to its scheduler instead of a number of steps; None if nothing."""
        return None

    def schedule(self, solver: SolverInfo, num_steps: int, tokens: int | None = None) -> Schedule:
        """The levels of a solver, made once and kept.

        Args:
          solver: on offer.
          num_steps: T.
          tokens: see `shift`.

        Raises:
          UsageError: if the number of steps does not fit the model, or the config asks for what is not supported.
        """
        limit = int(self.config.get("num_train_timesteps", 1000))
        if not 1 <= num_steps <= limit:
            raise UsageError(f"steps is {num_steps} but must lie between 1 and {limit}")
        mu = self.shift(tokens)
        if (solver, num_steps, mu) not in self._keys:
            with quiet_libraries():
                tables = scheduler_tables(self.config, self.class_name, solver, num_steps, sigmas=self.sigmas(num_steps), mu=mu)
            self._tables[tables.schedule.key] = tables
            self._keys[solver, num_steps, mu] = tables.schedule.key
        return self._tables[self._keys[solver, num_steps, mu]].schedule

    def tables(self, schedule: Schedule) -> Tables:
        """The tables behind a schedule of this plan, or behind the tail of one (key "KEY+start")."""
        if schedule.key not in self._tables:
            self._tables[schedule.key] = self._tail(schedule.key)
        return self._tables[schedule.key]

    def _tail(self, key: str) -> Tables:
        if key in self._tables:
            return self._tables[key]
        base, _, start = key.rpartition("+")
        if not base or not start.isdecimal():
            raise ValueError(f"schedule {key!r} was not made by this model")
        return self._tail(base).tail(int(start))
