"""Coarse-to-fine search: its price, the identities it obeys, its stages from files, its notes, its fit to a budget."""

from __future__ import annotations

import json
import math
import tomllib
import warnings
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from fake_driver import DETERMINISTIC, STOCHASTIC, TWO_STAGE, setting
from fakes import PROMPT, Hooked, Judge, closeness
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from tsdiff.plugin.conformance import PolicyConformance, gaussian
from tsdiff.policies.beam import Beam
from tsdiff.policies.best_of_n import BestOfN
from tsdiff.policies.hierarchical import Hierarchical, rank_correlation
from tsdiff.policies.rounds import deal, place, spends
from tsdiff.policies.stages import DEFAULT_STAGES, Stage, make_stages
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.ledger import Spend
from tsdiff.treesearch.parameters import build
from tsdiff.treesearch.protocols import Setting
from tsdiff.treesearch.search import search

EXAMPLE = Path(__file__).parents[2] / "examples/stages.toml"
SOLVERS = [("vp", "ddim"), ("vp", "ddim(eta=1)"), ("ve", "heun"), ("flow", "flow-euler"), ("flow", "flow-ancestral")]
SMALL = (
    Stage(levels=(0.0, 0.4), num_steps=2, keep=2, lookahead=2, verifier="layout"),
    Stage(levels=(0.2, 0.7), branch=2),
    Stage(levels=(0.6, 1.0), branch=3),
)


def grown(policy, process="vp", solver="ddim", steps=8, *, judges=None, **options):
    """A search of the analytic model; verifiers `layout` and `final` unless told otherwise."""
    verifier = {"final": Judge("value"), "layout": Judge("coarse", needs=["images"])} if judges is None else judges
    options = {"seed": 0, "baseline": False} | options
    return search(Hooked(process), PROMPT, policy=policy, solver=solver, steps=steps, verifier=verifier, **options)


def spent(result):
    return Spend(result.ledger.nfe, result.ledger.decodes, sum(result.ledger.verifier_calls.values()))


def leaves(result):
    return [node for node in result.tree.nodes if node.level == result.tree.schedule.last and not node.draft]


def stage_notes(result):
    return [note for note in result.tree.notes if "stage" in note]


@st.composite
def hierarchies(draw, by_steps=True):
    """(policy, steps), the stages on the grid of that many steps."""
    last = draw(st.integers(2, 9))
    stops = [*sorted(draw(st.sets(st.integers(1, last - 1), max_size=3))), last]
    stages, level = [], 0
    for stop in stops:
        start = draw(st.integers(0, level))
        final = stop == last
        stages.append(
            Stage(
                levels=(start / last, stop / last),
                num_steps=draw(st.none() | st.integers(1, 4)),
                branch=1 if start == level and not by_steps else draw(st.integers(1, 3)),
                keep=1 if final else draw(st.integers(1, 4)),
                lookahead=0 if final else draw(st.integers(0, 3)),
                verifier="final" if final else draw(st.sampled_from(["final", "layout"])),
                share=draw(st.sampled_from([0.5, 1.0, 2.0])),
            )
        )
        level = stop
    return Hierarchical(width=draw(st.integers(1, 4)), stages=tuple(stages)), last


# Price ---------------------------------------------------------------------------------------------------------------


@hypothesis_settings(max_examples=60)
@given(drawn=hierarchies(), deterministic=hierarchies(by_steps=False), which=st.sampled_from(SOLVERS), pictures=st.booleans())
def test_cost_is_what_the_ledger_says(drawn, deterministic, which, pictures):
    process, solver = which
    policy, steps = drawn if solver in ("ddim(eta=1)", "flow-ancestral") else deterministic
    final, layout = Judge("value", needs=["images"] if pictures else ["x0"], value=closeness), Judge("coarse", needs=["images"])
    roles = {"final": final} | ({"layout": layout} if "layout" in policy.roles else {})
    result = grown(policy, process, solver, steps, judges=roles)
    where = Setting(result.tree.schedule, result.tree.solver, final, tuple(roles.values())[1:], True, roles)
    assert policy.cost(where).exact
    assert policy.cost(where).upper == spent(result)
    assert sum(node.nfe for node in result.tree.nodes) == result.ledger.nfe
    assert result.node is result.tree.best()


