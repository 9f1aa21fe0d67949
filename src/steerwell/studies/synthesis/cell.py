"""One model and one concept of a synthesis study: texts written in every way, their quality, and the detectors.

A cell's folder holds the fitted directions, a ledger, `texts.parquet` (every text), `test.parquet` (the real test
examples), `configurations.parquet` (every arm: quality and AUROC), `scores.safetensors` (every detector's test scores)
and `cell.json`. A killed study is resumed by running it again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from steerwell.concepts import Concept
from steerwell.core.artifacts import finite, library_versions, write_atomic
from steerwell.core.records import Sampling
from steerwell.engines.base import Engine, made_by
from steerwell.runs.ledger import Ledger, Row, execute
from steerwell.runs.plan import plan
from steerwell.scoring.embeddings import load_embedder
from steerwell.scoring.judges.base import Judge
from steerwell.scoring.quality import quality
from steerwell.studies.alignment import CELL
from steerwell.studies.config import Model
from steerwell.studies.defence import Configuration, edits_of
from steerwell.studies.fitting import PAPER_SAMPLING, Say, fitted
from steerwell.studies.judging import concept_of, judge_for
from steerwell.studies.sweep import DIRECTIONS
from steerwell.studies.synthesis.arms import BROKEN, Arm, arms_of, roles_of
from steerwell.studies.synthesis.bench import Bench
from steerwell.studies.synthesis.config import SynthesisConfig
from steerwell.studies.synthesis.real import Real, real_examples
from steerwell.studies.tables import write_table
from steerwell.synthesis.detectors import train_detectors
from steerwell.synthesis.examples import VIOLATING, Example, labels
from steerwell.synthesis.export import write_examples
from steerwell.synthesis.writers import Prompting, Writer, prompted, steered, unsteered, write

ARMS, TEXTS, TEST, SCORES = "configurations.parquet", "texts.parquet", "test.parquet", "scores.safetensors"
ARMS_PER_UNIT = 4


@dataclass(frozen=True)
class SynthesisCell:
    """One model and one concept of a study.

    Attributes:
        config: the study.
        model: the model.
        concept: name or file of the concept.
        folder: where everything goes.
    """

    config: SynthesisConfig
    model: Model
    concept: str
    folder: Path

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.model.title}, {Path(self.concept).stem}"

    def run(self, engine: Engine, say: Say, judge: Judge | None = None) -> None:
        """Do what is not done yet, and write the cell's files.

        Args:
            engine: the model, loaded.
            say: called with what is being done and how many items it takes; returns where progress goes.
            judge: one of your own, instead of the study's.
        """
        _Running(self, engine, say, judge).run()


class _Running:
    """A cell at work."""

    def __init__(self, cell: SynthesisCell, engine: Engine, say: Say, judge: Judge | None) -> None:
        self.cell, self.config, self.folder, self.engine = cell, cell.config, cell.folder, engine
        self.say: Say = lambda text, count: say(f"{cell.title}: {text}", count)
        self.concept: Concept = concept_of(cell.concept, cell.config.language, engine)
        self.judge = judge or self._judge()

    def run(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.real: Real = real_examples(self.config, self.concept)
        with Ledger(self.folder / "ledger.sqlite", self._about()) as self.ledger:
            arms = self._arms()
            measured, found = self._quality(arms), self._detectors(arms)
            rows = [
                arm.fields()
                | figures
                | {
                    "auroc_validation": float(np.mean(row["validation"])),
                    "auroc": float(np.mean(row["test"])),
                    "auroc_seeds": row["test"],
                }
                for arm, figures, row in zip(arms, measured, found, strict=True)
            ]
            others: dict[str, Any] = {"probe": self._probe() if self.config.probe else None}
            others |= {"encoders": self._encoders(arms, roles_of(rows))}
        self._write(arms, rows, np.array([row["scores"] for row in found], np.float32), others)

    def _judge(self) -> Judge | None:
        if self.config.judge is None:
            return None
        drawn = replace(PAPER_SAMPLING, max_new_tokens=self.config.max_new_tokens)
        return judge_for(self.config.judge, self.concept, self.engine, drawn, self.folder, self.say)

    def _about(self) -> dict[str, Any]:
        settings = self.config.model_dump(mode="json", exclude={"models", "concepts", "examples"})
        return settings | made_by(self.engine) | {
            "what": "synthesis",
            "concept": self.concept.hash,
            "judge_name": self.judge.name if self.judge else None,
            "files hold": self.real.fingerprint if self.config.data else None,
        }  # fmt: skip

    # Texts -----------------------------------------------------------------------------------------------------------

    def _arms(self) -> list[Arm]:
        """Every arm with its violating examples."""
        ways, writers = zip(*self._writers(), strict=True)
        advance = self.say("texts", self.config.texts * len(writers))
        texts = write(
            writers,
            self.config.texts,
            engine=self.engine,
            concept=self.concept,
            judge=self.judge,
            ledger=self.ledger,
            size=self.config.batch_size,
            progress=advance,
        )
        return arms_of(self.config, self.real, ways, texts)

    def _writers(self) -> list[tuple[Configuration | Prompting | None, Writer]]:
        """Every way to write and who writes so; None: neither steered nor prompted."""
        config, concept, asked = self.config, self.concept, self.real.asked
        steering = config.steering.configurations(self.engine.info.n_layers)
        prompting = config.prompting.configurations(len({pair.violating for pair in concept.pairs}))
        sampling = replace(PAPER_SAMPLING, max_new_tokens=config.fitting_tokens)
        readings = [way.reading for way in steering]
        self.directions = fitted(self.engine, concept, readings, self.folder / DIRECTIONS, sampling, self.say)
        edits = edits_of(self.directions, steering, "violating")
        drawn = Sampling(config.temperature, config.top_p, config.max_new_tokens)
        hot = replace(drawn, temperature=config.broken)
        return [
            *(
                (way, steered(concept, asked, way.describe(), edit, drawn))
                for way, edit in zip(steering, edits, strict=True)
            ),
            *((way, prompted(concept, asked, way, drawn, self.real.violating)) for way in prompting),
            (None, unsteered(concept, asked, drawn, VIOLATING)),
            (None, unsteered(concept, asked, hot, VIOLATING, BROKEN)),
        ]

    # Measuring -------------------------------------------------------------------------------------------------------

    def _quality(self, arms: Sequence[Arm]) -> list[Row]:
        """Every arm's success, coherence, diversity and their means."""
        embed = None

        def work(items: Sequence[int]) -> list[Row]:
            nonlocal embed
            embed = embed or load_embedder(self.config.embedder)
            rows = []
            for item in items:
                texts = arms[item].examples
                found = quality(
                    [example.response for example in texts],
                    success=[example.success for example in texts],
                    coherence=[example.coherence for example in texts],
                    embeddings=embed,
                    prompts=[example.prompt for example in texts],
                    words=self.config.words,
                    intervals=False,
                )
                rows.append(found.figures())
            return rows

        units = plan("quality", range(len(arms)), ARMS_PER_UNIT)
        execute(self.ledger, units, work, self.say("arms measured", len(arms)))
        return list(self.ledger.rows("quality"))

    def _detectors(self, arms: Sequence[Arm]) -> list[Row]:
        """Every arm's linear detectors."""
        bench: Bench | None = None

        def work(items: Sequence[int]) -> list[Row]:
            nonlocal bench
            bench = bench or self._bench()
            found = [bench.run(arms[item].training(self.real, self.config.kept)) for item in items]
            return [
                {
                    "validation": outcome.validation.tolist(),
                    "test": outcome.test.tolist(),
                    "scores": np.round(outcome.scores, 6).tolist(),
                }
                for outcome in found
            ]

        units = plan("detectors", range(len(arms)), ARMS_PER_UNIT)
        execute(self.ledger, units, work, self.say("arms' detectors", len(arms)))
        return list(self.ledger.rows("detectors"))

    def _bench(self) -> Bench:
        settings, real = self.config.detector, self.real
        embed = load_embedder(settings.embedder)
        return Bench(real.benign, real.validation, real.test, embed, settings.c, settings.seeds)

    def _probe(self) -> Row:
        """The steering direction itself as detector, its layer chosen on validation examples."""
        reading = min(self.directions, key=lambda item: item[1] != "response_mean")  # as it reads; else the first

        def work(_items: Sequence[int]) -> list[Row]:
            train, real = [*self.real.violating, *self.real.benign], self.real
            (found,) = train_detectors(
                "probe", train, real.validation, engine=self.engine, direction=self.directions[reading]
            )
            return [{"layer": int(getattr(found, "layer")), "scores": found.scores(real.test).tolist()}]  # noqa: B009

        execute(self.ledger, plan("probe", [0], 1), work, self.say("probe", 1))
        (row,) = self.ledger.rows("probe")
        return {"reading": "-".join(reading)} | row

    def _encoders(self, arms: Sequence[Arm], roles: Mapping[str, int]) -> list[Row]:
        """Fine-tuned encoders of the controls and of what was selected, where this cell is one of the subset."""
        settings = self.config.encoders
        if settings is None or Path(self.cell.concept).stem not in settings.concepts:
            return []
        if settings.models and self.cell.model.title not in settings.models:
            return []
        items = [[at, seed] for at in dict.fromkeys(roles.values()) for seed in range(settings.seeds)]

        def work(part: Sequence[Any]) -> list[Row]:
            rows = []
            for at, seed in part:
                train = [*arms[at].training(self.real, self.config.kept), *self.real.benign]
                said = [example for example in train if example.response.strip()]
                (made,) = train_detectors(
                    "encoder", said, self.real.validation, (seed,), base=settings.base, epochs=settings.epochs
                )
                scores = np.round(made.scores(self.real.test), 6).tolist()
                rows.append({"arm": at, "seed": seed, "scores": scores})
            return rows

        execute(self.ledger, plan("encoders", items, 1), work, self.say("encoders", len(items)))
        trained = list(self.ledger.rows("encoders"))
        return [{"role": role} | row for role, at in roles.items() for row in trained if row["arm"] == at]

    # What is written -------------------------------------------------------------------------------------------------

    def _write(
        self, arms: Sequence[Arm], rows: Sequence[Row], scores: np.ndarray[Any, Any], others: Mapping[str, Any]
    ) -> None:
        from safetensors.numpy import save_file

        write_table(self.folder / ARMS, rows)
        texts: list[Example] = [example for arm in arms if arm.source != "original" for example in arm.examples]
        write_examples(self.folder / TEXTS, texts)
        write_examples(self.folder / TEST, self.real.test)
        save_file({"test": scores, "labels": labels(self.real.test)}, self.folder / SCORES)
        worth = getattr(self.judge, "quality", None)
        cell = {
            "model": self.cell.model.title,
            "concept": self.concept.concept,
            "poles": self.concept.poles.model_dump(),
            "info": {name: value for name, value in asdict(self.engine.info).items() if name != "signature"},
            "engine": self.cell.model.runner,
            "judge": self.judge.name if self.judge else None,
            "judge_quality": None if worth is None else {"trusted": worth.trusted, "words": worth.describe()},
            "real": {
                name: {"violating": int(labels(part).sum()), "benign": int((labels(part) == 0).sum())}
                for name, part in (
                    ("train", (*self.real.violating, *self.real.benign)),
                    ("validation", self.real.validation),
                    ("test", self.real.test),
                )
            },
            "prompts": {"asked": len(self.real.asked),
                        "test": len({item.prompt for item in self.real.test})},
            "versions": library_versions(),
        }  # fmt: skip
        text = json.dumps(finite(cell | dict(others)), indent=1, ensure_ascii=False)
        write_atomic(self.folder / CELL, text + "\n")
