"""Where a pipeline comes from (a folder, a hub id, an object) and its configs, read before any weights are.

A `Source` gives a model family what it needs to describe the model: the class of every component and the component's
config as plain data. Everything that can be wrong with a folder without reading its weights is found here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tsdiff.treesearch.errors import SetupError, UsageError
from tsdiff.treesearch.protocols import LoadOptions

INDEX = "model_index.json"
LIBRARIES = ("diffusers", "transformers")
_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
_PICKLES = {"diffusers": "diffusion_pytorch_model", "transformers": "pytorch_model"}


@dataclass(frozen=True, eq=False)
class Source:
    """A pipeline's classes and configs.

    Attributes:
      name: as the caller named it: a path, a hub id, or the class name of an object.
      class_name: of the pipeline.
      options: how to load it.
      components: (library, class name) of every component that is there, by component name.
      folder: where it is saved, None for hub ids and objects.
      pipeline: the object that was handed over, None otherwise.
      entries: all that the index of a folder or hub id says; empty for objects.
    """

    name: str
    class_name: str
    options: LoadOptions
    components: Mapping[str, tuple[str, str]]
    folder: Path | None = None
    pipeline: Any = None
    entries: Mapping[str, Any] = field(default_factory=dict)
    _configs: dict[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)

    def config(self, component: str, file: str = "config.json") -> Mapping[str, Any]:
        """The config of a component that is there; for objects, of the component as it is now.

        Raises:
          UsageError: if its file is missing or is no JSON object.
          SetupError: if the hub cannot be reached.
        """
        if component not in self._configs:
            if self.pipeline is not None:
                config = getattr(self.pipeline, component).config
                # Attributes and entries of a diffusers config can differ: loading an IP adapter sets an attribute alone.
                entries = config if isinstance(config, Mapping) else config.to_dict()
                self._configs[component] = {key: getattr(config, key, value) for key, value in entries.items()}
            else:
                self._configs[component] = self._read(f"{component}/{file}")
        return self._configs[component]

    def require(self, component: str, *class_names: str) -> None:
        """Raise UsageError unless a component is there, with one of the given classes of diffusers or transformers."""
        if component not in self.components:
            raise UsageError(f"{self.name!r} ({self.class_name}) has no {component}; save or build the pipeline with one ({' or '.join(class_names)})")
        library, class_name = self.components[component]
        if self.pipeline is None and library not in LIBRARIES:
            raise UsageError(f"the {component} of {self.name!r} is the class {class_name} of {library!r}; code that comes with a model is not run, only classes of {' and '.join(LIBRARIES)}")
        if class_name not in class_names:
            raise UsageError(f"the {component} of {self.name!r} is a {class_name}, which is not supported; supported is {' or '.join(class_names)}")

    def scheduler(self) -> tuple[str, Mapping[str, Any]]:
        """Class name and config of the pipeline's scheduler. Raises UsageError if it has none, or one that diffusers does not have."""
        if "scheduler" not in self.components:
            raise UsageError(f"{self.name!r} has no scheduler, so its noise levels are unknown; add its scheduler folder, or give the pipeline one")
        library, class_name = self.components["scheduler"]
        if self.pipeline is None and (library != "diffusers" or not class_name.endswith("Scheduler")):
            raise UsageError(f"the scheduler of {self.name!r} is the class {class_name} of {library!r}, which is no scheduler of diffusers; save or download the pipeline again")
        return self.components["scheduler"][1], self.config("scheduler", "scheduler_config.json")

    def entry(self, component: str, key: str) -> Any:
        """What the config of a component that is there says; UsageError if it says nothing."""
        value = self.config(component).get(key)
        if value is None:
            raise UsageError(f"the {component} config of {self.name!r} has no {key}; save or download the pipeline again")
        return value

    def check_weights(self, *components: str) -> None:
        """Raise UsageError if a folder lacks a weight file of a component, or its header cannot be read."""
        for component in components:
            if self.folder is not None and component in self.components:
                weights_variant(self.folder / component, self.components[component][0], self.options.variant)

    def _read(self, file: str) -> Mapping[str, Any]:
        return read_json(self.folder / file) if self.folder is not None else _from_hub(self.name, file, self.options)


def source_of(reference: Any, options: LoadOptions) -> Source:
    """Read what a folder, a hub id or a pipeline object is made of.

    Raises:
      UsageError: if it is not a saved pipeline, or its index cannot be read.
      SetupError: if a hub id cannot be reached, or is not in the cache when offline.
    """
    if not isinstance(reference, str):
        return _from_object(reference, options)
    folder = Path(reference) if Path(reference).exists() else None
    if folder is None:
        index = _from_hub(reference, INDEX, options)
    elif not folder.is_dir():
        raise UsageError(f"{reference!r} is a file; give the folder that a diffusers pipeline was saved to (it holds {INDEX}). Convert a single-file checkpoint once with `from_single_file(...).save_pretrained(...)`")
    elif not (folder / INDEX).is_file():
        raise UsageError(f"folder {reference!r} has no {INDEX}, so it is not a saved diffusers pipeline; give the folder that `save_pretrained` of a whole pipeline wrote")
    else:
        index = read_json(folder / INDEX)
    class_name = index.get("_class_name")
    if isinstance(class_name, list):
        raise UsageError(f"{reference!r} is a pipeline with code of its own ({class_name[-1]}), which is not run; give a pipeline whose class is part of diffusers")
    if not isinstance(class_name, str):
        raise UsageError(f"the {INDEX} of {reference!r} names no pipeline class (`_class_name`); save the pipeline again with `save_pretrained`")
    components = {
        name: (str(entry[0]), str(entry[1]))
        for name, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and all(entry)
    }
    return Source(reference, class_name, options, components, folder, entries=index)


