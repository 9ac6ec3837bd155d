"""LAION's aesthetic heads: published layouts, closed forms, agreement with the modules that were trained, refusals."""

from __future__ import annotations

import functools
import hashlib
import json
import zipfile

import pytest
import tiny_clip
import torch
from fakes import Hooked
from safetensors.torch import save_file
from torch import nn

import tsdiff
from tsdiff.plugin.conformance import VerifierConformance
from tsdiff.policies.best_of_n import BestOfN
from tsdiff.treesearch import registry
from tsdiff.treesearch.errors import SetupError, UsageError
from tsdiff.treesearch.protocols import Condition
from tsdiff.treesearch.resolve import resolve_verifier
from tsdiff.verifiers import clip_network
from tsdiff.verifiers.aesthetic import Aesthetic
from tsdiff.verifiers.libraries import quiet_libraries

WIDTHS = {"clip": 12, "open_clip": 16, "colours": 6}


class MLP(nn.Module):
    """The module whose state dict the v2 files hold: layers in one Sequential, dropout between them."""

    def __init__(self, width, relu):
        super().__init__()
        nothing = [nn.ReLU()] if relu else []
        self.layers = nn.Sequential(
            *(nn.Linear(width, 1024), *nothing, nn.Dropout(0.2), nn.Linear(1024, 128), *nothing, nn.Dropout(0.2)),
            *(nn.Linear(128, 64), *nothing, nn.Dropout(0.1), nn.Linear(64, 16), *nothing, nn.Linear(16, 1)),
        )

    def forward(self, features):
        return self.layers(features)[:, 0]


class Linear(nn.Linear):
    """The module of the v1 files."""

    def __init__(self, width):
        super().__init__(width, 1)

    def forward(self, features):
        return super().forward(features)[:, 0]


def trained(kind, width, seed=0):
    """A head with weights that spread scores about as real ones do."""
    made = Linear(width) if kind == "v1" else MLP(width, relu=kind == "relu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in made.parameters():
            scale = 2.0 / weight.shape[-1] ** 0.5 if weight.ndim > 1 else 0.5
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return made.eval()


KINDS = ["linear", "relu", "v1"]
NAMES = {"linear": "sac+logos+ava1-l14-linearMSE.pth", "relu": "ava+logos-l14-reluMSE.pth", "v1": "sa_0_4_vit_l_14_linear.pth"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """CLIP models that compute QuickGELU, as OpenAI's do."""
    root = tmp_path_factory.mktemp("clip")
    quick = tiny_clip.config(quick_gelu=True)
    colours = tiny_clip.colour_model(root / "colours")
    path = colours / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["quick_gelu"] = True  # its blocks add nothing, whatever the activation
    path.write_text(json.dumps(config))
    return {"clip": tiny_clip.save_clip(root / "clip"), "open_clip": tiny_clip.save_open_clip(root / "open", tiny_clip.open_clip_module(quick), quick), "colours": colours}


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """A file of each layout for each CLIP model, under its published name."""
    root = tmp_path_factory.mktemp("heads")
    files = {}
    for kind in KINDS:
        for clip, width in WIDTHS.items():
            (root / clip).mkdir(exist_ok=True)
            files[kind, clip] = root / clip / NAMES[kind]
            torch.save(trained(kind, width).state_dict(), files[kind, clip])
    return files


@pytest.fixture(scope="module")
def prepared(folders, heads):
    @functools.cache
    def make(kind, clip, **options):
        verifier = Aesthetic(head=str(heads[kind, clip]), model=str(folders[clip]), **options)
        verifier.prepare("cpu")
        return verifier

    return make


class Pictures:
    """Candidates that are images."""

    def __init__(self, images):
        self.images = images
        self.conditions = [Condition()] * len(images)


def noise(count=4, size=(32, 32), seed=0):
    return torch.rand((count, 3, *size), generator=torch.Generator().manual_seed(seed))


# Right answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", ["clip", "open_clip"])
def test_agrees_with_the_published_module_on_the_librarys_own_features(folders, prepared, kind, clip):
    images = noise()
    with quiet_libraries(), torch.no_grad():
        if clip == "clip":
            from transformers import CLIPImageProcessor, CLIPModel

            pixels = CLIPImageProcessor.from_pretrained(folders[clip])(list(images), do_rescale=False, return_tensors="pt").pixel_values
            features = CLIPModel.from_pretrained(folders[clip]).eval().get_image_features(pixel_values=pixels).pooler_output
        else:
            import open_clip

            model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folders[clip]}")
            features = model.eval().encode_image(torch.stack([preprocess(image) for image in images]))
        expected = trained(kind, WIDTHS[clip])(features / features.norm(dim=1, keepdim=True))
    ours = prepared(kind, clip).values(images)
    assert torch.allclose(ours, expected, atol=1e-4, rtol=1e-5)
    assert expected.std() > 0.05, "images matter"


COLOURS = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.3, 0.3, 0.3], [0.2, 0.4, 0.4]])


