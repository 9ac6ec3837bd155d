"""Predictions are shared, spans may be split anywhere, and noise follows from a node's place alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fakes import Hooked, Judge, check_books, grow
from hypothesis import given, settings
from hypothesis import strategies as st

import tsdiff
from tsdiff.policies import BestOfN
from tsdiff.treesearch.engine import Limits
from tsdiff.treesearch.noise import Fresh, Mix, Rotate, derive, initial_noise, move_noise, realize, step_noise
from tsdiff.treesearch.protocols import Guidance
from tsdiff.treesearch.requests import Denoise, Draw, Gather, Perturb, Release, Renoise, Score, Start
from tsdiff.worlds.gaussian.model import GaussianModel
from tsdiff.worlds.gaussian.presets import preset
from tsdiff.worlds.gaussian.verifiers import Target

SOLVERS = [
    ("vp", "ddim"), ("vp", "ddim(eta=1)"), ("vp", "ddpm"), ("vp", "dpm++2m"), ("vp", "dpm++2m-sde"), ("vp", "exact"),
    ("ve", "euler"), ("ve", "euler-ancestral"), ("ve", "heun"), ("ve", "exact"),
    ("flow", "flow-euler"), ("flow", "flow-ancestral"), ("flow", "flow-sde"), ("flow", "exact"),
]  # fmt: skip


def end(tree, leaf):
    yield Score(leaf)
    return tree.best()


# Splitting -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("process", "solver"), SOLVERS)
@pytest.mark.parametrize("guided", [False, True])
@settings(max_examples=5)
@given(stops=st.sets(st.integers(1, 11)))
def test_stops_on_the_way_change_nothing(process, solver, guided, stops):
    if solver == "exact" and guided:
        return  # follows the whole mixture, no class of it
    stops = sorted(stops)

    def whole(tree):
        leaf = yield Denoise((yield Draw()), to=12)
        return (yield from end(tree, leaf))

    def via(tree):
        leaf = yield Denoise((yield Draw()), to=12, via=stops)
        return (yield from end(tree, leaf))

    def stepwise(tree):
        nodes = yield Draw()
        for stop in [*stops, 12]:
            nodes = yield Denoise(nodes, to=stop)
        return (yield from end(tree, nodes))

    def scored(tree):
        nodes = yield Draw()
        for stop in [*stops, 12]:
            yield Score(nodes)
            nodes = yield Denoise(nodes, to=stop)
        return (yield from end(tree, nodes))

    options = {"class_label": 2, "guidance": Guidance(2.0, 0.5)} if guided else {}
    grown = grow(whole, via, stepwise, scored, model=Hooked(process), solver=solver, steps=12, **options)
    check_books(grown)
    leaves = [run.answer for run in grown.runs]
    assert len({grown.runs[0].tree.ledger.nfe, *(run.tree.ledger.nfe for run in grown.runs)}) == 1
    for i in (1, 2, 3):
        assert torch.equal(grown.latent(leaves[0], 0), grown.latent(leaves[i], i))
        assert [node.level for node in leaves[i].path()] == [0, *stops, 12]
    for first, second in zip(leaves[1].path(), leaves[2].path(), strict=True):
        assert torch.equal(grown.latent(first, 1), grown.latent(second, 2))


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("branch", [0, 2])
def test_a_stop_has_been_continued_once(eta, branch):
    """What went on from a stop is that node's first continuation: asked for again it is there, and others differ."""

    def search(tree):
        (root,) = yield Draw()
        (leaf,) = yield Denoise(root, to=6, via=(2, 4), noise=Fresh(branch) if eta else None)
        middle, stop = leaf.path()[2], leaf.path()[1]
        assert [node.move.copy for node in leaf.path()[1:]] == [branch if eta else 0, 0, 0]
        spent = tree.ledger.nfe
        first = Fresh(0) if eta else None
        for node, via, again in ((middle, (), leaf), (stop, (4,), leaf), (stop, (), middle)):
            assert (yield Denoise(node, to=again.level, via=via, noise=first)) == [again]
        assert tree.ledger.nfe == spent == tree.budget.spent
        (other,) = yield Denoise(middle, to=6)
        assert (other is leaf) == (eta == 0)
        assert other.move.copy == (1 if eta else 0)
        yield Release([leaf])
        (anew,) = yield Denoise(middle, to=6, noise=first)
        assert anew is not leaf
        return (yield from end(tree, [anew, other] if eta else [anew]))

    grown = grow(search, eta=eta)
    check_books(grown)
    leaves = [node for node in grown.runs[0].tree.nodes if node.level == 6]
    if eta:
        _, other, anew = leaves
        assert not torch.equal(grown.latent(other), grown.latent(anew))


