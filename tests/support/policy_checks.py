"""Checks that hold for every policy whose cost does not depend on values: its price, and how well `fit` fills a budget."""

from __future__ import annotations

from typing import Any

import torch
from fake_driver import STOCHASTIC, TWO_STAGE, setting
from fakes import PROMPT, Grown, Hooked, Judge, check_books, grow
from hypothesis import strategies as st
from torch import Tensor

from tsdiff.treesearch.node import Node
from tsdiff.treesearch.search import execute, prepare

SOLVERS = [
    ("vp", "ddim"), ("vp", "ddim(eta=1)"), ("vp", "dpm++2m"), ("vp", "exact"), ("ve", "heun"), ("ve", "euler-ancestral"),
    ("flow", "flow-euler"), ("flow", "flow-ancestral"), ("flow", "flow-sde"),
]  # fmt: skip
JUDGES = st.sampled_from([["images"], ["x0"], ["x0", "images"], ["images", "x0", "images"]])


def judges(needs: list[str], scope: str = "row") -> list[Judge]:
    """A verifier for each need; the first steers."""
    made = [Judge(f"judge{i}", needs=[need]) for i, need in enumerate(needs)]
    if scope == "set":
        made[0].scope, made[0].value = "set", lambda candidates: candidates.x0[:, 0].argsort().argsort().float()
    return made


def check_price(policy: Any, where: tuple[str, str], needs: list[str], scope: str = "row", **options: Any) -> None:
    """A real search spends what `cost` says: NFE, decodes, verifier calls; and every row is booked on a node."""
    model = Hooked(where[0])  # type: ignore[arg-type]
    plan = prepare(model, PROMPT, policy=policy, solver=where[1], verifiers=judges(needs, scope), baseline=False, **options)
    (result,) = execute(plan)
    spend, ledger = plan.cost.upper, result.ledger
    assert plan.cost.exact
    assert (spend.nfe, spend.decodes, spend.verifier_calls) == (ledger.nfe, ledger.decodes, ledger.verifier_calls.total())
    assert ledger.nfe == model.seen == sum(node.nfe for node in result.tree.nodes)
    assert result.node is result.tree.best()


def check_fill(policy: Any, least: float = 0.9) -> None:
    """`fit` fills at least this share of 16, 17, ... times one sample, whatever the steps and the solver."""
    for steps in (7, 10, 20, 50):
        for solver in (STOCHASTIC, TWO_STAGE):
            if "stochastic" in policy.needs and not solver.stochastic:
                continue
            where = setting(steps, solver)
            for multiple in (16, 17, 18, 22, 31, 64):
                nfe = multiple * where.sample_cost
                spent = policy.fit(nfe, where).cost(where).upper.nfe
                assert least * nfe <= spent <= nfe, f"{spent} of {nfe} NFE at {steps} steps with {solver}"


def chance(nulls: int = 5, levels: int = 4) -> Judge:
    """A verifier whose scores are drawn by node id: many ties, and NaN for one node in `nulls` (0 for none)."""

    def value(candidates: Any) -> Tensor:
        numbers = [int(node_id, 16) for node_id in candidates.node_ids]
        return torch.tensor([torch.nan if nulls and number % nulls == 0 else float(number // 7 % levels) for number in numbers])

    return Judge(value=value)


def sick(threshold: float = 0.7) -> Hooked:
    """A model whose prediction is no number where the first coordinate of a latent is large: some nodes fail."""
    model = Hooked()
    model.spoil = lambda latents, timesteps, outputs: torch.where(latents[:, :1] > threshold, torch.nan, outputs)
    return model


def run(policy: Any, where: tuple[str, str] = ("vp", "ddim"), *, model: Hooked | None = None, judge: Judge | None = None, seed: int = 0, **options: Any) -> Grown:
    """One search of a policy, its books checked, with every latent kept."""
    grown = grow(
        policy.search, model=model or Hooked(where[0]), solver=where[1], verifiers=[judge or Judge()], seeds=[seed], **options  # type: ignore[arg-type]
    )
    check_books(grown)
    return grown


def leaves(grown: Grown) -> list[Node]:
    """Finished samples in order."""
    return [node for node in grown.nodes if node.level == grown.tree.schedule.last and not node.draft]


def values(nodes: list[Node]) -> list[float | None]:
    """Their scores."""
    return [node.score("judge") for node in nodes]


def rank(node: Node) -> tuple[float, int]:
    """What survivors are ordered by, best last: the score (null lowest), then age."""
    score = node.score("judge")
    return (float("-inf") if score is None else score, -node.index)