@pytest.mark.parametrize("kind", ["linear", "v1"])
def test_an_affine_head_on_plain_images_is_known_in_closed_form(prepared, kind):
    """score = b + w . e, with w and b the product of the layers, and e = (r, -r, g, -g, b, -b) / (sqrt(2) |rgb|)."""
    head = trained(kind, 6).double()
    weight, bias = torch.eye(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    for layer in head.modules():
        if isinstance(layer, nn.Linear):
            weight, bias = layer.weight @ weight, layer.weight @ bias + layer.bias
    direction = COLOURS.double() / COLOURS.double().norm(dim=1, keepdim=True)
    features = torch.stack([direction, -direction], dim=2).flatten(1) / 2.0**0.5
    expected = (features @ weight[0] + bias[0]).float()
    ours = prepared(kind, "colours").values(COLOURS[:, :, None, None].expand(-1, -1, 40, 24))
    assert torch.allclose(ours, expected, atol=1e-4)
    assert expected.std() > 0.05


def test_a_head_of_known_weights_ranks_a_search_by_colour(folders, tmp_path):
    """w . e = 7 r / |rgb| + 3: the reddest of many wins."""
    weight = torch.tensor([[7.0, -7.0, 0.0, 0.0, 0.0, 0.0]]) / 2.0**0.5
    save_file({"weight": weight, "bias": torch.tensor([3.0])}, tmp_path / "red.safetensors")
    verifier = Aesthetic(head=str(tmp_path / "red.safetensors"), model=str(folders["colours"]))
    verifier.prepare("cpu")
    images = noise(12, (16, 16), seed=4)
    means = images.mean((2, 3))
    assert torch.allclose(verifier.values(images), 7.0 * means[:, 0] / means.norm(dim=1) + 3.0, atol=1e-4)
    results = tsdiff.search(Hooked(), "near (3, 2.4)", policy=BestOfN(n=3), verifier=verifier, steps=3, baseline=False)
    assert results.score == pytest.approx(3.0 + 7.0 / 3.0**0.5, abs=1e-3), "that model's pictures are grey"


def test_relu_and_affine_layouts_of_one_set_of_weights_differ(folders, tmp_path):
    """Telling the layouts apart matters: the same numbers under the other names are another function."""
    relu = trained("relu", 12)
    renamed = dict(zip(trained("linear", 12).state_dict(), relu.state_dict().values(), strict=True))
    scores = []
    for name, state in (("relu", relu.state_dict()), ("linear", renamed)):
        torch.save(state, tmp_path / f"{name}.pth")
        verifier = Aesthetic(head=str(tmp_path / f"{name}.pth"), model=str(folders["clip"]))
        verifier.prepare("cpu")
        scores.append(verifier.values(noise()))
    assert not torch.allclose(*scores, atol=0.1)


@pytest.mark.parametrize("half", [False, True])
def test_safetensors_do_as_well(folders, heads, prepared, tmp_path, half):
    state = torch.load(heads["linear", "clip"], weights_only=True)
    save_file({key: tensor.half() if half else tensor for key, tensor in state.items()}, tmp_path / "head.safetensors")
    verifier = Aesthetic(head=str(tmp_path / "head.safetensors"), model=str(folders["clip"]))
    verifier.prepare("cpu")
    assert torch.allclose(verifier.values(noise()), prepared("linear", "clip").values(noise()), atol=0.02 if half else 1e-6)


# Batches, gradients, bad pixels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", ["clip", "open_clip"])
def test_a_score_does_not_depend_on_its_batch(prepared, kind, clip):
    verifier, images = prepared(kind, clip), noise(9, (40, 48))
    together = verifier.values(images)
    alone = torch.cat([verifier.values(image[None]) for image in images])
    # These heads score about 20, where float32 numbers lie 2e-6 apart.
    assert torch.allclose(together, alone, atol=1e-5, rtol=1e-6)
    assert torch.allclose(verifier.values(images.flip(0)), together.flip(0), atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("clip", ["clip", "open_clip"])
def test_gradients_are_those_of_finite_differences(prepared, clip):
    verifier = prepared("linear", clip)
    images = (0.2 + 0.6 * noise(2, (40, 48), seed=1)).requires_grad_()  # inside the range, where nothing is cut off
    direction = noise(2, (40, 48), seed=2) - 0.5
    verifier.score(Pictures(images)).values.sum().backward()
    slope = (images.grad * direction).sum((1, 2, 3))
    with torch.no_grad():
        ahead, behind = (verifier.values(images + sign * 1e-2 * direction) for sign in (1, -1))
    assert torch.allclose(slope, (ahead - behind) / 2e-2, rtol=0.02, atol=0.02 * slope.abs().max().item())
    assert slope.abs().min() > 0


def test_an_affine_heads_gradient_is_the_same_for_all_features(prepared):
    head = prepared("linear", "clip")._network.head
    features = torch.randn((5, 12), generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(head(features).sum(), features)
    assert torch.allclose(gradient, gradient[:1].expand(5, -1), atol=1e-5)
    assert gradient.abs().min() > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_image_that_is_not_finite_fails_alone(prepared, bad):
    verifier, images = prepared("linear", "clip"), noise()
    good = verifier.score(Pictures(images)).values
    images[2, 1, 3, 5] = bad
    scores = verifier.score(Pictures(images))
    assert scores.values.isnan().tolist() == [False, False, True, False]
    assert scores.reasons == {2: "the image holds numbers that are not finite"}
    assert torch.allclose(scores.values[[0, 1, 3]], good[[0, 1, 3]], atol=1e-5)


def test_black_and_white_images_score(prepared):
    images = torch.stack([torch.zeros(3, 20, 30), torch.ones(3, 20, 30)])
    for kind in KINDS:
        assert torch.isfinite(prepared(kind, "clip").values(images)).all()
    bias = torch.load(prepared("v1", "colours").head, weights_only=True)["bias"]
    assert prepared("v1", "colours").values(images[:1]).item() == pytest.approx(bias.item(), abs=1e-5), "black has no direction: features of zeros"


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (3, 32, 32)])
def test_images_that_are_not_rgb_are_refused(prepared, shape):
    with pytest.raises(UsageError, match=r"aesthetic was given images of shape .* takes RGB images \(B, 3, H, W\)"):
        prepared("linear", "clip").values(torch.zeros(shape))


def test_the_head_counts_in_float32_whatever_the_network_does(prepared):
    whole, half = prepared("linear", "clip"), prepared("linear", "clip", dtype="bfloat16")
    assert half.values(noise()).dtype == torch.float32
    assert torch.allclose(half.values(noise()), whole.values(noise()), atol=0.3)


# Refused -------------------------------------------------------------------------------------------------------------


def without(key):
    return lambda state: state.pop(key)


def put(key, tensor):
    return lambda state: state.__setitem__(key, tensor)


CHANGES = [
    ("linear", without("layers.4.bias"), r"1 missing \(layers.4.bias\)"),
    ("linear", without("layers.0.weight"), r"1 missing \(layers.0.weight\)"),
    ("linear", put("layers.9.weight", torch.zeros(1, 1)), r"missing .*unexpected"),
    ("linear", put("scale", torch.zeros(1)), r"1 unexpected \(scale\)"),
    ("linear", put("layers.7.weight", torch.zeros(2, 16)), r"layers.7.weight \(2, 16\) instead of \(1, 16\)"),
    ("linear", put("layers.0.weight", torch.zeros(12)), "of another shape"),
    ("relu", without("layers.11.bias"), r"1 missing \(layers.11.bias\)"),
    ("relu", without("layers.3.weight"), r"1 missing \(layers.3.weight\)"),
    ("v1", without("bias"), r"1 missing \(bias\)"),
    ("v1", put("weight", torch.zeros(3, 12)), r"weight \(3, 12\) instead of \(1, 12\)"),
    ("v1", put("bias", torch.tensor([float("nan")])), "numbers that are not finite"),
]


@pytest.mark.parametrize(("kind", "change", "match"), CHANGES)
def test_a_head_loads_exactly_or_is_refused_before_the_clip_model_loads(folders, heads, tmp_path, monkeypatch, kind, change, match):
    state = torch.load(heads[kind, "clip"], weights_only=True)
    change(state)
    torch.save(state, tmp_path / "head.pth")
    verifier = Aesthetic(head=str(tmp_path / "head.pth"), model=str(folders["clip"]))
    monkeypatch.setattr(clip_network, "load", lambda *_: pytest.fail("the CLIP model was loaded"))
    with pytest.raises(UsageError, match=match) as told:
        verifier.prepare("cpu")
    assert "head.pth" in str(told.value)


def test_a_head_for_other_features_is_refused_with_both_widths(folders, heads, monkeypatch):
    verifier = Aesthetic(head=str(heads["linear", "open_clip"]), model=str(folders["clip"]))
    monkeypatch.setattr(clip_network, "load", lambda *_: pytest.fail("the CLIP model was loaded"))
    with pytest.raises(UsageError, match=r"reads features of 16 dimensions, but those of .*clip have 12"):
        verifier.prepare("cpu")


def test_a_clip_model_of_another_activation_is_refused(heads, tmp_path):
    exact = tiny_clip.save_open_clip(tmp_path / "open", tiny_clip.open_clip_module(tiny_clip.OPEN_CLIP), tiny_clip.OPEN_CLIP)
    siglip = tiny_clip.save_siglip(tmp_path / "siglip")
    transformers = tiny_clip.save_clip(tmp_path / "clip")
    config = json.loads((transformers / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "gelu"
    (transformers / "config.json").write_text(json.dumps(config))
    for folder in (exact, siglip, transformers):
        with pytest.raises(UsageError, match=r"computes QuickGELU, but .* does not; use openai/clip-vit-large-patch14, or ViT-L-14-quickgelu"):
            Aesthetic(head=str(heads["linear", "clip"]), model=str(folder))


def test_what_config_files_leave_out_is_what_transformers_assumes(folders, heads, tmp_path):
    """Published configs name only what differs from the defaults: QuickGELU, and 512 dimensions."""
    from shutil import copytree

    folder = copytree(folders["clip"], tmp_path / "clip")
    config = json.loads((folder / "config.json").read_text())
    del config["vision_config"]["hidden_act"], config["projection_dim"]
    (folder / "config.json").write_text(json.dumps(config))
    assert Aesthetic(head=str(heads["linear", "clip"]), model=str(folder)).source.width == 512


@pytest.mark.parametrize(
    ("content", "match"),
    [(b"", "is empty"), (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), (b"PK\x03\x04 and no end", "its end is missing")],
)
def test_a_damaged_head_is_refused_when_the_verifier_is_made(folders, tmp_path, content, match):
    (tmp_path / "head.pth").write_bytes(content)
    with pytest.raises(UsageError, match=rf"^aesthetic: .*head.pth .*{match}"):
        Aesthetic(head=str(tmp_path / "head.pth"), model=str(folders["clip"]))


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_a_download_cut_short_is_refused_when_the_verifier_is_made(folders, heads, tmp_path, share):
    whole = heads["linear", "clip"].read_bytes()
    assert zipfile.is_zipfile(heads["linear", "clip"])
    (tmp_path / "head.pth").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UsageError, match="its end is missing"):
        Aesthetic(head=str(tmp_path / "head.pth"), model=str(folders["clip"]))


def test_a_file_of_another_kind_is_refused_and_code_in_it_is_not_run(folders, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    torch.save({"weight": Bomb()}, tmp_path / "bomb.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("no pickle")
    for name, match in (("bomb", "cannot be read as weights"), ("list", "holds no state dict"), ("text", "cannot be read as weights")):
        with pytest.raises(UsageError, match=rf"^aesthetic: .*{name}.pth {match}"):
            Aesthetic(head=str(tmp_path / f"{name}.pth"), model=str(folders["clip"])).prepare("cpu")
    assert not (tmp_path / "touched").exists()


def test_missing_options_and_files_are_named(folders, heads):
    head = str(heads["linear", "clip"])
    for options, match in (
        ({}, "head is missing; write head=FILE"),
        ({"model": str(folders["clip"])}, "head is missing"),
        ({"head": head}, "model is missing; write head=FILE.*model=openai/clip-vit-large-patch14"),
        ({"head": "nowhere.pth", "model": str(folders["clip"])}, "there is no file 'nowhere.pth'"),
        ({"head": head, "model": "./nowhere"}, "there is no folder 'nowhere'"),
        ({"head": head, "model": "ViT-L-14-quickgelu", "pretrained": "metaclip_400m"}, "fitted to OpenAI's weights, but pretrained is 'metaclip_400m'"),
        ({"head": head, "model": "ViT-L-14", "pretrained": "openai"}, "write model=ViT-L-14-quickgelu"),
        ({"head": head, "model": str(folders["clip"]), "dtype": "float8"}, "dtype"),
        ({"head": head, "model": str(folders["clip"]), "device": "gpu"}, "device"),
        ({"head": head, "model": str(folders["clip"]), "name": "a=b"}, "name"),
    ):
        with pytest.raises(UsageError, match=match):
            Aesthetic(**options)
    with pytest.raises(SetupError, match="'cuda:77' is not there"):
        Aesthetic(head=head, model=str(folders["clip"]), device="cuda:77").prepare("cpu")
    with pytest.raises(UsageError, match="aesthetic has no weights yet"):
        Aesthetic(head=head, model=str(folders["clip"])).values(noise())


def test_weights_are_named_by_their_bytes(folders, heads):
    files = [folders["clip"] / "model.safetensors", heads["linear", "clip"]]
    verifier = Aesthetic(head=str(files[1]), model=str(folders["clip"]))
    assert verifier.sha256 == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_by_reference(folders, heads):
    registry.verifiers.add("aesthetic", Aesthetic)
    head = str(heads["linear", "clip"])
    assert resolve_verifier(f"aesthetic:head={head},model={folders['clip']}") == Aesthetic(head=head, model=str(folders["clip"]))


class TestConforms(VerifierConformance):
    tolerance = 1e-5

    @pytest.fixture
    def verifier(self, folders, heads):
        return Aesthetic(head=str(heads["linear", "clip"]), model=str(folders["clip"]))
