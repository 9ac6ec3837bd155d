"""DINOv2 models of transformers: their folders looked at, weights loaded strictly, features and class logits.

Shapes: B images, d dimensions of features, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tsdiff.treesearch.errors import UsageError
from tsdiff.verifiers.checkpoints import cached_repository, read_json
from tsdiff.verifiers.clip_images import from_transformers
from tsdiff.verifiers.libraries import quiet_libraries
from tsdiff.verifiers.transformers_folder import check_folder, load_config, load_model, load_processor

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from tsdiff.verifiers.clip_images import Preprocessing

PLAIN, CLASSIFIER = "Dinov2Model", "Dinov2ForImageClassification"


@dataclass(frozen=True)
class DinoSource:
    """A model's files.

    Attributes:
      folder: in transformers' layout.
      weights: the files that hold the weights.
      architecture: the class of transformers that was saved.
      labels: names of the classes, in order; () for a model without classes.
    """

    folder: Path
    weights: tuple[Path, ...]
    architecture: Literal["Dinov2Model", "Dinov2ForImageClassification"]
    labels: tuple[str, ...]


def locate(model: str, who: str) -> DinoSource:
    """The files that `model` names, complete and of a kind that can be loaded; imports no torch.

    Args:
      model: a folder in transformers' layout, or OWNER/NAME of one in the hub's cache.
      who: the verifier, for messages.

    Raises:
      UsageError: if there is no such folder, or a file is missing, damaged or another model's.
      SetupError: if it is not in the cache; the message says how to fetch it.
    """
    if not model:
        raise UsageError(f"{who}: model is missing; write model=..., naming a folder with a DINOv2 model of transformers, or OWNER/NAME of one in the hub's cache")
    folder = Path(model).expanduser()
    if not folder.is_dir():
        name = model.removeprefix("hf-hub:")
        if model.startswith((".", "/", "~")) or name.count("/") != 1:
            raise UsageError(f"{who}: there is no folder {str(folder)!r}; model is a folder, or OWNER/NAME of one in the hub's cache")
        folder = cached_repository(name, who)
    if not (folder / "config.json").is_file():
        raise UsageError(f"{who}: {folder} holds no config.json; it must be a DINOv2 model of transformers")
    config = read_json(folder / "config.json", who)
    architectures = config.get("architectures") or []
    if config.get("model_type") != "dinov2" or architectures not in ([PLAIN], [CLASSIFIER]):
        raise UsageError(
            f"{who}: {folder / 'config.json'} is of model_type {config.get('model_type')!r} with architectures {architectures}, "
            f"but must be of 'dinov2', with {PLAIN} or {CLASSIFIER}"
        )
    labels = _labels(config, folder, who) if architectures == [CLASSIFIER] else ()
    return DinoSource(folder, check_folder(folder, who), architectures[0], labels)


def _labels(config: Mapping[str, Any], folder: Path, who: str) -> tuple[str, ...]:
    """Class names in order; a config without them means two classes (transformers' default)."""
    named = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    if not isinstance(named, dict) or set(named) != {str(number) for number in range(len(named))}:
        raise UsageError(f"{who}: id2label in {folder / 'config.json'} must name the classes 0, 1, 2, ... without a gap")
    return tuple(str(named[str(number)]) for number in range(len(named)))


class DinoNetwork:
    """Features and class logits of images, in float32. Weights take no gradients; images do.

    Args:
      source: the model.
      name: of the verifier, for messages.
      dtype: number format of weights and activations.

    Raises:
      UsageError: if the files do not make a model together.
    """

    def __init__(self, source: DinoSource, name: str, dtype: Literal["float32", "float16", "bfloat16"] = "float32") -> None:
        import torch

        with quiet_libraries():
            import transformers

            config = load_config(source.folder, name)
            # The mask token serves training only, and not every published checkpoint has one.
            self.module: nn.Module = load_model(getattr(transformers, source.architecture), config, source.folder, source.weights, name, spare=("embeddings.mask_token",))
            self.preprocessing = _preprocessing(source.folder, config, name)
        self.name = name
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.device = torch.device("cpu")
        self._has_classes = source.architecture == CLASSIFIER
        self.module.requires_grad_(False).eval().to(self.dtype)

    def to(self, device: str) -> None:
        """Move the weights."""
        import torch

        self.device = torch.device(device)
        self.module.to(self.device)

    def image_features(self, images: Tensor) -> Tensor:
        """Features (B, d) of length 1 of images (B, 3, H, W) in [0, 1]: the class token after the last norm; differentiable.

        Raises:
          UsageError: for another shape.
        """
        import torch

        backbone = self.module.dinov2 if self._has_classes else self.module
        features: Tensor = backbone(pixel_values=self._pixels(images)).pooler_output  # type: ignore[operator]
        return torch.nn.functional.normalize(features.float(), dim=-1)

    def logits(self, images: Tensor) -> Tensor:
        """Class logits (B, K) of images (B, 3, H, W) in [0, 1]; differentiable.

        Raises:
          UsageError: for another shape.
        """
        logits: Tensor = self.module(pixel_values=self._pixels(images)).logits
        return logits.float()

    def _pixels(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3 or not images.shape[2] or not images.shape[3]:
            raise UsageError(f"{self.name} was given images of shape {tuple(images.shape)} but takes RGB images (B, 3, H, W)")
        return self.preprocessing(images.to(self.device)).to(self.dtype)


def _preprocessing(folder: Path, config: Any, who: str) -> Preprocessing:
    """Of the size that the processor makes: DINOv2 stretches its positions to any whole number of patches."""
    told = load_processor(folder, who)
    asked = dict((told.get("crop_size") if told.get("do_center_crop") else told.get("size")) or {})
    height, width = asked.get("height"), asked.get("width")
    if not height or not width or height % config.patch_size or width % config.patch_size:
        raise UsageError(f"{who}: {folder} makes images of size {asked}, which are not whole patches of {config.patch_size} x {config.patch_size} pixels")
    return from_transformers(told, (height, width), str(folder))
