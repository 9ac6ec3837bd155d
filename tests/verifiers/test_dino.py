"""Classes as verifiers: DINOv2 with a linear head, and CLIP by the names of classes."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny_clip
import tiny_dino
import torch
from safetensors.torch import load_file, save_file

import tsdiff
from tsdiff.plugin.conformance import ExampleCandidates, VerifierConformance
from tsdiff.policies.best_of_n import BestOfN
from tsdiff.treesearch import registry
from tsdiff.treesearch.errors import SetupError, UsageError
from tsdiff.treesearch.protocols import Condition
from tsdiff.treesearch.resolve import resolve_verifier
from tsdiff.verifiers.dino import DinoClassifier
from tsdiff.verifiers.dino_network import DinoNetwork, locate
from tsdiff.verifiers.labels import class_index
from tsdiff.verifiers.libraries import quiet_libraries
from tsdiff.verifiers.zero_shot import ClipZeroShot

LABELS = ("cat", "dog, hound", "7")
WORDS = ("red star", "green", "blue")  # some tokenizers have only letters, and ten fit


class Pictures:
    """Candidates that are images and conditions."""

    def __init__(self, images, conditions):
        self.images = images
        self.conditions = conditions


def noise(count=4, size=(40, 48), seed=0):
    return torch.rand((count, 3, *size), generator=torch.Generator().manual_seed(seed))


def plain(colours):
    return colours[:, :, None, None].expand(-1, -1, 40, 24)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("dino")
    return {
        "classes": tiny_dino.save_dino(root / "classes", LABELS),
        "features": tiny_dino.save_dino(root / "features"),
        "colours": tiny_dino.colour_dino(root / "colours"),
        "clip": tiny_clip.save_clip(root / "clip"),
        "open_clip": tiny_clip.save_open_clip(root / "open", tiny_clip.open_clip_module(tiny_clip.OPEN_CLIP), tiny_clip.OPEN_CLIP),
        "siglip": tiny_clip.save_siglip(root / "siglip"),
        "clip-colours": tiny_clip.colour_model(root / "clip-colours"),
    }


@pytest.fixture(scope="module")
def prepared(folders):
    """A verifier with weights: dino-classifier, or clip-zero-shot over WORDS."""

    @functools.cache
    def make(kind, **options):
        if kind in ("classes", "colours"):
            verifier = DinoClassifier(model=str(folders[kind]), **options)
        else:
            verifier = ClipZeroShot(model=str(folders[kind]), **{"classes": WORDS, "templates": ("a {}",)} | options)
        verifier.prepare("cpu")
        return verifier

    return make


KINDS = ["classes", "clip", "open_clip", "siglip"]
COLOURS = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.3, 0.3, 0.3], [0.2, 0.4, 0.4]])


# DINOv2 --------------------------------------------------------------------------------------------------------------


def pixels_of(folder, images):
    with quiet_libraries():
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(folder)(list(images), do_rescale=False, return_tensors="pt").pixel_values


def test_logits_are_those_of_transformers(folders, prepared):
    images = noise(size=(40, 32))  # cut, but not resized, where only pixels could differ: see test_clip_images
    with quiet_libraries(), torch.no_grad():
        from transformers import Dinov2ForImageClassification

        model = Dinov2ForImageClassification.from_pretrained(folders["classes"]).eval()
        expected = model(pixel_values=pixels_of(folders["classes"], images)).logits
    verifier = prepared("classes", scale="logit")
    assert torch.allclose(verifier.logits(images), expected, atol=1e-4, rtol=1e-5)
    assert expected.std(0).min() > 1e-2, "images matter"
    assert torch.allclose(verifier.values(images, [2, 0, 1, 1]), expected[range(4), [2, 0, 1, 1]], atol=1e-4)


@pytest.mark.parametrize("kind", ["features", "classes"])
def test_features_are_the_class_token_of_transformers(folders, kind):
    """With a classifier on top, or without."""
    images = noise(size=(32, 40))
    with quiet_libraries(), torch.no_grad():
        from transformers import Dinov2ForImageClassification, Dinov2Model

        model = (Dinov2ForImageClassification if kind == "classes" else Dinov2Model).from_pretrained(folders[kind]).eval()
        expected = (model.dinov2 if kind == "classes" else model)(pixel_values=pixels_of(folders[kind], images)).pooler_output
    features = DinoNetwork(locate(str(folders[kind]), "test"), "test").image_features(images)
    assert torch.allclose(features, expected / expected.norm(dim=1, keepdim=True), atol=1e-4)
    assert torch.allclose(features.norm(dim=1), torch.ones(4), atol=1e-5)
    assert (features @ features.T).min() < 0.999, "images matter"


def test_logits_and_features_of_plain_images_are_known_in_closed_form(prepared):
    """The logit of "red" is sqrt(3) r / |rgb|; features are the colour's direction."""
    verifier = prepared("colours", scale="logit")
    direction = COLOURS / COLOURS.norm(dim=1, keepdim=True)
    assert torch.allclose(verifier.logits(plain(COLOURS)), 3.0**0.5 * direction, atol=1e-4)
    features = verifier._network.image_features(plain(COLOURS))
    assert torch.allclose(features @ features.T, direction @ direction.T, atol=1e-4)


