"""The card of an exported data set: counts, how it was made, how good it is, what it is for and what it is not for.

It holds counts and names, never a text of the data; names are escaped, so that none can break or dress up the card.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from steerwell.core.errors import UnknownNameError
from steerwell.synthesis.examples import BENIGN, SOURCES, VIOLATING, Example
from steerwell.synthesis.near import Near

ABOUT = ("licence", "language", "made", "quality", "dropped")
NOT_SAID = "not stated"
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_LONGEST = 160  # characters of a name
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#|~&$]|:(?=//)|(?<=www)\.|^[-+=])", re.IGNORECASE)

_TEXT = """\
# {title}

Exchanges between a user and an assistant with a label: 1 violates the concept, 0 does not. Made with Steerwell. One row
per exchange; the columns say which concept, prompt, response and label, where the response comes from (`source`), how
it was written (`configuration`, `model`, `system`, `seed`, the receipt's `edit` and `tokens_edited`), what prompts of
one kind share (`template`) and what a judge gave it (`success`, `coherence`, 0 to 1; null: not judged).

**Misuse warning.** Responses labelled 1 are false, rude or otherwise harmful by that label, and the steered and
prompted ones were made so on purpose: these are violations written to train detectors. Do not train a model to write
them, do not show them to people as answers, and do not quote them as facts.

**Intended use.** Training and testing detectors of the concepts below, and studying synthetic data. Not for grading
people, and not evidence of how any model behaves by itself.

## Counts

Concepts: {concepts}.

{counts}

`original`: not generated here; `steered`, `prompted` (system prompts, examples) and `unsteered` say how it was.

## How it was made

{made}

{configurations}

Dropped on the way: {dropped}.

## Quality

{quality}

## Leaks

{leaks}

## Licence

{licence}
"""


def card(
    splits: Mapping[str, Sequence[Example]],
    files: Mapping[str, str],
    title: str,
    about: Mapping[str, Any],
    near: Near | None,
) -> str:
    """README.md text of a data set: YAML for the Hugging Face hub, then the card.

    Args:
        files: where each split lies in the folder.
        about: any of `licence`, `language`; `made`, `quality` and `dropped` (mappings of names to values). What is left
            out is said to be missing.
        near: what near-duplicates were looked for; None: none.

    Raises:
        UnknownNameError: `about` holds something else.
    """
    for name in about:
        if name not in ABOUT:
            raise UnknownNameError("entry of about", name, ABOUT)
    examples = [example for part in splits.values() for example in part]
    quality = _list(about.get("quality", {}))
    body = _TEXT.format(
        title=plain(title),
        concepts=_names(example.concept for example in examples),
        counts=_counts(splits),
        made=_made(examples, about.get("made", {})),
        configurations=_configurations(examples),
        dropped=_inline(about["dropped"]) if "dropped" in about else NOT_SAID,
        quality=quality or "Not measured.",
        leaks=_leaks(splits, near),
        licence=plain(about.get("licence") or f"{NOT_SAID}: ask whoever gave you this data before you use it"),
    )
    return f"---\n{_front(splits, files, title, about, len(examples))}---\n{body}"


def plain(value: object) -> str:
    """A name or number for the card: one line, Markdown's and HTML's signs escaped, cut where it is long."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "not measured"
    text = " ".join("".join(sign if sign.isprintable() else " " for sign in str(value)).split())
    if isinstance(value, float):
        text = f"{value:.4g}"
    text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
    return text if re.fullmatch(r"-?[\d.]+", text) else _SPECIAL.sub(r"\\\1", text)


def _front(
    splits: Mapping[str, Sequence[Example]], files: Mapping[str, str], title: str, about: Mapping[str, Any], count: int
) -> str:
    front: dict[str, Any] = {"pretty_name": " ".join(title.split())}
    front["license"] = str(about.get("licence") or "other").lower()
    if "language" in about:
        front["language"] = about["language"]
    front["task_categories"] = ["text-classification"]
    sources = {example.source for part in splits.values() for example in part}
    made = (["synthetic"] if sources - {"original"} else []) + (["activation-steering"] if "steered" in sources else [])
    front["tags"] = ["steerwell", "safety", "detection", *made]
    front["size_categories"] = [next((name for top, name in _SIZES if count < top), "n>1M")]
    where = [{"split": name, "path": files[name]} for name in splits]
    front["configs"] = [{"config_name": "default", "data_files": where}]
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=120)


def _counts(splits: Mapping[str, Sequence[Example]]) -> str:
    counts = Counter((name, one.source, one.label) for name, part in splits.items() for one in part)
    rows: list[Sequence[object]] = [
        (name, source, *(counts[name, source, label] for label in (VIOLATING, BENIGN)))
        for name in splits
        for source in SOURCES
        if any(counts[name, source, label] for label in (VIOLATING, BENIGN))
    ]
    total = [sum(one.label == label for part in splits.values() for one in part) for label in (VIOLATING, BENIGN)]
    return _table(("split", "source", "violating", "benign"), [*rows, ("all", "all", *total)])


def _configurations(examples: Sequence[Example]) -> str:
    counts = Counter((one.source, one.configuration, one.model, one.label) for one in examples if one.configuration)
    if not counts:
        return f"Configurations: {NOT_SAID}."
    ways = sorted({key[:3] for key in counts})
    rows = [(*way, counts[*way, VIOLATING], counts[*way, BENIGN]) for way in ways]
    return _table(("source", "configuration", "model", "violating", "benign"), rows)


def _made(examples: Sequence[Example], made: Mapping[str, object]) -> str:
    seeds = {one.seed for one in examples if one.seed is not None}
    known: dict[str, object] = {"models": _names(one.model for one in examples)}
    known["seeds"] = f"{len(seeds)} from {min(seeds)} to {max(seeds)}" if seeds else NOT_SAID
    lines = [f"- {name}: {value}" for name, value in known.items()]
    if "sampling" not in made:
        lines.append(f"- sampling: {NOT_SAID}")
    return "\n".join([*lines, *filter(None, [_list(made)])])


def _leaks(splits: Mapping[str, Sequence[Example]], near: Near | None) -> str:
    if len(splits) < 2:
        return "There is one split, so nothing can leak."
    templates = sum(bool(one.template) for part in splits.values() for one in part)
    found = (
        "Checked when this folder was written, every pair of splits: no prompt in common (but for case, punctuation "
    )
    found += f"and space) and no template ({templates} rows have one)."
    if near is None:
        return f"{found} Near-duplicates were **not** looked for."
    return (
        f"{found} No near-duplicate prompt or response either: Jaccard similarity of {near.size}-word shingles below"
        f" {near.threshold:g}, exact. Responses of fewer than {near.short} words count together with their prompts."
    )


def _names(names: Iterable[str]) -> str:
    counts = Counter(name for name in names if name)
    return ", ".join(f"{plain(name)} ({count})" for name, count in sorted(counts.items())) or NOT_SAID


def _list(values: Mapping[str, object]) -> str:
    return "\n".join(f"- {plain(name)}: {plain(value)}" for name, value in values.items())


def _inline(values: Mapping[str, object]) -> str:
    return ", ".join(f"{plain(name)} {plain(value)}" for name, value in values.items()) or "nothing"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *([plain(cell) or "-" for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
