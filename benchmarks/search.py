"""Automatic search beside the full grid on the bundled model: `python -m benchmarks.search` writes docs/search.md.

For every training seed and concept both look for an operating point along logistic directions on validation scenarios;
both points answer the same test scenarios under the same attacks.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from benchmarks.evidence import GREEDY, ROOT, model_folder, table_row
from steerwell.concepts import concept_names, load_concept
from steerwell.core.artifacts import library_versions, write_atomic
from steerwell.core.records import POOLS
from steerwell.engines.hf import HFEngine
from steerwell.scoring.intervals import Bootstrap, Interval
from steerwell.scoring.judges.exact import ExactJudge
from steerwell.studies.defence import COHERENCE_FLOOR, grid
from steerwell.studies.search import RUNGS, SCREEN
from steerwell.studies.sweep import VALIDATION, Search, Sweep, SweepResult

HEAD = """# Automatic search beside the full grid

Written by `python -m benchmarks.search`; do not edit. Both choose among the same {count} configurations (every layer,
the paper's strengths, logistic directions, both pools) by the same attacks and judge: the highest trait that keeps 90 %
of the unattacked coherence. The grid answers {grid} validation scenarios in every configuration. The search
(`steerwell sweep --search auto`)

1. *reads* without generating: how likely does each configuration under attack find the first {tokens} tokens of the
   model's own unattacked answers to {screened} scenarios? 1 in {part} of each method passes;
2. lets those answer a {first} of its {auto} scenarios, and 1 in {halving} of each method all of them.

Its cost is counted against the grid's: *answers* (generated and judged) and *tokens* (generated), validation, baselines
included; *read* is what it read, as a share of the tokens that the grid generated; *time* is processor time on one
thread of the whole sweep, with fitting and test answers, which are the same for both. *Difference*: test trait under
attack at the point that the search chose, minus the grid's, same questions and attacks, 95 % BCa bootstrap over paired
answers. Goal: at most {share:.0%} of the grid's tokens and answers, and a lower bound above {worst:g} points. The
search was designed on validation data alone.

"""
COLUMNS = ("concept", "seed", "n", "grid chose", "trait / coherence", "search chose", "trait / coherence",
           "difference", "answers", "tokens", "read", "time")  # fmt: skip
SUMMARY = ("over", "n", "grid: trait / coherence", "search: trait / coherence", "difference", "answers", "tokens",
           "read", "time", "goal")  # fmt: skip
SEARCHES: tuple[Search, Search] = ("grid", "auto")
ORDINALS = {3: "third", 4: "quarter", 6: "sixth", 8: "eighth"}
WORST, SHARE = -3.0, 0.15  # the goal: points of trait, and cost beside the grid's


@dataclass(frozen=True)
class Row:
    """What both, grid and search, found on one concept and seed: test trait per answer, and validation cost.

    `seconds` is processor time of the whole sweep, fitting and test answers included.
    """

    concept: str
    seed: int
    points: tuple[str, str]
    traits: tuple[list[float], list[float]]
    coherence: tuple[float, float]
    answers: tuple[int, int]
    tokens: tuple[int, int]
    scored: tuple[int, int]
    seconds: tuple[float, float]


def main() -> None:
    """Run all, print as it goes, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "search.md")
    arguments = parser.parse_args()
    work = [(model_folder(seed), seed, name) for seed in arguments.seeds for name in concept_names("testbed")]
    rows = []
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for row in pool.map(compare, *zip(*work, strict=True)):
            rows.append(row)
            print(json.dumps(asdict(row)), flush=True)
    write_atomic(arguments.out, report(rows))
    print(f"wrote {arguments.out}")


def compare(folder: Path, seed: int, name: str) -> Row:
    """Both searches on one model and concept; one process each, on one thread."""
    engine = HFEngine.load(str(folder), dtype="float32", batch_size=64)
    found, seconds = zip(*(run(engine, name, search) for search in SEARCHES), strict=True)
    points = [None if item.chosen is None else item.configurations[item.chosen].describe() for item in found]
    scores = [item.test[item.chosen, True] for item in found]
    return Row(
        name,
        seed,
        tuple(map(str, points)),
        tuple(item.traits.tolist() for item in scores),
        tuple(item.coherence for item in scores),
        tuple(item.answers for item in found),
        tuple(item.tokens for item in found),
        tuple(item.scored for item in found),
        seconds,
    )


