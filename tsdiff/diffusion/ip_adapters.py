"""Image prompts: what an IP adapter of a UNet wants of a condition, and the embeddings that the pipeline makes of it.

Ye et al. 2023 (arXiv 2308.06721).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

from tsdiff.treesearch.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_OPTIONS = ("ip_adapter_image", "ip_adapter_image_embeds")


def check_image_prompt(name: str, extra: Mapping[str, Any], *, adapter: bool) -> None:
    """Raise UsageError unless the options of a condition give an image prompt exactly where an adapter wants one.

    Args:
      name: of the model.
      extra: options of the condition.
      adapter: whether an IP adapter is loaded.
    """
    image, embeds = (extra.get(key) for key in IMAGE_OPTIONS)
    if image is not None and embeds is not None:
        raise UsageError("ip_adapter_image and ip_adapter_image_embeds are both given; leave out one of them")
    if adapter and image is None and embeds is None:
        raise UsageError("an IP adapter is loaded, so every condition needs ip_adapter_image or ip_adapter_image_embeds; give one, or call `pipe.unload_ip_adapter()` before")
    if not adapter and not (image is None and embeds is None):
        raise UsageError(f"{name!r} has no IP adapter for an image to go to; load one with `pipe.load_ip_adapter(...)` and hand over the pipeline object")
    if embeds is not None and not (isinstance(embeds, list) and embeds and all(tensor.ndim in (3, 4) for tensor in embeds)):
        raise UsageError("ip_adapter_image_embeds must be a list with one tensor (2, images, ...) for each IP adapter, the negative embedding first")


def image_embeddings(pipeline: Any, extra: Mapping[str, Any], device: str, memo: dict[Hashable, Any], *, guided: bool) -> list[tuple[Tensor, Tensor]]:
    """(negative, positive) embeddings for each IP adapter; they are one and the same without guidance.

    Args:
      pipeline: whose image encoder is used.
      extra: options of a condition, checked before.
      device: where the embeddings are put.
      memo: of one call over many conditions, which may share an image.

    Raises:
      UsageError: if the number of images is not that of the adapters, or an embedding lacks its negative half.
    """
    image, embeds = (extra.get(key) for key in IMAGE_OPTIONS)
    if image is None and embeds is None:
        return []
    key = ("images", id(image), id(embeds))
    if key not in memo:
        adapters = len(pipeline.unet.encoder_hid_proj.image_projection_layers)
        given = embeds if embeds is not None else image if isinstance(image, list) else [image]
        if len(given) != adapters:
            raise UsageError(f"{len(given)} images are given for {adapters} IP adapters; give a list with one for each")
        if embeds is not None:
            if guided and any(tensor.shape[0] != 2 for tensor in embeds):
                raise UsageError("under guidance each of ip_adapter_image_embeds needs shape (2, images, ...), the negative embedding first")
            embeds = [tensor if guided else tensor[-1:] for tensor in embeds]
        batches = pipeline.prepare_ip_adapter_image_embeds(image, embeds, device, 1, guided)
        memo[key] = [(batch[0].to(device), batch[-1].to(device)) for batch in batches]
    found: list[tuple[Tensor, Tensor]] = memo[key]
    return found
