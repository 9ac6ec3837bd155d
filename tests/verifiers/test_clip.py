"""CLIPScore: known answers, agreement with open_clip and transformers, scales, gradients, prompts, failures."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import warnings

import numpy as np
import pytest
import tiny_clip
import torch
from fakes import Hooked

import tsdiff
from tsdiff.plugin.conformance import VerifierConformance
from tsdiff.policies.best_of_n import BestOfN
from tsdiff.treesearch.errors import SetupError, UsageError
from tsdiff.treesearch.protocols import Condition
from tsdiff.verifiers import Clip
from tsdiff.verifiers.clip_network import PromptWarning
from tsdiff.verifiers.libraries import quiet_libraries

PROMPTS = ["a red star", "", "blue and a", "a"]  # some tokenizers have only letters, and ten fit


class Pictures:
    """Candidates that are images and prompts."""

    def __init__(self, images, prompts):
        self.images = images
        self.conditions = [Condition(prompt) for prompt in prompts]


def noise(count=4, size=(32, 32), seed=0):
    return torch.rand((count, 3, *size), generator=torch.Generator().manual_seed(seed))


def fresh(folder, **options):
    verifier = Clip(model=str(folder), **options)
    verifier.prepare("cpu")
    return verifier


prepared = functools.cache(fresh)  # for tests that only ask it for scores


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One checkpoint of each kind."""
    root = tmp_path_factory.mktemp("clip")
    own_words = tiny_clip.config(
        text_cfg={"vocab_size": 54, "hf_tokenizer_name": "letters", "pool_type": "eos", "eos_id": 53, "pad_id": 53}, vision_cfg={"patch_size": 8}, quick_gelu=True
    )
    sigmoid = tiny_clip.config(custom_text=True, init_logit_bias=-3.0)
    return {
        "open_clip": tiny_clip.save_open_clip(root / "open", tiny_clip.open_clip_module(tiny_clip.OPEN_CLIP), tiny_clip.OPEN_CLIP),
        "own-words": tiny_clip.save_open_clip(root / "own", tiny_clip.open_clip_module(own_words), own_words, tokenizer=tiny_clip.clip_tokenizer()),
        "sigmoid": tiny_clip.save_open_clip(root / "sigmoid", tiny_clip.open_clip_module(sigmoid), sigmoid, mean=[0.5] * 3, std=[0.5] * 3, resize_mode="squash"),
        "clip": tiny_clip.save_clip(root / "clip"),
        "siglip": tiny_clip.save_siglip(root / "siglip"),
        "siglip-mask": tiny_clip.save_siglip(root / "siglip-mask", mask=True),
        "colours": tiny_clip.colour_model(root / "colours"),
    }


KINDS = ["open_clip", "own-words", "sigmoid", "clip", "siglip"]


def reference_logits(kind, folder, images, prompts):
    """Logit of each image with each prompt by the library's own forward, preprocessing and tokenizer."""
    with quiet_libraries(), torch.no_grad():
        if kind in ("clip", "siglip", "siglip-mask"):
            from transformers import AutoModel, AutoProcessor

            model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
            inputs = processor(text=prompts, images=list(images), return_tensors="pt", padding="max_length", truncation=True, do_rescale=False)
            return model(**inputs).logits_per_image
        import open_clip

        model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(prompts)
        return model.eval().get_logits(torch.stack([preprocess(image) for image in images]), tokens)[0]


# Right answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "siglip-mask"])
def test_agrees_with_the_library_that_trained_it(folders, kind):
    images = noise()
    expected = reference_logits(kind, folders[kind], images, PROMPTS)
    verifier = prepared(folders[kind], scale="logit")
    ours = torch.stack([verifier.values(images, [prompt] * len(images)) for prompt in PROMPTS], dim=1)
    assert torch.allclose(ours, expected, atol=1e-4, rtol=1e-5)
    assert expected.std(0).min() > 1e-3, "images matter"
    assert expected.std(1).min() > 1e-3, "and prompts do"


def test_scores_of_plain_images_are_known_in_closed_form(folders):
    verifier = prepared(folders["colours"])
    colours = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.3, 0.3, 0.3], [0.2, 0.4, 0.4]])
    images = colours[:, :, None, None].expand(-1, -1, 40, 24)  # of any size and shape
    for channel, word in enumerate(("red", "green", "blue")):
        expected = colours[:, channel] / colours.norm(dim=1)
        assert torch.allclose(verifier.values(images, [word] * 4), expected, atol=1e-4)
    half = torch.zeros(1, 3, 16, 16)
    half[:, 0, :, :8] = 1.0
    half[:, 2, :, 8:] = 1.0
    assert verifier.values(half, ["red"]).item() == pytest.approx(math.sqrt(0.5), abs=1e-4), "the mean colour is halfway to blue"


