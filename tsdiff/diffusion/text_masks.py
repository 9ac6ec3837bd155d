"""Texts whose padding is hidden from the network by a mask, so that rows of different lengths share batches.

A row has `prompt_embeds` (tokens, width) and `prompt_attention_mask` (tokens,), 1 for tokens and 0 for padding. What is hidden
has no weight at all, so results do not depend on how far a text is padded.
"""

from __future__ import annotations

import dataclasses

from tsdiff.diffusion.text_conditions import NEGATIVE, SIDES, TextRules
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Condition

EMBEDS, MASK = "prompt_embeds", "prompt_attention_mask"


def padded(condition: Condition, rules: TextRules) -> Condition:
    """A condition whose embeddings have the length of a prompt's, or of the longest among them, behind their masks."""
    from torch.nn.functional import pad

    given = {name: tensor for name, tensor in condition.tensors.items() if name.removeprefix(NEGATIVE) in rules.embeddings}
    tokens = {name: tensor.shape[-2 if name.endswith(EMBEDS) else -1] for name, tensor in given.items()}
    length = max(rules.tokens(condition.extra), *tokens.values(), 0)
    longer = {
        name: pad(tensor, (0, 0) * name.endswith(EMBEDS) + (0, length - tokens[name])) for name, tensor in given.items()
    }
    return dataclasses.replace(condition, tensors={**condition.tensors, **longer}) if longer else condition


def check_masks(condition: Condition) -> None:
    """Raise UsageError for a mask that does not fit its embeddings, or is none."""
    for side in SIDES:
        embeds, mask = condition.tensors.get(side + EMBEDS), condition.tensors.get(side + MASK)
        if embeds is None or mask is None:
            continue
        if mask.shape[-1] != embeds.shape[-2]:
            raise UsageError(f"{side}{MASK} has {mask.shape[-1]} tokens but {side}{EMBEDS} has {embeds.shape[-2]}; give both as the pipeline's encode_prompt makes them")
        if not bool(((mask == 0) | (mask == 1)).all()) or not bool((mask == 1).any()):
            raise UsageError(f"{side}{MASK} must hold 1 for tokens and 0 for padding, with a token at least; give it as the pipeline's encode_prompt makes it")
