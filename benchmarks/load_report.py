"""LOAD.md: what the load test measured, as Markdown, and whether it met its targets."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from benchmarks.load_cases import GATE_MARGIN, LOGIT_MARGIN, WAYS
from benchmarks.report import MISSED, Row, Section, machine
from benchmarks.timing import Summary

FLAT = 0.05  # share by which the memory may differ
STEERED, FASTER = 0.9, 4.0  # mixed over unsteered traffic; over one request at a time
PACKAGES = ("fastapi", "uvicorn", "uvloop", "httptools", "aiohttp")
KINDS = {
    "mixed": "mixed steering, {clients} clients",
    "unsteered": "unsteered, {clients} clients",
    "single": "mixed steering, {clients} clients, a server with `--batch 1`",
    "alone": "mixed steering, 1 client",
}
THROUGHPUT = (
    "Generated tokens per second of mixed steering over those of the same prompts unsteered (the answers differ, so "
    "requests are told too), of the same requests to a server that decodes one answer at a time, and of one client "
    "that asks one request after the other."
)
HOW_TO_READ = """\
Everything runs on one machine: a server, the load generator (a process of its own that checks every answer) and a
second server with `--batch 1`, which is idle but in its own turns. What the generator takes of the CPU the server does
not have; the table tells both. A client sends its next request when it has its answer, with no pause: all of them at
once are more than the server decodes together, so the time to the first token is mostly waiting for a place in the
batch. At the beginning of a turn all clients ask in the same moment; these answers count for the percentiles and not
for the throughput.

The kinds of traffic take turns, in an order that turns around from round to round, and only turns of one round are
divided; given are the median over the rounds and their middle half (first to third quartile). A ratio whose middle half
spans its target is not decided by this run. Absolute figures depend on the machine and on what else it did.

