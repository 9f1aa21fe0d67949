"""Quality of a set of texts: success, coherence and diversity, their harmonic mean, and intervals (METHODS section 6).

Intervals come from a grouped jackknife. Bootstrap resamples hold texts twice, which every measure of a set takes for
a lack of diversity, so their values lie below the set's own; leaving texts out makes no duplicates. The texts are dealt
into groups, all texts of a prompt into the same one, every measure is taken again without each group in turn, and with
G groups

    variance = (G - 1) / G * sum of (value without group g - mean of those values)^2

It is not too small in expectation for any measure that does not mind the texts' order (Efron and Stein 1981, The
jackknife estimate of variance). Intervals are Student's with G - 1 degrees of freedom, cut to the measure's range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from steerwell.core.errors import ArgumentError
from steerwell.scoring.diversity import DIVERSITY, WINDOW, WORDS, Measure, Subsets, Texts, Values, measure
from steerwell.scoring.embeddings import MINILM, Embedder, load_embedder
from steerwell.scoring.intervals import Interval

GROUPS = 40
LEVEL = 0.95
AXES = ("hm3", "hm2", "success", "coherence", "diversity")
PARTS = ("mattr", "vendi")  # of the diversity axis: inside a text, across texts
Numbers = Sequence[float] | NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Quality:
    """What a set of texts scores. Every interval's estimate is NaN where it cannot be computed; none is guessed.

    Compare only figures of the same `n`, `words`, `window`, embedder and language.

    Attributes:
        n: texts looked at.
        words: of every text that count.
        window: words that the moving average looks at.
        seed: of the choice of texts and of the groups.
        groups: independent groups that the intervals rest on; 0: there are none.
        empty: texts without a word.
        short: texts with fewer words than the window, which the diversity inside a text leaves out.
        success: S, mean of the given values.
        coherence: C, mean of the given values.
        diversity: D, mean of the measures `mattr` and `vendi`.
        hm3: harmonic mean of S, C and D.
        hm2: harmonic mean of S and C.
        measures: every registered measure of diversity by name, the parts of D first.
    """

    n: int
    words: int
    window: int
    seed: int
    groups: int
    empty: int
    short: int
    success: Interval
    coherence: Interval
    diversity: Interval
    hm3: Interval
    hm2: Interval
    measures: Mapping[str, Interval]

    def intervals(self) -> dict[str, Interval]:
        """All of them by name."""
        return {name: getattr(self, name) for name in AXES} | dict(self.measures)

    def figures(self) -> dict[str, float]:
        """All estimates by name."""
        return {name: interval.estimate for name, interval in self.intervals().items()}


def quality(
    texts: Sequence[str],
    *,
    success: Numbers | None = None,
    coherence: Numbers | None = None,
    embeddings: str | Embedder | NDArray[np.floating[Any]] = MINILM,
    prompts: Sequence[str] | None = None,
    size: int | None = None,
    words: int = WORDS,
    window: int = WINDOW,
    seed: int = 42,
    intervals: bool = True,
) -> Quality:
    """Measure a set of texts at a fixed number of texts and of words.

    Args:
        texts: N texts.
        success: how much each shows what it should, 0 to 1; NaN: not judged; None: none is.
        coherence: of each, likewise.
        embeddings: name of an embedder (`load_embedder`), a function that embeds, or vectors [N, d] of any norm. Only
            the texts that are looked at are embedded, cut to `words`; give vectors of cut texts too (`diversity.cut`).
        prompts: what each answers: for the distance within a prompt, and because texts of one prompt are not
            independent (where there are two prompts or more, intervals leave out whole prompts).
        size: texts looked at, drawn without replacement; None: all.
        words: of every text that count, from its start.
        window: words that the moving average looks at.
        seed: the same texts and seed give the same figures.
        intervals: without them bounds are NaN, at a fifth of the time.

    Raises:
        ArgumentError: no text, fewer than `size`, another number of values than texts, or values outside 0 to 1.
        UnknownNameError, MissingDependencyError, EngineError: as `load_embedder`.
    """
    count = len(texts)
    n = count if size is None else size
    if not 1 <= n <= count:
        raise ArgumentError(f"size: got {n} for {count} texts; expected 1 to {count}, the same for all you compare")
    judged = {name: _scores(name, given, count) for name, given in (("success", success), ("coherence", coherence))}
    if prompts is not None and len(prompts) != count:
        raise ArgumentError(f"prompts: got {len(prompts)} for {count} texts; give one per text")
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(count, n, replace=False))
    asked = None if prompts is None else [prompts[row] for row in rows]
    chosen = [texts[row] for row in rows]
    made = Texts.of(chosen, _of_rows(embeddings, rows, count), asked, words, window)
    groups = _groups(asked, n, rng) if intervals else []
    subsets = [np.arange(n), *(np.setdiff1d(np.arange(n), group) for group in groups)]
    values, missing = _values({name: each[rows] for name, each in judged.items()}, made, subsets)
    found = {name: _interval(values[name], n, missing.get(name, 0), _high(name)) for name in values}
    return Quality(
        n=n,
        words=words,
        window=window,
        seed=seed,
        groups=len(groups),
        empty=int((made.lengths == 0).sum()),
        short=int((made.lengths < window).sum()),
        **{name: found[name] for name in AXES},
        measures={name: interval for name, interval in found.items() if name not in AXES},
    )


def harmonic_mean(*axes: Values) -> Values:
    """`k / sum of 1 / axis`, elementwise; 0 where an axis is 0, NaN where one is missing."""
    table = np.array(axes, np.float64)
    positive = np.where(table > 0, table, 1)
    means = np.where((table > 0).all(axis=0), len(table) / (1 / positive).sum(axis=0), 0)
    return np.where(np.isnan(table).any(axis=0), math.nan, means)


def _values(judged: dict[str, Values], made: Texts, subsets: Subsets) -> tuple[dict[str, Values], dict[str, int]]:
    """Every figure of every subset, and how many texts it leaves out."""
    values = {name: np.array([_mean(each[rows]) for rows in subsets]) for name, each in judged.items()}
    missing = {name: int(np.isnan(each).sum()) for name, each in judged.items()}
    for name in sorted(DIVERSITY.names(), key=lambda name: (name not in PARTS, name)):
        chosen: Measure = DIVERSITY.get(name)
        values[name] = measure(name, made, subsets)
        missing[name] = int((made.lengths < chosen.least(made)).sum())
    s, c = values["success"], values["coherence"]
    values["diversity"] = d = np.mean([values[part] for part in PARTS], axis=0)
    return values | {"hm3": harmonic_mean(s, c, d), "hm2": harmonic_mean(s, c)}, missing


def _mean(values: Values) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _high(name: str) -> float:
    if name in AXES:
        return 1
    chosen: Measure = DIVERSITY.get(name)
    return chosen.high


def _interval(values: Values, n: int, missing: int, high: float) -> Interval:
    """Of a figure: the whole set's value and those without each group."""
    estimate, without = float(values[0]), values[1:]
    if len(without) < 2:
        return Interval(estimate, math.nan, math.nan, n - missing, missing)
    count = len(without)
    error = math.sqrt((count - 1) / count * float(np.square(without - without.mean()).sum()))
    reach = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * error
    low, top = np.clip([estimate - reach, estimate + reach], 0, high)  # NaN stays NaN
    return Interval(estimate, float(low), float(top), n - missing, missing)