def test_a_matching_image_wins_a_search_among_many(folders):
    verifier = prepared(folders["colours"])
    images = noise(12, (16, 16), seed=4)
    best = verifier.values(images, ["green"] * 12).argmax()
    means = images.mean((2, 3))
    assert best == (means[:, 1] / means.norm(dim=1)).argmax()


def test_scales_are_what_their_names_say(folders):
    images, prompts = noise(), PROMPTS
    cosine = prepared(folders["siglip"]).values(images, prompts)
    values = {scale: prepared(folders["siglip"], scale=scale).values(images, prompts) for scale in ("cosine100", "clipscore", "logit", "probability")}
    logit = math.exp(1.5) * cosine - 0.7
    assert torch.allclose(values["cosine100"], 100 * cosine)
    assert torch.allclose(values["clipscore"], 2.5 * cosine.clamp(min=0))
    assert torch.allclose(values["logit"], logit, atol=1e-5)
    assert torch.allclose(values["probability"], 1 / (1 + torch.exp(-logit)), atol=1e-5)
    assert prepared(folders["siglip"]).scale == "cosine"


def test_other_scales_keep_the_cosine_as_a_part(folders):
    candidates = Pictures(noise(), PROMPTS)
    plain = prepared(folders["clip"]).score(candidates)
    scaled = prepared(folders["clip"], scale="clipscore").score(candidates)
    assert plain.parts == {}
    assert torch.equal(scaled.parts["cosine"], plain.values)


def test_a_cosine_below_zero_is_no_clipscore(folders):
    verifier = prepared(folders["clip"], scale="clipscore")
    cosines = verifier.cosines(noise(), PROMPTS)
    assert (cosines < 0).any(), "or this test shows nothing"
    assert (verifier.values(noise(), PROMPTS)[cosines < 0] == 0).all()


def test_probabilities_need_a_model_that_gives_them(folders):
    for kind in ("clip", "open_clip"):
        with pytest.raises(UsageError, match="no SigLIP model"):
            Clip(model=str(folders[kind]), scale="probability")
    assert 0.0 < prepared(folders["sigmoid"], scale="probability").values(noise(1), ["a"]).item() < 1.0


def test_half_precision_weights_on_disk_are_loaded_as_float32(folders, tmp_path):
    module = tiny_clip.open_clip_module(tiny_clip.OPEN_CLIP)
    stored = prepared(tiny_clip.save_open_clip(tmp_path, module, tiny_clip.OPEN_CLIP, half=True))
    assert {weight.dtype for weight in stored.network.towers.module.parameters()} == {torch.float32}
    whole = prepared(folders["open_clip"])
    assert torch.allclose(stored.values(noise(), PROMPTS), whole.values(noise(), PROMPTS), atol=5e-3)


@pytest.mark.parametrize("kind", ["open_clip", "clip"])
def test_a_network_in_half_precision_scores_nearly_alike_in_float32(folders, kind):
    whole, half = prepared(folders[kind]), prepared(folders[kind], dtype="bfloat16")
    values = half.values(noise(), PROMPTS)
    assert values.dtype == torch.float32
    assert torch.allclose(values, whole.values(noise(), PROMPTS), atol=0.05)