def test_scales_are_what_their_names_say(prepared):
    logits = 3.0**0.5 * COLOURS / COLOURS.norm(dim=1, keepdim=True)
    conditions = [Condition(class_label=label) for label in ("red", 1, "2", "green")]
    rows = torch.tensor([0, 1, 2, 1])
    expected = {
        "logit": logits[range(4), rows],
        "log-probability": logits[range(4), rows] - logits.exp().sum(1).log(),
        "probability": logits.exp()[range(4), rows] / logits.exp().sum(1),
    }
    for scale, values in expected.items():
        scores = prepared("colours", scale=scale).score(Pictures(plain(COLOURS), conditions))
        assert torch.allclose(scores.values, values, atol=1e-4), scale
        if scale == "logit":
            assert scores.parts == {}
        else:
            assert torch.allclose(scores.parts["logit"], expected["logit"], atol=1e-4)
    assert prepared("colours").scale == "log-probability"


def test_a_search_by_class_finds_the_sample_that_shows_it(folders):
    """The analytic world takes classes too: verifier and model are told the same one, by number."""
    verifier = DinoClassifier(model=str(folders["colours"]))
    result = tsdiff.search("gaussian", policy=BestOfN(n=4), verifier=verifier, class_label=1, steps=3, baseline=False)
    scores = [node.values["dino-classifier"].score for node in result.tree.nodes if node.level == 3]
    assert result.score == max(scores)
    assert len(set(scores)) == 4
    picture = torch.from_numpy(np.array(result.image)).permute(2, 0, 1)[None].float() / 255
    assert result.score == pytest.approx(verifier.values(picture, [1]).item(), abs=1e-3), "of the picture in 8 bits"
    with pytest.raises(UsageError, match=r"dino-classifier: class 5 does not exist; classes run from 0 to 2"):
        tsdiff.search("gaussian", policy=BestOfN(n=4), verifier=verifier, class_label=5, steps=3, baseline=False)


def test_positions_are_stretched_as_transformers_does(folders, tmp_path):
    """Published models were trained on 518 pixels and look at 224: another crop is another number of patches, not an error."""
    folder = shutil.copytree(folders["classes"], tmp_path / "wide")
    path = folder / "preprocessor_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"size": {"shortest_edge": 48}, "crop_size": {"height": 42, "width": 42}}))
    images = noise(size=(48, 52))
    verifier = DinoClassifier(model=str(folder))
    verifier.prepare("cpu")
    with quiet_libraries(), torch.no_grad():
        from transformers import Dinov2ForImageClassification

        expected = Dinov2ForImageClassification.from_pretrained(folder).eval()(pixel_values=pixels_of(folder, images)).logits
    assert torch.allclose(verifier.logits(images), expected, atol=1e-4, rtol=1e-5)
    path.write_text(json.dumps(config | {"crop_size": {"height": 30, "width": 30}}))
    with pytest.raises(UsageError, match="not whole patches of 14 x 14 pixels"):
        DinoClassifier(model=str(folder)).prepare("cpu")


