"""Growing nodes: shared predictions, chains of denoising steps, clean estimates.

All arithmetic of rows that are ready is done at once, one call for each sampler, whatever their levels and trees.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from tsdiff.treesearch.batches import Batches
from tsdiff.treesearch.node import Node
from tsdiff.treesearch.protocols import Sampler, StepState
from tsdiff.treesearch.run import Run
from tsdiff.treesearch.stopwatch import Stopwatch
from tsdiff.treesearch.store import Store
from tsdiff.treesearch.work import Chain, Estimate, Evaluation, Step

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class Growth:
    """What stands between requests and batches.

    Args:
      batches: where network rows go.
      store: where latents and predictions live.
      timed: books the time of the arithmetic.

    Attributes:
      repeating: a group is begun again from its record: nodes are made, but what its work gave is known.
    """

    def __init__(self, batches: Batches, store: Store, timed: Stopwatch) -> None:
        self.repeating = False
        self.batches = batches
        self.store = store
        self.timed = timed
        self.steps: list[Step] = []
        self.estimates: list[Estimate] = []
        self.predicting: dict[tuple[int, int, str | None], list[tuple[Callable[[Tensor, Tensor | None], None], Callable[[str], None]]]] = {}

    def predict(self, run: Run, node: Node, model: str | None, then: Callable[[Tensor, Tensor | None], None], failed: Callable[[str], None]) -> None:
        """Call `then` with the raw outputs of a model at a node, evaluated at most once while the node is open."""
        if run.has_prediction(node, model):
            kept = self.store.get(run.key("prediction", node.index, model))
            then(kept["cond"], kept.get("uncond"))
            return
        key = (run.number, node.index, model)
        if key in self.predicting:
            self.predicting[key].append((then, failed))
            return
        self.predicting[key] = [(then, failed)]

        def arrived(cond: Tensor, uncond: Tensor | None) -> None:
            run.predict_done(node, model, {"cond": cond} if uncond is None else {"cond": cond, "uncond": uncond})
            for waiter, _ in self.predicting.pop(key):
                waiter(cond, uncond)

        def broke(reason: str) -> None:
            for _, waiter in self.predicting.pop(key):
                waiter(reason)

        latents = self.store.get(run.key("node", node.index))["latent"]
        self.batches.evaluate(Evaluation(run, run.bindings[model], node.level, latents, node, arrived, broke))

    def start(self, chain: Chain, parent: Node) -> None:
        """Begin a denoise at a node."""

        def failed(reason: str) -> None:
            chain.run.fail(chain.child, reason)
            chain.then()

        self.predict(chain.run, parent, chain.binding.name, lambda cond, uncond: self.steps.append(Step(chain, cond, uncond)), failed)

    def _continue(self, chain: Chain) -> None:
        """Evaluate a chain's latents between two nodes."""

        def failed(reason: str) -> None:
            chain.run.fail(chain.child, reason)
            chain.then()

        level = chain.next if chain.stage else chain.level
        self.batches.evaluate(
            Evaluation(
                chain.run, chain.binding, level, chain.latents, chain.child, lambda cond, uncond: self.steps.append(Step(chain, cond, uncond)), failed
            )
        )

    def compute(self) -> bool:
        """Do all steps and estimates that are ready: cheap, so never worth waiting with."""
        if not self.steps and not self.estimates:
            return False
        with self.timed("step"):
            steps, self.steps = self.steps, []
            for group in _grouped(steps, lambda s: (id(s.chain.sampler), s.chain.stage, s.uncond is None, len(s.chain.history))):
                self._advance(group)
            estimates, self.estimates = self.estimates, []
            for part in _grouped(estimates, lambda e: (id(e.binding.sampler(e.run.tree)), e.uncond is None)):
                self._estimate(part)
        return True

    def _guided(self, sampler: Sampler, items: Sequence[Step | Estimate], runs: Sequence[Run]) -> Tensor:
        import torch

        cond = torch.stack([item.cond for item in items])
        if items[0].uncond is None:
            return cond
        uncond = torch.stack([item.uncond for item in items if item.uncond is not None])
        return sampler.guide(cond, uncond, [run.guidance.scale for run in runs], [run.guidance.rescale for run in runs])

    def _advance(self, steps: Sequence[Step]) -> None:
        """Advance chains of one sampler by one stage."""
        import torch

        chains = [step.chain for step in steps]
        sampler, stage = chains[0].sampler, chains[0].stage
        levels, nexts = [chain.level for chain in chains], [chain.next for chain in chains]
        output = self._guided(sampler, steps, [chain.run for chain in chains])
        latents = torch.stack([chain.latents for chain in chains])
        self._capture(chains, latents, output)
        noise = None
        if sampler.solver.stochastic and stage == 0:
            with self.timed("noise"):
                drawn = torch.stack([torch.from_numpy(chain.draw()) for chain in chains], dim=1)
            noise = self.to_device(drawn)
        history = tuple(torch.stack(column) for column in zip(*(chain.history for chain in chains), strict=True))
        state = StepState(latents, history, [chain.history_level for chain in chains])
        state = sampler.advance(state, stage, levels, nexts, output, noise)
        rows = state.latents.unbind(0)
        columns = [column.unbind(0) for column in state.history]
        schedule = sampler.schedule
        ending = [schedule.step_cost(n, sampler.solver.stages) <= stage + 1 and n == chain.levels[-1] for chain, n in zip(chains, nexts, strict=True)]
        finite = torch.isfinite(state.latents).flatten(1).all(1).tolist() if any(ending) else []
        for i, chain in enumerate(chains):
            chain.latents = rows[i]
            chain.history = tuple(column[i] for column in columns)
            chain.history_level = state.history_levels[i] if state.history_levels else -1
            if schedule.step_cost(nexts[i], sampler.solver.stages) > stage + 1:
                chain.stage = stage + 1
                self._continue(chain)
                continue
            chain.stage = 0
            chain.position += 1
            if not ending[i]:
                self._continue(chain)
                continue
            if finite[i]:
                self._settle(chain)
            else:
                chain.run.fail(chain.child, f"the latent is not finite at level {nexts[i]}")
            chain.then()

    def _settle(self, chain: Chain) -> None:
        """A chain has reached its child: keep the latent and what the solver remembers."""
        tensors = {"latent": chain.latents} | chain.captured
        if chain.child.level < chain.run.tree.schedule.last:
            tensors |= {f"history{i}": column for i, column in enumerate(chain.history)}
        chain.run.settle(chain.child, tensors, arrived=chain.levels[-1] - chain.levels[-2] == 1, history_level=chain.history_level)

    def _capture(self, chains: Sequence[Chain], latents: Tensor, output: Tensor) -> None:
        """Remember clean estimates that a verifier wants of ancestors, in passing and at no cost."""
        for i, chain in enumerate(chains):
            for name, level in chain.run.ancestor_levels.items():
                if chain.stage == 0 and name not in chain.captured and chain.level >= level:
                    chain.captured[name] = chain.sampler.x0(latents[i : i + 1], [chain.level], output[i : i + 1])[0]

    def _estimate(self, estimates: Sequence[Estimate]) -> None:
        """Form clean estimates."""
        import torch

        sampler = estimates[0].binding.sampler(estimates[0].run.tree)
        output = self._guided(sampler, estimates, [item.run for item in estimates])
        x0 = sampler.x0(torch.stack([item.latents for item in estimates]), [item.level for item in estimates], output)
        finite = torch.isfinite(x0).flatten(1).all(1).tolist()  # one transfer for the batch
        for item, row, good in zip(estimates, x0.unbind(0), finite, strict=True):
            if good:
                item.then(row)
            else:
                item.failed(f"the clean estimate is not finite at level {item.level}")

    def to_device(self, array: Any) -> Tensor:
        """A numpy array or tensor on the store's device."""
        import torch

        tensor = array if isinstance(array, torch.Tensor) else torch.from_numpy(array)
        return tensor.to(self.store.device)


def _grouped(items: Sequence[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())
