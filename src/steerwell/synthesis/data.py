"""A data set from examples: filters, duplicates, and splits that share nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from steerwell.core.errors import ArgumentError
from steerwell.synthesis.examples import BENIGN, VIOLATING, Example, labels
from steerwell.synthesis.leaks import leaks as leaks
from steerwell.synthesis.near import NEAR, Near, linked, normal, response_shingles, said, shingles, similar
from steerwell.synthesis.templates import components
from steerwell.synthesis.templates import templates_of as templates_of

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
Pairs = list[tuple[int, int]]

_FIXES = {  # what joins examples: how to get them apart
    "equal prompts": "use more prompts",
    "equal templates": "write more templates, or record finer ones (guess=False trusts those on record alone)",
    "near-duplicate prompts": "write prompts that differ more, or raise near's threshold",
    "near-duplicate responses": "drop near-duplicates first (unique), or raise near's threshold",
}
_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Kept:
    """What a step kept, in its order, and how many it dropped for which reason (reasons with none are left out)."""

    examples: list[Example]
    dropped: Mapping[str, int]


def keep(
    examples: Sequence[Example],
    *,
    success: float | None = None,
    coherence: float | None = None,
    words: tuple[int, int] | None = None,
) -> Kept:
    """The examples that pass; an example is counted under the first reason that it fails.

    A score that is asked for and missing (NaN) drops the example as "success missing" or "coherence missing": nothing
    is guessed. Filter generated examples before originals, which have no scores, are added.

    Args:
        success: least success of a *violating* example, 0 to 1; benign ones are not asked.
        coherence: least coherence, 0 to 1.
        words: fewest and most words of a response, as spaces separate them.
    """
    for name, least in (("success", success), ("coherence", coherence)):
        if least is not None and not 0 <= least <= 1:
            raise ArgumentError(f"{name}: got {least!r}; expected a share from 0 to 1 (a judge's score / 100)")
    if words is not None and not 0 <= words[0] <= words[1]:
        raise ArgumentError(f"words: got {words!r}; expected the fewest and the most words, such as (5, 200)")
    reasons = [_reason(example, success, coherence, words) for example in examples]
    passed = [example for example, reason in zip(examples, reasons, strict=True) if reason is None]
    return Kept(passed, dict(Counter(reason for reason in reasons if reason is not None)))


def unique(examples: Sequence[Example], near: Near | None = NEAR, *, across: bool = True) -> Kept:
    """The examples without those whose response repeats that of an earlier one; the first stays.

    "duplicate" is equal but for case, punctuation and space, "near-duplicate" is what `near` says (None: not looked
    for). Short responses count together with their prompts, see `Near.short`. Repeats of an example of the other label
    are counted apart ("... of the other label"); `across=False` leaves them in.
    """
    everything = range(len(examples))
    groups = [[i for i in everything if examples[i].label == label] for label in (BENIGN, VIOLATING)]
    found: dict[int, tuple[str, int]] = {}
    for group in [list(everything)] if across else groups:
        found |= _repeats(examples, group, near)
    dropped = Counter(
        kind if examples[first].label == examples[index].label else f"{kind} of the other label"
        for index, (kind, first) in found.items()
    )
    return Kept([example for index, example in enumerate(examples) if index not in found], dict(dropped))


def split(
    examples: Sequence[Example],
    shares: tuple[float, float, float] = (0.8, 0.1, 0.1),
    *,
    seed: int = 0,
    near: Near | None = NEAR,
    guess: bool = True,
) -> dict[Split, list[Example]]:
    """Train, validation and test that share no prompt, no template and no near-duplicate prompt or response.

    Whatever shares one of these, directly or through others, goes to one split together; the largest groups are placed
    first, each where its labels are missed most, so that sizes and labels come near the shares. Same input and seed,
    same splits; each keeps the order of the examples.

    Args:
        shares: of train, validation and test, summing to 1; 0 leaves a split empty.
        near: what a near-duplicate is; None: only equal prompts and templates keep examples together.
        guess: prompts without a template get the one that `templates_of` finds, in the result as well.

    Raises:
        ArgumentError: the groups are too large: a split would be empty, have less than half of its share, or lack a
            label; the message names what joins the largest group.
    """
    if len(shares) != len(SPLITS) or min(shares) < 0 or not math.isclose(sum(shares), 1):
        raise ArgumentError(f"shares: got {shares!r}; expected three of at least 0 that sum to 1, as (0.8, 0.1, 0.1)")
    if guess:
        examples = _with_templates(examples)
    links = _links(examples, near)
    group = components(len(examples), [pair for pairs in links.values() for pair in pairs])
    place = _places(group, labels(examples), np.array(shares), seed)
    if lacking := _lacking(place, labels(examples), shares):
        raise ArgumentError(_too_large(examples, links, group, lacking))
    return {
        name: [example for example, at in zip(examples, place, strict=True) if at == number]
        for number, name in enumerate(SPLITS)
    }


def _reason(
    example: Example, success: float | None, coherence: float | None, limits: tuple[int, int] | None
) -> str | None:
    asked = {"success": success if example.label == VIOLATING else None, "coherence": coherence}
    for name, least in asked.items():
        score: float = getattr(example, name)
        if least is not None and not score >= least:
            return f"{name} missing" if math.isnan(score) else f"{name} too low"
    count = len(example.response.split())
    if limits is not None and not limits[0] <= count <= limits[1]:
        return "too short" if count < limits[0] else "too long"
    return None


def _repeats(examples: Sequence[Example], indices: Sequence[int], near: Near | None) -> dict[int, tuple[str, int]]:
    """{number of an example: (what it is, number of the one that it repeats)}."""
    told = {i: said(examples[i], near or NEAR) for i in indices}
    alike: dict[Hashable, list[int]] = {}
    for i in indices:
        alike.setdefault(told[i] if near is None else response_shingles(examples[i], near), []).append(i)
    members, gone = list(alike.values()), dict[int, int]()
    if near is not None:
        sets = [response_shingles(examples[those[0]], near) for those in members]
        gone = {later: earlier for earlier, later in similar(sets, near.threshold, first=True)}
    found = {}
    for number, those in enumerate(members):
        first = members[gone.get(number, number)][0]
        for i in those:
            if i != first:
                found[i] = ("duplicate" if told[i] == told[first] else "near-duplicate", first)
    return found


def _with_templates(examples: Sequence[Example]) -> list[Example]:
    unknown = [index for index, example in enumerate(examples) if not example.template]
    result = list(examples)
    for index, name in zip(unknown, templates_of([examples[index].prompt for index in unknown]), strict=True):
        result[index] = replace(examples[index], template=name)
    return result


def _links(examples: Sequence[Example], near: Near | None) -> dict[str, Pairs]:
    """Pairs of examples that must stay together, by what joins them."""
    prompts = [normal(example.prompt) for example in examples]
    links = {
        "equal prompts": _equal(prompts),
        "equal templates": _equal([example.template for example in examples]),
    }
    if near is not None:
        asked = [shingles(prompt, near.size) if prompt else None for prompt in prompts]
        links["near-duplicate prompts"] = linked(asked, near.threshold)
        answered = [response_shingles(example, near) for example in examples]
        links["near-duplicate responses"] = linked(answered, near.threshold)
    return links


def _equal(keys: Sequence[str]) -> Pairs:
    first: dict[str, int] = {}
    return [(first[key], i) for i, key in enumerate(keys) if key and first.setdefault(key, i) != i]


def _places(
    group: NDArray[np.int64], kinds: NDArray[np.int64], shares: NDArray[np.float64], seed: int
) -> NDArray[np.int64]:
    """Each example's split, [n]: the largest group first, where the squared distance to the shares grows least."""
    counts = np.zeros((int(group.max(initial=-1)) + 1, 2))
    np.add.at(counts, (group, kinds), 1)
    total = counts.sum(axis=0)
    target, now = np.outer(shares, total), np.zeros((len(shares), 2))
    order = np.random.default_rng(seed).permutation(len(counts))
    place = np.zeros(len(counts), np.int64)
    for index in order[np.argsort(-counts[order].sum(axis=1), kind="stable")]:
        growth = counts[index] * (counts[index] + 2 * (now - target)) / np.maximum(total, 1)
        place[index] = np.where(shares > 0, growth.sum(axis=1), np.inf).argmin()
        now[place[index]] += counts[index]
    return place[group]