def _from_object(pipeline: Any, options: LoadOptions) -> Source:
    class_name = type(pipeline).__name__
    if options.device != "auto" or options.dtype != "auto":
        raise UsageError(f"the {class_name} object keeps its own device and dtype; leave device and dtype at 'auto', and move or cast the pipeline yourself before handing it over")
    if not isinstance(getattr(pipeline, "components", None), Mapping):
        raise UsageError(f"a {class_name} object is not a pipeline of diffusers; give a pipeline, a folder or a hub id 'org/name'")
    there = {name: part for name, part in pipeline.components.items() if part is not None}
    classes = {name: type(unwrapped(part)) for name, part in there.items()}
    components = {name: (cls.__module__.partition(".")[0], cls.__name__) for name, cls in classes.items()}
    return Source(class_name, class_name, options, components, pipeline=pipeline)


def unwrapped(module: Any) -> Any:
    """A module without the shell that `torch.compile(module)` puts around it."""
    return getattr(module, "_orig_mod", module)


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object from a file.

    Raises:
      UsageError: if the file is missing, unreadable or not a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{str(path)!r} is missing, so the pipeline is incomplete; save or download it again") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{str(path)!r} cannot be read as JSON ({error}); save or download it again") from error
    if not isinstance(data, dict):
        raise UsageError(f"{str(path)!r} holds a {type(data).__name__} where a JSON object belongs; save or download it again")
    return data


def weights_variant(folder: Path, library: str, variant: str | None) -> str | None:
    """`variant` if a component's folder holds its weights in that variant, None if it holds the plain files alone.

    Raises:
      UsageError: if weights are missing, or the header of a file cannot be read.
    """
    stem, pickle = _STEMS[library], _PICKLES[library]
    # The order in which diffusers and transformers look; the plain files stand in for a missing variant.
    for found in dict.fromkeys((variant, None)):
        tag = f".{found}" if found else ""
        for index in (f"{stem}.safetensors.index{tag}.json", f"{pickle}.bin.index{tag}.json"):
            if (folder / index).is_file():
                shards = read_json(folder / index).get("weight_map")
                if not isinstance(shards, dict) or not shards:
                    raise UsageError(f"{str(folder / index)!r} lists no weight files (`weight_map`); download the pipeline again")
                for shard in sorted(set(shards.values())):
                    check_file(folder / shard)
                return found
        for name in (f"{stem}{tag}.safetensors", f"{pickle}{tag}.bin"):
            if (folder / name).is_file():
                check_file(folder / name)
                return found
    raise UsageError(f"{str(folder)!r} holds no weights; expected is {stem}.safetensors (or {pickle}.bin, or shards with their index). Save or download the pipeline again")


def check_file(path: Path) -> None:
    """Raise UsageError unless a weight file is there and its header can be read."""
    if not path.is_file():
        raise UsageError(f"weight file {str(path)!r} is missing; download the pipeline again")
    with path.open("rb") as file:
        start = file.read(40)
    if start.startswith(b"version https://git-lfs"):
        raise UsageError(f"weight file {str(path)!r} is only a git-lfs pointer; run `git lfs pull` in the folder, or download the pipeline again")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UsageError(f"weight file {str(path)!r} is damaged ({error}); download or save it again") from error


def _from_hub(name: str, file: str, options: LoadOptions) -> Mapping[str, Any]:
    """One config file of a hub repository, downloaded or from the cache."""
    from huggingface_hub import errors, hf_hub_download

    from tsdiff.diffusion.quiet import quiet_libraries

    try:
        with quiet_libraries():
            path = hf_hub_download(name, file, revision=options.revision, local_files_only=options.offline)
    except errors.LocalEntryNotFoundError as error:
        offline = "and offline=True forbids downloading it" if options.offline else "and the hub cannot be reached"
        raise SetupError(f"{file} of {name!r} is not in the local cache, {offline}; fetch it once with `hf download {name}`, or give the path of a saved pipeline (no folder of that name exists)") from error
    except errors.GatedRepoError as error:
        raise SetupError(f"{name!r} is gated: accept its terms on its page of the hub, then log in with `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise UsageError(f"the hub has no model {name!r}, or it is private and you are not logged in (`hf auth login`), and no such folder exists; check the name") from error
    except errors.RevisionNotFoundError as error:
        raise UsageError(f"{name!r} has no revision {options.revision!r}; check it on the hub") from error
    except errors.EntryNotFoundError as error:
        raise UsageError(f"{name!r} has no {file}, so it is not a complete diffusers pipeline; give one that has {INDEX}") from error
    except errors.HFValidationError as error:
        raise UsageError(f"{name!r} is neither a folder nor a valid hub id ({error})") from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise SetupError(f"{name!r} cannot be fetched from the hub ({type(error).__name__}: {error}); try again, or give the path of a saved pipeline") from error
    return read_json(Path(path))