# Sharing -------------------------------------------------------------------------------------------------------------


def test_children_share_the_prediction_that_scored_their_parent():
    def search(tree):
        (root,) = yield Draw()
        (node,) = yield Denoise(root, to=2)
        yield Score(node)
        assert node.nfe == 1 + 1
        children = yield Denoise(node, to=3, copies=5)
        assert [child.nfe for child in children] == [0] * 5
        assert tree.ledger.nfe == 2 + 1
        return (yield from end(tree, (yield Denoise(children[0], to=6))))

    check_books(grow(search, eta=1.0))


@pytest.mark.parametrize("limits", [Limits(), Limits(host_bytes=1)], ids=["memory", "disk"])
def test_a_prediction_outlives_other_work(limits):
    def search(tree):
        nodes = yield Denoise((yield Draw(4)), to=2)
        yield Score(nodes)
        yield Score((yield Renoise(nodes, to=1, copies=5)))
        before = tree.ledger.nfe
        yield Denoise(nodes, to=3)
        assert tree.ledger.nfe == before
        return (yield from end(tree, (yield Denoise(nodes[0], to=6))))

    check_books(grow(search, limits=limits))


def test_requests_in_flight_share_too():
    model = Hooked()

    def search(tree):
        (root,) = yield Draw()
        values, again, children, _ = yield Gather(Score(root), Score(root), Denoise(root, to=1, copies=2), Renoise(root, to=0, source="x0"))
        assert values == again
        assert tree.ledger.nfe == 1
        return (yield from end(tree, (yield Denoise(children[1], to=6))))

    judge = Judge()
    check_books(grow(search, model=model, eta=1.0, verifiers=[judge]))
    assert judge.rows == 2


def test_a_deterministic_repeat_is_the_same_node_at_no_cost():
    def search(tree):
        (root,) = yield Draw()
        (first,) = yield Denoise(root, to=4)
        (again,) = yield Denoise(root, to=4)
        assert again is first
        twice = yield Denoise([root, root], to=5)
        assert twice[0] is twice[1]
        both = yield Gather(Denoise(root, to=3), Denoise(root, to=3))
        assert both[0][0] is both[1][0]
        (coarse,) = yield Denoise(root, to=4, num_steps=2)
        assert coarse is not first
        assert tree.ledger.nfe == 4 + 4 + 2 + 1
        return (yield from end(tree, (yield Denoise(first, to=6))))

    check_books(grow(search))


@pytest.mark.parametrize("keep", [True, False])
def test_after_a_release_a_repeat_is_made_anew(keep):
    def search(tree):
        (root,) = yield Draw()
        (first,) = yield Denoise(root, to=4)
        yield Release(first)
        (again,) = yield Denoise(root, to=4)
        assert again is not first
        assert again.status == "open"
        assert tree.ledger.nfe == 4 + 3
        return (yield from end(tree, (yield Denoise(again, to=6))))

    grown = grow(search, keep=keep)
    check_books(grown)
    assert len({node.id for node in grown.nodes}) == len(grown.nodes)


def test_to_the_own_level_is_the_node_itself():
    def search(tree):
        nodes = yield Denoise((yield Draw(2)), to=3)
        same = yield Denoise(nodes, to=3, copies=2)
        assert same == [nodes[0], nodes[0], nodes[1], nodes[1]]
        stayed = yield Renoise(nodes, to=3)
        assert stayed == nodes
        mixed = yield Denoise(nodes, to=[3, 6])
        assert mixed[0] is nodes[0]
        assert (yield Denoise(mixed[1], to=6)) == [mixed[1]]
        return (yield from end(tree, mixed[1]))

    check_books(grow(search, eta=1.0))


