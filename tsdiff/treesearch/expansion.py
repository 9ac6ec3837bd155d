"""Growing a saved tree from one of its nodes, planned: every name resolved, every option checked, the cost known."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from tsdiff.treesearch.arguments import CHANGEABLE, object_in, prepare_again, read_arguments, write_arguments
from tsdiff.treesearch.budgets import capped
from tsdiff.treesearch.disk import LOCAL, Disk
from tsdiff.treesearch.durable import about_run, same_machine
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.journal import JournalReader
from tsdiff.treesearch.ledger import Cost, Spend
from tsdiff.treesearch.lock import Lock
from tsdiff.treesearch.node import Node
from tsdiff.treesearch.plan import Plan, policy_options
from tsdiff.treesearch.pools import pools
from tsdiff.treesearch.protocols import Allocator, Policy, Search, Setting, TreeView, Verifier
from tsdiff.treesearch.rebuild import Rebuilt, rebuild
from tsdiff.treesearch.requests import Denoise, Draw, Score
from tsdiff.treesearch.resolve import Verifiers, check_needs, resolve_policy, resolve_verifiers, roles_in, roles_of
from tsdiff.treesearch.restore import lost_path, price
from tsdiff.treesearch.run import Launch, levels_of_ancestors
from tsdiff.treesearch.runfacts import drivers_of, no_run, require_result, require_searched
from tsdiff.treesearch.runfile import JOURNAL, different
from tsdiff.treesearch.runfolder import INDEX, RUN, LatentsFile, environment, lock_path, read_json
from tsdiff.treesearch.strictjson import decode, encode
from tsdiff.treesearch.tree import Tree

CHILDREN = 8
RENOISE = 0.5
LATENTS = "latents.safetensors"

POLICY_OPTIONS = frozenset({"policy", "cost", "nfe_budget", "total_nfe", "target", "roles"})
"""Resolved options of a search that say how its first driver grew the tree; a later one has its own."""


@dataclass(frozen=True, kw_only=True)
class Children:
    """A node's children: as many re-noised copies of it, or continuations of the node itself, denoised to the end."""

    name: ClassVar[str] = "children"
    size_parameters: ClassVar[tuple[str, ...]] = ("count",)
    needs: ClassVar[frozenset[str]] = frozenset()

    count: int
    stay: bool

    def search(self, tree: TreeView) -> Search:
        """Each child is scored once."""
        last = tree.schedule.last
        first = yield Draw(1 if self.stay else self.count)
        leaves = yield Denoise(first, to=last, copies=self.count if self.stay else 1)
        yield Score(leaves)
        return tree.best()

    def cost(self, setting: Setting) -> Cost:
        """Exact. Continuations of one node share its prediction."""
        shared = self.count - 1 if self.stay else 0
        return Cost.exactly(Spend(nfe=self.count * setting.sample_cost - shared) + setting.scoring(self.count, final=True) + setting.result())

    def fit(self, nfe: int, setting: Setting) -> Children:
        """As many as `nfe` pays for. Raises UsageError if it does not pay for one."""
        if nfe < setting.sample_cost:
            raise UsageError(f"nfe leaves {nfe} for children, but one costs {setting.sample_cost}; give a larger budget, or re-noise less")
        each = setting.sample_cost - self.stay
        return replace(self, count=1 + (nfe - setting.sample_cost) // each if each else CHILDREN)


@dataclass(frozen=True)
class Asked:
    """What `tsdiff.expand` was called with.

    Attributes:
      node: by its index, or "best", the answer.
      renoise, to_level: how far back; at most one is given.
    """

    node: Any
    children: int | None = None
    renoise: float | None = None
    to_level: int | None = None
    policy: str | Policy | None = None
    policy_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    nfe: int | None = None
    verifiers: Verifiers = ()

    def written(self, node: Node, to: int) -> dict[str, Any]:
        """As strict JSON, with the node and the level that were meant."""
        words = {"children": self.children, "policy": self.policy, "policy_options": dict(self.policy_options) or None, "nfe": self.nfe, "verifiers": self.verifiers or None}
        written = write_arguments({name: value for name, value in words.items() if value is not None}, None, {}).data
        return _normal({"node": node.index, "to_level": to, **written})

    @staticmethod
    def read(written: Mapping[str, Any], folder: Path, given: Mapping[str, Any]) -> Asked:
        """The inverse; `given` are objects that could not be written down."""
        missing = [name for name, value in written.items() if object_in(value) and name not in given]
        if missing:
            raise UsageError(f"{str(folder)!r} is being expanded with objects that no file holds: {_listed(written, missing)}; continue it from Python: tsdiff.resume({str(folder)!r}, {_call(missing)})")
        return Asked(**read_arguments(written, folder, {name: given[name] for name in written if name in given and object_in(written[name])}))


@dataclass(frozen=True)
class Expansion:
    """What `planned_expansion` has resolved; `carry_out` does it.

    Attributes:
      plan: the search, with the expansion's own verifiers.
      folder: of the run; it is locked.
      facts: what its `run.json` says.
      begun: whether it was begun before, and interrupted.
      rebuilt: the tree as earlier drivers left it.
      number: of the driver, from 1.
      launch: the node, and the level to re-noise it to.
      lost: nodes whose latents have to be computed again first, on the way to the node.
      policy: what searches from there.
      cost: of all of it.
      nfe: the budget, None for none.
      steering: name of the verifier that steers the run.
      roles: the verifier in each role that the policy knows.
      kept: the latents that the run has kept.
      about: what the journal has to say of the run, but for the model's fingerprint.
      notices: lines to show the user.
    """

    plan: Plan
    folder: Path
    facts: Mapping[str, Any]
    begun: bool
    rebuilt: Rebuilt
    number: int
    launch: Launch
    lost: tuple[Node, ...]
    policy: Policy
    cost: Cost
    nfe: int | None
    steering: str
    roles: Mapping[str, Verifier]
    kept: LatentsFile | None
    about: Mapping[str, Any]
    notices: tuple[str, ...] = ()

    @property
    def node(self) -> Node:
        """The node to grow from."""
        return self.launch.node

    @property
    def rows_upper(self) -> int:
        """Network rows, at most: guided levels have two."""
        return self.cost.upper.nfe * (2 if self.plan.guidance.on else 1)

    def to_json(self) -> dict[str, Any]:
        """What is done and what it costs, as strict JSON."""
        cost = {"lower": dataclasses.asdict(self.cost.lower), "upper": dataclasses.asdict(self.cost.upper), "exact": self.cost.exact}
        return {"number": self.number, **self.launch.facts, "cost": cost, "rows_upper": self.rows_upper}


class Taken(UsageError):
    """A command that has been carried out, or is on its way."""


@contextmanager
def planned_expansion(folder: Path, asked: Asked | None, *, command: str | None = None, disk: Disk = LOCAL, **given: Any) -> Iterator[Expansion]:
    """What an expansion does, with the run's folder locked.

    Args:
      folder: of one run.
      asked: what to do; None continues the expansion that was interrupted.
      command: id of the command of the run's inbox that asks for it, which is carried out once.
      disk: through which files are changed.
      **given: `model`, `helpers`, `policy`, `verifier`: objects that no file holds; `max_batch`, `memory_limit`, `seconds`.

    Raises:
      UsageError, SetupError: if it cannot be done as asked. Nothing has been changed then.
      Taken: if the command has been taken already.
    """
    _facts(folder)
    with Lock(lock_path(folder), disk=disk), ExitStack() as stack:
        facts = _facts(folder)
        drivers = drivers_of(facts, folder)
        if command is not None and any(driver.get("command") == command for driver in drivers):
            raise Taken(f"command {command} has been taken already")
        begun = drivers[-1] if drivers and drivers[-1]["status"] != "done" else None
        if begun is None and facts["status"] != "done":
            raise UsageError(f"{str(folder)!r} {'has failed, and has no node to expand' if facts['status'] == 'failed' else f'is not done; continue it first: tsdiff resume {folder}'}")
        if begun is None and asked is None:
            raise UsageError(f"{str(folder)!r} has no expansion that was interrupted")
        plan = _search_plan(folder, facts, given)
        number = max(len(drivers), 1) - (begun is not None)
        rebuilt = _rebuilt(folder, plan, number, more=begun is not None)
        known = facts["options"]
        if plan.limits.deterministic:
            stack.enter_context(same_machine(known.get("environment") or {}, folder))
        notices = _changed_rows(known, plan)
        if asked is not None and object_in(facts["arguments"].get("verifiers")):
            asked = replace(asked, verifiers=())  # those that were passed again are the run's own
        if asked is None:
            assert begun is not None
            asked = Asked.read(begun["arguments"], folder, _objects(given))
        elif begun is not None:
            node, to = _start(rebuilt, asked, plan)
            if asked.written(node, to) != begun["arguments"]:
                raise UsageError(f"another expansion of {str(folder)!r}, from node {begun['node']}, was interrupted; finish it first: tsdiff resume {folder}")
        yield _resolve(folder, facts, plan, rebuilt, number, asked, begun, notices, command)


# The run -------------------------------------------------------------------------------------------------------------


def _facts(folder: Path) -> dict[str, Any]:
    """What the folder of one run says."""
    if not folder.is_dir():
        raise UsageError(f"{str(folder)!r} is not the folder of a run; `--out` of the search says where it is")
    if not (folder / RUN).exists() and (folder / INDEX).exists():
        names = sorted(entry.name for entry in folder.iterdir() if (entry / RUN).exists())
        shown = ", ".join(names[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "")
        raise UsageError(f"{str(folder)!r} holds the runs of several prompts or seeds; name one of them: {shown}")
    if not (folder / RUN).exists():
        raise no_run(folder, RUN)
    facts = read_json(folder / RUN)
    require_searched(facts, folder, "expanded")
    require_result(facts, folder)
    return facts


def _search_plan(folder: Path, facts: Mapping[str, Any], given: Mapping[str, Any]) -> Plan:
    """The run's search, whatever policy it had."""
    own = {name: value for name, value in facts["arguments"].items() if name not in ("policy", "policy_options", "nfe", "total_nfe", "target", "seconds")}
    again = {name: given[name] for name in ("model", "helpers", *CHANGEABLE) if given.get(name) is not None}
    if object_in(own.get("verifiers")) and given.get("verifier") is not None:
        again["verifiers"] = given["verifier"]
    missing = [name for name, value in own.items() if object_in(value) and name not in again]
    if missing:
        raise UsageError(f"{str(folder)!r} was made with objects that no file holds: {_listed(own, missing)}; expand it from Python: tsdiff.expand({str(folder)!r}, node, {_call(missing)})")
    anything = _Anything(count=1, stay=False, roles=roles_in(read_arguments(own, folder, again).get("verifiers", ())))
    return prepare_again(own, facts["options"], folder, again, policy=anything, out=folder.parent)


@dataclass(frozen=True, kw_only=True)
class _Anything(Children):
    """Stands for a search's policy where only its roles matter."""

    roles: tuple[str, ...]


def _rebuilt(folder: Path, plan: Plan, most: int, *, more: bool) -> Rebuilt:
    """The tree as its ended drivers left it. Raises UsageError if the journal does not know them all."""
    tree = Tree(plan.schedule, plan.solver, plan.conditions[0], seed=plan.seeds[0], verifier=plan.verifiers[0].name)
    rebuilt = rebuild(folder, tree, most)
    if len(rebuilt.drivers) < most or (rebuilt.more and not more):
        why = rebuilt.tail or "it has been changed"
        raise UsageError(f"the journal of {str(folder)!r} does not hold the tree that its {RUN} tells of: {why}")
    return rebuilt


def _changed_rows(known: Mapping[str, Any], plan: Plan) -> tuple[str, ...]:
    changed = different(known.get("rows_per_call"), plan.to_json()["rows_per_call"], "rows_per_call") if plan.limits.deterministic else ""
    return (f"{changed}: what is done from here on may differ in the last bits from what it would be otherwise",) if changed else ()


def _objects(given: Mapping[str, Any]) -> dict[str, Any]:
    """What was passed again, by the names that arguments are written under."""
    return {"verifiers" if name == "verifier" else name: value for name, value in given.items() if name in ("policy", "verifier") and value is not None}


# The expansion -------------------------------------------------------------------------------------------------------


def _start(rebuilt: Rebuilt, asked: Asked, plan: Plan) -> tuple[Node, int]:
    """The node that is meant, and the level to re-noise it to. Raises UsageError if it cannot be grown from there."""
    node = _node(rebuilt, asked.node)
    last = plan.schedule.last
    if node.failed:
        raise UsageError(f"node {node.index} failed ({node.reason}) and has no latent; choose another")
    if node.draft:
        raise UsageError(f"node {node.index} was made only to look ahead; expand node {node.parent.index if node.parent else 0}, from where it looked")
    if asked.renoise is not None and asked.to_level is not None:
        raise UsageError(f"renoise={asked.renoise} and to_level={asked.to_level} both say how far to go back; give one")
    if asked.to_level is not None:
        to = _whole("to_level", asked.to_level)
        if not 0 <= to <= node.level:
            raise UsageError(f"to_level is {to} but node {node.index} stands at level {node.level}; re-noising goes down, to 0 at least")
    else:
        share = RENOISE if asked.renoise is None else asked.renoise
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0.0 <= share <= 1.0:
            raise UsageError(f"renoise is {share!r} but must lie in [0, 1]: 0 stays at the node's level, 1 goes back to pure noise")
        to = node.level - (max(1, int(share * node.level + 0.5)) if share and node.level else 0)
    if to == node.level == last:
        raise UsageError(f"node {node.index} is finished, so that there is nothing to denoise without re-noising it; give a renoise above 0, or a to_level below {last}")
    if to == node.level and not plan.solver.stochastic:
        why = "pure noise, which cannot be re-noised" if to == 0 else "to be continued as it is"
        raise UsageError(f"node {node.index} is {why}, and solver {plan.solver} is deterministic: all children would be equal; choose {'a later node' if to == 0 else 'a renoise above 0'}")
    return node, to


def _node(rebuilt: Rebuilt, which: Any) -> Node:
    nodes = rebuilt.tree.nodes
    if which == "best":
        best = rebuilt.best()
        if best is None:
            raise UsageError("the run has no answer; name a node by its index")
        return best
    index = which.index if isinstance(which, Node) else which
    try:
        index = operator.index(int(index) if isinstance(index, str) and index.isdecimal() else index)
    except TypeError:
        raise UsageError(f"node is {which!r} but must be a node's index, or 'best' for the answer") from None
    if not 0 <= index < len(nodes):
        raise UsageError(f"node {index} does not exist; the tree's nodes are 0 to {len(nodes) - 1}")
    return nodes[index]


def _whole(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise UsageError(f"{name} is {value!r} but must be a whole number") from None


def _policy(asked: Asked, stay: bool) -> tuple[Policy, bool]:
    """What searches, and whether its size was left open."""
    children = None if asked.children is None else _whole("children", asked.children)
    if asked.policy is None:
        if asked.policy_options:
            raise UsageError(f"policy options {', '.join(asked.policy_options)} were given without a policy; name one, or give children")
        if children is not None and children < 1:
            raise UsageError(f"children is {children} but must be at least 1")
        return Children(count=CHILDREN if children is None else children, stay=stay), children is None
    if children is not None:
        raise UsageError(f"children={children} was given beside a policy, which has its own size; set that by its options (-P), or by a budget")
    policy, open_size = resolve_policy(asked.policy, asked.policy_options)
    if isinstance(policy, Allocator):
        raise UsageError(f"policy {policy.name} shares a budget among many searches; an expansion is one: choose another")
    if stay:
        raise UsageError(f"policy {policy.name} needs different first nodes, so that the node has to be re-noised; give a renoise above 0, and a node above level 0")
    return policy, open_size


def _judges(asked: Asked, policy: Policy, plan: Plan) -> tuple[tuple[Verifier, ...], dict[str, Verifier]]:
    """The verifiers, the one that steers first, and those in the policy's roles. The run's own judge what is finished in any case."""
    own = plan.verifiers
    if not asked.verifiers and not callable(asked.verifiers):
        return own, {role: plan.roles.get(role, own[0]) for role in roles_of(policy)}
    judges, roles = resolve_verifiers(asked.verifiers, policy)
    same: dict[int, Verifier] = {}
    for judge in judges:
        mine = next((one for one in own if one.name == judge.name), judge)
        if mine is not judge and mine != judge:
            raise UsageError(f"verifier {judge.name!r} judged this run with other options; values are kept by name, so give it another name")
        same[id(judge)] = mine
    chosen = tuple(same[id(judge)] for judge in judges)
    if own[0].scope == "set" and chosen[0] is not own[0]:
        raise UsageError(f"verifier {own[0].name} ranks all samples of this run against each other, so that it has to steer its expansions too; leave out the verifier")
    for judge in chosen:
        if "images" in judge.needs and plan.model.media is None:
            raise UsageError(f"verifier {judge.name!r} looks at images, but model {plan.model.name!r} makes none")
        judge.check(plan.conditions[0])
    more = tuple(one for one in own if all(one is not judge for judge in chosen))
    return (*chosen, *more), {role: same[id(judge)] for role, judge in roles.items()}


def _resolve(
    folder: Path,
    facts: Mapping[str, Any],
    plan: Plan,
    rebuilt: Rebuilt,
    number: int,
    asked: Asked,
    begun: Mapping[str, Any] | None,
    notices: tuple[str, ...],
    command: str | None,
) -> Expansion:
    command = command if begun is None else begun.get("command")
    node, to = _start(rebuilt, asked, plan)
    policy, open_size = _policy(asked, stay=to == node.level)
    judges, roles = _judges(asked, policy, plan)
    if pools(judges) and lock_path(folder).parent != folder:
        raise UsageError(f"verifier {judges[0].name} was calibrated on all prompts of {str(folder.parent)!r}; a single one of its runs cannot be expanded with it")
    setting = Setting(plan.schedule.tail(to), plan.solver, judges[0], judges[1:], plan.model.media is not None, roles)
    check_needs(policy, setting, plan.model.solvers)
    kept = LatentsFile(folder / LATENTS) if (folder / LATENTS).exists() else None
    there = frozenset() if kept is None else frozenset(int(name.removeprefix("node/")) for name in kept.names)
    if begun is not None:
        lost = tuple(rebuilt.tree.nodes[index] for index in begun["restored"])
    else:
        lost = _lost(rebuilt, node, to, there, sorted(levels_of_ancestors(plan.schedule, judges).values()))
    joint = judges[0].scope == "set" and judges[0] is plan.verifiers[0]
    before = _ranked_again(rebuilt, there, folder, judges[0]) if joint else 0
    again = price(lost, plan.schedule, lambda one: _stages(plan, one))
    nfe = None if asked.nfe is None else _budget(asked.nfe, again, setting)
    if nfe is not None and open_size:
        policy = policy.fit(nfe - again, setting)
    cost = policy.cost(setting)
    if nfe is not None and isinstance(policy, Children) and cost.upper.nfe + again > nfe:
        raise UsageError(f"{policy.count} children cost {cost.upper.nfe + again} NFE but nfe is {nfe}; give fewer children, or leave them out to fill the budget")
    cost = capped(cost, None if nfe is None else nfe - again, setting)
    ranking = Spend(decodes=before * ("images" in judges[0].needs), verifier_calls=before)
    extra = Spend(nfe=again) + ranking
    known = about_run(plan, (0, 0), "", environment())
    known["options"] |= {name: value for name, value in _recorded_options(folder).items() if name in POLICY_OPTIONS}
    launch = Launch(node, to, _normal({
        "node": node.index,
        "level": node.level,
        "to": to,
        "restored": [one.index for one in lost],
        "policy": {"name": policy.name} | policy_options(policy),
        "verifiers": [judge.name for judge in judges],
        "roles": {role: judge.name for role, judge in roles.items()},
        "nfe_budget": nfe,
        "joint": joint,
        "arguments": asked.written(node, to),
        **({} if command is None else {"command": command}),
    }), joint)  # fmt: skip
    return Expansion(
        plan=replace(plan, verifiers=judges, roles=roles),
        folder=folder,
        facts=facts,
        begun=begun is not None,
        rebuilt=rebuilt,
        number=number,
        launch=launch,
        lost=lost,
        policy=policy,
        cost=Cost(cost.lower + extra, cost.upper + extra),
        nfe=nfe,
        steering=plan.verifiers[0].name,
        roles=roles,
        kept=kept,
        about=known,
        notices=notices,
    )


def _lost(rebuilt: Rebuilt, node: Node, to: int, there: frozenset[int], ancestor_levels: Sequence[int]) -> tuple[Node, ...]:
    try:
        return lost_path(node, to, there, lambda one: rebuilt.history.get(one.index, -1), ancestor_levels)
    except UsageError as why:
        able = [index for index in sorted(there) if index < len(rebuilt.tree.nodes)]
        shown = ", ".join(map(str, able[:12])) + (f", ... ({len(able)} in all)" if len(able) > 12 else "")
        raise UsageError(f"the latent of node {node.index} was not kept (--keep all keeps all), and it cannot be computed again: {why}; kept are those of nodes {shown or 'none'}") from None


def _ranked_again(rebuilt: Rebuilt, there: frozenset[int], folder: Path, judge: Verifier) -> int:
    """How many earlier samples are ranked with the new ones."""
    tree = rebuilt.tree
    finished = [node.index for node in tree.nodes if node.level == tree.schedule.last and not node.draft and not node.failed]
    missing = [index for index in finished if index not in there]
    if missing:
        raise UsageError(f"verifier {judge.name} ranks all samples against each other, but {str(folder)!r} has not kept the latents of {len(missing)} of them (--keep all or leaves keeps them)")
    return len(finished)


def _stages(plan: Plan, node: Node) -> int:
    if node.move.solver is None:
        return plan.solver.stages
    outline = plan.model if node.move.model is None else plan.helpers[node.move.model]
    return outline.solver(node.move.solver).stages


def _budget(nfe: Any, again: int, setting: Setting) -> int:
    limit = _whole("nfe", nfe)
    least = again + setting.sample_cost
    if limit < least:
        first = f", of which {again} to compute the node's latent again" if again else ""
        raise UsageError(f"nfe is {limit} but one sample from there costs {least}{first}; the smallest budget is {least}")
    return limit


def _recorded_options(folder: Path) -> dict[str, Any]:
    about: Any = JournalReader(folder / JOURNAL).about
    options: dict[str, Any] = about["options"]
    return options


def _normal(data: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from a file of strict JSON."""
    normal: dict[str, Any] = decode(encode(dict(data)))  # type: ignore[assignment]
    return normal


def _listed(data: Mapping[str, Any], names: Sequence[str]) -> str:
    return ", ".join(f"{name} ({object_in(data[name])})" for name in names)


def _call(names: Sequence[str]) -> str:
    return ", ".join(f"{'verifier' if name == 'verifiers' else name}=..." for name in names)