An answer is *wrong* if its text, finish reason, policy name, edit id or, term by term, the tokens seen and edited in
its receipt differ from what `HFEngine.generate` says to the same prompt under the same edit, *lost* if the connection,
the status or the form of the answer is not what it should be, *refused* if the status is 429. A stream's texts are put
together first. Where a gate or a greedy choice comes within rounding of a tie ({gate:g} activation units, {logit:g}
logits, as in the engines' contract), another answer is as right: such answers are counted apart.\
"""


@dataclass(frozen=True, slots=True)
class Measured:
    """One turn.

    Attributes:
        got: the generator's `Tally`.
        seconds: the turn took, the wait for the last answers included.
        server: CPU seconds that the server used in it.
        generator: CPU seconds that the generator used.
    """

    got: Mapping[str, Any]
    seconds: float
    server: float
    generator: float

    @property
    def tokens(self) -> float:
        """Generated tokens per second."""
        return float(self.got["tokens"] / self.got["window"])

    @property
    def requests(self) -> float:
        """Answers per second."""
        return float(self.got["requests"] / self.got["window"])

    def told(self) -> str:
        """In a line."""
        counts = ", ".join(f"{self.got[name]} {name}" for name in ("answers", "wrong", "lost", "refused"))
        said = f"{counts}; {self.tokens:,.0f} tokens/s, {self.requests:.1f} requests/s"
        return "\n  ".join([said, *self.got["faults"]])


Look = tuple[float, int]  # seconds, bytes resident


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory of the server while it has mixed traffic, after the warm-up, MiB.

    It breathes with what is in the batch; growth shows from turn to turn.

    Attributes:
        begin: median of the looks in the first third of the turns.
        end: of those in the last third.
        furthest: the turn's median that is furthest from the beginning.
        low: the least of all looks.
        high: the greatest.
        slope: of a line through all looks, MiB per minute.
        looks: how many.
    """

    begin: float
    end: float
    furthest: float
    low: float
    high: float
    slope: float
    looks: int

    @classmethod
    def of(cls, turns: Sequence[Sequence[Look]]) -> Memory:
        """From the looks of every turn, two or more in all."""
        part = max(len(turns) // 3, 1)
        sizes = [[size / 2**20 for _, size in turn] for turn in turns if turn]
        every = [look for turn in turns for look in turn]
        seconds, all_sizes = (np.array(column, float) for column in zip(*every, strict=True))
        begin, end = (median([size for turn in some for size in turn]) for some in (sizes[:part], sizes[-part:]))
        furthest = max((median(turn) for turn in sizes), key=lambda size: abs(size - begin))
        all_sizes /= 2**20
        slope = float(np.polyfit(seconds / 60, all_sizes, 1)[0])
        return cls(begin, end, furthest, float(all_sizes.min()), float(all_sizes.max()), slope, len(every))

    @property
    def off(self) -> float:
        """Share by which a turn was off the beginning, at most."""
        return abs(self.furthest - self.begin) / self.begin


Turns = Mapping[str, Sequence[Measured]]
Target = tuple[str, str, bool]  # what, its figure, whether it is met


def count(turns: Turns, name: str, kinds: Sequence[str] | None = None) -> int:
    """A count over all turns, warm-up included, or over those of some kinds."""
    return sum(turn.got[name] for kind, listed in turns.items() if kinds is None or kind in kinds for turn in listed)


def ratios(turns: Turns) -> list[Row]:
    """Throughput of mixed traffic beside the others, round by round."""

    def row(what: str, other: str, at_least: float | None = None, measure: str = "tokens") -> Row:
        mine, others = ([getattr(turn, measure) for turn in turns[kind]] for kind in ("mixed", other))
        ratio = Summary.of([one / two if two else math.nan for one, two in zip(mine, others, strict=True)])
        figures = " / ".join(f"{median(side):,.{0 if measure == 'tokens' else 1}f}" for side in (mine, others))
        return Row(what, ratio, f"{figures} {measure}/s", at_least=at_least)

    return [
        row("mixed / unsteered", "unsteered", STEERED),
        row("mixed / unsteered, requests", "unsteered", measure="requests"),
        row("mixed / server with `--batch 1`", "single", FASTER),
        row("mixed / one client at a time", "alone"),
    ]


def targets(turns: Turns, memory: Memory) -> list[Target]:
    """What must hold."""
    wrong, lost = count(turns, "wrong"), count(turns, "lost")
    held = f"{memory.off:.1%} off the beginning in the turn furthest from it"
    return [
        ("no wrong answer", f"{wrong} of {count(turns, 'answers'):,}", wrong == 0),
        ("no lost answer", f"{lost}", lost == 0),
        (f"memory flat within {FLAT:.0%} after the warm-up", held, memory.off <= FLAT),
        *(
            (f"{row.what} >= {row.at_least:g}", f"{row.ratio.median:.2f}", row.ratio.median >= row.at_least)
            for row in ratios(turns)
            if row.at_least is not None
        ),
    ]


def passed(turns: Turns, memory: Memory) -> bool:
    """Whether every target is met."""
    return all(met for _, _, met in targets(turns, memory))


def document(turns: Turns, memory: Memory, cases: Sequence[Mapping[str, Any]], clients: int, seconds: float) -> str:
    """The whole report."""
    lines = [
        "# The server under load",
        "",
        "Written by `make load`; do not edit.",
        "",
        *machine([_versions()], seconds),
        "",
        _what(turns, len(cases), clients),
        "",
        "| target | figure | |",
        "|---|---|---|",
        *(f"| {what} | {figure} | {'met' if met else MISSED} |" for what, figure, met in targets(turns, memory)),
        "",
        "## How to read this",
        "",
        HOW_TO_READ.format(gate=GATE_MARGIN, logit=LOGIT_MARGIN),
        "",
        *_answers(turns, cases),
        *_times(turns, clients),
        Section("Throughput", THROUGHPUT, ratios(turns)).markdown(),
        *_memory(memory),
    ]
    return "\n".join(lines)


def _what(turns: Turns, cases: int, clients: int) -> str:
    ways = {way for turn in turns["mixed"] for way in turn.got["ways"]}
    minutes = sum(turn.seconds for turn in turns["mixed"]) / 60
    return (
        f"{clients} clients asked without a pause, in {len(ways)} of {len(WAYS)} ways to steer, for {minutes:.1f} "
        f"minutes of mixed traffic: {cases} different requests (model names, `steering` fields, composed ones; prompts "
        "from a few words to long conversations, 8 to 96 new tokens; chat and completions), greedy, every other one "
        "streamed."
    )


def _answers(turns: Turns, cases: Sequence[Mapping[str, Any]]) -> list[str]:
    names = ("answers", "streams", "wrong", "lost", "refused", "tied", "turned")
    head = "| | whole answers | of them streamed | wrong | lost | refused | close to a tie | of them another one |"
    groups = {"mixed traffic": ["mixed"], "all turns, warm-up too": None}
    close = sum(case["expected"]["tie"] for case in cases)
    rows = [
        f"| {what} | " + " | ".join(f"{count(turns, name, kinds):,}" for name in names) + " |"
        for what, kinds in groups.items()
    ]
    faults = [f"- {fault}" for listed in turns.values() for turn in listed for fault in turn.got["faults"]][:20]
    note = f"{close} of the {len(cases)} requests come close to a tie."
    return ["## Answers", "", note, "", head, "|---" * 8 + "|", *rows, "", *faults, *([""] if faults else [])]


def _times(turns: Turns, clients: int) -> list[str]:
    """Seconds to the first token and to the end, and the CPU that server and generator took."""
    lines = [
        "## Times",
        "",
        "Seconds, as 50 / 95 / 99 % of the answers have it. CPU: cores that were busy with the server and with the "
        "generator.",
        "",
        "| traffic | first token | whole answer | tokens/s | requests/s | CPU: server | CPU: generator |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, what in KINDS.items():
        listed = turns[kind]
        wall = sum(turn.seconds for turn in listed)
        cells = [
            what.format(clients=clients),
            *(_percentiles([value for turn in listed for value in turn.got[name]]) for name in ("first", "latency")),
            f"{median(turn.tokens for turn in listed):,.0f}",
            f"{median(turn.requests for turn in listed):.1f}",
            *(f"{sum(getattr(turn, name) for turn in listed) / wall:.2f}" for name in ("server", "generator")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _memory(memory: Memory) -> list[str]:
    def told(size: float) -> str:
        return f"{size:.0f} MiB ({size / memory.begin - 1:+.1%})"

    return [
        "## Memory of the server",
        "",
        f"Resident during mixed traffic, {memory.looks} looks after the warm-up. It breathes with the "
        "keys and values of what is in the batch, so medians are compared.",
        "",
        "| begin (first third of turns) | end (last third) | turn furthest from the begin | least and greatest look "
        "| slope |",
        "|---|---|---|---|---|",
        f"| {memory.begin:.0f} MiB | {told(memory.end)} | {told(memory.furthest)} | {told(memory.low)}, "
        f"{told(memory.high)} | {memory.slope:+.2f} MiB/min |",
        "",
    ]


def _percentiles(values: Sequence[float]) -> str:
    if not values:
        return "none"
    return " / ".join(f"{value:.2f}" for value in np.percentile(values, (50, 95, 99)))


def _versions() -> str:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return "Serving: " + ", ".join(found)
