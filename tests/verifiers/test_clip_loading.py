"""A CLIP model loads exactly or is refused, and what can be known beforehand is told before any weights load."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys

import pytest
import tiny_clip
import torch
from safetensors.torch import load_file, save_file

from tsdiff.treesearch import registry
from tsdiff.treesearch.errors import SetupError, TsdiffWarning, UsageError
from tsdiff.treesearch.registry import reference
from tsdiff.treesearch.resolve import resolve_verifier
from tsdiff.verifiers import Clip, clip_files, clip_published
from tsdiff.verifiers.libraries import quiet_libraries

PIXELS = torch.rand((2, 3, 32, 32), generator=torch.Generator().manual_seed(0))
WEIGHTS = {"open_clip": "open_clip_model.safetensors", "clip": "model.safetensors", "siglip": "model.safetensors"}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("originals")
    module = tiny_clip.open_clip_module(tiny_clip.OPEN_CLIP)
    return {
        "open_clip": tiny_clip.save_open_clip(root / "open", module, tiny_clip.OPEN_CLIP),
        "clip": tiny_clip.save_clip(root / "clip"),
        "siglip": tiny_clip.save_siglip(root / "siglip"),
    }


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty cache of the hub."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


def cached(hub, repository, source):
    """Put a folder into the cache as if it had been fetched."""
    home = hub / f"models--{repository.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    return shutil.copytree(source, home / "snapshots" / ("0" * 40))


@pytest.fixture
def folder(originals, tmp_path, request):
    """A copy that a test may spoil."""
    return shutil.copytree(originals[request.param], tmp_path / request.param)


ANY = pytest.mark.parametrize("folder", list(WEIGHTS), indirect=True)
OPEN = pytest.mark.parametrize("folder", ["open_clip"], indirect=True)
CLIP = pytest.mark.parametrize("folder", ["clip"], indirect=True)


def values(verifier):
    verifier.prepare("cpu")
    return verifier.values(PIXELS, ["a star", "a"])


def agree(left, right):
    """Equal weights from different files: memory is laid out differently, and the last bits with it."""
    return torch.allclose(left, right, atol=1e-6, rtol=0)


def spoil(folder, change):
    """Rewrite the weights."""
    path = folder / WEIGHTS[folder.name]
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})
    return path


def loads(folder, **options):
    return Clip(model=str(folder), **options).prepare("cpu")


# Strictly ------------------------------------------------------------------------------------------------------------


@ANY
def test_a_missing_tensor_is_refused_by_name(folder):
    gone = []

    def change(state):
        gone.append(next(key for key in state if "visual" in key or "vision" in key))
        del state[gone[0]]

    path = spoil(folder, change)
    with pytest.raises(UsageError, match="1 missing") as told:
        loads(folder)
    assert gone[0] in str(told.value)
    assert str(path) in str(told.value)


@ANY
def test_a_tensor_too_many_is_refused_by_name(folder):
    spoil(folder, lambda state: state.update({"head.weight": torch.zeros(2)}))
    with pytest.raises(UsageError, match=r"1 unexpected \(head.weight\)"):
        loads(folder)


@ANY
def test_a_tensor_of_another_shape_is_refused_by_name(folder):
    def change(state):
        key = next(key for key in sorted(state) if key.endswith(("visual.proj", "layernorm.weight", "ln.weight", "layer_norm.weight")))
        state[key] = state[key][:-1].clone()

    spoil(folder, change)
    with pytest.raises(UsageError, match=r"1 of another shape \(.* instead of \("):
        loads(folder)


@OPEN
def test_positions_are_never_stretched_to_another_image_size(folder):
    """open_clip would interpolate them: a network that nobody trained."""
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["vision_cfg"]["image_size"] = 64
    path.write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"visual.positional_embedding \(5, 32\) instead of \(17, 32\)"):
        loads(folder)


@OPEN
def test_a_missing_bias_is_not_made_up(folder):
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["init_logit_bias"] = -10
    path.write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"1 missing \(logit_bias\)"):
        loads(folder)


@OPEN
def test_older_open_clip_checkpoints_load(folder, tmp_path):
    """A torch file with the state dict under a key, names as from parallel training, the scale as a list of one."""
    state = load_file(folder / "open_clip_model.safetensors")
    expected = values(Clip(model=str(folder)))
    old = {f"module.{key}": tensor for key, tensor in state.items()}
    old["module.logit_scale"] = old["module.logit_scale"].reshape(1)
    (folder / "open_clip_model.safetensors").unlink()
    torch.save({"epoch": 3, "state_dict": old}, folder / "open_clip_pytorch_model.bin")
    assert agree(values(Clip(model=str(folder))), expected)
    custom = copy.deepcopy(tiny_clip.OPEN_CLIP) | {"custom_text": True}  # the text tower set apart, the weights from before
    (tmp_path / "custom.json").write_text(json.dumps(custom))
    again = Clip(model=str(tmp_path / "custom.json"), pretrained=str(folder / "open_clip_pytorch_model.bin"))
    assert agree(values(again), expected)


def test_an_image_tower_of_timm_loads_from_the_checkpoint_alone(tmp_path):
    """Whatever the config says of timm's own weights."""
    vision = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": tiny_clip.OPEN_CLIP["text_cfg"]}
    module = tiny_clip.open_clip_module(config)
    verifier = Clip(model=str(tiny_clip.save_open_clip(tmp_path, module, config | {"vision_cfg": vision | {"timm_model_pretrained": True}})))
    features = verifier.network.image_features(PIXELS) if values(verifier).isfinite().all() else None
    expected = module.encode_image(verifier.network.towers.preprocessing(PIXELS), normalize=True)
    assert torch.allclose(features, expected, atol=1e-5)


