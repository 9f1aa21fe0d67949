"""The sweep: every way to steer tried on validation scenarios under attack, the best one reported on test scenarios.

What it leaves in its folder: the fitted directions, a ledger, a table of every answer (`answers.parquet`) and one of
every condition's means (`configurations.parquet`), a heat map of layers and strengths, and the operating point as a
policy that everything else reads (METHODS section 4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from steerwell.concepts import Concept
from steerwell.core.errors import ArgumentError, EngineError, UnknownNameError
from steerwell.core.policy import save_policy
from steerwell.core.records import Direction, Edit, Prompt, Response, Sampling, Verdict
from steerwell.engines.base import Engine, made_by
from steerwell.runs.ledger import Ledger, Row, execute
from steerwell.runs.plan import plan
from steerwell.scoring.intervals import Bootstrap, Interval
from steerwell.scoring.judges.base import Judge, verdicts
from steerwell.studies.defence import (
    Configuration,
    EvaluationSplit,
    attack_prompts,
    baseline_prompts,
    by_method,
    choose,
    choose_each,
    edits_of,
    mean_score,
    prefilled,
)
from steerwell.studies.fitting import PAPER_SAMPLING, Reading, Say, fitted
from steerwell.studies.plots import heat_map
from steerwell.studies.search import RUNGS, SCREEN, better_part, successive_halving
from steerwell.studies.tables import Asked, write_answers, write_summaries

DIRECTIONS = "directions"
GREEDY = Sampling(max_new_tokens=256)
Search = Literal["grid", "auto"]
Threat = Literal["system", "prefill"]
VALIDATION: Mapping[Search, int] = {"grid": 24, "auto": 48}  # scenarios to choose on where nobody names a number
Condition = tuple[int | None, bool]  # index of the configuration, None for unsteered; attacked or not


@dataclass(frozen=True, eq=False)
class Scores:
    """A condition's scores, one per scenario, 0-100; NaN where the judge gave none."""

    traits: np.ndarray
    coherences: np.ndarray

    @property
    def trait(self) -> float:
        """Mean trait over the answers that were scored; NaN without any."""
        return mean_score(self.traits)

    @property
    def coherence(self) -> float:
        """Mean coherence over the answers that were scored; NaN without any."""
        return mean_score(self.coherences)

    @cached_property
    def interval(self) -> Interval:
        """95 % BCa bootstrap interval of the mean trait, resampling scenarios."""
        return Bootstrap().mean(self.traits)

    def figures(self) -> dict[str, Any]:
        """Means, the trait's interval and how many scores are missing, as JSON values."""
        found = self.interval
        return {
            "trait": self.trait,
            "trait_low": found.low,
            "trait_high": found.high,
            "coherence": self.coherence,
            "n": found.n,
            "missing": found.missing,
        }


@dataclass(frozen=True, eq=False)
class SweepResult:
    """What a sweep found.

    Attributes:
        configurations: what was tried.
        baseline: unsteered and not attacked, on validation scenarios.
        attacked: unsteered under the validation attacks.
        tried: steered under the validation attacks, by index; a search leaves out what it gave up.
        best: for every method the index of its operating point; methods without a coherent one are missing.
        chosen: index of the operating point of all; None where nothing is coherent enough.
        answers: answers on validation scenarios that it took: generated and judged.
        tokens: of these answers.
        scored: tokens that a search only read, to see how likely they are.
        test: on test scenarios, by (configuration index or None for unsteered, attacked or not).
        policy: the policy file; None where nothing is coherent enough.
    """

    configurations: tuple[Configuration, ...]
    baseline: Scores
    attacked: Scores
    tried: Mapping[int, Scores]
    answers: int
    tokens: int
    scored: int
    best: Mapping[str, int]
    chosen: int | None
    test: Mapping[Condition, Scores]
    policy: Path | None


