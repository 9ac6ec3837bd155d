"""The words of the world as CLIP's text models take them: every word of the grammar is one token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tsdiff.worlds.shapes.grammar import VOCABULARY

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

LENGTH = 16
"""Tokens of a prompt at most, the first and the last, which mark its ends, included. The grammar needs 13."""

_ENDS = ("<|startoftext|>", "<|endoftext|>")
_WORD_END = "</w>"


def merges() -> list[tuple[str, str]]:
    """Rules of byte pair encoding after which every word of the grammar is a single token.

    Words are joined from their front, one after another; each rule is applied to all words at once, as the tokenizer
    does, so that what an earlier rule joined stays joined.
    """
    words = [[*word[:-1], word[-1] + _WORD_END] for word in VOCABULARY]
    rules: list[tuple[str, str]] = []
    while long := next((word for word in words if len(word) > 1), None):
        rules.append((long[0], long[1]))
        words = [_join(word, rules[-1]) for word in words]
    return rules


def _join(parts: list[str], rule: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for part in parts:
        if joined and (joined[-1], part) == rule:
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def vocabulary() -> dict[str, int]:
    """Numbers of all tokens: the two ends, the grammar's words, then the fragments they are joined from."""
    whole = [word + _WORD_END for word in VOCABULARY]
    rules = merges()
    letters = sorted({letter for word in VOCABULARY for letter in word})
    fragments = [*letters, *(letter + _WORD_END for letter in letters), *(first + second for first, second in rules)]
    return {token: number for number, token in enumerate(dict.fromkeys([*_ENDS, *whole, *fragments]))}


def known_tokens() -> int:
    """How many tokens training ever shows: the first ones of `vocabulary`."""
    return len(_ENDS) + len(VOCABULARY)


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer for this world. A word it does not have falls into fragments, which mean nothing."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer(vocab=vocabulary(), merges=merges(), model_max_length=LENGTH)