def test_to_the_own_level_from_the_clean_estimate_is_a_new_node():
    def search(tree):
        nodes = yield Denoise((yield Draw(2)), to=3)
        fresh = yield Renoise(nodes, to=3, source="x0")
        assert fresh[0] is not nodes[0]
        assert tree.ledger.nfe == 2 * 3 + 2
        return (yield from end(tree, (yield Denoise(fresh[0], to=6))))

    check_books(grow(search))


# Noise ---------------------------------------------------------------------------------------------------------------


def test_streams_follow_from_the_place():
    def search(tree):
        roots = yield Draw(2)
        assert [root.stream for root in roots] == [derive(tree.seed, "draw", i) for i in range(2)]
        children = yield Denoise(roots[1], to=2, copies=3)
        assert [child.stream for child in children] == [roots[1].stream, *(derive(roots[1].stream, "denoise", 0, j) for j in (1, 2))]
        (fourth,) = yield Denoise(roots[1], to=4)
        assert fourth.stream == derive(roots[1].stream, "denoise", 0, 3)
        (chosen,) = yield Denoise(roots[1], to=2, noise=Fresh(2))
        assert chosen.stream == children[2].stream
        noised = yield Renoise(children[0], to=1, copies=2)
        assert [node.stream for node in noised] == [derive(children[0].stream, "renoise", 2, 1, j) for j in range(2)]
        (more,) = yield Renoise(children[0], to=1)
        assert more.stream == derive(children[0].stream, "renoise", 2, 1, 2)
        (elsewhere,) = yield Renoise(children[0], to=0)
        assert elsewhere.stream == derive(children[0].stream, "renoise", 2, 0, 0)
        moved = yield Perturb(children[0], 0.5, copies=2)
        assert len({node.stream for node in tree.nodes}) == len(tree.nodes) - 2  # child 0 and the chosen branch repeat one
        return (yield from end(tree, (yield Denoise(moved[0], to=6))))

    grown = grow(search, eta=1.0, seeds=[17])
    nodes = grown.nodes
    assert len({node.id for node in nodes}) == len(nodes)
    assert torch.equal(grown.latent(nodes[4]), grown.latent(next(node for node in nodes if node.move.copy == 2 and node is not nodes[4])))
    check_books(grown)


def test_a_stochastic_step_uses_the_noise_of_its_stream():
    model = Hooked()

    def search(tree):
        (root,) = yield Draw()
        children = yield Denoise(root, to=1, copies=2)
        (turned,) = yield Denoise(root, to=1, noise=Rotate(0, 0.2, 5))
        return (yield from end(tree, (yield Denoise([*children, turned], to=6))))

    grown = grow(search, model=model, solver="ddpm", seeds=[4])
    root, one, two, turned = grown.nodes[:4]
    info = model.solver("ddpm")
    sampler = model.sampler(grown.tree.schedule, info)
    from tsdiff.treesearch.protocols import Condition, StepState

    x = grown.latent(root)[None]
    output = sampler.evaluate(x, [0], list(model.encode([Condition()], guided=False)[0].rows))
    for child, noise in (
        (one, step_noise(root.stream, 1, (2,))),
        (two, step_noise(derive(root.stream, "denoise", 0, 1), 1, (2,))),
        (turned, realize(Rotate(0, 0.2, 5), seed=4, shape=(2,), roots={0: initial_noise(root.stream, (2,))})[None]),
    ):
        stepped = sampler.advance(StepState(x), 0, [0], [1], output, torch.from_numpy(noise)[:, None])
        assert torch.equal(grown.latent(child), stepped.latents[0])


def test_roots_are_their_recipes():
    recipes = [Fresh(5), Rotate(0, 0.5, 1), Mix({0: 0.6, 1: 0.8})]

    def search(tree):
        yield Draw(2)
        roots = yield Draw(3, recipes)
        assert [node.move.noise for node in roots] == recipes
        return (yield from end(tree, (yield Denoise(roots, to=6))))

    grown = grow(search, seeds=[8], solver="ddim")
    own = {i: grown.latent(i).numpy() for i in range(2)}
    for node, recipe in zip(grown.nodes[2:5], recipes, strict=True):
        assert np.array_equal(grown.latent(node).numpy(), realize(recipe, seed=8, shape=(2,), roots=own))


