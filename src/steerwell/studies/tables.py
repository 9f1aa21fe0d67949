"""The tables that a sweep leaves: every answer, and the means of every condition, as Parquet files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from steerwell.core.records import Prompt
from steerwell.runs.ledger import Row
from steerwell.studies.defence import Configuration, EvaluationSplit, mean_score

Asked = tuple[EvaluationSplit, int | None, bool, int]  # configuration, None: unsteered; attacked or not; scenario


def write_answers(
    path: Path,
    configurations: Sequence[Configuration],
    prompts: Mapping[tuple[EvaluationSplit, bool], Sequence[Prompt]],
    rows: Mapping[Asked, Row],
) -> None:
    """One row per answer: what was asked, how it was steered (null: not at all), what was said and what it scored."""
    table = []
    for (split, index, attacked, scenario), row in rows.items():
        prompt = prompts[split, attacked][scenario]
        asked = {"split": split, "prompt": prompt.messages[-1].content, "system": prompt.system}
        asked["prefill"] = prompt.prefill
        said = {name: value for name, value in row.items() if name != "token_ids"}
        table.append(asked | _fields(configurations, index) | said)
    write_table(path, table)


def write_summaries(path: Path, configurations: Sequence[Configuration], rows: Mapping[Asked, Row]) -> None:
    """One row per condition: split, attacked or not, how it was steered (null: not at all), and over its answers

    `n` and `missing`, how many have and lack a trait score; the means `trait` and `coherence`, 0-100, NaN without any;
    `gate_rate`, the mean edited share of the tokens; `perturbation`, the mean displacement of the edited tokens in
    activation units over the answers that have any, NaN: nothing was edited; `tokens`, how many were generated.
    """
    conditions: dict[tuple[EvaluationSplit, bool, int | None], list[Row]] = {}
    for (split, index, attacked, _), row in rows.items():
        conditions.setdefault((split, attacked, index), []).append(row)
    order = sorted(conditions, key=lambda key: (key[0] == "test", key[1], -1 if key[2] is None else key[2]))
    write_table(
        path,
        [
            {"split": split, "attacked": attacked, "configuration": index}
            | _fields(configurations, index)
            | _means(conditions[split, attacked, index])
            for split, attacked, index in order
        ],
    )


def _fields(configurations: Sequence[Configuration], index: int | None) -> Row:
    return {} if index is None else asdict(configurations[index])


def _means(rows: Sequence[Row]) -> Row:
    traits = np.array([row["trait"] for row in rows], np.float64)
    missing = int(np.isnan(traits).sum())
    return {
        "n": len(rows) - missing,
        "missing": missing,
        "trait": mean_score(traits),
        "coherence": mean_score([row["coherence"] for row in rows]),
        "gate_rate": mean_score([row["gate_rate"] for row in rows]),
        "perturbation": mean_score([row["perturbation"] for row in rows if row["gate_rate"] > 0]),
        "tokens": sum(row["tokens"] for row in rows),
    }


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """A row without a column has null there."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = list(dict.fromkeys(name for row in rows for name in row))
    pq.write_table(pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows]), path)
