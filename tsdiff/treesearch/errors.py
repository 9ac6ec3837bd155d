"""The errors of tsdiff.

Four kinds, told apart by who can mend them. A message says what was given, what is allowed and what to do.

* `UsageError`: the caller can mend it (a wrong name, value, file). Shown without a traceback, exit status 2.
* `SetupError`: the machine lacks something (a package, weights, a device). Exit status 2.
* `SearchFailed`: the search ran and could not finish (every sample failed). Exit status 1.
* `BudgetExhausted`: thrown *into a policy* whose request does not fit its budget; a policy may catch it and ask for less.

Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TsdiffError(Exception):
    """Base of every error that tsdiff raises on purpose."""

    exit_status = 1


class UsageError(TsdiffError, ValueError):
    """What was asked cannot be done as asked; the message says what to change."""

    exit_status = 2


class SetupError(TsdiffError):
    """The machine lacks a package, weights or a device; the message says how to obtain it."""

    exit_status = 2


class SearchFailed(TsdiffError):
    """The search ended without a single finished sample."""


class BudgetExhausted(TsdiffError):
    """A request would leave too little budget to finish a sample (or time is up).

    Attributes:
      price: NFE that the request would have cost.
      remaining: NFE left that could be granted, or None when time ran out.
    """

    def __init__(self, message: str, *, price: int, remaining: int | None) -> None:
        super().__init__(message)
        self.price = price
        self.remaining = remaining


class TsdiffWarning(UserWarning):
    """Something that the user should know; the command line shows it as one line."""


def unknown_name(kind: str, given: str, known: Iterable[str], hint: str = "") -> UsageError:
    """A `UsageError` for a name that is not known, naming the nearest ones.

    Args:
      kind: what the name stands for, e.g. "policy".
      given: the name that was given.
      known: the names that exist.
      hint: what to do to see them all, e.g. "tsdiff list policies lists all".
    """
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=3, cutoff=0.5)
    if near:
        advice = f"did you mean {' or '.join(repr(name) for name in near)}?"
    elif len(names) <= 12:
        advice = f"known are: {', '.join(names) or 'none'}."
    else:
        advice = f"{len(names)} are known."
    return UsageError(f"unknown {kind} {given!r}; {advice}{' ' + hint if hint else ''}")