@pytest.mark.parametrize("process", ["vp", "ve", "flow"])
def test_renoise_is_the_forward_kernel(process):
    def search(tree):
        nodes = yield Denoise((yield Draw(1)), to=4)
        back = yield Renoise(nodes, to=1, copies=2)
        forth = yield Renoise(nodes, to=2, source="x0")
        return (yield from end(tree, (yield Denoise([*back, *forth], to=6))))

    grown = grow(search, model=Hooked(process))
    node, one, two, estimated = grown.nodes[1:5]
    schedule = grown.tree.schedule
    (a, s), (alpha, sigma) = (schedule.arrival[4] if node.move.levels[-2] == 3 else (schedule.alpha[4], schedule.sigma[4])), (schedule.alpha[1], schedule.sigma[1])
    ratio = alpha / a
    for child in (one, two):
        expected = ratio * grown.latent(node).numpy() + (sigma**2 - (ratio * s) ** 2) ** 0.5 * move_noise(child.stream, (2,))
        assert np.allclose(grown.latent(child).numpy(), expected, rtol=1e-5, atol=1e-5)
    clean = (grown.latent(estimated).numpy() - schedule.sigma[2] * move_noise(estimated.stream, (2,))) / schedule.alpha[2]
    assert np.isfinite(clean).all()
    assert estimated.move.source == "x0"


def test_perturbing_by_nothing_keeps_the_latent():
    def search(tree):
        nodes = yield Denoise((yield Draw(1)), to=3)
        same = yield Perturb(nodes, 0.0)
        other = yield Perturb(nodes, 1.0)
        return (yield from end(tree, (yield Denoise([*same, *other], to=6))))

    grown = grow(search)
    node, same, other = grown.nodes[1:4]
    assert torch.allclose(grown.latent(same), grown.latent(node), atol=1e-6)
    assert not torch.allclose(grown.latent(other), grown.latent(node), atol=1e-2)


def test_start_noises_a_finished_sample():
    def search(tree):
        leaves = yield Denoise((yield Draw(1)), to=6)
        begun = yield Start(leaves[0], 0.5, copies=2)
        assert [node.level for node in begun] == [3, 3]
        full = yield Start(leaves[0], 1.0)
        assert [node.level for node in full] == [0]
        return (yield from end(tree, (yield Denoise([*begun, *full], to=6))))

    grown = grow(search, seeds=[3])
    leaf, one, two = grown.nodes[1:4]
    schedule = grown.tree.schedule
    for i, node in ((1, one), (2, two)):
        noise = initial_noise(derive(3, "draw", i), (2,))
        assert np.allclose(grown.latent(node).numpy(), schedule.alpha[3] * grown.latent(leaf).numpy() + schedule.sigma[3] * noise, atol=1e-6)
        assert node.note["source"] == leaf.index


def test_siblings_do_not_share_memory():
    seen = {}

    def ended(run):
        for node in run.tree.nodes:
            for name, tensor in run.store.get(run.key("node", node.index)).items():
                if name in ("latent", "history0"):
                    seen[node.index, name] = tensor

    def search(tree):
        (root,) = yield Draw()
        children = yield Denoise(root, to=2, copies=3)
        noised = yield Renoise(children[0], to=1, copies=3)
        moved = yield Perturb(children[1], 0.5, copies=2)
        return (yield from end(tree, (yield Denoise([*children, *noised, *moved], to=6))))

    from tsdiff.treesearch.engine import Engine
    from tsdiff.treesearch.protocols import Condition
    from tsdiff.treesearch.run import Run
    from tsdiff.treesearch.store import Store
    from tsdiff.treesearch.tree import Tree

    model = Hooked()
    info = model.solver("dpm++2m-sde")
    tree = Tree(model.schedule(info, 6, None), info, Condition(), seed=0, verifier="judge")
    engine = Engine(Limits(), Store("cpu"))
    engine.add(Run(tree, search, {None: model}, [Judge()], on_end=ended))
    engine.run()
    assert len(seen) > 15
    places = [tensor.untyped_storage().data_ptr() for tensor in seen.values()]
    assert len(set(places)) == len(places)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in seen.values())


