"""Which verifiers compare with plain samples, and what that will cost: known before anything loads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tsdiff.treesearch.cache import cache_folder
from tsdiff.treesearch.protocols import CalibratedVerifier, Pool, Setting, Verifier

KIND = "calibration"
"""The folder of the cache, and the line of the trees that plain samples are."""


def pools(verifiers: Sequence[Verifier]) -> list[tuple[CalibratedVerifier, Pool]]:
    """The verifiers that compare with plain samples, and with which."""
    return [(one, one.pool) for one in verifiers if isinstance(one, CalibratedVerifier) and one.pool is not None]


def announce(verifiers: Sequence[Verifier], setting: Setting, prompts: int) -> list[str]:
    """What to tell the user before anything loads: one line for each verifier that compares with plain samples."""
    lines = []
    for verifier, pool in pools(verifiers):
        cost = pool.cost(setting, prompts)
        lines.append(
            f"verifier {name_of(verifier)} compares with plain samples: unless their scores are in {cache_folder() / KIND}, {pool.samples} samples are made "
            f"first and scored at {len(pool.at(setting.schedule.last))} of {setting.schedule.last + 1} levels ({cost.nfe:,} NFE, {cost.decodes:,} decodes), beside the search's budget"
        )
    return lines


def name_of(verifier: Any) -> str:
    """A verifier's name; `CalibratedVerifier` does not speak of it."""
    name: str = verifier.name
    return name
