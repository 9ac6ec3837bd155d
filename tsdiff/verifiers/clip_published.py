"""Models that open_clip knows by name, their published weights by tag, and repositories of the hub: as cached here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tsdiff.treesearch.errors import SetupError, UsageError, unknown_name
from tsdiff.verifiers.checkpoints import cached_file
from tsdiff.verifiers.clip_files import OPEN_CLIP_WEIGHTS, Source, model_configs, open_clip_source
from tsdiff.verifiers.libraries import quiet_libraries

QUICK = "-quickgelu"


@cache
def names() -> tuple[str, ...]:
    """Names of open_clip's registered models of two towers; imports nothing."""
    return tuple(sorted(path.stem for path in model_configs().glob("*.json") if not path.stem.startswith("coca_")))


def locate(name: str, pretrained: str) -> Source:
    """A registered model with the weights of a published tag, or of a file.

    Raises:
      UsageError: for an unknown tag, or weights that were trained with the other activation than the model computes.
      SetupError: if the weights are not on this machine.
    """
    tags = _tags(name)
    if not pretrained:
        known = f"a published tag ({', '.join(tags)}) or a file" if tags else "a file"
        raise UsageError(f"clip: {name} needs weights; add pretrained=..., naming {known}")
    model_cfg = json.loads((model_configs() / f"{name}.json").read_text(encoding="utf-8"))
    file = Path(pretrained).expanduser()
    if file.is_file():
        return _from_file(name, model_cfg, file)
    tag = pretrained.lower().replace("-", "_")
    twin = name.removesuffix(QUICK) if name.endswith(QUICK) else name + QUICK
    if tag not in tags and tag in _tags(twin):
        tags = _tags(twin)  # known, and so to be refused below for what it is
    if tag not in tags:
        if "/" in pretrained or file.suffix:
            raise UsageError(f"clip: there is no checkpoint {pretrained!r}")
        raise unknown_name(f"weights of {name}", pretrained, tags, f"`clip:model={name}` with any of {', '.join(tags)}, or a file.")
    _check_activation(name, model_cfg, tag, tags[tag])
    return open_clip_source(f"{name} {tag}", model_cfg, tags[tag], _cached_weights(name, tag, tags[tag]), folder=None)


def _from_file(name: str, model_cfg: Mapping[str, Any], file: Path) -> Source:
    """A file of weights that a person names: recognised by where published ones come from, or taken as it is."""
    for tag, facts in (_tags(name.removesuffix(QUICK)) | _tags(name)).items():
        repository = facts.get("hf_hub", "").rpartition("/")[0]
        homes = {f"models--{repository.replace('/', '--')}", repository.rpartition("/")[2]} if repository else set()
        if homes & set(file.absolute().parts) or file.name == facts.get("url", "-").rpartition("/")[2]:
            _check_activation(name, model_cfg, tag, facts)
            return open_clip_source(str(file), model_cfg, facts, file, folder=None)
    twin = name + QUICK
    assumed = f"exact GELU (for QuickGELU write {twin})" if twin in names() else ""
    notice = f"{file} is not known to open_clip: {' and '.join(filter(None, (assumed, 'pixels normalised as OpenAI did')))} assumed; a folder with open_clip_config.json says both"
    return open_clip_source(str(file), model_cfg, {}, file, folder=None, notice=notice)


def _check_activation(name: str, model_cfg: Mapping[str, Any], tag: str, facts: Mapping[str, Any]) -> None:
    """QuickGELU weights in a GELU network, or the other way round, give plausible, wrong scores."""
    trained, computed = bool(facts.get("quick_gelu")), bool(model_cfg.get("quick_gelu"))
    if trained == computed:
        return
    twin = name.removesuffix(QUICK) if computed else name + QUICK
    kinds = {True: "QuickGELU", False: "exact GELU"}
    advice = f"write model={twin}" if twin in names() else f"write a config file with \"quick_gelu\": {str(trained).lower()}"
    raise UsageError(f"clip: the weights {tag} were trained with {kinds[trained]}, but {name} computes {kinds[computed]}; {advice}")


def _tags(name: str) -> dict[str, dict[str, Any]]:
    """What open_clip knows of a model's published weights, by tag."""
    with quiet_libraries():
        from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

        return {tag: get_pretrained_cfg(name, tag) for tag in list_pretrained_tags_by_model(name)}


def _cached_weights(name: str, tag: str, facts: Mapping[str, Any]) -> Path:
    """The file of a published tag, if it is on this machine."""
    repository, _, file = facts.get("hf_hub", "").rpartition("/")
    if repository:
        for candidate in _safe_first(file):
            if (found := cached_file(repository, candidate)) is not None:
                return found
        raise SetupError(
            f"clip: the weights {tag} of {name} are not on this machine and nothing is downloaded during a search; "
            f"fetch them with `hf download {repository} {_safe_first(file)[0]}`, or name a file with pretrained=FILE"
        )
    url = facts.get("url", "")
    fetched = Path("~/.cache/clip").expanduser() / url.rpartition("/")[2]  # where open_clip keeps them
    if url and fetched.is_file():
        return fetched
    raise SetupError(f"clip: the weights {tag} of {name} are not on this machine; fetch {url} and name the file with pretrained=FILE")


def _safe_first(file: str) -> tuple[str, ...]:
    """The names that a repository may keep a checkpoint under, safetensors first; "" stands for open_clip's own names."""
    if not file:
        return OPEN_CLIP_WEIGHTS
    stem, _, ending = file.rpartition(".")
    return (f"{stem}.safetensors", file) if ending in ("bin", "pth", "pt") else (file,)