def test_a_text_tower_of_transformers_loads_from_the_checkpoint_alone(hub, tmp_path):
    from transformers import BertConfig

    tokenizer = tiny_clip.word_tokenizer()
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 16}
    BertConfig(vocab_size=len(tokenizer), **size).save_pretrained(tmp_path / "bert")
    cached(hub, "owner/bert", tmp_path / "bert")
    text = {"hf_model_name": str(tmp_path / "bert"), "hf_tokenizer_name": "words", "hf_proj_type": "linear", "hf_model_pretrained": False, "context_length": 8}
    config = {"embed_dim": 16, "vision_cfg": tiny_clip.OPEN_CLIP["vision_cfg"], "text_cfg": text, "custom_text": True}
    module = tiny_clip.open_clip_module(config)
    stored = config | {"text_cfg": text | {"hf_model_name": "owner/bert", "hf_model_pretrained": True}}
    verifier = Clip(model=str(tiny_clip.save_open_clip(tmp_path / "model", module, stored, tokenizer=tokenizer)))
    values(verifier)
    tokens = torch.tensor(tokenizer(["a red star"], padding="max_length", max_length=8).input_ids)
    assert torch.allclose(verifier.network.text_features(["a red star"]), module.encode_text(tokens, normalize=True), atol=1e-5)
    shutil.rmtree(hub / "models--owner--bert")
    with pytest.raises(SetupError, match=r"which is not on this machine; fetch it with `hf download owner/bert config\.json`"):
        loads(tmp_path / "model")


# Damaged or incomplete -----------------------------------------------------------------------------------------------


@ANY
@pytest.mark.parametrize(("content", "match"), [(b"", "is empty"), (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), (b"\x09" * 99, "not a whole")])
def test_weights_that_cannot_be_weights_are_refused_before_loading(folder, content, match):
    (folder / WEIGHTS[folder.name]).write_bytes(content)
    with pytest.raises(UsageError, match=match) as told:
        Clip(model=str(folder))
    assert WEIGHTS[folder.name] in str(told.value)


@ANY
@pytest.mark.parametrize("share", [0.0001, 0.5, 0.9999])
def test_a_download_cut_short_is_refused_before_loading(folder, share):
    path = folder / WEIGHTS[folder.name]
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UsageError, match=r"not a whole safetensors file \(\d+ bytes\)"):
        Clip(model=str(folder))


@OPEN
@pytest.mark.parametrize("content", [b"no pickle", b"\x80\x02}q\x00.", b"PK\x03\x04 no zip"])
def test_a_damaged_torch_file_is_refused_when_it_loads(folder, content):
    (folder / "open_clip_model.safetensors").unlink()
    (folder / "open_clip_pytorch_model.bin").write_bytes(content)
    with pytest.raises(UsageError, match=r"open_clip_pytorch_model\.bin (cannot be read|holds no state dict)"):
        loads(folder)


