"""A verifier from what a caller typed: a reference, an object or a function. Also for verifiers made of others."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from tsdiff.treesearch import registry
from tsdiff.treesearch.callables import CallableVerifier
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.parameters import build
from tsdiff.treesearch.protocols import Verifier

VerifierLike = str | Verifier | Callable[..., Any]


def resolve_verifier(verifier: VerifierLike) -> Verifier:
    """A verifier from "name", "name:key=value,...", "name:anything" (where it takes that), an object or a callable.

    A registered function may return a verifier, or the reference of another one that its name stands for.

    Raises:
      UsageError: for an unknown name or parameter.
    """
    if isinstance(verifier, str):
        return _named(verifier, ())
    if hasattr(verifier, "score") and hasattr(verifier, "needs"):
        return verifier  # type: ignore[return-value]
    if callable(verifier):
        return CallableVerifier(verifier)
    raise UsageError(f"verifier {verifier!r} is neither a name, nor a verifier, nor a function (images, prompts) -> scores")


def _named(reference: str, through: tuple[str, ...]) -> Verifier:
    """The verifier of a reference; `through` are the names that led to it."""
    name, rest = registry.split_reference(reference)
    if name in through:
        raise UsageError(f"verifier {through[0]!r} stands for itself ({' -> '.join((*through, name))}); mend the plug-in that registers it")
    factory: Any = registry.verifiers.load(name)
    if hasattr(factory, "from_reference"):
        made: Any = factory.from_reference(rest)
        return made  # type: ignore[no-any-return]
    options = registry.split_options(rest)
    if isinstance(factory, type) and dataclasses.is_dataclass(factory):
        return build(factory, options)  # type: ignore[return-value]
    try:
        inspect.signature(factory).bind(**options)
    except TypeError as error:
        raise UsageError(f"verifier {reference!r}: {error}") from None
    made = factory(**options)
    return _named(made, (*through, name)) if isinstance(made, str) else made