def test_it_is_remembered_where_a_latent_stands():
    """A single step lands on the schedule's arrival, a coarse one on the grid, and noise starts from nominal scales."""

    def search(tree):
        (root,) = yield Draw()
        (fine,) = yield Denoise(root, to=2)
        (coarse,) = yield Denoise(root, to=4, num_steps=1)
        back = yield Renoise(fine, to=1)
        moved = yield Perturb([fine, coarse], 0.5)
        yield Denoise(fine, to=6, num_steps=2)
        tree.note(arrived=[root.index], fine=fine.index, coarse=coarse.index, back=back[0].index, moved=[node.index for node in moved])
        return (yield from end(tree, (yield Denoise(moved, to=6))))

    run = grow(search).run
    note = run.tree.notes[0]
    assert run.arrived[note["fine"]]
    assert not run.arrived[note["coarse"]]
    assert not run.arrived[note["back"]]
    assert [run.arrived[index] for index in note["moved"]] == [True, False]


def test_the_longest_remaining_work_goes_first():
    model = Hooked()
    times = []

    def fault(latents, timesteps):
        times.extend(timesteps.tolist())

    def search(tree):
        late = yield Denoise((yield Draw(2)), to=4)
        early = yield Draw(2)
        times.clear()
        yield Gather(Score(late), Score(early))
        tree.note(order=[*times])
        return (yield from end(tree, (yield Denoise(late, to=6))))

    model.fault = fault
    grown = grow(search, model=model, limits=Limits(network=1))
    order = grown.tree.notes[0]["order"]
    assert len(order) == 4
    assert order == sorted(order, reverse=True)
    assert order[0] > order[-1]


def test_batches_are_filled_over_trees_and_levels():
    model = Hooked()

    def search(tree):
        roots = yield Draw(4)
        nodes = yield Denoise(roots, to=[1, 2, 3, 4])
        return (yield from end(tree, (yield Denoise(nodes, to=6))))

    grown = grow(*[search] * 4, model=model, limits=Limits(network=8), seeds=[0, 1, 2, 3])
    check_books(grown)
    rows = 4 * (1 + 2 + 3 + 4 + 5 + 4 + 3 + 2)
    assert model.seen == rows
    assert sum(size == 8 for size in model.calls) >= 0.8 * rows / 8


def test_noise_is_added_from_where_the_latent_stands():
    asked = []

    class Watched(Hooked):
        def sampler(self, schedule, solver):
            sampler = super().sampler(schedule, solver)
            renoise, perturb = sampler.renoise, sampler.perturb
            sampler.renoise = lambda latents, arrived, *rest: asked.append(list(arrived)) or renoise(latents, arrived, *rest)
            sampler.perturb = lambda latents, x0, arrived, *rest: asked.append(list(arrived)) or perturb(latents, x0, arrived, *rest)
            return sampler

    def search(tree):
        (root,) = yield Draw()
        (fine,) = yield Denoise(root, to=3)
        (coarse,) = yield Denoise(root, to=4, num_steps=1)
        back = yield Renoise(fine, to=2, copies=2)
        yield Renoise(coarse, to=2)
        yield Renoise(back[0], to=1)
        yield Perturb([fine, coarse, back[0]], 0.5)
        return (yield from end(tree, (yield Denoise(back[0], to=6))))

    grow(search, model=Watched())
    assert asked[:3] == [[True, True], [False], [False]]
    assert sorted(asked[3:]) == [[False], [False], [True]]  # in the order in which their estimates are ready


def test_a_prompt_is_encoded_once_for_all_of_its_seeds_and_baselines():
    model = GaussianModel(preset("rare-mode").mixture)
    encoded = []
    original = model.encode
    model.encode = lambda conditions, *, guided: encoded.extend(conditions) or original(conditions, guided=guided)
    results = tsdiff.search(model, ["near (0, 0)", "near (1, 1)"], policy=BestOfN(n=2), verifier=Target(), seed=[0, 1, 2])
    assert [condition.prompt for condition in encoded] == ["near (0, 0)", "near (1, 1)"]
    assert [result.ledger.encodes for result in results] == [1] * 6