def _lacking(place: NDArray[np.int64], kinds: NDArray[np.int64], shares: Sequence[float]) -> str:
    """What the first unusable split lacks, in words; "" if all can be used."""
    for number, (name, share) in enumerate(zip(SPLITS, shares, strict=True)):
        here = kinds[place == number]
        if share > 0 and (not len(here) or len(here) < share * len(kinds) / 2):
            return f"{name} would hold {len(here)} instead of about {share * len(kinds):.0f}"
        for label, word in ((BENIGN, "benign"), (VIOLATING, "violating")):
            if share * (kinds == label).sum() >= 1 and not (here == label).any():
                return f"{name} would hold no {word} example"
    return ""


def _too_large(examples: Sequence[Example], links: Mapping[str, Pairs], group: NDArray[np.int64], lacking: str) -> str:
    count = len(examples)
    sizes = np.bincount(group, minlength=1)
    largest = np.flatnonzero(group == sizes.argmax())
    said = f"examples: {count} cannot be split without a leak: {lacking}. "
    if sizes.max() < 2:
        return f"{said}Fix: give more examples, or a share of 0 to a split that is not needed"
    alone = {cause: np.bincount(components(count, pairs)[largest]).max() for cause, pairs in links.items()}
    cause = max(alone, key=lambda name: alone[name])
    shown = examples[int(largest[0])]
    text = shown.response if cause.endswith("responses") else shown.prompt
    return (
        f"{said}The largest of {len(sizes)} groups that must stay together has {sizes.max()}, of which {cause} join"
        f" {alone[cause]}, such as {text[:_SHOWN]!r}. Fix: {_FIXES[cause]}"
    )