# Batches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_does_not_depend_on_its_batch(folders, kind):
    verifier = prepared(folders[kind])
    images, prompts = noise(9, (40, 48)), [PROMPTS[index % 4] for index in range(9)]
    together = verifier.values(images, prompts)
    alone = torch.cat([verifier.values(image[None], [prompt]) for image, prompt in zip(images, prompts, strict=True)])
    assert torch.allclose(together, alone, atol=1e-5, rtol=0)
    assert torch.allclose(verifier.values(images.flip(0), prompts[::-1]), together.flip(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["open_clip", "clip"])
def test_each_prompt_is_encoded_once_and_by_itself(folders, kind):
    verifier = fresh(folders[kind])
    module = verifier.network.towers.module
    embedding = module.token_embedding if kind == "open_clip" else module.text_model.embeddings.token_embedding
    seen = []
    embedding.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    for _ in range(3):
        verifier.score(Pictures(noise(8), PROMPTS * 2))
    verifier.prepare("cpu")
    verifier.values(noise(1), PROMPTS[:1])
    assert seen == [1] * len(PROMPTS)


def test_the_last_block_computes_nothing_that_is_thrown_away(folders):
    """A class token is all that open_clip's towers hand on; that its numbers are right is told above."""
    verifier = fresh(folders["open_clip"])
    blocks = verifier.network.towers.module.visual.transformer.resblocks
    tokens = []
    for block in blocks:
        block.mlp.register_forward_hook(lambda _, inputs, __: tokens.append(inputs[0].shape[1]))
    verifier.values(noise(3), ["a"] * 3)
    assert tokens == [5] * (len(blocks) - 1) + [1]


def test_features_remembered_under_inference_mode_still_serve_gradients(folders):
    verifier = fresh(folders["clip"])
    with torch.inference_mode():
        verifier.score(Pictures(noise(), PROMPTS))
    images = noise().requires_grad_()
    verifier.values(images, PROMPTS).sum().backward()
    assert images.grad.abs().sum() > 0


def test_images_of_several_searches_share_batches(folders):
    verifier = fresh(folders["open_clip"])
    batches = []
    verifier.network.towers.module.visual.register_forward_hook(lambda _, inputs, __: batches.append(len(inputs[0])))
    prompts = ["near (3, 2.4)", "near (0, 0)"]
    results = tsdiff.search(Hooked(), prompts, policy=BestOfN(n=4), verifier=verifier, steps=4, baseline=False)
    assert sum(batches) == 8
    assert max(batches) > 4, "rows of both trees in one call"
    for result, prompt in zip(results, prompts, strict=True):
        picture = torch.from_numpy(np.array(result.image)).permute(2, 0, 1)[None].float() / 255
        assert result.score == pytest.approx(verifier.values(picture, [prompt]).item(), abs=0.01), "of the picture in 8 bits"


# Gradients -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(32, 32), (48, 40)])
def test_gradients_are_those_of_finite_differences(folders, kind, size):
    verifier = prepared(folders[kind], scale="cosine100")
    images = 0.2 + 0.6 * noise(2, size, seed=1)  # inside the range, where nothing is cut off
    direction = noise(2, size, seed=2) - 0.5
    images.requires_grad_()
    values = verifier.score(Pictures(images, PROMPTS[:2])).values
    values.sum().backward()
    slope = (images.grad * direction).sum((1, 2, 3))
    step = 1e-2
    with torch.no_grad():
        ahead, behind = (verifier.values(images + sign * step * direction, PROMPTS[:2]) for sign in (1, -1))
    assert torch.allclose(slope, (ahead - behind) / (2 * step), rtol=0.02, atol=0.02 * slope.abs().max().item())
    assert slope.abs().min() > 0


def test_gradient_ascent_turns_an_image_red(folders):
    """The gradient points where the score rises, and the weights stay as they were."""
    verifier = prepared(folders["colours"])
    before = {name: weight.clone() for name, weight in verifier.network.towers.module.state_dict().items()}
    image = torch.full((1, 3, 16, 16), 0.5)
    scores = []
    for _ in range(20):
        image.requires_grad_()
        value = verifier.values(image, ["red"])
        scores.append(value.item())
        (gradient,) = torch.autograd.grad(value, image)
        image = (image + 20.0 * gradient).clamp(0, 1).detach()
    assert all(later > earlier for earlier, later in itertools.pairwise(scores))
    assert scores[-1] > 0.8
    assert all(torch.equal(before[name], weight) for name, weight in verifier.network.towers.module.state_dict().items())
    assert not any(weight.requires_grad for weight in verifier.network.towers.module.parameters())


# Prompts and images that are no good ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "room"), [("open_clip", 10), ("own-words", 10), ("clip", 10), ("siglip", 7)])
def test_an_overlong_prompt_is_cut_with_one_warning(folders, kind, room):
    verifier = fresh(folders[kind])
    fits, longer = " ".join(["a"] * room), " ".join(["a"] * (room + 3))
    verifier.values(noise(1), [fits])
    with pytest.warns(PromptWarning, match=r"clip reads \d+ tokens at most, so the last 3 of the prompt 'a a ") as caught:
        cut = verifier.values(noise(2), [longer, longer])
    assert len(caught) == 1
    assert torch.allclose(verifier.values(noise(1), [longer]), cut[:1], atol=1e-5), "and no second warning, which would be an error"
    assert torch.isfinite(cut).all()
    if kind != "siglip":  # whose last token it is that counts
        assert cut[0].item() == pytest.approx(verifier.values(noise(1), [fits]).item(), abs=1e-5)


def test_an_empty_prompt_is_a_prompt(folders):
    for kind in KINDS:
        verifier = prepared(folders[kind])
        assert torch.isfinite(verifier.values(noise(1), [""])).all()
        assert verifier.check(Condition("")) is None


def test_a_class_without_a_prompt_is_refused(folders):
    verifier = Clip(model=str(folders["clip"]))
    with pytest.raises(UsageError, match="class 3 without a prompt"):
        verifier.check(Condition(class_label=3))
    assert verifier.check(Condition("a dog", class_label=3)) is None


def test_a_prefix_is_set_before_every_prompt(folders):
    plain, prefixed = prepared(folders["clip"]), prepared(folders["clip"], prefix="a photo")
    assert torch.equal(prefixed.values(noise(2), ["red", ""]), plain.values(noise(2), ["a photo red", "a photo"]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_an_image_that_is_not_finite_fails_alone(folders, bad):
    verifier = prepared(folders["open_clip"], scale="cosine100")
    good = verifier.score(Pictures(noise(), PROMPTS))
    images = noise()
    images[2, 1, 3, 5] = bad
    scores = verifier.score(Pictures(images, PROMPTS))
    assert scores.values.isnan().tolist() == [False, False, True, False]
    assert scores.parts["cosine"].isnan().tolist() == [False, False, True, False]
    assert scores.reasons == {2: "the image holds numbers that are not finite"}
    assert torch.allclose(scores.values[[0, 1, 3]], good.values[[0, 1, 3]], atol=1e-4)


def test_black_and_white_images_score(folders):
    images = torch.stack([torch.zeros(3, 20, 20), torch.ones(3, 20, 20)])
    for kind in ("colours", *KINDS):  # a black image's features are all zero under "colours"
        assert torch.isfinite(prepared(folders[kind]).values(images, ["red", "blue"])).all()


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 4, 32, 32), (3, 32, 32), (2, 3, 0, 32)])
def test_images_that_are_not_rgb_are_refused(folders, shape):
    with pytest.raises(UsageError, match=r"takes RGB images \(B, 3, H, W\)"):
        prepared(folders["clip"]).values(torch.zeros(shape), ["a"] * shape[0])


