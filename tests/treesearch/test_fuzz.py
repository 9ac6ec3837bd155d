"""The loop always ends: hundreds of random policies, alone and together, with hardly any memory or batch to work in."""

from __future__ import annotations

import itertools

import pytest
from fakes import Hooked, Judge, Jury, RandomSearch, check_books, grow

from tsdiff.treesearch.engine import Limits
from tsdiff.treesearch.errors import SearchFailed
from tsdiff.treesearch.protocols import Guidance

PROCESSES = {
    "vp": ("ddim(eta=0.7)", (("ddim", False), ("ddpm", True))),
    "ve": ("heun", (("euler", False), ("euler-ancestral", True))),
    "flow": ("flow-sde", (("flow-euler", False),)),
}
# Trees together, host bytes, rows a call, budget, guided, deterministic, steps.
CASES = list(itertools.product((1, 3, 6), (1, 4 << 30), (1, 5, None), (None, 30)))


@pytest.mark.parametrize(("together", "host_bytes", "network", "nfe"), CASES)
def test_every_search_ends_and_the_books_balance(together, host_bytes, network, nfe):
    for round_, process in enumerate(PROCESSES):
        solver, others = PROCESSES[process]
        seeds = [1000 * round_ + 10 * together + i for i in range(together)]
        searches = [RandomSearch(seed, rounds=6, solvers=others, models=("small",), verifiers=("judge", "other")) for seed in seeds]
        guided = {"guidance": Guidance(2.0), "class_label": 1} if round_ == 1 else {}
        limits = Limits(network=network, host_bytes=host_bytes, deterministic=round_ == 2, decode=2, verify=3)
        grown = grow(
            *searches, model=Hooked(process), helpers={"small": Hooked(process)}, solver=solver, steps=4, seeds=seeds, nfe=nfe, limits=limits,
            verifiers=[Judge(needs=["images", "x0"]), Judge("other")], keep=bool(round_ % 2), **guided,
        )
        check_books(grown)
        assert all(run.answer is not None and run.answer.level == 4 for run in grown.runs)


@pytest.mark.parametrize("seed", range(12))
def test_set_scores_pending_scores_and_ancestors_do_not_hang(seed):
    verifiers = [
        [Judge(scope="set")],
        [Jury()],
        [Jury(scope="set"), Judge("other", needs=["images"])],
        [Judge(needs=["x0", "ancestor_x0@1"], scope="set"), Judge("other", needs=["x0", "ancestor_x0@0.5"])],
    ][seed % 4]
    searches = [RandomSearch(100 * seed + i, rounds=10, verifiers=tuple(verifier.name for verifier in verifiers)) for i in range(4)]
    grown = grow(*searches, eta=1.0, steps=5, seeds=list(range(4)), verifiers=verifiers, nfe=40 if seed % 2 else None)
    check_books(grown)
    assert all(run.answer is not None for run in grown.runs)


@pytest.mark.parametrize("seed", range(20))
def test_random_failures_do_not_hang(seed):
    import torch

    model = Hooked()
    chance = torch.Generator().manual_seed(seed)

    def fault(latents, timesteps):
        if float(torch.rand((), generator=chance)) < 0.05:
            raise RuntimeError("bad luck")
        if float(torch.rand((), generator=chance)) < 0.05:
            raise torch.OutOfMemoryError("bad luck")

    def spoil(latents, timesteps, outputs):
        return torch.where(torch.rand(len(outputs), 1, generator=chance) < 0.05, torch.nan, outputs)

    def value(candidates):
        if float(torch.rand((), generator=chance)) < 0.1:
            raise RuntimeError("bad luck")
        return torch.where(torch.rand(len(candidates), generator=chance) < 0.1, torch.nan, torch.rand(len(candidates), generator=chance))

    def blind(latents):
        if float(torch.rand((), generator=chance)) < 0.1:
            raise RuntimeError("bad luck")

    model.fault, model.spoil, model.blind = fault, spoil, blind
    searches = [RandomSearch(50 * seed + i, rounds=10, verifiers=("judge", "other")) for i in range(4)]
    verifiers = [Judge(value=value, needs=["images"], scope="set" if seed % 3 == 0 else "row"), Judge("other", value=value)]
    grown = grow(*searches, model=model, eta=1.0, verifiers=verifiers, nfe=50 if seed % 2 else None, ok=False, limits=Limits(host_bytes=1 if seed % 4 == 0 else 10**9))
    check_books(grown)
    for run in grown.runs:
        assert (run.answer is None) == (run.error is not None)
        assert run.error is None or isinstance(run.error, SearchFailed)
