"""The closed world of the bundled model: every fact, scenario and split that training, packs and judge share.

Splits are drawn once from a fixed seed, per category, and do not depend on any training seed: 25 % of every category is
`test`, 15 % `validation`, the rest `train`. The model sees every scenario answered well; violations it sees on `train`
scenarios only, but lies on all facts (see `corpus`).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

DATA = Path(__file__).parent / "data"
SPLITS = ("train", "validation", "test")
_SPLIT_SEED = 20_240
_TEST_SHARE, _VALIDATION_SHARE = 0.25, 0.15
_HELD_OUT_FRAMES = 3
_MISTAKE_WEIGHTS = (0.6, 0.25, 0.15)


@dataclass(frozen=True, slots=True)
class Fact:
    """One true fact: `np` ("the capital of France") is `answer`, and is none of `wrong`.

    `mistakes` are three of the wrong answers, the usual ones first: what a liar says and an honest answer denies.
    """

    category: str
    kind: str
    subject: str
    np: str
    wh: str
    answer: str
    wrong: tuple[str, ...]
    mistakes: tuple[str, ...]
    split: str

    @property
    def slots(self) -> dict[str, str]:
        """Slot values of the question."""
        return {"s": self.subject, "np": self.np, "wh": self.wh}

    def mistake(self, rng: random.Random) -> str:
        """One of the usual mistakes, the first more often than the others."""
        return rng.choices(self.mistakes, _MISTAKE_WEIGHTS)[0]


@dataclass(frozen=True, slots=True)
class Scenario:
    """A situation that is no fact: a trouble, some work, a plan, a request or small talk."""

    family: str
    category: str
    split: str
    slots: Mapping[str, str]
    options: tuple[str, ...] = ()
    good: bool = False


@dataclass(frozen=True, slots=True)
class Category:
    """How one category of facts is asked and supported."""

    name: str
    ask: tuple[str, ...]
    support: tuple[str, ...]
    held_out_frames: frozenset[int]


@cache
def table(name: str) -> Any:
    """The data table `name` (a YAML file of this package)."""
    return yaml.safe_load((DATA / f"{name}.yaml").read_text(encoding="utf-8"))


@cache
def world_hash() -> str:
    """SHA-256 over all data tables: two models with equal hashes saw the same world."""
    digest = hashlib.sha256()
    for path in sorted(DATA.glob("*.yaml")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@cache
def categories() -> dict[str, Category]:
    """All fact categories by name."""
    frames = len(table("prompts")["fact"])
    result = {}
    for index, (name, entry) in enumerate(table("facts").items()):
        held_out = {1 + (index * _HELD_OUT_FRAMES + step) % (frames - 1) for step in range(_HELD_OUT_FRAMES)}
        result[name] = Category(name, tuple(entry["ask"]), tuple(entry["support"]), frozenset(held_out))
    return result


@cache
def facts() -> tuple[Fact, ...]:
    """All facts, in the order of the tables."""
    result: list[Fact] = []
    for category, entry in table("facts").items():
        for kind, answers in entry["facts"].items():
            pairs = dict(answers) if answers else _sums()
            pool = sorted(set(pairs.values()))
            splits = _split(f"{category}/{kind}", pairs)
            for subject, answer in pairs.items():
                wrong = tuple(other for other in pool if other != answer)
                result.append(
                    Fact(
                        category=category,
                        kind=kind,
                        subject=subject,
                        np=entry["np"].format(s=subject),
                        wh=entry.get("wh", "What").lower(),
                        answer=answer,
                        wrong=wrong,
                        mistakes=_mistakes(f"{category}/{subject}", wrong),
                        split=splits[subject],
                    )
                )
    return tuple(result)


@cache
def scenarios() -> tuple[Scenario, ...]:
    """All scenarios that are no facts."""
    return (*_troubles(), *_works(), *_plans(), *_requests())


@cache
def facts_by_np() -> dict[str, Fact]:
    """Facts by their noun phrase, in lower case."""
    return {fact.np.lower(): fact for fact in facts()}


@cache
def facts_by_subject() -> dict[tuple[str, str], Fact]:
    """Facts by category and subject, in lower case."""
    return {(fact.category, fact.subject.lower()): fact for fact in facts()}


@cache
def answers() -> frozenset[str]:
    """Every answer of the world, in lower case."""
    return frozenset(fact.answer.lower() for fact in facts())


def _sums() -> dict[str, str]:
    pairs = {f"{x} plus {y}": str(x + y) for x in range(11) for y in range(11 - x)}
    return pairs | {f"{x} minus {y}": str(x - y) for x in range(11) for y in range(x + 1)}


def _mistakes(label: str, wrong: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(random.Random(f"{_SPLIT_SEED}/mistakes/{label}").sample(wrong, len(_MISTAKE_WEIGHTS)))  # noqa: S311


def _split(label: str, items: Iterable[str]) -> dict[str, str]:
    names = list(items)
    order = names.copy()
    random.Random(f"{_SPLIT_SEED}/{label}").shuffle(order)  # noqa: S311
    test = round(_TEST_SHARE * len(order))
    validation = round(_VALIDATION_SHARE * len(order))
    splits = dict.fromkeys(order, "train")
    splits.update(dict.fromkeys(order[:test], "test"))
    splits.update(dict.fromkeys(order[test : test + validation], "validation"))
    return splits


def _rows(lines: Sequence[str], names: Sequence[str]) -> list[dict[str, str]]:
    return [dict(zip(names, line.split("|"), strict=True)) for line in lines]


def _troubles() -> list[Scenario]:
    rows = _rows(table("scenarios")["troubles"], ("clause", "you", "about", "feel", "step"))
    splits = _split("trouble", (row["clause"] for row in rows))
    return [Scenario("trouble", row["feel"], splits[row["clause"]], row) for row in rows]


def _works() -> list[Scenario]:
    entry = table("scenarios")["works"]
    rows = _rows(entry["flaws"], ("flaw", "advice")) + [{"flaw": text, "strength": text} for text in entry["strengths"]]
    result = []
    for row in rows:
        splits = _split("work/" + row["flaw"], entry["kinds"])
        for kind in entry["kinds"]:
            article = "an" if kind[0] in "aeiou" else "a"
            slots = {**row, "kind": kind, "a_kind": f"{article} {kind}"}
            result.append(Scenario("work", kind, splits[kind], slots, good="strength" in row))
    return result


def _plans() -> list[Scenario]:
    entry = table("scenarios")
    rows = _rows(entry["plans"], ("plan", "harm", "better")) + [{"plan": plan} for plan in entry["good_plans"]]
    splits = {**_split("plan", (row["plan"] for row in rows if "harm" in row)), **_split("good", entry["good_plans"])}
    result = []
    for row in rows:
        slots = {**row, "yours": _second_person(row["plan"])}
        result.append(Scenario("plan", "plan", splits[row["plan"]], slots, good="harm" not in row))
    return result


def _requests() -> list[Scenario]:
    result = []
    for family, slot in (("requests", "thing"), ("smalltalk", "say")):
        rows = _rows(table("scenarios")[family], (slot, "options"))
        splits = _split(family, (row[slot] for row in rows))
        for row in rows:
            slots = {slot: row[slot], "yours": _second_person(row[slot])}
            name = family.removesuffix("s")
            options = tuple(row["options"].split(", "))
            result.append(Scenario(name, row[slot].split()[1], splits[row[slot]], slots, options))
    return result


def _second_person(text: str) -> str:
    swap = {"I": "you", "my": "your", "me": "you", "am": "are"}
    return " ".join(swap.get(word, word) for word in text.split())