def test_the_price_of_the_default_by_hand():
    # 20 steps: layout 3 + 4 ahead, then 6 + 4 ahead, 7 levels + the estimate, 8 levels; 8 children each.
    assert Hierarchical().cost(setting(20)).upper.nfe == 8 * (7 + 10 + 8 + 8)
    assert Hierarchical().cost(setting(20)).upper.verifier_calls == 8 * 4


# Identities ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("process", "solver"), SOLVERS)
def test_one_stage_of_one_child_is_best_of_n(process, solver):
    one = grown(Hierarchical(width=5, stages=(Stage(levels=(0.0, 1.0)),)), process, solver, judges=Judge())
    best = grown(BestOfN(n=5), process, solver, judges=Judge())
    assert [node.to_json() for node in one.tree.nodes] == [node.to_json() for node in best.tree.nodes]
    assert one.ledger == best.ledger


@pytest.mark.parametrize(("process", "solver"), SOLVERS)
@pytest.mark.parametrize("cuts", [(0.5,), (0.25, 0.75)])
def test_stages_that_only_go_on_change_nothing(process, solver, cuts):
    """Scored on the way, from predictions that the next denoise uses again; the noise follows the stream."""
    ends = [0.0, *cuts, 1.0]
    stages = tuple(Stage(levels=(start, stop), keep=1 if stop == 1.0 else 4) for start, stop in pairwise(ends))
    split = grown(Hierarchical(width=4, stages=stages), process, solver, judges=Judge())
    best = grown(BestOfN(n=4), process, solver, judges=Judge())
    assert split.ledger.nfe == best.ledger.nfe
    assert sorted(leaf.score("judge") for leaf in leaves(split)) == sorted(leaf.score("judge") for leaf in leaves(best))
    assert split.score == best.score


@pytest.mark.parametrize("lookahead", [0, 3])
@pytest.mark.parametrize("cuts", [(0.5,), (0.25, 0.5, 0.75)])
@pytest.mark.parametrize(("process", "solver"), [("vp", "ddim(eta=1)"), ("flow", "flow-ancestral")])
def test_stages_without_renoising_are_beam(process, solver, cuts, lookahead):
    ends = [0.0, *cuts]
    branching = [Stage(levels=(start, stop), branch=3, keep=2, lookahead=lookahead) for start, stop in pairwise(ends)]
    staged = grown(Hierarchical(width=2, stages=(*branching, Stage(levels=(cuts[-1], 1.0)))), process, solver, judges=Judge())
    value = "lookahead" if lookahead else "x0"
    beam = grown(
        Beam(width=2, branch=3, levels=cuts, jump=1.0, branch_by="step", value=value, lookahead_steps=lookahead or 1), process, solver, judges=Judge()
    )
    assert [node.to_json() for node in staged.tree.nodes] == [node.to_json() for node in beam.tree.nodes]
    assert staged.ledger == beam.ledger


def test_layout_without_its_own_verifier_is_judged_by_the_one_that_steers():
    alone = grown(Hierarchical(width=4, stages=SMALL), judges=Judge())
    finals = tuple(replace(stage, verifier="final") for stage in SMALL)
    assert alone.tree.to_json()["nodes"] == grown(Hierarchical(width=4, stages=finals), judges=Judge()).tree.to_json()["nodes"]


# What survives, and what is said of it -------------------------------------------------------------------------------


@pytest.mark.parametrize(("process", "solver"), SOLVERS)
def test_a_stage_starts_from_the_best_of_the_one_before(process, solver):
    policy = Hierarchical(width=6, stages=(replace(SMALL[0], keep=3), *SMALL[1:]))
    result = grown(policy, process, solver)
    first = [node for node in result.tree.nodes if node.move.kind == "denoise" and node.parent.level == 0 and node.parent.parent is None and not node.draft]
    assert len(first) == 6
    parted = [node.parent for node in result.tree.nodes if node.move.kind == "renoise" and node.parent in first]
    ranked = sorted(first, key=lambda node: (-node.score("coarse@lookahead2"), node.index))
    assert parted == [ranked[0], ranked[0], ranked[1], ranked[1], ranked[2], ranked[2]], "two children each, the best first"
    assert all(node.score("value") is None for node in first), "the layout verifier decides alone"
    assert all(node.status == "closed" for node in first), "what has been branched is released"
    assert len(leaves(result)) == 3
    assert {leaf.path()[0] for leaf in leaves(result)} <= {node.path()[0] for node in ranked[:3]}


