"""`tsdiff verifiers check`: every promise of a verifier that is broken is named, and one that holds is not."""

import hashlib
import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from fakes import Judge

from tsdiff.cli import verifiers as command
from tsdiff.treesearch import registry
from tsdiff.treesearch.errors import SetupError, UsageError
from tsdiff.treesearch.protocols import Condition, Scores
from tsdiff.verifiers.neural import Neural

CHANNELS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.6, 0.2), "blue": (0.1, 0.3, 0.9), "yellow": (0.9, 0.9, 0.1)}


def named_color(candidates):
    """Minus the distance of the middle pixel to the colour that the prompt names."""
    images = candidates.images
    middle = images[:, :, images.shape[2] // 2, images.shape[3] // 2]
    wanted = torch.tensor([CHANNELS[condition.prompt.split()[1]] for condition in candidates.conditions])
    return -(middle - wanted).norm(dim=1)


class Eye(Judge):
    """A verifier of pictures and prompts; a good one, unless told otherwise."""

    def __init__(self, value=named_color, *, name="eye", needs=("images", "conditions"), **options):
        super().__init__(name, value, needs=needs, **options)
        self.prepared = []

    def prepare(self, device):
        self.prepared.append(device)

    def score(self, candidates):
        return Scores(self.value(candidates))


@pytest.fixture
def check(tsdiff):
    """Runs the command on a verifier: exit status and findings by name."""

    def run(judge, *arguments):
        registry.verifiers.add(judge.name, lambda: judge)
        result = tsdiff("verifiers", "check", judge.name, "--json", "--size", "16", *arguments)
        assert result.stderr == ""
        report = json.loads(result.stdout, parse_constant=pytest.fail)
        assert report["ok"] == (result.exit_code == 0)
        return result.exit_code, {finding["what"]: finding for finding in report["findings"]}

    return run


def failed(findings):
    return [what for what, finding in findings.items() if finding["status"] == "failed"]


def test_a_good_verifier_passes(check):
    eye = Eye()
    status, findings = check(eye, "--device", "cpu")
    assert (status, failed(findings)) == (0, [])
    assert eye.prepared == ["cpu"]
    assert findings["matching pairs"]["detail"].startswith("12 of 12 matching images")
    assert findings["matching pairs"]["data"]["gap"] > 0
    assert findings["batch neighbours"]["data"]["difference"] == 0.0
    assert set(findings["finite scores"]["data"]) == {"noise", "black", "white", "grey", "checkerboard"}
    assert list(findings["images per second"]["data"]) == ["1", "2", "4", "8", "16"]
    assert all(rate > 0 for rate in findings["images per second"]["data"].values())
    assert findings["weights"]["status"] == "skipped"


def test_weights_are_named_with_their_hash(check, tmp_path):
    """As every verifier with a network names them."""

    @dataclass(frozen=True, kw_only=True)
    class Net(Neural):
        needs = frozenset({"images", "conditions"})
        name: str = "net"

        def _find(self):
            (tmp_path / "w.safetensors").write_bytes(b"weights")

        def _load(self):
            return SimpleNamespace(to=lambda device: None)

        @property
        def files(self):
            return (tmp_path / "w.safetensors",)

        def score(self, candidates):
            return Scores(named_color(candidates))

    status, findings = check(Net(device="cpu"))
    assert status == 0
    assert findings["sha256 of w.safetensors"]["detail"] == hashlib.sha256(b"weights").hexdigest()
    assert findings["device"]["detail"].startswith("cpu, ready after")


def test_the_shapes_world_knows_its_colours(tsdiff):
    result = tsdiff("verifiers", "check", "shapes-oracle")
    assert result.exit_code == 0, result.stdout
    assert "12 of 12 matching images" in result.stdout


@pytest.mark.parametrize("name", ["sharpness", "luminance", "jpeg-size", "total-variation", "target-color"])
def test_formulas_pass_what_can_be_checked(tsdiff, name):
    result = tsdiff("verifiers", "check", name, "--json")
    statuses = {finding["what"]: finding["status"] for finding in json.loads(result.stdout)["findings"]}
    assert result.exit_code == 0
    assert statuses == {"device": "ok", "weights": "skipped", "matching pairs": "skipped", "finite scores": "ok", "repeats itself": "ok", "batch neighbours": "ok", "images per second": "ok"}


def drifting(candidates):
    drifting.calls += 1
    return named_color(candidates) + 0.01 * drifting.calls


drifting.calls = 0


@pytest.mark.parametrize(
    ("value", "broken"),
    [
        (lambda candidates: -named_color(candidates), ["matching pairs"]),
        (lambda candidates: candidates.images.mean((1, 2, 3)), ["matching pairs"]),  # blind to the prompt
        (lambda candidates: named_color(candidates) + 1e-3 * candidates.images.mean(), ["batch neighbours"]),
        (lambda candidates: named_color(candidates) - 1e-3 * torch.arange(len(candidates.images)), ["batch neighbours"]),
        (drifting, ["repeats itself", "batch neighbours"]),
        (lambda candidates: named_color(candidates) + 0.0 * candidates.images.std((1, 2, 3)).log(), ["finite scores"]),
    ],
)
def test_what_is_broken_is_named_and_only_that(check, value, broken):
    status, findings = check(Eye(value))
    assert (status, failed(findings)) == (1, broken)


def test_differences_that_rounding_makes_are_allowed(check):
    status, _ = check(Eye(lambda candidates: named_color(candidates) + 1e-6 * len(candidates.images)))
    assert status == 0


def test_a_verifier_that_raises_is_told_as_such(check):
    def broken(candidates):
        raise RuntimeError("the weights are upside down")

    status, findings = check(Eye(broken))
    assert status == 1
    assert set(failed(findings)) == {"matching pairs", "finite scores", "repeats itself", "batch neighbours"}
    assert all("the weights are upside down" in findings[what]["detail"] for what in failed(findings))
    assert findings["images per second"]["status"] == "skipped"


def test_a_verifier_brings_its_own_pairs(check):
    class Own(Eye):
        def examples(self):
            return [(Condition("a red thing"), torch.tensor([0.9, 0.1, 0.1])[:, None, None].expand(3, 9, 9), torch.zeros(3, 9, 9))] * 2

    assert check(Own())[1]["matching pairs"]["detail"].startswith("2 of 2 matching images outscore a mismatched one (its own examples)")
    assert failed(check(Own(lambda candidates: -named_color(candidates)))[1]) == ["matching pairs"]


def test_verifiers_of_other_prompts_say_which_they_judge(check):
    class Choosy(Eye):
        def check(self, condition):
            if "cube" not in condition.prompt:
                raise UsageError("only cubes are judged")

    status, findings = check(Choosy(lambda candidates: candidates.images.mean((1, 2, 3))), "--prompt", "a red cube")
    assert status == 0
    assert findings["matching pairs"]["status"] == "skipped"
    assert "only cubes are judged" in findings["matching pairs"]["detail"]


def test_a_class_is_judged_where_one_is_given(check):
    seen = []

    def value(candidates):
        seen.extend(condition.class_label for condition in candidates.conditions)
        return candidates.images.mean((1, 2, 3))

    status, findings = check(Eye(value), "--class", "cat")
    assert (status, findings["matching pairs"]["status"], set(seen)) == (0, "skipped", {"cat"})


def test_what_a_picture_alone_cannot_tell_is_skipped(check):
    class Late(Eye):
        latency = "pending"

        def ask(self, candidates, answer):
            raise AssertionError("nobody is asked")

    for judge, why in ((Judge(), "reads x0"), (Eye(scope="set"), "whole set"), (Late(), "answers later")):
        status, findings = check(judge)
        assert (status, list(findings)) == (0, ["scores"])
        assert why in findings["scores"]["detail"]
        assert not getattr(judge, "prepared", []), "no weights load for nothing"


def test_pictures_are_what_they_are_called():
    drawn = command.odd_pictures(16)
    assert all(picture.shape == (3, 16, 16) and picture.min() >= 0 and picture.max() <= 1 for picture in drawn.values())
    assert drawn["checkerboard"].mean() == 0.5
    assert drawn["noise"].unique().numel() > 500
    disc = command.circle((1.0, 0.0, 0.0), 64)
    share = (disc[0] > 0.5).float().mean()
    assert abs(share - 3.14159 * 0.15 / 4) < 0.01
    assert torch.equal(command.noise(8, 3), command.noise(8, 3))
    assert not torch.equal(command.noise(8, 3), command.noise(8, 4))


@pytest.mark.parametrize(
    ("arguments", "hints"),
    [
        ([], ["{check}"]),
        (["check"], ["NAME"]),
        (["chek", "sharpness"], ["'chek'", "check"]),
        (["check", "sharpnes"], ["'sharpnes'", "'sharpness'"]),
        (["check", "target-color:color=rde"], ["'rde'", "CSS"]),
        (["check", "clip"], ["model"]),
        (["check", "clip:model=nowhere"], ["nowhere"]),
        (["check", "shapes-oracle", "--prompt", "a dog"], ["nothing to judge"]),
        (["check", "sharpness", "--size", "2"], ["--size", "8<=x<=2048"]),
        (["check", "sharpness", "--device", "gpu"], ["gpu", "cuda:N"]),
        (["check", "sharpness", "--device", "cuda:99"], ["cuda:99", "cpu"]),
        (["check", "unready"], ["the weights are not on this machine"]),
        (["check", "sharpness", "luminance"], ["luminance"]),
    ],
)
def test_wrong_input_is_one_line(tsdiff, arguments, hints):
    class Unready(Eye):
        def prepare(self, device):
            raise SetupError("the weights are not on this machine; fetch them")

    registry.verifiers.add("unready", lambda: Unready())
    result = tsdiff("verifiers", *arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert all(hint in last for hint in hints), last
    assert "Traceback" not in result.stderr
