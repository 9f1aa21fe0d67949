"""What arXiv 2605.28664 found, each held against a study's test figures; what fails is said to fail.

Our grid is not that paper's, so a failure here says that a finding does not carry over, not that it was wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from steerwell.scoring.intervals import Interval
from steerwell.studies.claims import Claim, Finding
from steerwell.studies.synthesis.analysis import against, correlations, falsifier, lead, share_above, trend
from steerwell.studies.synthesis.results import MEASURABLE, SynthesisResult

PAPER_SHARE = 41 / 136  # of the configurations, which beat prompting there
Verdict = tuple[bool | None, str]


def claims_of(cells: Sequence[SynthesisResult]) -> list[Claim]:
    """Every claim over these cells."""
    return [
        Claim(name, statement, criterion, tuple(Finding(cell.model, cell.concept, *check(cell)) for cell in cells))
        for name, statement, criterion, check in _CLAIMS
    ]


def diversity_falls(cell: SynthesisResult) -> Verdict:
    """Diversity falls with strength."""
    found = trend(cell)
    if math.isnan(found.high):
        return None, f"{found.n} curves of three strengths or more; one says nothing about the others"
    return found.high < 0, f"mean rank correlation of strength with D over {found.n} curves: {_told(found)}"


def beats_prompting(cell: SynthesisResult) -> Verdict:
    """The best steered configuration trains better detectors than the best prompted one."""
    if (why := _unmeasurable(cell)) is not None:
        return None, why
    found = against(cell, cell.best("steered"), cell.best("prompted"))
    if found is None:
        return None, "nothing to compare"
    told = (
        f"AUROC {found.first.estimate:.3f} against {found.second.estimate:.3f}, difference {_told(found.difference, 3)}"
    )
    return found.difference.low > 0, told


def share_beats_prompting(cell: SynthesisResult) -> Verdict:
    """As large a share of the configurations beats prompting as in the paper."""
    if (why := _unmeasurable(cell)) is not None:
        return None, why
    above, known = share_above(cell, cell.best("prompted"))
    if not known:
        return None, "nothing to compare"
    return above / known >= PAPER_SHARE, f"{above} of {known} configurations ({above / known:.0%})"


def hm3_follows(cell: SynthesisResult) -> Verdict:
    """HM3 follows AUROC more closely than success and coherence do."""
    if (why := _unmeasurable(cell)) is not None:
        return None, why
    found = correlations(cell)
    if math.isnan(found["hm3"].estimate):
        return None, "no judge, or too few configurations"
    told = ", ".join(f"{name} {_told(found[name])}" for name in ("hm3", "hm2", "success", "coherence", "diversity"))
    ahead = {name: lead(cell, "hm3", name) for name in ("success", "coherence")}
    told += "; ahead of " + ", ".join(f"{name} by {_told(each)}" for name, each in ahead.items())
    return found["hm3"].low > 0 and all(each.low > 0 for each in ahead.values()), told


def diversity_matters(cell: SynthesisResult) -> Verdict:
    """At equal n and comparable coherence, diverse data beat successful data."""
    if (why := _unmeasurable(cell)) is not None:
        return None, why
    found = falsifier(cell)
    if found.difference is None:
        return None, "no weak and diverse configuration is as coherent as a strong and successful one"
    gap = found.difference.difference
    told = (
        f"{len(found.pairs)} pairs, AUROC difference {_told(gap, 3)}; partial correlation of D {_told(found.partial)}"
    )
    return gap.low > 0 and found.partial.low > 0, told


def _unmeasurable(cell: SynthesisResult) -> str | None:
    if cell.measurable:
        return None
    at = cell.named("original")
    found = "n/a" if at is None else f"{cell.auroc(at):.2f}"
    low, high = MEASURABLE
    return f"not measurable: detectors trained on originals have AUROC {found}, outside {low:.2f} to {high:.2f}"


def _told(found: Interval, digits: int = 2) -> str:
    return f"{found.estimate:+.{digits}f} ({found.low:+.{digits}f} to {found.high:+.{digits}f})"


_CLAIMS: tuple[tuple[str, str, str, Callable[[SynthesisResult], Verdict]], ...] = (
    (
        "diversity falls",
        "The stronger the steering, the less diverse the texts.",
        "The mean rank correlation of strength with D over the grid's curves is surely below 0.",
        diversity_falls,
    ),
    (
        "steering beats prompting",
        "Steered data train better detectors than prompted data (on 3 of 4 concepts in the paper).",
        "Best configuration of each, chosen on validation: the paired interval of the difference is above 0.",
        beats_prompting,
    ),
    (
        "many configurations beat prompting",
        "41 of 136 steered configurations beat prompting.",
        "At least this share has a higher test AUROC than the best prompting configuration, chosen on validation.",
        share_beats_prompting,
    ),
    (
        "HM3 follows AUROC",
        "HM3 follows AUROC more consistently than success and coherence do.",
        "Its rank correlation with AUROC is surely positive, and surely higher than each of theirs.",
        hm3_follows,
    ),
    (
        "diversity matters",
        "Diversity is what makes synthetic data useful.",
        "Weak and diverse beats strong and successful at like coherence, and the partial correlation of D is positive; "
        "both surely. Where this fails, diversity may be an artifact here.",
        diversity_matters,
    ),
)