# CLIP by names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "open_clip", "siglip"])
def test_classes_are_the_librarys_own_zero_shot_weights(folders, prepared, kind):
    """Mean over templates of normalised text features, normalised again; logits are the scaled cosines."""
    templates = ("a {}", "{} a")
    images = noise(size=(32, 32))
    verifier = prepared(kind, templates=templates, scale="logit")
    with quiet_libraries(), torch.no_grad():
        if kind == "open_clip":
            import open_clip

            model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folders[kind]}")
            tokenizer = open_clip.get_tokenizer(f"local-dir:{folders[kind]}")
            made = [(lambda name, template=template: template.replace("{}", name)) for template in templates]
            classes = open_clip.build_zero_shot_classifier(model.eval(), tokenizer, WORDS, made, num_classes_per_batch=2)
            features = model.encode_image(torch.stack([preprocess(image) for image in images]), normalize=True)
            expected = model.logit_scale.exp() * features @ classes
        else:
            from transformers import AutoModel, AutoProcessor

            model, processor = AutoModel.from_pretrained(folders[kind]).eval(), AutoProcessor.from_pretrained(folders[kind])
            spoken = [template.replace("{}", name) for name in WORDS for template in templates]
            inputs = processor(text=spoken, images=list(images), return_tensors="pt", padding="max_length", truncation=True, do_rescale=False)
            answer = model(**inputs)
            classes = torch.nn.functional.normalize(answer.text_embeds.reshape(len(WORDS), len(templates), -1).mean(1), dim=-1)
            expected = model.logit_scale.exp() * answer.image_embeds @ classes.T
    assert torch.allclose(verifier.logits(images), expected, atol=1e-4, rtol=1e-5)
    assert expected.std(0).min() > 1e-3, "images matter"
    assert expected.std(1).min() > 1e-3, "and so do classes"


def test_log_probabilities_of_plain_images_are_known_in_closed_form(folders):
    """The tower reads one word, so the template is the bare name: cosines are r, g, b over |rgb|."""
    verifier = ClipZeroShot(model=str(folders["clip-colours"]), classes=("red", "green", "blue"), templates=("{}",))
    verifier.prepare("cpu")
    scale = verifier._network.towers.logit_scale
    cosines = COLOURS / COLOURS.norm(dim=1, keepdim=True)
    expected = (scale * cosines).log_softmax(1)
    conditions = [Condition(class_label="red"), Condition(class_label=1), Condition("blue"), Condition("blue", class_label="green")]
    scores = verifier.score(Pictures(plain(COLOURS), conditions))
    assert torch.allclose(scores.values, expected[range(4), [0, 1, 2, 1]], atol=1e-3)
    assert torch.allclose(scores.parts["logit"], scale * cosines[range(4), [0, 1, 2, 1]], atol=1e-3)


def test_the_order_of_templates_does_not_matter_and_one_repeated_is_one(prepared):
    images = noise()
    pair, swapped = (prepared("clip", templates=templates).logits(images) for templates in (("a {}", "b {}"), ("b {}", "a {}")))
    single, double = (prepared("clip", templates=templates).logits(images) for templates in (("a {}",), ("a {}", "a {}")))
    assert torch.allclose(pair, swapped, atol=1e-4)
    assert torch.allclose(single, double, atol=1e-4)
    assert not torch.allclose(pair, single, atol=1e-2)


def test_imagenet_stands_for_open_clips_names_and_templates(folders):
    with quiet_libraries():
        from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
    verifier = ClipZeroShot(model=str(folders["open_clip"]), classes=("imagenet",), templates=("imagenet",))
    assert verifier.names == tuple(IMAGENET_CLASSNAMES)
    assert verifier.check(Condition(class_label=999)) is None
    assert verifier.check(Condition(class_label="goldfish")) is None
    assert verifier._class(Condition(class_label="goldfish")) == 1
    assert [template.replace("{}", "cat") for template in verifier._state["templates"]] == [template("cat") for template in OPENAI_IMAGENET_TEMPLATES]
    twice = next(name for name in IMAGENET_CLASSNAMES if IMAGENET_CLASSNAMES.count(name) > 1)
    with pytest.raises(UsageError, match=r"may be any of .*; give its number"):
        verifier.check(Condition(class_label=twice))