@dataclass(frozen=True)
class Sweep:
    """What to sweep.

    Attributes:
        concept: the trait; its own attacks and scenarios are used.
        configurations: the ways to steer, see `steerwell.studies.defence.grid`.
        validation: validation scenarios to choose on; None: all.
        test: test scenarios to report on; None: all.
        threat: `system`: malicious system prompts; `prefill`: neutral ones, and the first words of what the model says
            under malicious ones put into its mouth.
        search: `grid` answers every validation scenario in every way; `auto` gives up on ways as it learns, see
            `steerwell.studies.search`.
        sampling: how answers are drawn; scenario i has seed + i under every configuration.
        fitting: how the contrastive answers are drawn that directions are fitted on.
    """

    concept: Concept
    configurations: tuple[Configuration, ...]
    validation: int | None = 24
    test: int | None = None
    threat: Threat = "system"
    search: Search = "grid"
    sampling: Sampling = GREEDY
    fitting: Sampling = PAPER_SAMPLING

    def run(self, engine: Engine, judge: Judge, folder: Path, *, rows_per_unit: int = 64, say: Say) -> SweepResult:
        """Do what is not done yet, and write tables and policy. An interrupted sweep is resumed by running it again.

        Args:
            engine: the model.
            judge: who scores.
            folder: where everything goes.
            rows_per_unit: answers per unit of the ledger, which are generated and written together.
            say: called with what is being done and how many answers it takes; returns where progress goes.

        Raises:
            ArgumentError: the folder holds another sweep.
            EngineError: a search finds no unattacked answer to go by.
        """
        return _Running(self, engine, judge, folder, rows_per_unit, say).run()


