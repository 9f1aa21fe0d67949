"""Close looks at a cell's test answers: token by token, in full, and against each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from steerwell.core.records import Direction, Edit, EditTerm, Prompt
from steerwell.engines.base import Engine
from steerwell.runs.ledger import Row
from steerwell.scoring.tournament import Compare, Comparison, tournament
from steerwell.studies.defence import Configuration

SCENARIOS, TOKENS = 64, 40  # answers, and tokens of each, that curves are made of
Rows = Sequence[Row]


def of(rows: Rows, task: str, condition: int | None) -> list[Row]:
    """A condition's rows of one task, by scenario."""
    return [row for row in rows if row["task"] == task and row["condition"] == condition]


@dataclass(frozen=True, eq=False)
class CloseUps:
    """What is looked at once more in the answers of a cell.

    Attributes:
        engine: the model that wrote them.
        edits: by configuration index.
        rows: the trials' rows.
        best: every method's operating point.
    """

    engine: Engine
    edits: Mapping[int, Edit]
    rows: Rows
    best: Mapping[str, int]

    def curves(self, chosen: int, way: Configuration, direction: Direction) -> dict[str, Any]:
        """By response token: mean projection on the chosen direction, and the share that each method edits.

        Entry t is of the token that yields token t. An edit without effect reads the projections of unsteered answers.
        """
        vector, calibration = direction.at(way.layer)
        watch = Edit((EditTerm(way.layer, vector, calibration.boundary, 0.0, 0.0, "response"),))
        read = {
            "not attacked": self._traced("baseline", None, watch),
            "attacked": self._traced("attacked", None, watch),
            "attacked, steered (before the edit)": self._traced("attacked", chosen, self.edits[chosen]),
        }
        return {
            "way": way.describe(),
            "boundary": calibration.boundary,
            "mu_aligned": calibration.mu_aligned,
            "mu_violating": calibration.mu_violating,
            "projection": {name: projection for name, (projection, _) in read.items()},
            "edited": {name: self._traced("attacked", at, self.edits[at])[1] for name, at in self.best.items()},
        }

    def examples(self, count: int) -> list[dict[str, Any]]:
        """The first attacked test scenarios in full, with every token's piece and whether it was edited."""
        listed = []
        for scenario in range(min(count, len(of(self.rows, "baseline", None)))):
            shown = {name: rows[scenario] for name, rows in self._conditions().items()}
            answers = [self._shown(name, row) for name, row in shown.items()]
            first = shown["unsteered"]
            listed.append({"system": first["system"], "prompt": first["prompt"], "answers": answers})
        return listed

    def standings(self, compare: Compare | None) -> dict[str, Any]:
        """A tournament between the unattacked baseline and the attacked conditions.

        Args:
            compare: decides; None: the scores that the answers already have, which then are not checked but ranked.
        """
        shown = self._conditions()
        asked = [row["prompt"] for row in shown["not attacked"]]
        answers = {name: [row["answer"] for row in rows] for name, rows in shown.items()}
        found = tournament(asked, answers, compare or _by_scores(shown.values()))
        by = "scores" if compare is None else "judge"
        return {"by": by, "missing": found.missing, "ratings": [asdict(item) for item in found.ratings]}

    def _conditions(self) -> dict[str, list[Row]]:
        named: dict[str, int | None] = {"unsteered": None, **self.best}
        attacked = {name: of(self.rows, "attacked", at) for name, at in named.items()}
        return {"not attacked": of(self.rows, "baseline", None)} | attacked

    def _traced(self, task: str, condition: int | None, edit: Edit) -> tuple[list[float], list[float]]:
        """Mean projection and edited share by token over a condition's answers, read again under an edit."""
        mine = [row for row in of(self.rows, task, condition)[:SCENARIOS] if row["token_ids"]]
        tokens = [row["token_ids"][:TOKENS] for row in mine]
        traces = [score.traces[0] for score in self.engine.score([_prompt(row) for row in mine], tokens, edit)]
        return _by_token([item.projection for item in traces]), _by_token([item.edited for item in traces])

    def _shown(self, name: str, row: Row) -> dict[str, Any]:
        tokens, edited = row["token_ids"], [False] * len(row["token_ids"])
        if row["condition"] is not None and tokens:
            score = self.engine.score([_prompt(row)], [tokens], self.edits[row["condition"]])[0]
            edited = np.any([trace.edited for trace in score.traces], 0).tolist()
        pieces = self.engine.pieces(tokens)
        return {"name": name, "trait": row["trait"], "coherence": row["coherence"], "pieces": pieces, "edited": edited}


def _prompt(row: Row) -> Prompt:
    return Prompt.chat(row["prompt"], row["system"], row["prefill"])


def _by_token(rows: Sequence[np.ndarray]) -> list[float]:
    """Mean of entry t over the rows that have one."""
    width = max(map(len, rows), default=0)
    return [float(np.mean([row[at] for row in rows if len(row) > at])) for at in range(width)]


def _by_scores(conditions: Iterable[Rows]) -> Callable[[Sequence[Comparison]], list[float]]:
    """Decides by known scores: the higher trait wins, then the higher coherence."""
    known = {(row["prompt"], row["answer"]): (row["trait"], row["coherence"]) for rows in conditions for row in rows}

    def decide(one: tuple[float, float], two: tuple[float, float]) -> float:
        return math.nan if math.isnan(sum((*one, *two))) else 0.5 + 0.5 * ((one > two) - (one < two))

    def compare(shown: Sequence[Comparison]) -> list[float]:
        return [decide(known[item.prompt, item.first], known[item.prompt, item.second]) for item in shown]

    return compare