def test_notes_tell_how_far_each_stage_foretells_the_next():
    stages = (replace(SMALL[0], keep=6), replace(SMALL[1], keep=5), SMALL[2])
    result = grown(Hierarchical(width=8, stages=stages), solver="ddim(eta=1)", steps=10)
    notes = stage_notes(result)
    assert [note["stage"] for note in notes] == [1, 2, 3]
    assert [(note["level"], note["verifier"], note["children"], note["survivors"]) for note in notes] == [(4, "layout", 8, 6), (7, "final", 12, 5), (10, "final", 15, 1)]
    assert "rank_correlation" not in notes[0]
    keys = ["coarse@lookahead2", "value", "value"]
    for note, (before, after) in zip(notes[1:], pairwise(keys), strict=True):
        children = [node for node in result.tree.nodes if node.level == note["level"] and node.move.kind == "denoise" and not node.draft]
        pairs = [(node.parent.parent.score(before), node.score(after)) for node in children]  # child <- re-noised <- survivor
        assert note["pairs"] == len(pairs)
        assert note["rank_correlation"] == pytest.approx(spearmanr(*zip(*pairs, strict=True)).statistic, abs=1e-12)
    json.dumps(result.tree.notes, allow_nan=False)


small = st.integers(0, 4).map(float)


@given(pairs=st.lists(st.tuples(small | st.floats(-1e6, 1e6), small), max_size=12))
def test_rank_correlation_is_scipys(pairs):
    ours = rank_correlation(pairs)
    left, right = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    if len(set(left)) < 2 or len(set(right)) < 2:
        assert ours is None
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert ours == pytest.approx(spearmanr(left, right).statistic, abs=1e-12)


def test_the_order_of_values_decides_not_their_size():
    assert rank_correlation([(0.0, -5.0), (1.0, 0.0), (2.0, 1e9)]) == pytest.approx(1.0)
    assert rank_correlation([(0.0, 1e9), (1.0, 0.0), (2.0, -5.0)]) == pytest.approx(-1.0)


@given(total=st.integers(0, 40), parents=st.integers(1, 12))
def test_dealing_is_even_and_favours_the_first(total, parents):
    counts = deal(total, parents)
    assert sum(counts) == total
    assert counts == sorted(counts, reverse=True)
    assert max(counts) - min(counts) <= 1


# Failures and caps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2, 3])
def test_null_scores_rank_last_and_nothing_breaks(every):
    calls = iter(range(10_000))

    def value(candidates):
        return torch.tensor([math.nan if next(calls) % every == 0 else score for score in closeness(candidates).tolist()])

    result = grown(Hierarchical(width=5, stages=SMALL), judges=Judge(value=value))
    assert result.node.level == result.tree.schedule.last
    assert result.node in leaves(result)
    assert (result.score is None) == (every == 1)
    notes = stage_notes(result)
    assert len(notes) == 3
    assert all(note["pairs"] <= note["children"] for note in notes[1:])


def test_failed_nodes_never_survive():
    model = Hooked()
    rows = iter(range(10_000))

    def spoil(latents, timesteps, outputs):
        return torch.stack([output * (math.nan if next(rows) % 11 == 5 else 1.0) for output in outputs])

    model.spoil = spoil
    policy = Hierarchical(width=6, stages=SMALL)
    result = search(model, PROMPT, policy=policy, verifier=Judge(), steps=8, baseline=False)
    assert any(node.failed for node in result.tree.nodes)
    assert not any(node.failed for node in result.node.path())
    where = Setting(result.tree.schedule, result.tree.solver, Judge())
    assert result.ledger.nfe <= policy.cost(where).upper.nfe, "failures only make a search cheaper"


def test_under_a_cap_the_last_stage_makes_what_it_pays_for():
    policy = Hierarchical(width=4, stages=SMALL)
    full = grown(policy)
    last = full.tree.notes[-1]["children"]
    capped = grown(policy, nfe=full.ledger.nfe - 1)
    assert capped.truncated is None
    assert len(leaves(capped)) == last - 1
    assert [leaf.score("value") for leaf in leaves(capped)] == [leaf.score("value") for leaf in leaves(full)][: last - 1]
    smallest = grown(policy, nfe=8)
    assert smallest.truncated is not None
    assert len(leaves(smallest)) == 1


# Fit -----------------------------------------------------------------------------------------------------------------

CASES = [(steps, solver) for steps in (7, 10, 20, 50) for solver in (STOCHASTIC, DETERMINISTIC)]


