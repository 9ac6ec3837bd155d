"""Verifier roles: a policy scores by a role's name, the caller says who has it, "final" steers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from fakes import PROMPT, Hooked, Judge, closeness, grow

from tsdiff.policies.best_of_n import BestOfN
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.ledger import Cost, Spend
from tsdiff.treesearch.protocols import Setting
from tsdiff.treesearch.requests import Denoise, Draw, Score
from tsdiff.treesearch.search import execute, prepare, search

STEPS = 4


@dataclass(frozen=True)
class Sifting:
    """Draws six, keeps the two that the verifier of a role likes best early on."""

    role: str = "layout"
    name = "sifting"
    size_parameters = ()
    needs = frozenset()
    roles = ("layout",)

    def search(self, tree):
        early = yield Denoise((yield Draw(6)), to=1)
        values = yield Score(early, verifier=self.role)
        best = sorted(early, key=lambda node: (-values[early.index(node)], node.index))[:2]
        yield Score((yield Denoise(best, to=tree.schedule.last)))
        return tree.best()

    def cost(self, setting):
        nfe = 6 * 2 + 2 * (setting.denoise_cost(1, setting.schedule.last) - 1)
        return Cost.exactly(Spend(nfe=nfe) + setting.scoring(6, final=False, role=self.role) + setting.scoring(2, final=True) + setting.result())

    def fit(self, nfe, setting):
        return self


def towards(x, y, name, **options):
    """A verifier that likes clean estimates near a point."""
    return Judge(name, lambda candidates: -(candidates.x0 - torch.tensor([x, y])).norm(dim=1), **options)


def sift(verifier, **options):
    return search(Hooked(), PROMPT, policy=Sifting(), verifier=verifier, steps=STEPS, baseline=False, **options)


def early(result):
    return [node for node in result.tree.nodes if node.level == 1]


def leaves(result):
    return [node for node in result.tree.nodes if node.level == STEPS]


# Who judges what -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [("layout", "final"), ("final", "layout")])
def test_each_role_has_its_verifier_in_whatever_order(order):
    judges = {"layout": towards(-3.0, 0.0, "left"), "final": towards(3.0, 2.4, "right")}
    result = sift({role: judges[role] for role in order})
    assert result.tree.verifier == "right", "final steers"
    assert all(set(node.values) == {"left"} for node in early(result)), "values are kept by the verifier's own name"
    chosen = sorted(early(result), key=lambda node: -node.score("left"))[:2]
    assert [leaf.parent for leaf in leaves(result)] == chosen
    assert all(set(leaf.values) == {"left", "right"} for leaf in leaves(result)), "finished samples are scored by all"
    assert result.node is max(leaves(result), key=lambda leaf: leaf.score("right"))
    assert result.score == result.node.score("right")
    assert result.ledger.verifier_calls == Counter(left=8, right=2)


def test_without_roles_everything_is_as_with_the_first_verifier_alone():
    judge, other = Judge("judge"), towards(-3.0, 0.0, "other")
    plain = sift([judge, other])
    assert all(set(node.values) == {"judge"} for node in early(plain))
    named = sift({"layout": judge, "final": judge})
    assert [(node.id, node.score("judge")) for node in plain.tree.nodes] == [(node.id, node.score("judge")) for node in named.tree.nodes]
    assert named.ledger.verifier_calls == Counter(judge=8), "one verifier in two roles is one verifier"


def test_final_takes_the_roles_that_nobody_was_given():
    judge = Judge("judge")
    assert sift({"final": judge}).tree.to_json() == sift(judge).tree.to_json()


def test_the_first_without_a_role_steers_where_final_is_not_given():
    plan = prepare("gaussian", PROMPT, policy=Sifting(), verifiers=["layout=gaussian-log-density", "gaussian-target"], steps=STEPS)
    assert [judge.name for judge in plan.verifiers] == ["gaussian-target", "gaussian-log-density"]
    assert {role: judge.name for role, judge in plan.roles.items()} == {"final": "gaussian-target", "layout": "gaussian-log-density"}
    assert plan.to_json()["roles"] == {"final": "gaussian-target", "layout": "gaussian-log-density"}
    assert execute(plan)[0].tree.verifier == "gaussian-target"


def test_texts_name_roles_and_options_are_no_roles():
    texts = ["layout=gaussian-target:rho=2", "final=gaussian-log-density:mixture=rare-mode"]
    plan = prepare("gaussian", PROMPT, policy=Sifting(), verifiers=texts, steps=STEPS)
    assert plan.roles["layout"].rho == 2.0
    assert plan.verifiers[0] is plan.roles["final"]
    optioned = prepare("gaussian", PROMPT, policy=Sifting(), verifiers="gaussian-target:rho=2", steps=STEPS)
    assert optioned.roles["layout"] is optioned.roles["final"] is optioned.verifiers[0]


def test_one_reference_in_two_roles_is_one_verifier():
    plan = prepare("gaussian", PROMPT, policy=Sifting(), verifiers=["layout=gaussian-target", "final=gaussian-target"], steps=STEPS)
    assert len(plan.verifiers) == 1
    function = lambda images, prompts: images.flatten(1).mean(1)  # noqa: E731
    assert len(prepare("gaussian", PROMPT, policy=Sifting(), verifiers={"layout": function, "final": function}, steps=STEPS).verifiers) == 1


def test_every_policy_knows_final():
    result = search(Hooked(), PROMPT, policy=BestOfN(n=2), verifier={"final": Judge()}, steps=STEPS)
    assert result.tree.to_json() == search(Hooked(), PROMPT, policy=BestOfN(n=2), verifier=Judge(), steps=STEPS).tree.to_json()


def test_a_verifier_can_be_asked_by_its_own_name_too():
    judges = [Judge("judge"), towards(-3.0, 0.0, "left")]
    result = search(Hooked(), PROMPT, policy=Sifting(role="left"), verifier=judges, steps=STEPS, baseline=False)
    assert all(set(node.values) == {"left"} for node in early(result))


@pytest.mark.parametrize("images", ["layout", "final", "both", "none"])
def test_the_cost_knows_who_judges(images):
    def needs(role):
        return ["images"] if images in (role, "both") else ["x0"]

    judges = {"layout": Judge("left", closeness, needs=needs("layout")), "final": Judge("right", closeness, needs=needs("final"))}
    plan = prepare(Hooked(), PROMPT, policy=Sifting(), verifiers=judges, steps=STEPS, baseline=False)
    result = execute(plan)[0]
    assert plan.cost.upper == Spend(result.ledger.nfe, result.ledger.decodes, sum(result.ledger.verifier_calls.values()))


def test_settings_can_be_compared_and_hashed():
    plan = prepare("gaussian", PROMPT, policy=Sifting(), verifiers={"layout": "gaussian-target", "final": "gaussian-log-density"}, steps=STEPS)
    setting = Setting(plan.schedule, plan.solver, plan.verifiers[0], plan.verifiers[1:], True, plan.roles)
    again = Setting(plan.schedule, plan.solver, plan.verifiers[0], plan.verifiers[1:], True, dict(plan.roles))
    assert setting == again
    assert hash(setting) == hash(again)


# Verifiers of whole sets ---------------------------------------------------------------------------------------------


def ranks(candidates):
    return closeness(candidates).argsort().argsort().float()


def test_a_verifier_of_sets_may_have_a_role_without_steering():
    judges = {"layout": Judge("ranks", ranks, scope="set"), "final": Judge("right", closeness)}
    plan = prepare(Hooked(), PROMPT, policy=Sifting(), verifiers=judges, steps=STEPS, baseline=False)
    result = execute(plan)[0]
    assert sorted(node.score("ranks") for node in early(result)) == [0, 1, 2, 3, 4, 5], "the six are one set"
    assert all(set(leaf.values) == {"right"} for leaf in leaves(result))
    assert plan.cost.upper == Spend(result.ledger.nfe, result.ledger.decodes, sum(result.ledger.verifier_calls.values()))


def test_a_policy_that_compares_across_sets_refuses_ranks_in_any_role():
    class Absolute(Sifting):
        needs = frozenset({"absolute"})

    with pytest.raises(UsageError, match="verifier ranks scores relative to each set"):
        prepare(Hooked(), PROMPT, policy=Absolute(), verifiers={"layout": Judge("ranks", ranks, scope="set"), "final": Judge()}, steps=STEPS)


# Mistakes ------------------------------------------------------------------------------------------------------------

MISTAKES = {
    "unknown role": (["lay-out=gaussian-target", "final=gaussian-target"], r"policy sifting has no verifier role 'lay-out'; its roles are: final, layout"),
    "unknown role in a dictionary": ({"first": Judge(), "final": Judge()}, r"no verifier role 'first'; its roles are: final, layout"),
    "a role that is no text": ({1: Judge(), "final": Judge()}, r"no verifier role 1; its roles are"),
    "role twice": (["final=gaussian-target", "final=gaussian-log-density"], r"two verifiers were given for the role 'final'"),
    "none steers": ({"layout": Judge()}, r"none for final, which steers the answer; add final=NAME"),
    "unknown verifier": (["final=gausian-target"], r"did you mean 'gaussian-target'"),
    "two of one name": ({"layout": Judge("same"), "final": Judge("same")}, r"'same' is given twice"),
    "one name, other options": (["layout=gaussian-target:rho=1", "final=gaussian-target:rho=2"], r"'gaussian-target' is given twice"),
    "nothing": ({"layout": 3, "final": Judge()}, r"neither a name"),
    "a set without a role": ([Judge(), Judge("ranks", scope="set")], r"can only steer"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_before_anything_runs(name):
    verifiers, match = MISTAKES[name]
    model = Hooked()
    with pytest.raises(UsageError, match=match):
        search(model, PROMPT, policy=Sifting(), verifier=verifiers, steps=STEPS)
    assert model.seen == 0


def test_a_policy_without_roles_of_its_own_has_final_alone():
    with pytest.raises(UsageError, match=r"policy best-of-n has no verifier role 'layout'; its roles are: final$"):
        search(Hooked(), PROMPT, policy=BestOfN(n=2), verifier={"layout": Judge(), "final": Judge("other")}, steps=STEPS)


def test_a_role_that_the_policy_does_not_declare_is_an_unknown_verifier():
    with pytest.raises(UsageError, match=r"unknown verifier of this search 'layuot'; did you mean 'layout'"):
        grow(Sifting(role="layuot").search, steps=STEPS, verifiers=[Judge()], roles={"layout": Judge()})
