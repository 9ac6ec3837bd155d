"""Verifier hacking: does a search find better samples, or only what its own verifier overrates?

Beside the score that was searched with, the report shows those of a verifier that was not (held out) and, where there is
one, of an oracle, all against the budget; and how different the answers of one prompt still are. A growing searched score
with a falling held-out one is over-optimisation: Goodhart's law, as Gao et al. 2022 (arXiv 2210.10760) measure it.

Two kinds of budget axis:

* across runs (default): each run's answer at its own NFE budget, the baseline samples at the left end. The same prompts and
  seeds at every budget make paired comparisons.
* `within` runs of independent samples (best-of-n): the expected answer of best-of-k for k = 1, 2, 4, ..., n from the n
  samples of each run, over all subsets (`hacking_table.best_of_k`), so that one run with a large n shows the whole curve.

Intervals resample prompts and seeds together (`statistics.crossed_counts`); a warning is given where the search gains
by its own verifier and loses by the held-out one, from some budget to the largest, both with intervals that exclude 0
(corrected for the number of budgets compared with, Bonferroni).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdiff.bench.answers import Search, judge_pictures, load_searches
from tsdiff.bench.diversity import Features, feature_function
from tsdiff.bench.hacking_table import HELD_OUT, ORACLE, SEARCHED, HackingCurve, Table
from tsdiff.bench.plots import new_figure
from tsdiff.bench.statistics import RESAMPLES, Interval
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.references import VerifierLike, resolve_verifier

if TYPE_CHECKING:
    from tsdiff.treesearch.results import Result


@dataclass(frozen=True)
class HackingReport:
    """What `hacking_report` found.

    Attributes:
      model: that was searched.
      verifiers: name by role.
      features: what pictures were compared by.
      within: whether budgets are sizes of best-of-k inside runs.
      curves: one a policy.
      notices: what could not be told, and why.
      confidence: of the intervals.
    """

    model: str
    verifiers: dict[str, str]
    features: str
    within: bool
    curves: tuple[HackingCurve, ...]
    notices: tuple[str, ...]
    confidence: float

    @property
    def warnings(self) -> tuple[str, ...]:
        """One line for each policy that hacks its verifier."""
        return tuple(curve.warning for curve in self.curves if curve.warning is not None)

    def to_json(self) -> dict[str, Any]:
        """Strict JSON."""
        return {
            "model": self.model,
            "verifiers": self.verifiers,
            "features": self.features,
            "within": self.within,
            "confidence": self.confidence,
            "curves": [
                {
                    "policy": curve.policy, "prompts": curve.prompts, "seeds": curve.seeds, "held_out_peak": curve.peak, "warning": curve.warning,
                    "points": [point.to_json() for point in curve.points],
                }
                for curve in self.curves
            ],
            "notices": list(self.notices),
        }  # fmt: skip

    def plot(self, path: str | Path) -> Path:
        """Draw scores by role, and diversity where it is known, against NFE (logarithmic) into a file.

        Raises:
          SetupError: without matplotlib.
        """
        roles = list(self.verifiers)
        diverse = any(point.vendi is not None for curve in self.curves for point in curve.points)
        with new_figure(path, (3.4 * (len(roles) + diverse), 3.4)) as figure:
            panels = figure.subplots(1, len(roles) + diverse, squeeze=False)[0]
            for axes, role in zip(panels, roles, strict=False):
                for number, curve in enumerate(self.curves):
                    _draw(axes, curve, [(point.nfe, point.scores[role], point.intervals.get(role)) for point in curve.points], f"C{number}")
                axes.set_title(f"{role.replace('_', '-')}: {self.verifiers[role]}", fontsize=10)
            if diverse:
                for number, curve in enumerate(self.curves):
                    _draw(panels[-1], curve, [(point.nfe, point.vendi, point.intervals.get("vendi")) for point in curve.points if point.vendi is not None], f"C{number}")
                panels[-1].set_title(f"Vendi score ({self.features})", fontsize=10)
            for axes in panels:
                axes.set_xscale("log", base=2)
                axes.xaxis.set_major_formatter("{x:g}")
                axes.set_xlabel("NFE")
                axes.grid(alpha=0.3)
            panels[0].legend(fontsize=8)
            shown = "best-of-k within runs" if self.within else "across runs"
            figure.suptitle(f"{self.model}, {shown}{': HACKED' if self.warnings else ''}", fontsize=11, color="C3" if self.warnings else "black")
        return Path(path)


def _draw(axes: Any, curve: HackingCurve, points: Sequence[tuple[float, float, Interval | None]], color: str) -> None:
    known = [(nfe, interval.low, interval.high) for nfe, _, interval in points if interval is not None]
    if known:
        axes.fill_between(*zip(*known, strict=True), color=color, alpha=0.2, linewidth=0)
    axes.plot([nfe for nfe, _, _ in points], [value for _, value, _ in points], color=color, marker="o", markersize=3.5, label=curve.policy)


# Reporting -----------------------------------------------------------------------------------------------------------


def hacking_report(
    runs: Iterable[Result | Search | str | Path],
    *,
    held_out: VerifierLike,
    oracle: VerifierLike | None = None,
    features: Features = "pixels",
    within: bool = False,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    device: str = "auto",
) -> HackingReport:
    """Compare what searches were steered by with what they were not.

    Args:
      runs: results, run folders, folders of run folders, or records made otherwise (`answers.Search`); of one model and one
        steering verifier.
      held_out: the name of a verifier whose scores the runs hold (named after the first when they ran; `within` runs, rescored
        since), or a reference
        or object of one that reads pictures and prompts alone: it then scores the saved pictures of answers.
      oracle: another one, which says what is truly wanted.
      features: what diversity is measured in, see `tsdiff.bench.diversity.feature_function`.
      within: show best-of-k inside runs of independent samples, instead of budgets across runs.
      confidence, resamples, seed: of the bootstrap.
      device: where verifiers and feature networks run; "auto" is the best there is.

    Raises:
      UsageError: for runs that do not compare, or a verifier that neither is in the runs nor can judge pictures.
    """
    from tsdiff.treesearch.pictures import picture_device

    searches = load_searches(runs)
    if not searches:
        raise UsageError("no runs were given; name run folders or results")
    if not 0.0 < confidence < 1.0:
        raise UsageError(f"confidence is {confidence} but must lie between 0 and 1, e.g. 0.95")
    for what in ("model", "verifier"):
        different = sorted({getattr(one, what) for one in searches})
        if len(different) > 1:
            raise UsageError(f"runs have different {what}s ({', '.join(different)}), so their scores do not compare; report on each apart")
    device = picture_device(device)
    notices: list[str] = []
    verifiers, judged = {SEARCHED: searches[0].verifier}, searches
    for role, wanted in ((HELD_OUT, held_out), (ORACLE, oracle)):
        if wanted is not None:
            verifiers[role], judged = _scored(judged, wanted, within, device, notices)
    if len(set(verifiers.values())) < len(verifiers):
        raise UsageError(f"the roles {', '.join(f'{role}={name}' for role, name in verifiers.items())} are not different verifiers; hold one out that was not searched with")
    name, function = feature_function(features, device)
    curves = []
    for policy in dict.fromkeys(one.policy for one in judged):
        table = Table([one for one in judged if one.policy == policy], verifiers, within, notices, device)
        curves.append(table.curve(policy, confidence, resamples, seed, function))
    return HackingReport(searches[0].model, verifiers, name, within, tuple(curves), tuple(dict.fromkeys(notices)), confidence)


def _scored(searches: Sequence[Search], wanted: VerifierLike, within: bool, device: str, notices: list[str]) -> tuple[str, list[Search]]:
    """The searches with a verifier's scores: those that they hold, or new ones of their pictures."""
    samples = [sample for one in searches for sample in (one.answer, *([one.plain] if one.plain else []), *(one.samples if within else ()))]
    if isinstance(wanted, str) and any(wanted in sample.scores for sample in samples):
        return wanted, list(searches)
    verifier = resolve_verifier(wanted)
    name: str = verifier.name
    if within:
        raise UsageError(f"verifier {name} has not scored the samples of these runs, and only answers have pictures; `tsdiff rescore RUN --verifier ...` scores them (name it here as {name} then), and so does a --verifier after the first when the search runs")
    missing = [one.source for one in searches if one.answer.picture is None]
    if missing:
        raise UsageError(f"verifier {name} has not scored {missing[0]}, and there is no picture of its answer to score; name it with --verifier, after the first, when the search runs")
    owners = [(one, sample) for one in searches for sample in (one.answer, one.plain) if sample is not None and sample.picture is not None]
    values = judge_pictures(verifier, [sample.picture for _, sample in owners if sample.picture is not None], [one.condition for one, _ in owners], device)
    failed = [value.reason for value in values if value.score is None]
    if failed:
        notices.append(f"{name} could not score {len(failed)} of {len(values)} pictures: {failed[0]}")
    new = {
        id(sample): dataclasses.replace(sample, scores={**sample.scores, **({} if value.score is None else {name: value.score})})
        for (_, sample), value in zip(owners, values, strict=True)
    }
    return name, [
        dataclasses.replace(one, answer=new[id(one.answer)], plain=None if one.plain is None else new.get(id(one.plain), one.plain)) for one in searches
    ]