def test_classes_and_templates_from_files(folders, tmp_path):
    (tmp_path / "names.txt").write_text("red star\n\ngreen\nblue\n")
    (tmp_path / "names.json").write_text(json.dumps(WORDS))
    (tmp_path / "templates.txt").write_text("a {}\n{}, and a\n")
    model = str(folders["clip"])
    for file in ("names.txt", "names.json"):
        assert ClipZeroShot(model=model, classes=(str(tmp_path / file),)).names == WORDS
    verifier = ClipZeroShot(model=model, classes=WORDS, templates=(str(tmp_path / "templates.txt"),))
    assert verifier._state["templates"] == ("a {}", "{}, and a")
    (tmp_path / "bad.json").write_text('{"a": 1')
    (tmp_path / "numbers.json").write_text("[1, 2]")
    for file, match in (("nowhere.txt", "cannot be read"), ("bad.json", "cannot be read"), ("numbers.json", "several texts")):
        with pytest.raises(UsageError, match=match):
            ClipZeroShot(model=model, classes=(str(tmp_path / file),))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "classes is missing"),
        ({"classes": ("a",)}, "only 'a'"),
        ({"classes": ("a", "a")}, "only 'a'"),
        ({"classes": ("a", "")}, "several texts"),
        ({"classes": "cat"}, "several texts"),
        ({"classes": WORDS, "templates": ("a photo",)}, r"template 'a photo' must have \{\} in one place"),
        ({"classes": WORDS, "templates": ("{} {}",)}, "in one place"),
        ({"classes": WORDS, "label": "yellow"}, "unknown class of clip-zero-shot 'yellow'"),
        ({"classes": WORDS, "scale": "cosine"}, "scale"),
    ],
)
def test_wrong_options_are_refused_at_once(folders, options, match):
    with pytest.raises(UsageError, match=match):
        ClipZeroShot(model=str(folders["clip"]), **options)


def test_a_zero_shot_verifier_by_reference(folders):
    registry.verifiers.add("clip-zero-shot", ClipZeroShot)
    made = resolve_verifier(f"clip-zero-shot:model={folders['clip']},classes=red star,green,blue,label=green")
    assert made == ClipZeroShot(model=str(folders["clip"]), classes=WORDS, label="green")


# Which class ---------------------------------------------------------------------------------------------------------


def test_a_class_is_a_name_one_of_its_names_or_a_number():
    names = ("cat", "dog, hound", "crane", "crane", "7", "fish, hound")
    for label, index in (("cat", 0), ("dog, hound", 1), ("dog", 1), (" dog ", 1), (3, 3), ("3", 3), ("7", 4), (5, 5)):
        assert class_index("judge", Condition(class_label=label), names) == index
    assert class_index("judge", Condition(class_label=0), names, default="dog") == 0
    assert class_index("judge", Condition("a dog"), names, default="dog") == 1
    for label, match in (("crane", "any of 2 .*, 3 .*"), ("hound", r"any of 1 \(dog, hound\), 5"), (6, "run from 0 to 5"), ("9", "run from 0 to 5"), ("cats", "did you mean 'cat'"), (-1, "run from")):
        with pytest.raises(UsageError, match=match):
            class_index("judge", Condition(class_label=label), names)
    with pytest.raises(UsageError, match="judge scores for a class, but the condition 'a dog' has none"):
        class_index("judge", Condition("a dog"), names)


def test_conditions_are_checked_without_weights(folders):
    dino = DinoClassifier(model=str(folders["classes"]))
    assert dino.check(Condition(class_label="hound")) is None
    assert dino._class(Condition(class_label="7")) == 2, "a name before a number"
    with pytest.raises(UsageError, match="has none"):
        dino.check(Condition("a dog"))
    assert DinoClassifier(model=str(folders["classes"]), label="cat").check(Condition("a dog")) is None
    with pytest.raises(UsageError, match="unknown class"):
        DinoClassifier(model=str(folders["classes"]), label="bird")
    clip = ClipZeroShot(model=str(folders["clip"]), classes=WORDS)
    assert clip.check(Condition("green")) is None
    with pytest.raises(UsageError, match="has none"):
        clip.check(Condition("a green thing"))