@pytest.mark.parametrize(("steps", "solver"), CASES)
def test_budgets_are_filled(steps, solver):
    where = setting(steps, solver)
    for times in range(16, 65):
        nfe = times * where.sample_cost
        fitted = Hierarchical().fit(nfe, where)
        spent = fitted.cost(where).upper.nfe
        assert 0.9 * nfe <= spent <= nfe
        _, rounds = fitted.rounds(where.schedule, solver)
        assert spent + min(sum(one.prices(where.schedule, solver)) for one in rounds) > nfe, "one more child does not fit"


@pytest.mark.parametrize("times", [16, 64, 256])
def test_stages_spend_equal_shares_and_survivors_halve(times):
    where = setting(20)
    nfe = times * 20
    width, rounds = Hierarchical().fit(nfe, where).rounds(where.schedule, where.solver)
    for spent in spends(width, rounds, where.schedule, where.solver):
        assert abs(spent - nfe / 4) <= 2 * 10, "within a child or two of a quarter"
    for i, one in enumerate(rounds[:-1]):
        assert abs(one.keep - width / 2 ** (i + 1)) <= 0.5


def smallest_budget(policy, where):
    """What the refusal of an empty budget names."""
    with pytest.raises(UsageError) as told:
        policy.fit(0, where)
    return int(str(told.value).split()[-2])


@given(drawn=hierarchies(), nfe=st.integers(0, 400), solver=st.sampled_from([STOCHASTIC, DETERMINISTIC, TWO_STAGE]))
def test_fit_stays_within_its_budget(drawn, nfe, solver):
    policy, steps = drawn
    where = setting(steps, solver)
    if nfe < (smallest := smallest_budget(policy, where)):
        with pytest.raises(UsageError, match=f"a budget of {nfe} NFE is too small"):
            policy.fit(nfe, where)
        nfe = smallest
    fitted = policy.fit(nfe, where)
    assert fitted.cost(where).upper.nfe <= nfe
    width, rounds = fitted.rounds(where.schedule, solver)
    for before, one in pairwise([None, *rounds]):
        parents = width if before is None else before.keep
        assert 1 <= parents <= one.children, "every survivor has a child"
        assert 1 <= one.keep <= one.children
        if one.goes_on:
            assert one.children == parents


@hypothesis_settings(max_examples=30)
@given(drawn=hierarchies(), extra=st.integers(0, 60))
def test_a_fitted_search_is_never_cut_short(drawn, extra):
    """Even where a few coarse steps cost less than the finish, step by step, that must always stay affordable."""
    policy, steps = drawn
    sample = grown(BestOfN(n=1), solver="ddim(eta=1)", steps=steps, judges=Judge())
    where = Setting(sample.tree.schedule, sample.tree.solver, Judge())
    nfe = smallest_budget(policy, where) + extra
    fitted = policy.fit(nfe, where)
    result = grown(fitted, solver="ddim(eta=1)", steps=steps, judges=Judge(), nfe=nfe)
    assert result.truncated is None
    assert result.ledger.nfe == fitted.cost(where).upper.nfe <= nfe
    assert len(leaves(result)) == fitted.rounds(where.schedule, where.solver)[1][-1].children


def test_a_single_stage_fits_like_best_of_n():
    where = setting(20)
    single = Hierarchical(stages=(Stage(levels=(0.0, 1.0)),))
    for nfe in (20, 39, 40, 1000):
        assert single.fit(nfe, where).rounds(where.schedule, where.solver)[0] == BestOfN().fit(nfe, where).n


def test_where_a_stage_only_goes_on_its_share_decides_who_survives():
    where = setting(20)

    def sizes(share):
        stages = (Stage(levels=(0.0, 0.5), keep=2, share=share), Stage(levels=(0.5, 1.0)))
        fitted = Hierarchical(stages=stages).fit(320, where)
        width, rounds = fitted.rounds(where.schedule, where.solver)
        assert rounds[0].keep == rounds[1].children
        assert width * 11 + rounds[0].keep * 9 == fitted.cost(where).upper.nfe <= 320
        return width, rounds[0].keep

    (width, kept), (more, fewer) = sizes(1.0), sizes(4.0)
    assert more > width
    assert fewer < kept


