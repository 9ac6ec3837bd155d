"""Verifiers that sit on another device than the sampler: everything they read is brought to them, a batch at a time.

This machine has no accelerator. `second_device` plays one, as strict about mixed devices as a real one is; what it cannot
show is how fast a real one would be.
"""

from __future__ import annotations

import all_verifiers
import pytest
import torch
from all_verifiers import CHECKPOINTS, CLASSED, REFERENCES, WORDS, candidates, condition, make, noise, owner, scores
from fakes import Hooked
from second_device import DEVICE, There, second_device

import tsdiff
from tsdiff.policies.best_of_n import BestOfN
from tsdiff.treesearch.pictures import score_pictures
from tsdiff.treesearch.protocols import Condition
from tsdiff.treesearch.references import resolve_verifier

PAIRED = {"self-supervised", "path-stability"}
"""Those that look at two pictures of a row."""

FILES = {"jpeg-size", "jpeg-compressibility"}
"""Those that make files, on the CPU, of what they see."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Tiny checkpoints."""
    folder = tmp_path_factory.mktemp("checkpoints")
    all_verifiers.checkpoints(folder)
    return folder


def elsewhere(name, root, device="mps"):
    """A verifier that is told to sit on a device."""
    with pytest.MonkeyPatch.context() as patched:
        told = REFERENCES[name].replace("value:", "value:path=").replace("{value}", f"{{value}},device={device}").replace("model=", f"device={device},model=")
        patched.setitem(REFERENCES, name, told)
        return make(name, root)


def moved(batch):
    """The same candidates, made by a sampler on the second device."""
    for name in ("images", "x0", "latents", "ancestors"):
        object.__setattr__(batch, name, getattr(batch, name).to(DEVICE))
    return batch


# The second device itself ---------------------------------------------------------------------------------------------


def test_the_second_device_is_as_strict_as_a_real_one():
    with second_device() as machine:
        here, there = torch.arange(6.0).reshape(2, 3), torch.arange(6.0).reshape(2, 3).to("mps")
        assert there.device == DEVICE
        assert machine.sent == [(2, 3)]
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            here + there
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            torch.stack([here, there])
        assert isinstance(there @ there.T, There)
        assert torch.equal((there * there).cpu(), here * here)
        assert there.sum().item() == 15.0
        assert machine.fetched == [(2, 3), ()]
        network = torch.nn.Linear(3, 2).requires_grad_(False)
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            network(there)
        assert network.to("mps")(there).device == DEVICE


def test_a_network_that_does_not_fetch_its_pictures_would_be_found_out(root):
    """Or the tests below would show nothing."""
    with second_device():
        verifier = elsewhere("clip-transformers", root)
        verifier.prepare("cpu")
        verifier.network.device = torch.device("cpu")  # where it now looks for its pictures
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            scores(verifier, candidates("clip-transformers", noise()))


# Verifiers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(CHECKPOINTS))
def test_what_a_verifier_reads_comes_to_its_device_in_one_piece_and_its_scores_come_back_in_one(root, name):
    plain = make(name, root)
    plain.prepare("cpu")
    with second_device() as machine:
        verifier = elsewhere(name, root)
        verifier.prepare("cpu")
        assert machine.sent, "its weights"
        assert owner(verifier)._network.device == DEVICE
        scores(verifier, candidates(name, noise(1)))  # texts are encoded once
        transfers = {}
        for rows in (2, 8):
            batch = candidates(name, noise(rows, seed=rows))
            machine.forget()
            values = scores(verifier, batch)
            transfers[rows] = list(machine.sent), list(machine.fetched)
            assert torch.allclose(values, scores(plain, batch), atol=1e-5, rtol=1e-5)
    facts = len(verifier.facts_of(condition(name))) if name == "compositional" else 1
    for rows, (sent, _) in transfers.items():
        whole = [(rows, 2)] if name == "value" else [(rows * facts, 3, 32, 40)] * (2 if name in PAIRED else 1)
        assert [shape for shape in sent if len(shape) > 2 or shape == (rows, 2)] == whole
    (few_sent, few_fetched), (many_sent, many_fetched) = transfers[2], transfers[8]
    assert len(few_sent) == len(many_sent), "as many transfers for eight rows as for two"
    assert len(few_fetched) == len(many_fetched) <= 2


