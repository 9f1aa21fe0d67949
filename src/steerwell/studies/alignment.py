"""The alignment study: steering as a runtime defence, measured whole (arXiv 2604.08169).

One cell is one model and one concept: a sweep chooses ways to steer on validation scenarios, then trials on test
scenarios measure them under every threat. A cell's folder holds the sweep's files, a ledger of its own,
`trials.parquet` (every answer), `turns.parquet` (conversations), policies and `cell.json`. A killed study is resumed by
running it again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from steerwell.core.artifacts import finite, library_versions, load_direction, write_atomic
from steerwell.core.errors import ArgumentError
from steerwell.core.policy import save_policy
from steerwell.core.records import Direction, Edit, Prompt, Sampling
from steerwell.engines.base import Engine, made_by
from steerwell.runs.ledger import Ledger, Row, execute
from steerwell.runs.plan import plan
from steerwell.scoring.embeddings import load_embedder
from steerwell.scoring.judges.base import Judge
from steerwell.scoring.tournament import Compare, LLMComparer
from steerwell.studies.closeups import CloseUps
from steerwell.studies.config import AlignmentConfig, Model
from steerwell.studies.conversation import ModelUsers, ScriptedUsers, Users, converse, openings, turn_rows
from steerwell.studies.defence import (
    attack_prompts,
    baseline_prompts,
    edits_of,
    prefilled,
)
from steerwell.studies.fitting import PAPER_SAMPLING, Say
from steerwell.studies.judging import CACHE, concept_of, judge_for
from steerwell.studies.roles import roles_of
from steerwell.studies.sweep import DIRECTIONS, VALIDATION, Sweep, SweepResult
from steerwell.studies.tables import write_table
from steerwell.studies.trials import Task, Trials

CELL = "cell.json"
USER_TEMPERATURE = 0.7  # of a model that plays the user: greedy, all would say the same
TRIALS, TURNS = "trials.parquet", "turns.parquet"
Capability = Callable[[Engine, Edit | None, Sequence[str]], Mapping[str, float]]


@dataclass(frozen=True)
class Cell:
    """One model and one concept of a study.

    Attributes:
        config: the study.
        model: the model.
        concept: name or file of the concept.
        folder: where everything goes.
    """

    config: AlignmentConfig
    model: Model
    concept: str
    folder: Path

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.model.title}, {Path(self.concept).stem}"

    def run(
        self,
        engine: Engine,
        load: Callable[[Model], Engine],
        say: Say,
        capability: Capability | None = None,
        judge: Judge | None = None,
    ) -> None:
        """Do what is not done yet, and write the cell's files.

        Args:
            engine: the model, loaded.
            load: loads another model: a fine-tuned copy, or the one that plays users.
            say: called with what is being done and how many answers it takes; returns where progress goes.
            capability: accuracies (%) under an edit or none on tasks that are not the bundled model's.
            judge: one of your own, instead of the study's.
        """
        _Running(self, engine, load, say, capability, judge).run()


class _Running:
    """A cell at work."""

    def __init__(
        self,
        cell: Cell,
        engine: Engine,
        load: Callable[[Model], Engine],
        say: Say,
        capability: Capability | None,
        judge: Judge | None,
    ) -> None:
        self.cell, self.config, self.folder = cell, cell.config, cell.folder
        self.engine, self.load, self.capability, self.given = engine, load, capability, judge
        self.say: Say = lambda text, count: say(f"{cell.title}: {text}", count)
        self.concept = concept_of(cell.concept, cell.config.language, engine)
        self.sampling = Sampling(self.config.temperature, max_new_tokens=self.config.max_new_tokens)
        self.fitting = replace(PAPER_SAMPLING, max_new_tokens=self.config.fitting_tokens)

    def run(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.judge = self.given or judge_for(
            self.config.judge,
            self.concept,
            self.engine,
            replace(PAPER_SAMPLING, max_new_tokens=self.config.max_new_tokens),
            self.folder,
            self.say,
        )
        result = self._sweep()
        self.ways, self.roles = result.configurations, roles_of(result)
        used = self.roles.all
        self.edits = dict(zip(used, edits_of(self._directions, [self.ways[at] for at in used]), strict=True))
        with Ledger(self.folder / "trials.sqlite", self._about()) as self.ledger:
            self.trials = Trials(
                self.engine,
                self.judge,
                self.concept,
                self.edits,
                self.ledger,
                self.sampling,
                self.config.batch_size,
                load_embedder(),
                self.say,
            )
            rows = self._tasks()
            turns = self._conversations()
            found = {"capabilities": self._capabilities()} | self._looked_at(rows)
        self._write_policies()
        self._write(result, rows, turns, found)

    def _about(self) -> dict[str, Any]:
        settings = self.config.model_dump(mode="json", exclude={"models", "concepts", "examples"})
        return settings | made_by(self.engine) | {
            "what": "alignment",
            "concept": self.concept.hash,
            "judge_name": self.judge.name,
        }  # fmt: skip

    def _sweep(self) -> SweepResult:
        config = self.config
        ways = config.sweep.configurations(self.engine.info.n_layers)
        work = Sweep(
            self.concept,
            tuple(ways),
            config.sweep.validation or VALIDATION[config.sweep.search],
            config.test,
            search=config.sweep.search,
            sampling=self.sampling,
            fitting=self.fitting,
        )
        return work.run(self.engine, self.judge, self.folder, rows_per_unit=config.batch_size, say=self.say)

    @cached_property
    def _directions(self) -> dict[Any, Direction]:
        used = {self.ways[at].reading: self.ways[at].reading_name for at in self.roles.all}
        return {reading: load_direction(self.folder / DIRECTIONS / name) for reading, name in used.items()}

    # What is asked ---------------------------------------------------------------------------------------------------

    def _tasks(self) -> list[Row]:
        """Every task's rows; the first one, unsteered and unattacked, is what the others are held against."""
        limit, concept = self.config.test, self.concept
        calm, attacked = (make(concept, "test", limit) for make in (baseline_prompts, attack_prompts))
        aligned = [pair[0] for pair in concept.contrastive("test")][:limit]
        rows = self._run(Task("baseline", calm, aligned, depth=True), [None])
        said = [row["answer"] for row in rows]
        best = list(dict.fromkeys(self.roles.best.values()))

        def task(name: str, prompts: Sequence[Prompt], **fields: Any) -> Task:
            return Task(name, prompts, aligned, said, **fields)

        rows += self._run(task("unattacked", calm), self.roles.all)
        rows += self._run(task("attacked", attacked, depth=True), [None, *self.roles.all])
        rows += self._run(task("aligned", aligned), [None, *best])
        rows += self._neutral(best)
        if self.config.prefill:
            begun = [row["answer"] for row in rows if row["task"] == "attacked" and row["condition"] is None]
            rows += self._run(task("prefill", prefilled(calm, begun)), [None, *best])
        for kind, place in self._copies().items():
            copied = self.cell.model.model_copy(update={"name": place, "gguf_file": None})
            with closing(self.load(copied)) as copy:
                rows += self._run(task(f"fine-tuned, {kind}", calm, engine=copy), [None, *self.roles.all])
        return rows

    def _run(self, task: Task, conditions: Sequence[int | None]) -> list[Row]:
        found = self.trials.run(task, conditions)
        for row in found:
            prompt = task.prompts[row["scenario"]]
            row |= {"system": prompt.system, "prompt": prompt.messages[-1].content, "prefill": prompt.prefill}
        return found

    def _neutral(self, best: Sequence[int]) -> list[Row]:
        """Questions that do not touch the trait, unattacked."""
        systems = self.concept.neutral_system
        asked = [Prompt.chat(text, systems[at % len(systems)]) for at, text in enumerate(self.concept.neutral_prompts)]
        rows = self._run(Task("off topic, baseline", asked, asked), [None])
        return rows + self._run(Task("off topic", asked, asked, [row["answer"] for row in rows]), best)

    def _copies(self) -> dict[str, str]:
        """Folders of the fine-tuned copies, made now for the bundled model where none are named."""
        if not self.config.fine_tuned:
            return {}
        given = self.cell.model.tuned
        if given is not None:
            return {kind: place for kind, place in given.model_dump().items() if place}
        if self.concept.language != "testbed":
            return {}
        from steerwell.testbed.finetune import KINDS, finetune

        places = {}
        for kind in KINDS:
            folder = self.folder / "fine-tuned" / kind
            if not (folder / "finetune.json").is_file():  # written last
                advance = self.say(f"training a copy that is {kind}", 1)
                finetune(kind, folder, model=self.engine.info.name, trait=self.concept.concept)
                advance(1)
            places[kind] = str(folder)
        return places

    def _conversations(self) -> list[Row]:
        """One row per turn: the best of every method and no steering under attack, and the unattacked baseline."""
        settings = self.config.conversations
        if settings is None:
            return []
        edits: dict[str, Edit | None] = {"unsteered": None}
        edits |= {method: self.edits[at] for method, at in self.roles.best.items()}
        edits |= {f"{method}, matched": self.edits[at] for method, at in self.roles.matched.items()}
        begun = openings(settings.count, self.concept.attacks("test"), edits)
        begun += openings(settings.count, self.concept.neutral_system, {"not attacked": None})
        scenarios = self.concept.scenarios("test")[: self.config.test]
        sampling = replace(self.sampling, max_new_tokens=settings.max_new_tokens)

        def talk(items: Sequence[int]) -> list[Row]:
            grown = converse(
                self.engine,
                users,
                [begun[at] for at in items],
                settings.turns,
                sampling,
                history=settings.history,
            )
            rows = turn_rows(self.judge, self.concept, grown, settings.turns)
            return [{"turns": rows[at : at + settings.turns]} for at in range(0, len(rows), settings.turns)]

        users: Users = ScriptedUsers(scenarios)
        with ExitStack() as stack:
            if settings.user is not None:
                player = replace(sampling, temperature=USER_TEMPERATURE)
                user = stack.enter_context(closing(self.load(settings.user)))
                users = ModelUsers(user, scenarios, settings.user_system, player)
            units = plan("conversations", range(len(begun)), self.config.batch_size)
            execute(self.ledger, units, talk, self.say("conversations", len(begun)), self.engine)
        return [turn for row in self.ledger.rows("conversations") for turn in row["turns"]]

    def _capabilities(self) -> list[Row]:
        """Accuracies (%) without a system prompt, one row per condition."""
        tasks = self.config.capabilities
        if not tasks:
            return []
        conditions = list(dict.fromkeys([None, *self.roles.best.values(), *self.roles.matched.values()]))

        def measure(items: Sequence[int | None]) -> list[Row]:
            return [{"condition": item} | self._accuracies(item, tasks) for item in items]

        units = plan("capabilities", conditions, 1)
        execute(self.ledger, units, measure, self.say("capabilities", len(conditions)), self.engine)
        return list(self.ledger.rows("capabilities"))

    def _accuracies(self, condition: int | None, tasks: Sequence[str]) -> dict[str, float]:
        found: dict[str, float] = {}
        edit = None if condition is None else self.edits[condition]
        others = [name for name in tasks if name != "testbed"]
        if "testbed" in tasks:
            from steerwell.testbed.evaluate import capability

            def answer(asked: Sequence[tuple[str, str]]) -> list[str]:
                prompts = [Prompt.chat(user, system) for system, user in asked]
                return [item.text for item in self.engine.generate(prompts, self.sampling, edit)]

            found |= capability(answer, "test")
        if others:
            if self.capability is None:
                raise ArgumentError(f"capabilities: got {others}, and nothing that measures them; see Cell.run")
            found |= self.capability(self.engine, edit, others)
        return found

    def _looked_at(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Curves by token, examples in full, and a tournament."""
        looks = CloseUps(self.engine, self.edits, rows, self.roles.best)
        chosen, curves = self.roles.chosen, {}
        if chosen is not None:
            way = self.ways[chosen]
            curves = looks.curves(chosen, way, self._directions[way.reading])
        standings = looks.standings(self._comparer()) if self.config.tournament else {}
        return {"curves": curves, "examples": looks.examples(self.config.examples), "standings": standings}

    def _comparer(self) -> Compare | None:
        judge = self.config.judge
        if judge.kind != "llm":
            return None
        return LLMComparer(self.concept, judge.model, judge.url, cache=self.folder / CACHE)

    # What is written -------------------------------------------------------------------------------------------------

    def _write_policies(self) -> None:
        """A policy file of every configuration that was measured."""
        folder = self.folder / "policies"
        folder.mkdir(exist_ok=True)
        for condition in self.roles.all:
            way = self.ways[condition]
            policy = way.policy(way.describe(), f"../{DIRECTIONS}/{way.reading_name}")
            save_policy(policy, folder / f"{way.method}-{condition}.yaml")

    def _write(self, result: SweepResult, rows: Sequence[Row], turns: Sequence[Row], found: Mapping[str, Any]) -> None:
        table = [{name: value for name, value in row.items() if name != "token_ids"} for row in rows]
        write_table(self.folder / TRIALS, table)
        if turns:
            write_table(self.folder / TURNS, turns)
        layers = {
            "-".join(key): [item.cohens_d for item in direction.calibration]
            for key, direction in self._directions.items()
        }
        quality = getattr(self.judge, "quality", None)
        cell = {
            "model": self.cell.model.title,
            "concept": self.concept.concept,
            "poles": self.concept.poles.model_dump(),
            "info": {name: value for name, value in asdict(self.engine.info).items() if name != "signature"},
            "engine": self.cell.model.runner,
            "judge": self.judge.name,
            "judge_report": _report(self.judge),
            "judge_quality": None if quality is None else {"trusted": quality.trusted, "words": quality.describe()},
            "configurations": [asdict(way) | {"describe": way.describe()} for way in self.ways],
            "roles": asdict(self.roles),
            "validation": {
                "baseline": result.baseline.figures(),
                "attacked": result.attacked.figures(),
                "tried": {at: [scores.trait, scores.coherence] for at, scores in result.tried.items()},
                "answers": result.answers,
                "tokens": result.tokens,
            },
            "cohens_d": layers,
            "versions": library_versions(),
        }
        text = json.dumps(finite(cell | dict(found)), indent=1, ensure_ascii=False)
        write_atomic(self.folder / CELL, text + "\n")


def _report(judge: Judge) -> dict[str, Any] | None:
    report = getattr(judge, "report", None)
    return None if report is None else asdict(report)