def test_a_fitted_search_spends_what_was_planned():
    for process, solver in SOLVERS:
        sample = search(Hooked(process), PROMPT, policy=BestOfN(n=1), solver=solver, steps=10, verifier=Judge(), baseline=False)
        where = Setting(sample.tree.schedule, sample.tree.solver, Judge())
        nfe = 16 * where.sample_cost
        fitted = Hierarchical().fit(nfe, where)
        result = grown(fitted, process, solver, steps=10, judges=Judge(), nfe=nfe)
        assert 0.9 * nfe <= result.ledger.nfe == fitted.cost(where).upper.nfe <= nfe
        assert result.truncated is None


# Stages from files ---------------------------------------------------------------------------------------------------


def test_the_example_holds_the_default_stages():
    assert make_stages(EXAMPLE) == DEFAULT_STAGES == Hierarchical().stages
    assert build(Hierarchical, {"stages": str(EXAMPLE), "width": "8"}) == Hierarchical()
    keys = set().union(*tomllib.loads(EXAMPLE.read_text(encoding="utf-8"))["stages"])
    assert keys == set(asdict(Stage())), "the example shows every key"


GOOD = "[[stages]]\nlevels = [0, 0.5]\n[[stages]]\nlevels = [0.25, 1.0]\n"
WRONG = {
    "stages = 3": ["stages is 3", "[[stages]]"],
    "": ["there is no stage"],
    "[[stage]]\nlevels = [0, 1]": ["'stage'", "did you mean 'stages'"],
    "stages = [1]": ["stage 1 is 1", "table"],
    "[[stages]]\nlevles = [0, 1]": ["stage 1", "'levles'", "did you mean 'levels'"],
    "[[stages]]\nkeep = 2": ["stage 1 has no levels"],
    "[[stages]]\nlevels = [0]": ["stage 1: levels is [0]", "two numbers"],
    "[[stages]]\nlevels = [0, 'a']": ["stage 1: levels is", "two numbers"],
    "[[stages]]\nlevels = [0, nan]": ["stage 1: levels is", "two numbers"],
    "[[stages]]\nlevels = [0, 1.5]": ["stage 1: levels is 1.5", "at most 1"],
    "[[stages]]\nlevels = [1, 0]": ["stage 1: levels is [1, 0]", "lead up"],
    GOOD + "keep = '4'": ["stage 2: keep is '4'", "whole number"],
    GOOD + "keep = true": ["stage 2: keep is True", "whole number"],
    GOOD + "keep = 2.0": ["stage 2: keep is 2.0", "whole number"],
    GOOD + "keep = 0": ["stage 2: keep is 0", "at least 1"],
    GOOD + "num_steps = 0": ["stage 2: num_steps is 0", "at least 1"],
    GOOD + "num_steps = 1.5": ["stage 2: num_steps is 1.5", "whole number"],
    GOOD + "branch = 0": ["stage 2: branch is 0", "at least 1"],
    GOOD + "branch = 1.5": ["stage 2: branch is 1.5", "a whole number"],
    GOOD + "share = 'all'": ["stage 2: share is 'all'", "a number"],
    GOOD + "share = inf": ["stage 2: share is inf", "a number"],
    GOOD + "lookahead = -1": ["stage 2: lookahead is -1", "at least 0"],
    GOOD + "share = 0": ["stage 2: share is 0", "above 0"],
    GOOD + "verifier = 3": ["stage 2: verifier is 3", "text"],
    GOOD + "verifier = 'a:b'": ["stage 2: verifier is 'a:b'", "letter"],
    GOOD + "keep = 2": ["last stage's keep is 2", "must be 1"],
    GOOD + "lookahead = 2": ["last stage's lookahead is 2", "must be 0"],
    GOOD + "verifier = 'layout'": ["last stage's verifier is 'layout'", "must be 'final'"],
    "[[stages]]\nlevels = [0.1, 1]": ["stage 1 starts at 0.1", "start at 0"],
    "[[stages]]\nlevels = [0, 0.9]": ["last stage ends at 0.9", "end at 1"],
    "[[stages]]\nlevels = [0, 0.3]\n[[stages]]\nlevels = [0.4, 1]": ["stage 2 starts at 0.4", "0.3"],
    "[[stages]]\nlevels = [0, 0.3]\n[[stages]]\nlevels = [0.1, 0.3]": ["stage 2 ends at 0.3", "above 0.3"],
    "[[stages]": ["is not TOML", "line 1"],
}


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text.removeprefix(GOOD).replace("\n", " "))
def test_a_wrong_file_is_one_line_that_names_file_and_entry(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as told:
        build(Hierarchical, {"stages": str(path)})
    message = str(told.value)
    assert str(path) in message
    assert "\n" not in message
    assert all(hint in message for hint in WRONG[text]), message


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere\.toml cannot be read"):
        Hierarchical(stages=tmp_path / "nowhere.toml")
    (tmp_path / "latin.toml").write_bytes(b"# caf\xe9\n")
    with pytest.raises(UsageError, match="not UTF-8"):
        Hierarchical(stages=tmp_path / "latin.toml")


def test_a_good_file_is_read(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(GOOD + "branch = 2\nshare = 0.5\n")
    assert Hierarchical(stages=path).stages == (Stage(levels=(0.0, 0.5)), Stage(levels=(0.25, 1.0), branch=2, share=0.5))


def test_wrong_tables_in_python_are_told_too():
    with pytest.raises(UsageError, match="stages: stage 1: keep is 'x'"):
        Hierarchical(stages=({"levels": (0.0, 1.0), "keep": "x"},))
    with pytest.raises(UsageError, match="must be a table"):
        Hierarchical(stages=(3,))


@given(drawn=hierarchies())
def test_options_survive_json(drawn):
    policy, _ = drawn
    assert build(Hierarchical, json.loads(json.dumps(asdict(policy), allow_nan=False))) == policy


def test_stages_lie_on_the_nearest_levels():
    def placed(stages, steps):
        return [(one.number, one.start, one.stop, one.back, one.keep) for one in place(stages, setting(steps).schedule)]

    assert placed(DEFAULT_STAGES, 20) == [(1, 0, 6, False, 4), (2, 2, 10, True, 2), (3, 7, 14, True, 1), (4, 12, 20, True, 1)]
    assert placed(DEFAULT_STAGES, 4) == [(1, 0, 1, False, 4), (2, 0, 2, True, 2), (3, 1, 3, True, 1), (4, 2, 4, True, 1)]
    assert placed(DEFAULT_STAGES, 2) == [(1, 0, 1, False, 1), (4, 0, 2, True, 1)], "a stage without a level of its own only thins out"
    assert placed(DEFAULT_STAGES, 1) == [(4, 0, 1, False, 1)]


@given(drawn=hierarchies(), steps=st.integers(1, 30))
def test_every_stage_leads_on(drawn, steps):
    level = 0
    for one in place(drawn[0].stages, setting(steps).schedule):
        assert one.start < one.stop
        assert level < one.stop <= steps
        assert one.start < level if one.back else one.start == level
        level = one.stop
    assert level == steps


@pytest.mark.parametrize("solver", ["ddim", "ddim(eta=1)"])
def test_a_single_step_is_best_of_n(solver):
    policy = Hierarchical(width=4, stages=SMALL)  # 2 survivors, with 2 children each, of which 1 has 3
    single = grown(policy, solver=solver, steps=1, judges=Judge())
    best = grown(BestOfN(n=3), solver=solver, steps=1, judges=Judge())
    assert [leaf.score("judge") for leaf in leaves(single)] == [leaf.score("judge") for leaf in leaves(best)]
    assert single.ledger == best.ledger


def test_needs_a_stochastic_solver_only_where_steps_part_children():
    assert Hierarchical().needs == frozenset()
    assert Hierarchical(stages=(Stage(levels=(0.0, 1.0), branch=2),)).needs == {"stochastic"}
    assert Hierarchical(stages=(Stage(levels=(0.0, 0.5)), Stage(levels=(0.5, 1.0), branch=2))).needs == {"stochastic"}
    assert Hierarchical(stages=(Stage(levels=(0.0, 0.5)), Stage(levels=(0.4, 1.0), branch=2))).needs == frozenset()


def test_roles_are_those_that_the_stages_name():
    assert Hierarchical().roles == ("layout", "final")
    assert Hierarchical(stages=(Stage(levels=(0.0, 1.0)),)).roles == ("final",)


# Conformance ---------------------------------------------------------------------------------------------------------


class TestHierarchical(PolicyConformance):
    examples = 4

    @pytest.fixture
    def policy(self):
        return Hierarchical(width=3, stages=SMALL)


class TestHierarchicalFlow(PolicyConformance):
    model = gaussian("flow")
    solver = "flow-ancestral"
    examples = 2

    @pytest.fixture
    def policy(self):
        return Hierarchical(width=2, stages=(Stage(levels=(0.0, 0.5), branch=2, keep=2, lookahead=2), Stage(levels=(0.5, 1.0), branch=2)))