@pytest.mark.parametrize("name", sorted(CHECKPOINTS))
def test_a_verifier_on_the_cpu_judges_a_sampler_on_another_device(root, name):
    plain, images = make(name, root), noise(6)
    plain.prepare("cpu")
    want = scores(plain, candidates(name, images))
    with second_device() as machine:
        verifier = elsewhere(name, root, "cpu")
        verifier.prepare(str(DEVICE))
        batch = moved(candidates(name, images))
        machine.forget()
        values = scores(verifier, batch)
        assert torch.allclose(values, want, atol=1e-5, rtol=1e-5)
        assert len(machine.fetched) < 6, "not one for each row"


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_a_verifier_without_a_device_of_its_own_is_where_the_sampler_is(root, name):
    plain, images = make(name, root), noise(6)
    plain.prepare("cpu")
    want = scores(plain, candidates(name, images))
    with second_device() as machine:
        verifier = make(name, root)
        verifier.prepare(str(DEVICE))
        batch = moved(candidates(name, images))
        machine.forget()
        assert torch.allclose(scores(verifier, batch), want, atol=1e-5, rtol=1e-5)
        pictures = [shape for shape in machine.sent + machine.fetched if len(shape) > 2]
        assert pictures == ([(6, 3, 32, 40)] if name in FILES else []), "only an encoder of files takes pictures off the device"


# Searches ------------------------------------------------------------------------------------------------------------


class Anything(Hooked):
    """The exact model, which makes the same of any prompt."""

    def check(self, condition, *, guided=False):
        """Any condition will do."""


@pytest.mark.parametrize("name", ["clip-transformers", "dino-classifier"])
def test_a_search_sends_its_pictures_batch_by_batch(root, name):
    """Twenty samples: sixteen at once, and the other four."""

    def search(verifier):
        given = {"class_label": 1} if name in CLASSED else {"prompts": WORDS}
        return tsdiff.search(Anything(), policy=BestOfN(n=20), verifier=verifier, steps=4, baseline=False, **given)

    def values(result, verifier):
        return [node.score(verifier.name) for node in result.tree.nodes if node.level == 4]

    plain = make(name, root)
    want = search(plain)
    with second_device() as machine:
        verifier = elsewhere(name, root)
        found = search(verifier)
        sent = [shape for shape in machine.sent if shape[1:] == (3, 4, 4)]
    assert sorted(sent, reverse=True) == [(16, 3, 4, 4), (4, 3, 4, 4)]
    assert len(values(found, verifier)) == 20
    assert values(found, verifier) == pytest.approx(values(want, plain), abs=1e-5)
    assert found.score == pytest.approx(want.score, abs=1e-5)


def test_pictures_from_files_are_sent_batch_by_batch(root):
    images = list(noise(20).unbind())
    with second_device() as machine:
        verifier = elsewhere("clip-open", root)
        verifier.prepare("cpu")
        answers = score_pictures([verifier], images, [Condition(WORDS)] * 20, device="cpu")
        assert [shape for shape in machine.sent if shape[1:] == (3, 32, 40)] == [(16, 3, 32, 40), (4, 3, 32, 40)]
    plain = resolve_verifier(REFERENCES["clip-open"].format(open_clip=root / "open_clip"))
    plain.prepare("cpu")
    want = scores(plain, candidates("clip-open", torch.stack(images)))
    assert [answer[verifier.name].score for answer in answers] == pytest.approx(want.tolist(), abs=1e-5)
