"""Where a CLIP model's files are, and whether they can be its files: found out before anything is loaded.

Nothing is ever downloaded. Reading folders and configs imports no torch; only the table of open_clip's published
weights does, for a model that is named rather than given as a folder.
"""

from __future__ import annotations

from pathlib import Path

from tsdiff.treesearch.errors import UsageError, unknown_name
from tsdiff.verifiers import clip_published, transformers_folder
from tsdiff.verifiers.checkpoints import cached_repository, read_json
from tsdiff.verifiers.clip_files import OPEN_CLIP_WEIGHTS, Source, open_clip_source

OPEN_CLIP_CONFIG = "open_clip_config.json"
TRANSFORMERS_KINDS = ("clip", "siglip")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "spiece.model")
TABLE_OF_FORMS = "a folder, OWNER/NAME of one in the hub's cache, an open_clip name with pretrained=TAG or FILE, or a config file with pretrained=FILE"


def locate(model: str, pretrained: str = "") -> Source:
    """The files that `model` and `pretrained` name, complete and of a kind that can be loaded.

    Args:
      model: a folder in open_clip's or transformers' layout (also written "local-dir:FOLDER"), OWNER/NAME of such a
        repository in the hub's cache (also "hf-hub:OWNER/NAME"), a name that open_clip registers, or a file with an
        open_clip model config.
      pretrained: a published tag or a checkpoint file for the last two; "" for folders, which hold their own.

    Raises:
      UsageError: if there is no such thing, a file is missing or damaged, or weights do not go with the model.
      SetupError: if it exists but not on this machine; the message says how to fetch it.
    """
    if not model:
        raise UsageError(f"clip: model is missing; write clip:model=..., naming {TABLE_OF_FORMS}")
    path = Path(model.removeprefix("local-dir:")).expanduser()
    if path.is_dir():
        return _folder(path, pretrained)
    if path.suffix == ".json":
        return _config_file(path, pretrained)
    name = model.replace("/", "-")  # ViT-L/14 is what the paper calls ViT-L-14
    if name in clip_published.names():
        return clip_published.locate(name, pretrained)
    if not model.startswith((".", "/", "~", "local-dir:")) and model.removeprefix("hf-hub:").count("/") == 1:
        return _folder(cached_repository(model.removeprefix("hf-hub:"), "clip"), pretrained)
    if "/" in model:
        raise UsageError(f"clip: there is no folder {str(path)!r}; model is {TABLE_OF_FORMS}")
    raise unknown_name("open_clip model", model, clip_published.names(), f"model is {TABLE_OF_FORMS}.")


def _folder(path: Path, pretrained: str) -> Source:
    if pretrained:
        raise UsageError(f"clip: pretrained={pretrained!r} was given beside the folder {path}, which holds its own weights; leave pretrained out")
    if (path / OPEN_CLIP_CONFIG).is_file():
        return _open_clip_folder(path)
    if (path / "config.json").is_file():
        return _transformers_folder(path)
    raise UsageError(f"clip: {path} holds neither {OPEN_CLIP_CONFIG} (open_clip) nor config.json (transformers)")


def _open_clip_folder(path: Path) -> Source:
    config = read_json(path / OPEN_CLIP_CONFIG, "clip")
    if "model_cfg" not in config:
        raise UsageError(f"clip: {path / OPEN_CLIP_CONFIG} has no entry 'model_cfg'")
    weights = next((path / name for name in OPEN_CLIP_WEIGHTS if (path / name).is_file()), None)
    if weights is None:
        raise UsageError(f"clip: {path} holds no weights; they must be in {' or '.join(OPEN_CLIP_WEIGHTS)}")
    source = open_clip_source(str(path), config["model_cfg"], config.get("preprocess_cfg") or {}, weights, folder=path)
    if source.model_cfg["text_cfg"].get("hf_tokenizer_name"):
        _require_tokenizer(path)
    return source


def _config_file(path: Path, pretrained: str) -> Source:
    if not path.is_file():
        raise UsageError(f"clip: there is no config file {str(path)!r}")
    config = read_json(path, "clip")
    model_cfg = config.get("model_cfg", config)
    if not pretrained:
        raise UsageError(f"clip: the config {path} needs weights; add pretrained=FILE")
    weights = Path(pretrained).expanduser()
    if not weights.is_file():
        raise UsageError(f"clip: there is no checkpoint {pretrained!r}; beside a config file, pretrained is a file")
    own = path.parent if _has_tokenizer(path.parent) else None  # else a tokenizer that the config names is the hub's
    return open_clip_source(str(path), model_cfg, config.get("preprocess_cfg") or {}, weights, folder=own)


def _transformers_folder(path: Path) -> Source:
    config = read_json(path / "config.json", "clip")
    kind = config.get("model_type")
    if kind not in TRANSFORMERS_KINDS:
        raise UsageError(f"clip: {path / 'config.json'} is of model_type {kind!r} but must be {' or '.join(TRANSFORMERS_KINDS)}, with both towers")
    files = transformers_folder.check_folder(path, "clip")
    _require_tokenizer(path)
    vision = config.get("vision_config") or {}
    # What a config leaves out is transformers' default for its kind.
    width = vision.get("hidden_size", 768) if kind == "siglip" else config.get("projection_dim", 512)
    quick = vision.get("hidden_act", "gelu" if kind == "siglip" else "quick_gelu") == "quick_gelu"
    return Source("transformers", str(path), path, files, has_bias=kind == "siglip", width=width, quick_gelu=quick)


def _has_tokenizer(path: Path) -> bool:
    return any((path / name).is_file() for name in TOKENIZER_FILES)


def _require_tokenizer(path: Path) -> None:
    if not _has_tokenizer(path):
        raise UsageError(f"clip: {path} holds no tokenizer; it must hold {' or '.join(TOKENIZER_FILES)}")