# Batches, gradients, bad pixels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_does_not_depend_on_its_batch(prepared, kind):
    verifier, images, classes = prepared(kind), noise(7), [0, 1, 2, 0, 1, 2, 0]
    together = verifier.values(images, classes)
    alone = torch.cat([verifier.values(image[None], [index]) for image, index in zip(images, classes, strict=True)])
    assert torch.allclose(together, alone, atol=1e-5, rtol=1e-5)
    assert torch.allclose(verifier.values(images.flip(0), classes[::-1]), together.flip(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(prepared, kind):
    verifier = prepared(kind)
    images = (0.2 + 0.6 * noise(2, seed=1)).requires_grad_()  # inside the range, where nothing is cut off
    direction = noise(2, seed=2) - 0.5
    verifier.score(Pictures(images, [Condition(class_label=1), Condition(class_label=2)])).values.sum().backward()
    slope = (images.grad * direction).sum((1, 2, 3))
    with torch.no_grad():
        ahead, behind = (verifier.values(images + sign * 1e-2 * direction, [1, 2]) for sign in (1, -1))
    assert torch.allclose(slope, (ahead - behind) / 2e-2, rtol=0.02, atol=0.02 * slope.abs().max().item())
    assert slope.abs().min() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_that_is_not_finite_fails_alone(prepared, kind):
    verifier, images = prepared(kind), noise()
    conditions = [Condition(class_label=1)] * 4
    good = verifier.score(Pictures(images, conditions)).values
    images[1, 0, 0, 0] = float("nan")
    scores = verifier.score(Pictures(images, conditions))
    assert scores.values.isnan().tolist() == [False, True, False, False]
    assert scores.parts["logit"].isnan().tolist() == [False, True, False, False]
    assert list(scores.reasons) == [1]
    assert torch.allclose(scores.values[[0, 2, 3]], good[[0, 2, 3]], atol=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, "colours"])
def test_black_and_white_images_score(prepared, kind):
    images = torch.stack([torch.zeros(3, 20, 30), torch.ones(3, 20, 30)])
    assert torch.isfinite(prepared(kind).values(images, [0, 1])).all()


def test_images_that_are_not_rgb_are_refused(prepared):
    with pytest.raises(UsageError, match=r"dino-classifier was given images of shape .* takes RGB images"):
        prepared("classes").values(torch.zeros(2, 1, 32, 32), [0, 0])


def test_half_precision_answers_nearly_alike_in_float32(prepared):
    whole, half = prepared("classes", scale="probability"), prepared("classes", scale="probability", dtype="bfloat16")
    values = half.values(noise(), [0, 1, 2, 0])
    assert values.dtype == torch.float32
    assert torch.allclose(values, whole.values(noise(), [0, 1, 2, 0]), atol=0.05)


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(folders, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(folders["classes"], tmp_path / "copy")


def spoil(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


CHANGES = [
    (lambda state: state.pop("classifier.bias"), r"1 missing \(classifier.bias\)"),
    (lambda state: state.pop("dinov2.encoder.layer.1.attention.output.dense.weight"), "1 missing"),
    (lambda state: state.update({"extra": torch.zeros(1)}), r"1 unexpected \(extra\)"),
    (lambda state: state.update({"classifier.weight": torch.zeros(5, 32)}), r"classifier.weight \(5, 32\) instead of \(3, 32\)"),
    (lambda state: state.update({"dinov2.embeddings.position_embeddings": torch.zeros(1, 5, 16)}), "of another shape"),
]


@pytest.mark.parametrize(("change", "match"), CHANGES)
def test_weights_load_exactly_or_are_refused(folder, change, match):
    spoil(folder, change)
    with pytest.raises(UsageError, match=match) as told:
        DinoClassifier(model=str(folder)).prepare("cpu")
    assert "model.safetensors" in str(told.value)


def test_a_mask_token_is_not_missed(folder, prepared):
    """Nothing but training reads it."""
    spoil(folder, lambda state: state.pop("dinov2.embeddings.mask_token"))
    verifier = DinoClassifier(model=str(folder))
    verifier.prepare("cpu")
    assert torch.equal(verifier.logits(noise()), prepared("classes").logits(noise()))


def test_what_is_missing_or_damaged_is_told_before_loading(folder, folders):
    for options, match in (
        ({}, "model is missing"),
        ({"model": "./nowhere"}, "there is no folder 'nowhere'"),
        ({"model": "nowhere"}, "there is no folder 'nowhere'"),
        ({"model": str(folders["features"])}, "gives features only"),
        ({"model": str(folders["clip"])}, "must be of 'dinov2'"),
        ({"model": str(folder.parent)}, "holds no config.json"),
        ({"model": str(folder), "scale": "logits"}, "scale"),
    ):
        with pytest.raises(UsageError, match=rf"^dino-classifier.*{match}"):
            DinoClassifier(**options)
    with pytest.raises(SetupError, match=r"dino-classifier: .*hf download owner/model"):
        DinoClassifier(model="owner/model")
    whole = (folder / "model.safetensors").read_bytes()
    for content, match in ((b"", "is empty"), (whole[: len(whole) // 2], "not a whole safetensors file"), (b"version https://git-lfs", "git lfs pull")):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(UsageError, match=match):
            DinoClassifier(model=str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="holds no weights"):
        DinoClassifier(model=str(folder))
    (folder / "model.safetensors").write_bytes(whole)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UsageError, match="how images are prepared"):
        DinoClassifier(model=str(folder))


def test_a_config_of_another_model_is_refused(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for changes in ({"model_type": "vit"}, {"architectures": ["Dinov2Backbone"]}, {"architectures": None}):
        path.write_text(json.dumps(config | changes))
        with pytest.raises(UsageError, match="but must be of 'dinov2', with Dinov2Model or Dinov2ForImageClassification"):
            DinoClassifier(model=str(folder))
    for labels in ({"0": "a", "2": "b"}, {"a": "0"}, ["a", "b"]):
        path.write_text(json.dumps(config | {"id2label": labels}))
        with pytest.raises(UsageError, match=r"must name the classes 0, 1, 2, \.\.\. without a gap"):
            DinoClassifier(model=str(folder))
    path.write_text(json.dumps(config | {"id2label": {"0": "a", "1": "b"}}))
    with pytest.raises(UsageError, match=r"classifier.bias \(3,\) instead of \(2,\)"):
        DinoClassifier(model=str(folder)).prepare("cpu")
    path.write_text(json.dumps(config | {"hidden_size": 32}))
    with pytest.raises(UsageError, match="of another shape"):
        DinoClassifier(model=str(folder)).prepare("cpu")


def test_weights_are_named_by_their_bytes_without_importing_torch(folders):
    path = folders["classes"] / "model.safetensors"
    assert DinoClassifier(model=str(folders["classes"])).sha256 == {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    program = (
        "import sys\n"
        "from tsdiff.verifiers.dino import DinoClassifier\n"
        "from tsdiff.verifiers.zero_shot import ClipZeroShot\n"
        f"DinoClassifier(model={str(folders['classes'])!r}).sha256\n"
        f"ClipZeroShot(model={str(folders['clip'])!r}, classes=('a', 'b')).sha256\n"
        "sys.exit(bool({'torch', 'open_clip', 'transformers', 'diffusers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_loading_and_scoring_print_nothing_and_leave_random_numbers_alone(folders, capfd):
    state = torch.get_rng_state()
    for verifier in (DinoClassifier(model=str(folders["classes"])), ClipZeroShot(model=str(folders["clip"]), classes=WORDS, templates=("a {}",))):
        verifier.prepare("cpu")
        verifier.values(noise(1), [0])
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")


class Conforms(VerifierConformance):
    tolerance = 1e-5

    @pytest.fixture
    def candidates(self):
        made = ExampleCandidates.random([""] * 5)
        made.conditions = [Condition(class_label=index % 3) for index in range(5)]
        return made


class TestDinoConforms(Conforms):
    @pytest.fixture
    def verifier(self, folders):
        return DinoClassifier(model=str(folders["classes"]))


class TestClipConforms(Conforms):
    @pytest.fixture
    def verifier(self, folders):
        return ClipZeroShot(model=str(folders["clip"]), classes=WORDS, templates=("a {}",))