@OPEN
def test_a_pickle_with_code_in_it_is_not_run(folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    (folder / "open_clip_model.safetensors").unlink()
    torch.save({"state_dict": {"x": Bomb()}}, folder / "open_clip_pytorch_model.bin")
    with pytest.raises(UsageError, match="cannot be read"):
        loads(folder)
    assert not (tmp_path / "touched").exists()


MISSING = {
    "open_clip": [("open_clip_model.safetensors", "holds no weights"), ("open_clip_config.json", "neither open_clip_config.json")],
    "clip": [
        ("model.safetensors", "holds no weights"),
        ("config.json", "neither"),
        ("preprocessor_config.json", "how images are prepared"),
        ("tokenizer.json", "no tokenizer"),
    ],
}


@pytest.mark.parametrize(("folder", "file", "match"), [(kind, *case) for kind, cases in MISSING.items() for case in cases], indirect=["folder"])
def test_a_file_that_is_not_there_is_named_before_loading(folder, file, match):
    (folder / file).unlink()
    if file == "tokenizer.json":
        (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UsageError, match=match):
        Clip(model=str(folder))


CONFIGS = [
    ("open_clip", "open_clip_config.json", "{", "cannot be read as JSON"),
    ("open_clip", "open_clip_config.json", "[]", "JSON object"),
    ("open_clip", "open_clip_config.json", "{}", "no entry 'model_cfg'"),
    ("open_clip", "open_clip_config.json", '{"model_cfg": {"embed_dim": 3}}', "has no vision_cfg, text_cfg"),
    ("open_clip", "open_clip_config.json", '{"model_cfg": {"embed_dim": 3, "vision_cfg": {}, "text_cfg": {}, "multimodal_cfg": {}}}', "captioning"),
    ("open_clip", "open_clip_config.json", '{"model_cfg": {"embed_dim": 3, "vision_cfg": {}, "text_cfg": {"hf_tokenizer_name": "x"}}}', "no tokenizer"),
    ("clip", "config.json", '{"model_type": "blip"}', "'blip' but must be clip or siglip"),
    ("clip", "config.json", "nonsense", "cannot be read as JSON"),
]


@pytest.mark.parametrize(("folder", "file", "content", "match"), CONFIGS, indirect=["folder"])
def test_a_config_of_something_else_is_refused_before_loading(folder, file, content, match):
    (folder / file).write_text(content)
    with pytest.raises(UsageError, match=match):
        Clip(model=str(folder))


@OPEN
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"embed_dim": 17}, "of another shape"),
        ({"no_such_option": 1}, "cannot build the model config"),
        ({"vision_cfg": {"heads": 3}}, "cannot build the model config"),
        ({"text_cfg": {"vocab_size": 100}}, "of another shape"),
    ],
)
def test_a_config_that_does_not_belong_to_the_weights_is_refused(folder, changes, match):
    config = {"model_cfg": tiny_clip.config(**changes)}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=match):
        loads(folder)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    small = tiny_clip.config(text_cfg={"vocab_size": 100})
    tiny_clip.save_open_clip(tmp_path / "small", tiny_clip.open_clip_module(small), small)
    with pytest.raises(UsageError, match="49408 tokens, but the model knows 100"):
        loads(tmp_path / "small")


