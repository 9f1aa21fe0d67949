"""From writers to a data set: write, filter, drop repeats, split, measure, export."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from steerwell.concepts import Concept
from steerwell.core.errors import ArgumentError
from steerwell.engines.base import Engine, made_by
from steerwell.runs.ledger import Ledger
from steerwell.scoring.embeddings import load_embedder
from steerwell.scoring.judges.base import Judge
from steerwell.scoring.quality import Quality, quality
from steerwell.synthesis.data import Split, keep, split, unique
from steerwell.synthesis.examples import VIOLATING, Example
from steerwell.synthesis.export import export
from steerwell.synthesis.near import NEAR, Near
from steerwell.synthesis.writers import Writer, write

Say = Callable[[str, int], Callable[[int], None]]
SET = "dataset"  # the exported folder, inside the run's


@dataclass(frozen=True)
class Filters:
    """What an example must be to stay.

    Attributes:
        success: least success of a violating example; a benign one may have `1 - success` at most. None: not asked.
        coherence: least coherence; None: not asked.
        words: fewest and most words of a response.
        near: what a near-duplicate is; None: only equal responses are repeats.
        shares: of train, validation and test.
    """

    success: float | None = 0.5
    coherence: float | None = 0.5
    words: tuple[int, int] = (3, 400)
    near: Near | None = NEAR
    shares: tuple[float, float, float] = (0.8, 0.1, 0.1)


@dataclass(frozen=True, eq=False)
class Made:
    """What was made.

    Attributes:
        folder: the exported data set.
        splits: its examples.
        written: how many texts there were before filtering.
        dropped: how many of them fell, by reason.
        quality: of the kept violating examples, by source.
    """

    folder: Path
    splits: Mapping[Split, Sequence[Example]]
    written: int
    dropped: Mapping[str, int]
    quality: Mapping[str, Quality]


@dataclass(frozen=True)
class Synthesis:
    """A data set to be made.

    Attributes:
        concept: what is violated.
        writers: who writes; violating and benign ones.
        count: texts of each writer.
        filters: what an example must be to stay.
        embedder: of the diversity measures.
        licence: of the data set, for its card.
    """

    concept: Concept
    writers: tuple[Writer, ...]
    count: int
    filters: Filters = Filters()
    embedder: str = "minilm"
    licence: str = ""

    def run(self, engine: Engine, judge: Judge | None, folder: Path, *, size: int = 64, say: Say) -> Made:
        """Do what is not done yet, and export. An interrupted run is resumed by running it again.

        Args:
            engine: the model.
            judge: scores the texts; None: then neither success nor coherence may be asked for.
            folder: where the ledger goes, and the data set in `dataset/`.
            size: texts per unit.
            say: called with what is being done and how many texts it takes; returns where progress goes.

        Raises:
            ArgumentError: filters that need a judge without one, the folder holds another run, nothing passes, or the
                splits cannot be made without a leak.
        """
        asked = [name for name in ("success", "coherence") if getattr(self.filters, name) is not None]
        if judge is None and asked:
            raise ArgumentError(f"{' and '.join(asked)}: asked for, but nobody judges; give a judge, or do not ask")
        with Ledger(folder / "ledger.sqlite", self._about(engine, judge, size)) as ledger:
            advance = say("texts", self.count * len(self.writers))
            texts = write(
                self.writers,
                self.count,
                engine=engine,
                concept=self.concept,
                judge=judge,
                ledger=ledger,
                size=size,
                progress=advance,
            )
        every = [example for found in texts for example in found]
        kept, dropped = self._kept(every)
        splits = split(kept, self.filters.shares, near=self.filters.near)
        measured = self._quality(kept)
        about = {
            "language": "en",
            "made": self._made(),
            "quality": _told(measured),
            "dropped": dropped,
        } | ({"licence": self.licence} if self.licence else {})
        title = f"{self.concept.title}: written by {Path(engine.info.name).name}"
        named: dict[str, Sequence[Example]] = dict(splits.items())
        place = export(named, folder / SET, title=title, about=about, near=self.filters.near)
        return Made(place, splits, len(every), dropped, measured)

    def _about(self, engine: Engine, judge: Judge | None, size: int) -> dict[str, Any]:
        writers = [
            {
                "name": item.name,
                "source": item.source,
                "label": item.label,
                "edit": item.edit.id if item.edit else None,
                "sampling": asdict(item.sampling),
                "prompts": [asdict(prompt) for prompt in item.prompts],
            }
            for item in self.writers
        ]
        return {
            "what": "data set",
            "concept": self.concept.hash,
            "judge": judge.name if judge else None,
            "writers": writers,
            "texts": self.count,
            "texts per unit": size,
        } | made_by(engine)

    def _kept(self, examples: Sequence[Example]) -> tuple[list[Example], dict[str, int]]:
        filters, dropped = self.filters, Counter[str]()
        passed = keep(examples, success=filters.success, coherence=filters.coherence, words=filters.words)
        most = None if filters.success is None else 1 - filters.success
        honest = [
            example
            for example in passed.examples
            if most is None or example.label == VIOLATING or example.success <= most
        ]
        fresh = unique(honest, filters.near)
        for part in (passed.dropped, {"benign, yet violating": len(passed.examples) - len(honest)}, fresh.dropped):
            dropped.update({reason: count for reason, count in part.items() if count})
        if not fresh.examples:
            raise ArgumentError(
                f"filters: none of {len(examples)} texts passes ({dict(dropped)}); steer harder, or ask for less"
            )
        return fresh.examples, dict(dropped)

    def _quality(self, kept: Sequence[Example]) -> dict[str, Quality]:
        """Of the violating examples of every source, all at the same number of texts."""
        groups: dict[str, list[Example]] = {}
        for example in kept:
            if example.label == VIOLATING:
                groups.setdefault(example.source, []).append(example)
        embed, size = load_embedder(self.embedder), min(map(len, groups.values()), default=0)
        return {
            source: quality(
                [example.response for example in found],
                success=[example.success for example in found],
                coherence=[example.coherence for example in found],
                embeddings=embed,
                prompts=[example.prompt for example in found],
                size=size,
            )
            for source, found in groups.items()
        }

    def _made(self) -> dict[str, object]:
        drawn = {f"temperature {item.sampling.temperature:g}, top-p {item.sampling.top_p:g}" for item in self.writers}
        filters = self.filters
        return {
            "texts per writer": self.count,
            "sampling": "; ".join(sorted(drawn)),
            "first seed": min(item.sampling.seed for item in self.writers),
            "least success": "not asked" if filters.success is None else filters.success,
            "least coherence": "not asked" if filters.coherence is None else filters.coherence,
            "words": f"{filters.words[0]} to {filters.words[1]}",
        }


def _told(measured: Mapping[str, Quality]) -> dict[str, str]:
    """Quality figures for a card."""
    names = ("hm3", "success", "coherence", "diversity", "mattr", "vendi")
    return {
        f"{source}, violating, {found.n} texts": ", ".join(f"{name} {found.figures()[name]:.3f}" for name in names)
        for source, found in measured.items()
    }
