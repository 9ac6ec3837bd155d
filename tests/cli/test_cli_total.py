"""`--total-nfe` and `--target`: one budget over many prompts on the command line."""

import json
import re

import pytest
from PIL import Image

from tsdiff.policies.adaptive import Adaptive
from tsdiff.treesearch import registry

PROMPTS = ["near (3, 2.4)", "near (0, 0)", "near (1, -2)", "near (2, 2)"]
ADAPTIVE = ("search", "--prompts", "prompts.txt", "--policy", "adaptive", "--steps", "5")


@pytest.fixture(autouse=True)
def prompts(tsdiff, tmp_path):
    """A prompt file in the current folder; the policy is known whatever is installed."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    registry.policies.add("adaptive", Adaptive)


def test_one_budget_is_shared_out_and_kept(tsdiff, tmp_path):
    result = tsdiff(*ADAPTIVE, "--total-nfe", "500", "--json")
    assert result.exit_code == 0, result.output
    runs = [json.loads(line) for line in result.stdout.splitlines()]
    assert [run["prompt"] for run in runs] == PROMPTS
    assert sum(run["nfe"] for run in runs) == 500
    assert len({run["nfe"] for run in runs}) > 1
    assert "500 NFE together, 20 to 440 NFE each" in result.stderr
    assert "500 of 500 NFE spent by all searches together" in result.stderr
    (index,) = (json.loads(path.read_text()) for path in tmp_path.glob("runs/run-*/index.json"))
    assert (index["forest"]["total_nfe"], index["forest"]["nfe"]) == (500, 500)
    assert index["options"]["policy"] == {"name": "adaptive", "policy": {"name": "best-of-n", "n": 4}, "pilot": 4, "rounds": 4, "prior": 1.0}
    assert index["options"]["typed"]["total_nfe"] == 500


def test_a_target_stops_prompts_that_reach_it(tsdiff):
    result = tsdiff(*ADAPTIVE, "--total-nfe", "4000", "--target", "-2", "--seed", "0-1", "--json", "--no-baseline")
    runs = [json.loads(line) for line in result.stdout.splitlines()]
    reached = sum(run["score"] >= -2 for run in runs)
    assert f"{reached} of 8 reached the target -2" in result.stderr
    assert 0 < reached < 8
    assert all(run["score"] >= -2 or run["nfe"] > 500 for run in runs)


def test_it_wraps_a_policy_with_its_parameters(tsdiff):
    result = tsdiff(*ADAPTIVE, "-P", "policy=beam", "-P", "policy.levels=0.4,0.6", "-P", "rounds=1", "--total-nfe", "900", "--json", "--quiet")
    assert (result.exit_code, result.stderr) == (0, "")
    assert sum(json.loads(line)["nfe"] for line in result.stdout.splitlines()) <= 900


def test_the_plan_says_what_is_shared_and_what_is_equal(tsdiff):
    shared = tsdiff("plan", *ADAPTIVE[1:], "--total-nfe", "500", "--target", "0.9").stdout
    assert re.search(r"^together +500 NFE, shared out, until the score is 0.9$", shared, re.MULTILINE)
    assert re.search(r"^network rows +520 in all at most$", shared, re.MULTILINE)
    equal = tsdiff("plan", "--prompts", "prompts.txt", "--policy", "best-of-n", "--steps", "5", "--total-nfe", "410").stdout
    assert re.search(r"^together +410 NFE, in equal parts$", equal, re.MULTILINE)
    assert re.search(r"^each run +100 of 102 NFE, ", equal, re.MULTILINE)
    assert re.search(r"^network rows +420 in all$", equal, re.MULTILINE)


def test_without_a_pilot_it_is_the_policy_with_equal_parts(tsdiff, tmp_path):
    for policy in (("adaptive", "-P", "pilot=0", "-P", "policy=beam"), ("beam",)):
        tsdiff("search", "--prompts", "prompts.txt", "--steps", "5", "--deterministic", "--total-nfe", "400", "--no-baseline", "--policy", *policy)
    one, other = (sorted(tmp_path.glob(f"runs/run-000{number}/0*")) for number in (1, 2))
    assert len(one) == len(other) == 4
    for left, right in zip(one, other, strict=True):
        for name in ("tree.json", "latents.safetensors"):
            assert (left / name).read_bytes() == (right / name).read_bytes()
        pictures = [Image.open(folder / "best.png").convert("RGB").tobytes() for folder in (left, right)]
        assert pictures[0] == pictures[1]  # the files' histories name their policies


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--policy", "adaptive"), ["total_nfe", "--total-nfe", "at least 20"]),
        (("--policy", "adaptive", "--nfe", "50"), ["nfe=50 for each of 4 is total_nfe=200"]),
        (("--policy", "adaptive", "--nfe", "50", "--total-nfe", "200"), ["give one"]),
        (("--policy", "adaptive", "--total-nfe", "19"), ["4 searches", "the smallest total is 20"]),
        (("--policy", "adaptive", "--total-nfe", "28", "-P", "pilot=0", "-P", "policy=beam"), ["need at least"]),
        (("--policy", "adaptive", "--total-nfe", "0"), ["--total-nfe", "0"]),
        (("--policy", "adaptive", "--total-nfe", "99", "--target", "high"), ["--target", "high"]),
        (("--policy", "adaptive", "--total-nfe", "99", "--target", "nan"), ["finite"]),
        (("--policy", "adaptive", "--total-nfe", "99", "-P", "policy=adaptive"), ["searches one prompt"]),
        (("--policy", "beam", "--total-nfe", "99", "--target", "1"), ["beam", "adaptive"]),
        (("--policy", "beam", "--total-nfe", "28"), ["total_nfe=28 is 7 for each of 4 searches"]),
    ],
)
def test_what_cannot_be_done_is_told(tsdiff, arguments, words):
    result = tsdiff("search", "--prompts", "prompts.txt", "--steps", "5", *arguments)
    assert result.exit_code == 2
    assert all(word in result.stderr for word in words), result.stderr
    assert result.stdout == ""


def test_a_file_can_say_it_all(tsdiff, tmp_path):
    (tmp_path / "run.toml").write_text('total_nfe = 400\ntarget = -1.0\nsteps = 5\n[policy]\nname = "adaptive"\npolicy = "beam"\n"policy.levels" = [0.4]\nrounds = 2\n')
    plan = json.loads(tsdiff("plan", *PROMPTS, "--config", "run.toml", "--json").stdout)
    assert (plan["total_nfe"], plan["target"], plan["nfe_budget"]) == (400, -1.0, None)
    assert plan["policy"]["policy"]["name"] == "beam"
    assert plan["policy"]["policy"]["levels"] == [0.4]


def test_it_is_described_with_its_parameters(tsdiff):
    shown = tsdiff("describe", "adaptive").stdout
    assert "policy adaptive" in shown
    for word in ("n0", "best-of-n", "policy.NAME=VALUE", "expected gain"):
        assert word in shown