@CLIP
def test_shards_that_an_index_names_must_be_there(folder):
    state = load_file(folder / "model.safetensors")
    expected = values(Clip(model=str(folder)))
    halves = [dict(list(state.items())[start::2]) for start in (0, 1)]
    index = {"metadata": {}, "weight_map": {}}
    for number, half in enumerate(halves, 1):
        save_file(half, folder / f"model-{number}.safetensors", metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(half, f"model-{number}.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded = Clip(model=str(folder))
    assert agree(values(sharded), expected)
    assert list(sharded.sha256) == ["model-1.safetensors", "model-2.safetensors"]
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(UsageError, match=r"names model-2.safetensors, which is not there"):
        Clip(model=str(folder))


# What a model can be called ------------------------------------------------------------------------------------------


@OPEN
def test_a_folder_a_prefix_and_a_config_file_are_the_same_model(folder, tmp_path):
    expected = values(Clip(model=str(folder)))
    weights = folder / "open_clip_model.safetensors"
    (tmp_path / "arch.json").write_text(json.dumps(tiny_clip.OPEN_CLIP))
    assert agree(values(Clip(model=f"local-dir:{folder}")), expected)
    assert agree(values(resolve_verifier(f"clip:model={folder}" if "clip" in registry.verifiers else Clip(model=str(folder)))), expected)
    assert agree(values(Clip(model=str(tmp_path / "arch.json"), pretrained=str(weights))), expected)
    assert agree(values(Clip(model=str(folder / "open_clip_config.json"), pretrained=str(weights))), expected)


WRONG = [
    ({}, "model is missing"),
    ({"model": "ViT-L-41"}, r"unknown open_clip model 'ViT-L-41'; did you mean .*'ViT-L-14'"),
    ({"model": "./nowhere"}, "there is no folder 'nowhere'"),
    ({"model": "/nowhere/at/all"}, "there is no folder '/nowhere/at/all'"),
    ({"model": "local-dir:/nowhere"}, "there is no folder '/nowhere'"),
    ({"model": "nowhere.json"}, "no config file 'nowhere.json'"),
    ({"model": "ViT-L-14"}, r"needs weights; add pretrained=.*openai"),
    ({"model": "ViT-L-14-quickgelu", "pretrained": "opanai"}, "did you mean 'openai'"),
    ({"model": "ViT-L-14", "pretrained": "./weights.safetensors"}, "no checkpoint './weights.safetensors'"),
    ({"model": "ViT-L/14", "pretrained": "openai"}, r"openai were trained with QuickGELU, but ViT-L-14 computes exact GELU; write model=ViT-L-14-quickgelu"),
    ({"model": "ViT-L-14-quickgelu", "pretrained": "laion2b-s32b-b82k"}, r"trained with exact GELU, but ViT-L-14-quickgelu computes QuickGELU; write model=ViT-L-14$"),
]


@pytest.mark.parametrize(("options", "match"), WRONG)
def test_wrong_names_are_refused_with_what_is_right(options, match, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=match):
        Clip(**options)


@OPEN
def test_weights_beside_a_folder_that_has_its_own_are_refused(folder, tmp_path):
    with pytest.raises(UsageError, match="leave pretrained out"):
        Clip(model=str(folder), pretrained="openai")
    (tmp_path / "arch.json").write_text(json.dumps(tiny_clip.OPEN_CLIP))
    with pytest.raises(UsageError, match="add pretrained=FILE"):
        Clip(model=str(tmp_path / "arch.json"))
    with pytest.raises(UsageError, match="there is no checkpoint 'openai'"):
        Clip(model=str(tmp_path / "arch.json"), pretrained="openai")


# Published models ----------------------------------------------------------------------------------------------------


def test_every_published_tag_is_refused_for_its_activation_or_not_on_this_machine(hub):
    """The whole table of open_clip: what QuickGELU weights need is never in doubt, and nothing is downloaded."""
    with quiet_libraries():
        from open_clip import get_model_config, list_pretrained
        from open_clip.pretrained import get_pretrained_cfg

    told = {True: 0, False: 0}
    for name, tag in list_pretrained():
        if name.startswith("coca"):
            continue
        fits = bool(get_pretrained_cfg(name, tag).get("quick_gelu")) == bool(get_model_config(name).get("quick_gelu"))
        told[fits] += 1
        with pytest.raises(SetupError if fits else UsageError, match="not on this machine" if fits else "QuickGELU"):
            Clip(model=name, pretrained=tag)
    assert min(told.values()) > 20, "both happen"


@pytest.fixture
def published(monkeypatch, tmp_path, originals):
    """An open_clip that knows one tiny model and its QuickGELU twin, with a tag for either, weights of half-grey pixels."""
    with quiet_libraries():
        from open_clip import pretrained

    configs = tmp_path / "model_configs"
    configs.mkdir()
    (configs / "Tiny.json").write_text(json.dumps(tiny_clip.OPEN_CLIP))
    (configs / "Tiny-quickgelu.json").write_text(json.dumps(tiny_clip.OPEN_CLIP | {"quick_gelu": True}))
    plain, quick = {"hf_hub": "org/plain/", "mean": (0.5,) * 3, "std": (0.5,) * 3}, {"hf_hub": "org/quick/", "quick_gelu": True}
    table = {"Tiny": {"exact": plain, "quick": quick}, "Tiny-quickgelu": {"quick": quick}}
    monkeypatch.setattr(pretrained, "_PRETRAINED", table)
    monkeypatch.setattr(clip_files, "model_configs", lambda: configs)
    monkeypatch.setattr(clip_published, "model_configs", lambda: configs)
    clip_published.names.cache_clear()
    yield
    clip_published.names.cache_clear()


def test_a_published_tag_brings_its_own_preprocessing(published, hub, originals):
    for repository in ("org/plain", "org/quick"):
        cached(hub, repository, originals["open_clip"])
    exact, quick = Clip(model="Tiny", pretrained="exact"), Clip(model="Tiny-quickgelu", pretrained="quick")
    difference = (values(exact) - values(quick)).abs()
    assert exact.network.towers.preprocessing.mean == (0.5, 0.5, 0.5)
    assert quick.network.towers.preprocessing.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert difference.min() > 1e-4, "the activation and the pixels' mean matter"


def test_a_file_is_recognised_by_the_repository_it_lies_in(published, hub, originals):
    quick = cached(hub, "org/quick", originals["open_clip"]) / "open_clip_model.safetensors"
    with pytest.raises(UsageError, match="quick were trained with QuickGELU, but Tiny computes exact GELU; write model=Tiny-quickgelu"):
        Clip(model="Tiny", pretrained=str(quick))
    loads("Tiny-quickgelu", pretrained=str(quick))
    plain = cached(hub, "org/plain", originals["open_clip"]) / "open_clip_model.safetensors"
    with pytest.raises(UsageError, match="trained with exact GELU"):
        Clip(model="Tiny-quickgelu", pretrained=str(plain))


def test_a_file_of_unknown_origin_says_what_is_assumed(published, originals):
    verifier = Clip(model="Tiny", pretrained=str(originals["open_clip"] / "open_clip_model.safetensors"))
    with pytest.warns(TsdiffWarning, match=r"not known to open_clip: exact GELU \(for QuickGELU write Tiny-quickgelu\) and pixels normalised as OpenAI did") as caught:
        verifier.prepare("cpu")
    assert len(caught) == 1
    assert agree(values(verifier), values(Clip(model=str(originals["open_clip"]))))


@pytest.mark.parametrize("kind", list(WEIGHTS))
@pytest.mark.parametrize("prefix", ["", "hf-hub:"])
def test_a_repository_of_the_hub_is_found_in_the_cache_or_told_how_to_fetch(hub, originals, kind, prefix):
    with pytest.raises(SetupError, match="hf download owner/model"):
        Clip(model=f"{prefix}owner/model")
    cached(hub, "owner/model", originals[kind])
    assert agree(values(Clip(model=f"{prefix}owner/model")), values(Clip(model=str(originals[kind]))))


# In the registry -----------------------------------------------------------------------------------------------------


def test_a_world_offers_its_own_model_under_a_name_of_its_own(originals):
    """By a function that returns a reference, and so without importing any verifier."""

    def world_clip(**options: str) -> str:
        """CLIPScore by the world's own model."""
        return reference("clip", **{"name": "world-clip", "model": originals["open_clip"]} | options)

    registry.verifiers.add("clip", Clip)
    registry.verifiers.add("world-clip", world_clip)
    verifier = resolve_verifier("world-clip:scale=clipscore")
    assert verifier == Clip(name="world-clip", model=str(originals["open_clip"]), scale="clipscore")
    assert torch.allclose(values(verifier), 2.5 * values(resolve_verifier("world-clip")).clamp(min=0))
    with pytest.raises(UsageError, match="did you mean 'scale'"):
        resolve_verifier("world-clip:scael=logit")


def test_a_folder_is_checked_without_importing_torch(originals):
    program = (
        "import sys, tsdiff.verifiers as v\n"
        f"for folder in {[str(folder) for folder in originals.values()]!r}: v.Clip(model=folder).sha256\n"
        "try: v.Clip(model='ViT-L-41')\n"
        "except v.clip.UsageError: pass\n"
        "sys.exit(bool({'torch', 'open_clip', 'transformers', 'diffusers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