def run(engine: HFEngine, name: str, search: Search) -> tuple[SweepResult, float]:
    """One sweep in a folder of its own, and the processor seconds that it took."""
    ways = tuple(grid(range(engine.info.n_layers), pools=POOLS))
    concept = load_concept(name, engine.info.language)
    sweep = Sweep(concept, ways, VALIDATION[search], None, search=search, sampling=GREEDY)
    with tempfile.TemporaryDirectory() as place:
        started = time.process_time()
        found = sweep.run(engine, ExactJudge(), Path(place), say=lambda _text, _count: lambda _done: None)
        return found, time.process_time() - started


def report(rows: Sequence[Row]) -> str:
    """The page."""
    first, _ = RUNGS
    head = HEAD.format(count=len(grid(range(6), pools=POOLS)), **VALIDATION, tokens=SCREEN.tokens, part=SCREEN.part,
                       screened=SCREEN.scenarios, first=ORDINALS[round(1 / first.share)], halving=first.halving,
                       share=SHARE, worst=WORST)  # fmt: skip
    lines = [head + table_row(COLUMNS), table_row(["---"] * len(COLUMNS))]
    for row in rows:
        (grid_scores, search_scores), n = scores([row]), str(len(row.traits[0]))
        lines.append(table_row([
            row.concept, str(row.seed), n, row.points[0], grid_scores, row.points[1], search_scores,
            difference([row]), *costs([row]),
        ]))  # fmt: skip
    lines += ["", table_row(SUMMARY), table_row(["---"] * len(SUMMARY))]
    for name in (*dict.fromkeys(row.concept for row in rows), "all"):
        mine = [row for row in rows if name in (row.concept, "all")]
        n = str(sum(len(row.traits[0]) for row in mine))
        lines.append(table_row([name, n, *scores(mine), difference(mine), *costs(mine), verdict(mine)]))
    versions = ", ".join(f"{name} {number}" for name, number in library_versions().items())
    return "\n".join([*lines, "", incoherent(rows), "", f"{versions}.", ""])


def incoherent(rows: Sequence[Row]) -> str:
    """The points that kept their coherence on validation scenarios and lost it on test ones."""
    floor, lost = 100 * COHERENCE_FLOOR, []
    for side, name in enumerate(SEARCHES):
        low = [row for row in rows if row.coherence[side] < floor]
        found = ", ".join(f"{row.concept} seed {row.seed} ({row.coherence[side]:.1f})" for row in low)
        lost.append(f"{name}: {found or 'none'}")
    return f"Points whose coherence under the test attacks is below {floor:g}: {'; '.join(lost)}."


def scores(rows: Sequence[Row]) -> list[str]:
    """Mean test trait and coherence of both, over answers."""
    sizes = [len(row.traits[0]) for row in rows]
    return [
        f"{np.mean(np.concatenate([row.traits[side] for row in rows])):.1f} / "
        f"{np.average([row.coherence[side] for row in rows], weights=sizes):.1f}"
        for side in (0, 1)
    ]


def costs(rows: Sequence[Row]) -> list[str]:
    """The search's part of the grid's answers, tokens, tokens again (what it read), and time."""
    return [f"{value:.1%}" for value in (
        share(rows, "answers"), share(rows, "tokens"), share(rows, "scored", "tokens"), share(rows, "seconds")
    )]  # fmt: skip


def verdict(rows: Sequence[Row]) -> str:
    """Whether the goal is met; what misses it is said."""
    missed = ["difference"] * (not interval(rows).low > WORST)
    missed += [name for name in ("answers", "tokens") if share(rows, name) > SHARE]
    return f"**missed**: {', '.join(missed)}" if missed else "met"


def difference(rows: Sequence[Row]) -> str:
    """Search minus grid, points of trait, with its interval."""
    found = interval(rows)
    return f"{found.estimate:+.1f} ({found.low:+.1f} to {found.high:+.1f})"


def interval(rows: Sequence[Row]) -> Interval:
    """Of the paired difference, search minus grid."""
    grids, searches = (np.concatenate([row.traits[side] for row in rows]) for side in (0, 1))
    return Bootstrap().paired_difference(searches, grids)


def share(rows: Sequence[Row], what: str, of: str | None = None) -> float:
    """The search's part of what the grid took."""
    return sum(getattr(row, what)[1] for row in rows) / sum(getattr(row, of or what)[0] for row in rows)


if __name__ == "__main__":
    main()