class _Running:
    """One sweep at work."""

    def __init__(self, sweep: Sweep, engine: Engine, judge: Judge, folder: Path, size: int, say: Say) -> None:
        if not sweep.configurations:
            raise ArgumentError("configurations: got none; see steerwell.studies.defence.grid")
        for kind, name, known in (("search", sweep.search, Search), ("threat", sweep.threat, Threat)):
            if name not in get_args(known):
                raise UnknownNameError(kind, name, get_args(known))
        self.sweep, self.engine, self.judge = sweep, engine, judge
        self.folder, self.size, self.say = folder, size, say
        self.phases = self.scored = 0
        self.rows: dict[Asked, Row] = {}
        limits: dict[EvaluationSplit, int | None] = {"validation": sweep.validation, "test": sweep.test}
        self.prompts: dict[tuple[EvaluationSplit, bool], list[Prompt]] = {
            (split, attacked): make(sweep.concept, split, limit)
            for split, limit in limits.items()
            for attacked, make in ((False, baseline_prompts), (True, attack_prompts))
        }

    def run(self) -> SweepResult:
        tried = self.sweep.configurations
        with Ledger(self.folder / "ledger.sqlite", self._about()) as self.ledger:
            self.edits = edits_of(self._directions(), tried)
            if self.sweep.threat == "prefill":
                self._prefill("validation")
                self._prefill("test")
            count = len(self.prompts["validation", True])
            found = self._measure("validation", [(None, False), (None, True)], count)
            left = self._search(count) if self.sweep.search == "auto" else list(range(len(tried)))
            found |= self._measure("validation", [(index, True) for index in left], count)
            baseline, scores = found[None, False], [found[index, True] for index in left]
            best = choose_each([tried[index] for index in left], scores, baseline, by_method)
            best = {method: left[at] for method, at in best.items()}
            at = choose(scores, baseline)
            chosen = None if at is None else left[at]
            spent = [row["tokens"] for row in self.rows.values()]
            reported = sorted(best.values())  # the chosen one is the best of its method
            conditions = list(product((None, *reported), (False, True)))
            test = self._measure("test", conditions, len(self.prompts["test", True]))
            policy = None if chosen is None else self._write_policy(chosen, found, test)
            self._write_tables()
        steered = dict(zip(left, scores, strict=True))
        heat_map(tried, steered, baseline, found[None, True], chosen, self.folder / "heatmap.png")
        return SweepResult(
            tried, baseline, found[None, True], steered, len(spent), sum(spent), self.scored, best, chosen, test, policy
        )

    def _prefill(self, split: EvaluationSplit) -> None:
        """Put the first words of what the attacked model says into its mouth, in place of the malicious prompts."""
        attacked, sampling = self.prompts[split, True], self.sweep.sampling

        def answer(items: Sequence[int]) -> list[Row]:
            drawn = [replace(sampling, seed=sampling.seed + scenario) for scenario in items]
            answers = self.engine.generate([attacked[scenario] for scenario in items], drawn)
            return [{"answer": item.text} for item in answers]

        phase = f"prefill-{split}"
        units = plan(phase, range(len(attacked)), self.size)
        execute(self.ledger, units, answer, self.say(f"answers to begin with, {split}", len(attacked)), self.engine)
        answers = [row["answer"] for row in self.ledger.rows(phase)]
        self.prompts[split, True] = prefilled(self.prompts[split, False], answers)

    def _search(self, count: int) -> list[int]:
        def measure(indices: Sequence[int], first: int) -> tuple[list[Scores], Scores]:
            found = self._measure("validation", [(None, False), *((index, True) for index in indices)], first)
            return [found[index, True] for index in indices], found[None, False]

        ways = self.sweep.configurations
        passed = better_part(ways, self._likelihoods(), SCREEN.part)
        return successive_halving(ways, count, measure, among=passed)

    def _likelihoods(self) -> dict[int, float]:
        """How likely every configuration under attack finds what the unsteered, unattacked answers begin with.

        Nothing is generated: the mean over answers of the mean log-probability of their first tokens, nats; empty
        answers are left out.

        Raises:
            EngineError: there is no other.
        """
        attacked = self.prompts["validation", True][: SCREEN.scenarios]
        begun = [self.rows["validation", None, False, at]["token_ids"][: SCREEN.tokens] for at in range(len(attacked))]
        items = [[index, at] for index in range(len(self.edits)) for at, tokens in enumerate(begun) if tokens]

        def read(part: Sequence[Any]) -> list[Row]:
            edits = [self.edits[index] for index, _ in part]
            scores = self.engine.score([attacked[at] for _, at in part], [begun[at] for _, at in part], edits)
            return [{"configuration": index, "logprob": float(score.logprobs.mean())}
                    for (index, _), score in zip(part, scores, strict=True)]  # fmt: skip

        if not items:
            raise EngineError(
                f"{self.engine.info.name!r} left the first {len(begun)} validation scenarios without an answer; "
                "search='auto' goes by these: use search='grid'"
            )
        units = plan("likelihood", items, self.size, lambda item: (item[1], item[0]))
        execute(self.ledger, units, read, self.say("answers to read, validation", len(items)), self.engine)
        self.scored = sum(len(begun[at]) for _, at in items)
        found: dict[int, list[float]] = {index: [] for index in range(len(self.edits))}
        for row in self.ledger.rows("likelihood"):
            found[row["configuration"]].append(row["logprob"])
        merits = {index: float(np.mean(values)) for index, values in found.items()}
        return {index: merit if math.isfinite(merit) else -math.inf for index, merit in merits.items()}

    def _about(self) -> dict[str, Any]:
        sweep = self.sweep
        return {
            "what": "sweep",
            "concept": sweep.concept.hash,
            "configurations": [asdict(item) for item in sweep.configurations],
            "validation": sweep.validation,
            "test": sweep.test,
            "threat": sweep.threat,
            "search": sweep.search,
            "schedule": [asdict(SCREEN), *map(asdict, RUNGS)] if sweep.search == "auto" else None,
            "sampling": asdict(sweep.sampling),
            "fitting": asdict(sweep.fitting),
            "judge": self.judge.name,
            "rows_per_unit": self.size,
        } | made_by(self.engine)

    def _directions(self) -> dict[Reading, Direction]:
        """The directions that the configurations need, from the folder or fitted now on one set of answers."""
        readings = (item.reading for item in self.sweep.configurations)
        place, sampling = self.folder / DIRECTIONS, self.sweep.fitting
        return fitted(self.engine, self.sweep.concept, readings, place, sampling, self.say)

    def _measure(self, split: EvaluationSplit, conditions: Sequence[Condition], count: int) -> dict[Condition, Scores]:
        """Scores of every condition on the first `count` scenarios of one split; what is known is not asked again."""
        keys = [(split, index, attacked, scenario) for index, attacked in conditions for scenario in range(count)]
        items = [list(key[1:]) for key in keys if key not in self.rows]

        def alike(item: list[Any]) -> tuple[int, int, bool]:
            _, attacked, scenario = item
            return -len(str(self.prompts[split, attacked][scenario].messages)), scenario, attacked

        phase = f"{self.phases}-{split}"
        self.phases += 1
        units = plan(phase, items, self.size, alike)
        if items:
            advance = self.say(f"answers, {split}", len(items))
            execute(self.ledger, units, lambda part: self._answer(split, part), advance, self.engine)
        for row in self.ledger.rows(phase):
            self.rows[split, row["configuration"], row["attacked"], row["scenario"]] = row
        return {
            (index, attacked): Scores(
                *(
                    np.array([self.rows[split, index, attacked, scenario][name] for scenario in range(count)])
                    for name in ("trait", "coherence")
                )
            )
            for index, attacked in conditions
        }

    def _answer(self, split: EvaluationSplit, items: Sequence[Any]) -> list[Row]:
        """Generate and score one unit."""
        prompts = [self.prompts[split, attacked][scenario] for _, attacked, scenario in items]
        edits: list[Edit | None] = [None if index is None else self.edits[index] for index, _, _ in items]
        sampling = self.sweep.sampling
        drawn = [replace(sampling, seed=sampling.seed + scenario) for _, _, scenario in items]
        answers = self.engine.generate(prompts, drawn, edits)
        scored = verdicts(self.judge, self.sweep.concept, answers)
        return [_row(item, answer, verdict) for item, answer, verdict in zip(items, answers, scored, strict=True)]

    def _write_policy(
        self,
        chosen: int,
        validation: Mapping[Condition, Scores],
        test: Mapping[Condition, Scores],
    ) -> Path:
        way = self.sweep.configurations[chosen]
        found = {
            split: {
                name: {label: round(value, 2) for label, value in scores[key].figures().items() if math.isfinite(value)}
                for name, key in (("baseline", (None, False)), ("attacked", (None, True)), ("steered", (chosen, True)))
            }
            for split, scores in (("validation", validation), ("test", test))
        }
        policy = way.policy(f"{self.sweep.concept.concept}-defence", f"{DIRECTIONS}/{way.reading_name}", found)
        return save_policy(policy, self.folder / "policy.yaml")

    def _write_tables(self) -> None:
        ways = self.sweep.configurations
        write_answers(self.folder / "answers.parquet", ways, self.prompts, self.rows)
        write_summaries(self.folder / "configurations.parquet", ways, self.rows)


def _row(item: Sequence[Any], answer: Response, verdict: Verdict) -> Row:
    index, attacked, scenario = item
    receipt = answer.receipt
    return {
        "configuration": index,
        "attacked": attacked,
        "scenario": scenario,
        "answer": answer.text,
        "tokens": len(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "trait": verdict.trait,
        "coherence": verdict.coherence,
        "reason": verdict.reason,
        "edit": None if receipt is None else receipt.edit_id,
        "gate_rate": 0.0 if receipt is None else receipt.gate_rate,
        "perturbation": 0.0 if receipt is None else receipt.perturbation,
    } | ({} if attacked or index is not None else {"token_ids": list(answer.token_ids)})
