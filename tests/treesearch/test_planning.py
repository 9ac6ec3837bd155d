"""What cannot be done is told before any weights load, with what to do instead."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from fakes import PROMPT, Hooked, Judge
from PIL import Image

from tsdiff.policies.beam import Beam
from tsdiff.policies.best_of_n import BestOfN
from tsdiff.treesearch.errors import SearchFailed, UsageError
from tsdiff.treesearch.protocols import Condition
from tsdiff.treesearch.search import Progress, execute, prepare, search


class Unloaded(Hooked):
    """A model whose weights must not be touched."""

    def load(self):
        raise AssertionError("the weights were loaded before the mistake was told")


def refused(match, *args, **options):
    options = {"verifier": Judge(), "steps": 4} | options
    with pytest.raises(UsageError, match=match) as told:
        search(*(args or (Unloaded(), PROMPT)), **options)
    assert len(str(told.value)) > 20
    assert "\n" not in str(told.value)


def picture(size=(16, 16)):
    return Image.new("RGB", size, (255, 0, 0))


CASES = {
    "policy": ("did you mean 'beam'", {"policy": "beem"}),
    "policy option": ("did you mean 'width'", {"policy_options": {"widht": 2}}),
    "policy option's type": ("whole number", {"policy_options": {"width": "many"}}),
    "policy option's range": ("at least 1", {"policy_options": {"width": 0}}),
    "policy option's choice": ("one of", {"policy_options": {"value": "y0"}}),
    "options beside an object": ("beside a policy object", {"policy": BestOfN(n=2), "policy_options": {"n": 3}}),
    "verifier": ("did you mean 'gaussian-target'", {"verifier": "gausian-target"}),
    "verifier option": ("did you mean 'rho'", {"verifier": "gaussian-target:roh=1"}),
    "verifier twice": ("given twice", {"verifier": [Judge(), Judge()]}),
    "verifier of no kind": ("neither a name", {"verifier": [3]}),
    "set second": ("can only steer", {"verifier": [Judge(), Judge("ranks", scope="set")]}),
    "solver": ("did you mean", {"solver": "dimm"}),
    "solver of another process": ("does not fit", {"solver": "heun"}),
    "eta": (r"\[0, 1\]", {"eta": 1.5}),
    "eta of none": ("takes no eta", {"solver": "ddpm", "eta": 0.5}),
    "steps": ("at least 1", {"steps": 0}),
    "guidance": ("guidance_scale", {"guidance_scale": -1.0}),
    "guidance nan": ("guidance_scale", {"guidance_scale": float("nan")}),
    "guidance inf": ("guidance_scale", {"guidance_scale": float("inf")}),
    "rescale": ("guidance_rescale", {"guidance_rescale": 1.5}),
    "interval": ("guidance_interval", {"guidance_interval": (2.0, 1.0)}),
    "strength alone": ("without an initial image", {"strength": 0.5}),
    "strength": (r"lie in \(0, 1\]", {"strength": 0.0, "init_image": picture()}),
    "strength too small": ("leaves none of 4 steps; use at least 0.25", {"strength": 0.2, "init_image": picture()}),
    "no image": ("does not exist", {"init_image": "/nowhere/at-all.png"}),
    "image of no kind": ("file name or a PIL image", {"init_image": 7}),
    "latents": ("need \\(2,\\)", {"latents": torch.zeros(3)}),
    "latents of several seeds": ("give one seed", {"latents": torch.zeros(2), "seed": [0, 1]}),
    "latents and torch": ("give one", {"latents": torch.zeros(2), "initial_noise": "torch"}),
    "initial noise": ("'portable' or 'torch'", {"initial_noise": "cuda"}),
    "seed": ("out of range", {"seed": -1}),
    "seed large": ("out of range", {"seed": 2**64}),
    "no seeds": ("empty", {"seed": []}),
    "seed twice": ("twice", {"seed": [1, 2, 1]}),
    "seed of a half": ("seed is 0.5 but must be a whole number", {"seed": [0, 0.5]}),
    "seed as text": ("whole number", {"seed": "1"}),
    "steps of a half": ("steps is 2.5 but must be a whole number", {"steps": 2.5}),
    "budget of a half": ("nfe is 40.5 but must be a whole number", {"nfe": 40.5}),
    "batch of a half": ("whole number", {"max_batch": 1.5}),
    "memory as a float": ("whole number", {"memory_limit": 1e9}),
    "seconds as text": ("a number above 0", {"seconds": "1"}),
    "budget": ("smallest budget is 4", {"nfe": 3}),
    "seconds": ("above 0", {"seconds": 0}),
    "seconds nan": ("above 0", {"seconds": float("nan")}),
    "batch": ("at least 1", {"max_batch": 0}),
    "memory": ("at least 1", {"memory_limit": 0}),
    "class": ("did you mean 'ring1'", {"class_label": "ring11"}),
    "class number": ("from 0 to 8", {"class_label": 9}),
    "negative prompt": ("negative prompt", {"negative_prompt": "far"}),
    "tensors": ("no use for prompt_embeds", {"prompt_embeds": torch.zeros(2, 2)}),
    "size": ("height and width", {"height": 64}),
    "helper": ("unknown model", {"helpers": {"small": "gausian"}}),
    "helper of another process": ("does not share", {"helpers": {"small": Hooked("flow"), "other": Hooked("ve")}, "solver": "exact"}),
    "helper without the solver": ("does not fit", {"helpers": {"small": Hooked("ve")}}),
    "helper of another shape": ("does not share", {"helpers": {"small": Hooked("vp", "two-modes")}}),
    "option": ("did you mean 'steps'", {"step": 3}),
    "verifiers": ("did you mean 'verifier'", {"verifiers": [Judge()]}),
    "stochastic needed": ("choose a stochastic one .*, or branch_by=renoise", {"policy": Beam(branch_by="step")}),
    "no prompts": ("empty", {}),
    "prompt of no kind": ("neither text nor a Condition", {}),
    "prompt": ("cannot read the prompt", {}),
    "model": ("unknown model", {}),
}
ARGUMENTS = {
    "no prompts": (Unloaded(), []),
    "prompt of no kind": (Unloaded(), [PROMPT, 3]),
    "prompt": (Unloaded(), "a red cube"),
    "model": ("gausian", PROMPT),
}


@pytest.mark.parametrize("name", CASES)
def test_mistakes_are_told_early(name):
    match, options = CASES[name]
    refused(match, *ARGUMENTS.get(name, ()), **options)


def test_one_bad_prompt_stops_all_before_any_runs():
    model = Hooked()
    with pytest.raises(UsageError, match="cannot read"):
        search(model, [PROMPT, "a cube"], verifier="gaussian-target", steps=4)
    assert model.seen == 0


def test_nothing_to_show_is_nothing_to_look_at():
    refused("makes none", Unloaded("vp", "two-modes"), "near (1)", verifier=Judge(needs=["images"]))


def test_a_policy_that_compares_across_sets_refuses_ranks():
    class Absolute(Beam):
        @property
        def needs(self):
            return frozenset({"absolute"})

    refused("relative to each set", policy=Absolute(), verifier=Judge(scope="set"))


def test_a_policy_may_need_what_there_is_not():
    class Fancy(Beam):
        @property
        def needs(self):
            return frozenset({"gradient"})

    refused("gradient", policy=Fancy())


def test_without_anything_the_demonstration_is_searched():
    plan = prepare(steps=4)
    assert plan.is_demo
    assert plan.model.name == "gaussian"
    assert len(plan.notices) == 3
    assert execute(plan)[0].score is not None


def test_conditions_and_options_are_joined():
    plan = prepare("gaussian", [Condition(PROMPT, class_label=2), "near (1, 1)"], verifiers=[Judge()], class_label="rare", steps=3)
    assert [(condition.prompt, condition.class_label) for condition in plan.conditions] == [(PROMPT, 2), ("near (1, 1)", "rare")]


def test_a_plan_is_strict_json_and_counts_everything():
    plan = prepare("gaussian", [PROMPT, "near (1, 1)"], seed=[0, 1, 2], policy=BestOfN(n=3), guidance_scale=2.0, class_label=0, steps=5, guidance_interval=(0.1, 2.0))
    data = json.loads(json.dumps(plan.to_json(), allow_nan=False))
    assert data["runs"] == 6
    assert data["nfe_upper"] == 6 * (3 * 5 + 5)
    assert data["rows_upper"] == 2 * data["nfe_upper"]
    assert data["cost"]["exact"]
    assert data["guidance_interval"] == [0.1, 2.0]


def test_a_cap_lowers_the_cost():
    plan = prepare("gaussian", PROMPT, policy=Beam(), nfe=100, steps=10)
    assert plan.cost.upper.nfe == 100
    assert not plan.cost.exact
    assert execute(plan)[0].ledger.nfe <= 100


def test_one_search_gives_a_result_and_several_give_results():
    options = {"policy": BestOfN(n=1), "steps": 3}
    one = search("gaussian", PROMPT, **options)
    assert one.prompt == PROMPT
    several = search("gaussian", [PROMPT], **options)
    assert len(several) == 1
    assert several[0].score == one.score
    assert [result.seed for result in search("gaussian", PROMPT, seed=[4, 2], **options)] == [4, 2]
    assert search("gaussian", PROMPT, baseline=False, **options).baseline is None


def test_numpys_numbers_and_ranges_are_as_good():
    options = {"policy": BestOfN(n=1), "steps": np.int64(3), "nfe": np.int64(9), "baseline": False}
    assert search("gaussian", PROMPT, seed=np.int64(2), **options).seed == 2
    for seeds in (np.arange(2), range(2), (seed for seed in (0, 1))):
        results = search("gaussian", PROMPT, seed=seeds, **options)
        assert [result.seed for result in results] == [0, 1]
        json.dumps(results[0].to_json() | results[0].options, allow_nan=False)


def test_results_show_themselves():
    results = search(Hooked(), ["near (1, 1)"], verifier=Judge("<b>"), policy=BestOfN(n=1), steps=3)
    html = results._repr_html_()
    assert "<b>" not in html
    assert "&lt;b&gt;" in html
    assert html.count("data:image/png;base64,") == 2
    assert "1 searches" in repr(results)
    assert "3 NFE" in repr(results[0])


def test_progress_ends_at_what_was_done():
    seen = []
    results = search("gaussian", [PROMPT, "near (0, 0)"], policy=BestOfN(n=3), steps=5, callback=seen.append)
    assert all(isinstance(progress, Progress) for progress in seen)
    assert [progress.nfe for progress in seen] == sorted(progress.nfe for progress in seen)
    assert (seen[-1].nfe, seen[-1].nfe_total, seen[-1].runs_done, seen[-1].runs_total) == (40, 40, 2, 2)
    assert seen[-1].best_score == max(result.score for result in results)


def test_a_failed_single_search_raises_its_error():
    model = Hooked()
    model.spoil = lambda latents, timesteps, outputs: outputs * torch.nan
    with pytest.raises(SearchFailed):
        search(model, PROMPT, verifier=Judge(), steps=3)
    results = search(model, [PROMPT], verifier=Judge(), steps=3)
    assert len(results) == 0
    assert isinstance(results.failures[0].error, SearchFailed)


def test_a_helper_model_denoises():
    from tsdiff.treesearch.requests import Denoise, Draw, Score

    class Helped(BestOfN):
        def search(self, tree):
            nodes = yield Denoise((yield Draw()), to=2, model="small")
            yield Score((yield Denoise(nodes, to=4)))
            return tree.best()

    small, large = Hooked(), Hooked()
    result = search(large, PROMPT, policy=Helped(n=1), verifier=Judge(), helpers={"small": small}, steps=4, baseline=False)
    assert (small.seen, large.seen) == (2, 2)
    assert [node.nfe for node in result.tree.nodes] == [1, 2, 1]