def _groups(prompts: Sequence[str] | None, n: int, rng: np.random.Generator) -> list[NDArray[np.intp]]:
    """Rows dealt into up to `GROUPS` groups by chance, a prompt's all into one where there are two prompts or more."""
    units = np.unique(prompts, return_inverse=True)[1] if prompts is not None else np.arange(n)
    if len(set(units)) < 2:
        units = np.arange(n)
    dealt = rng.permutation(int(units.max()) + 1) % GROUPS
    return [np.flatnonzero(dealt[units] == group) for group in range(min(GROUPS, len(dealt)))]


def _scores(name: str, given: Numbers | None, count: int) -> Values:
    if given is None:
        return np.full(count, math.nan)
    values = np.asarray(given, np.float64)
    if values.shape != (count,):
        raise ArgumentError(f"{name}: got shape {values.shape} for {count} texts; expected one value per text")
    if (wrong := (values < 0) | (values > 1)).any():
        raise ArgumentError(f"{name}: got {values[wrong][0]:g}; expected 0 to 1 (divide a judge's 0 to 100 by 100)")
    return values


def _of_rows(
    embeddings: str | Embedder | NDArray[np.floating[Any]], rows: NDArray[np.intp], count: int
) -> Embedder | NDArray[np.floating[Any]]:
    if isinstance(embeddings, str):
        return load_embedder(embeddings)
    if callable(embeddings):
        return embeddings
    if len(embeddings) != count:
        raise ArgumentError(f"embeddings: got {len(embeddings)} vectors for {count} texts; give one per text")
    return np.asarray(embeddings)[rows]