# Options -------------------------------------------------------------------------------------------------------------


def test_a_device_of_its_own(folders):
    verifier = Clip(model=str(folders["clip"]), device="cpu")
    verifier.prepare("cuda:7")
    assert verifier.network.device.type == "cpu"
    with pytest.raises(SetupError, match="'cuda:77' is not there"):
        Clip(model=str(folders["clip"]), device="cuda:77").prepare("cpu")
    for device in ("gpu", "cuda:", "cuda:x", ""):
        with pytest.raises(UsageError, match="device"):
            Clip(model=str(folders["clip"]), device=device)


@pytest.mark.parametrize("options", [{"scale": "2.5"}, {"dtype": "float8"}, {"name": "a:b"}, {"name": ""}, {"name": "a@b"}])
def test_wrong_options_are_refused_at_once(folders, options):
    with pytest.raises(UsageError, match=next(iter(options))):
        Clip(model=str(folders["clip"]), **options)


def test_weights_come_with_prepare_only(folders):
    verifier = Clip(model=str(folders["clip"]), name="judge")
    with pytest.raises(UsageError, match=r"judge has no weights yet; call prepare"):
        verifier.values(noise(1), ["a"])
    verifier.prepare("cpu")
    network = verifier.network
    verifier.prepare("cpu")
    assert verifier.network is network, "loaded once"


def test_weights_are_named_by_their_bytes(folders):
    digest = hashlib.sha256((folders["clip"] / "model.safetensors").read_bytes()).hexdigest()
    assert Clip(model=str(folders["clip"])).sha256 == {"model.safetensors": digest}


def test_loading_and_scoring_print_nothing_and_leave_random_numbers_alone(folders, capfd):
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in KINDS:
            fresh(folders[kind]).values(noise(1), ["a"])
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")


class TestConforms(VerifierConformance):
    tolerance = 1e-5

    @pytest.fixture
    def verifier(self, folders):
        return Clip(model=str(folders["own-words"]))

    @pytest.fixture
    def candidates(self):
        from tsdiff.plugin.conformance import ExampleCandidates

        return ExampleCandidates.random(["a cube", "dogs", "", "a star", "b"])
