"""Promise 5: memory follows the open nodes and a byte limit, never the size of the tree."""

from __future__ import annotations

import gc
import weakref

import pytest
from fakes import PROMPT, Hooked, Judge, RandomSearch, check_books, grow

from tsdiff.policies.beam import Beam
from tsdiff.policies.best_of_n import BestOfN
from tsdiff.treesearch import search as search_module
from tsdiff.treesearch.engine import Limits
from tsdiff.treesearch.noise import Mix, Rotate, Slerp
from tsdiff.treesearch.requests import Denoise, Draw, Release, Renoise, Score
from tsdiff.treesearch.run import Run
from tsdiff.treesearch.search import execute, prepare

LAST = 6


def long_search(rounds, sizes):
    def search(tree):
        beam = yield Draw(2)
        for _ in range(rounds):
            ends = yield Denoise(beam, to=4)
            starts = yield Renoise(ends, to=2, copies=2)
            children = yield Denoise(starts, to=4)
            values = yield Score(children)
            order = sorted(range(len(children)), key=lambda i: -values[i])
            gone = [*beam, *ends, *starts, *(children[i] for i in order[2:])]
            beam = [children[i] for i in order[:2]]
            yield Release([node for node in dict.fromkeys(gone) if node not in beam])
            run = watched[0]
            sizes.append((len(run.store._entries) + len(run.store._disk), run.store._bytes["host"]))
        leaves = yield Denoise(beam, to=LAST)
        yield Score(leaves)
        return tree.best()

    watched = []
    return search, watched


def grown_with(rounds, **options):
    sizes = []
    search, watched = long_search(rounds, sizes)

    def policy(tree):
        watched.append(policy.run)
        return search(tree)

    from tsdiff.treesearch import run as module

    original = module.Run.__init__

    def remember(self, *args, **kwargs):
        original(self, *args, **kwargs)
        policy.run = self

    module.Run.__init__ = remember
    try:
        grown = grow(policy, **options)
    finally:
        module.Run.__init__ = original
    return grown, sizes


def test_what_is_released_is_forgotten():
    grown, sizes = grown_with(60, keep=False)
    check_books(grown)
    assert len(grown.nodes) > 400
    # Two roots' noises, and two nodes with their predictions.
    assert max(entries for entries, _ in sizes) <= 2 + 2 * 2
    assert sizes[-1] == sizes[2]
    assert grown.engine.ledger.peak_memory["host"] < 1000


@pytest.mark.parametrize("limit", [1, 200, 1000])
def test_peak_memory_follows_the_limit(limit):
    short, _ = grown_with(30, limits=Limits(host_bytes=limit))
    grown, _ = grown_with(60, limits=Limits(host_bytes=limit))
    check_books(grown)
    assert grown.engine.ledger.peak_memory["host"] <= limit + 32  # and the entry in use
    assert grown.engine.ledger.peak_memory == short.engine.ledger.peak_memory
    assert len(grown.latents[0]) == len(grown.nodes)  # nothing is lost


def test_a_spilled_tree_is_the_same_tree():
    for seed in range(4):
        memory = grow(RandomSearch(seed, rounds=10), solver="dpm++2m-sde", limits=Limits(deterministic=True))
        disk = grow(RandomSearch(seed, rounds=10), solver="dpm++2m-sde", limits=Limits(deterministic=True, host_bytes=1))
        assert memory.tree.to_json() == disk.tree.to_json()
        assert memory.latents[0].keys() == disk.latents[0].keys()
        assert all(memory.latents[0][i].equal(disk.latents[0][i]) for i in memory.latents[0])


def test_built_in_policies_release_what_they_drop():
    for value in ("x0", "final", "lookahead"):
        grown = grow(Beam(width=2, branch=4, value=value).search, keep=False, steps=20)
        closed = [node for node in grown.nodes if node.index not in grown.latents[0]]
        assert len(closed) > 0.6 * len(grown.nodes)


def test_finished_runs_are_not_kept(monkeypatch):
    alive = []

    class Watched(Run):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            alive.append(weakref.ref(self))

    monkeypatch.setattr(search_module, "Run", Watched)
    results = execute(prepare(Hooked(), [PROMPT] * 3, policy=BestOfN(n=2), verifiers=[Judge()], steps=3))
    gc.collect()
    assert len(results) == 3
    assert len(alive) == 6
    assert [ref() for ref in alive] == [None] * 6


def test_node_records_are_small():
    node = grow(BestOfN(n=1).search).nodes[0]
    assert not hasattr(node, "__dict__")
    assert not hasattr(node.move, "__dict__")


def test_of_a_node_that_was_given_up_little_is_left():
    """What the engine keeps for each node beside the node itself follows the open ones."""
    seen = []

    def search(tree):
        nodes = yield Draw(2)
        for _ in range(20):
            further = yield Denoise(nodes, to=4, copies=2)
            starts = yield Renoise(further[:2], to=1)
            yield Score(starts[:1], at="lookahead", num_steps=2)
            yield Release([*nodes, *further, *starts[1:]])
            nodes = starts[:1]
            run = watching[0]
            kept = (run.arrived, run.history_level, run.predicted, run.repeats, run.memos_of, run.open_roots, run.tree.children)
            seen.append([len(one) for one in kept])
        leaves = yield Denoise(nodes, to=LAST)
        yield Score(leaves)
        return tree.best()

    watching = []
    original = Run.close

    def close(run, node):
        watching[:] = [run]
        original(run, node)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "close", close)
        grown = grow(search, solver="dpm++2m-sde")
    assert len(grown.nodes) > 100
    assert seen[-1] == seen[2]
    assert max(seen[-1]) <= 8


def test_the_noise_of_a_root_that_was_given_up_is_made_again():
    def search(release):
        def policy(tree):
            roots = yield Draw(3)
            near = yield Draw(1, Rotate(1, 0.9, 7))
            if release:
                yield Release([*roots, *near])
            further = yield Draw(4, [Rotate(3, 0.5, 1), Mix([(0, 0.6), (3, 0.8)]), Slerp(2, 3, 0.25), Rotate(1, 0.1, 2)])
            leaves = yield Denoise(further, to=LAST)
            yield Score(leaves)
            return tree.best()

        return policy

    one, other = grow(search(False)), grow(search(True))
    for node in one.nodes[4:]:
        assert one.latent(node).equal(other.latent(node.index))


def test_nodes_share_what_is_the_same():
    grown = grow(Beam(width=2, branch=4).search, steps=20)
    moves = [node.move for node in grown.nodes if node.move.kind == "denoise"]
    assert len({id(move) for move in moves}) == len(set(moves)) < len(moves)
    assert len({id(node.note) for node in grown.nodes}) == 1
