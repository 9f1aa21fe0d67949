"""What was measured, as Markdown."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

import steerwell
from benchmarks.timing import Summary

MISSED = "MISSED"
HOW_TO_READ = """\
Every ratio compares runs of one round: the contestants take turns, in an order that turns around from round to round,
so that a slow moment of the machine hits all of them. Given are the median over the rounds and the middle half of them
(first to third quartile). A ratio whose middle half spans its target is not decided by this run. Absolute figures
depend on the machine and on what else it did; compare them within one table only.

Models are float32 copies without end token, so every answer has exactly the tokens asked for. Where a vector is added
"at strength 1e-6", no token changes (checked): steered and unsteered runs do the same work but for the steering.
A model with "random" in its name has random weights: speed does not depend on their values.\
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison.

    Attributes:
        what: who is compared with whom.
        ratio: by how much.
        figures: absolute figures beside it.
        at_most: target for the ratio; None: no target.
        at_least: the same the other way around.
    """

    what: str
    ratio: Summary
    figures: str
    at_most: float | None = None
    at_least: float | None = None

    @property
    def verdict(self) -> str:
        """Whether the median meets the target."""
        if self.at_most is not None:
            return f"{'met' if self.ratio.median <= self.at_most else MISSED} (<= {self.at_most:g})"
        if self.at_least is not None:
            return f"{'met' if self.ratio.median >= self.at_least else MISSED} (>= {self.at_least:g})"
        return ""


@dataclass(frozen=True, slots=True)
class Section:
    """A table with a note on what was done."""

    title: str
    note: str
    rows: list[Row] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """Title, note, table, remarks."""
        lines = [f"## {self.title}", "", self.note, ""]
        if self.rows:
            lines += ["| what | ratio | middle half | rounds | target | absolute |", "|---|---|---|---|---|---|"]
            for row in self.rows:
                spread = f"{row.ratio.low:.3f} to {row.ratio.high:.3f}"
                cells = (row.what, f"**{row.ratio.median:.3f}**", spread, str(row.ratio.n), row.verdict, row.figures)
                lines.append("| " + " | ".join(cells) + " |")
            lines.append("")
        return "\n".join([*lines, *(f"- {remark}" for remark in self.remarks), *([""] if self.remarks else [])])


def document(sections: Sequence[Section], versions: Sequence[str], seconds: float) -> str:
    """The whole report."""
    missed = [
        f"- {section.title}: {row.what}: {row.ratio.median:.3f}, {row.verdict}"
        for section in sections
        for row in section.rows
        if row.verdict.startswith(MISSED)
    ]
    summary = ["Not reached in this run:", "", *missed] if missed else ["Every target was met in this run."]
    head = ["# Speed", "", "Written by `make bench`; do not edit.", "", *machine(versions, seconds), "", *summary, ""]
    body = [section.markdown() for section in sections]
    return "\n".join([*head, "## How to read this", "", HOW_TO_READ, "", *body])


def machine(versions: Sequence[str], seconds: float) -> list[str]:
    """Where and when this was measured."""
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "not known"
    here = (
        f"steerwell {steerwell.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}"
    )
    return [
        f"- Machine: {_cpu()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, {platform.system()}",
        f"- Versions: {here}",
        *(f"- {line}" for line in versions),
        f"- Date: {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC; {seconds / 60:.1f} minutes; "
        f"load average at the end {load}",
    ]


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def differences(name: str, plain: Sequence[Sequence[int]], got: Sequence[Sequence[int]]) -> list[str]:
    """A remark where tokens are not those of the unsteered run: rounding may turn a near tie between two tokens."""
    rows = sum(list(left) != list(right) for left, right in zip(plain, got, strict=True))
    return [f"{name}: {rows} of {len(plain)} rows differ from ours unsteered (near ties)"] if rows else []


def per_second(count: float, summary: Summary, unit: str = "tokens/s") -> str:
    """A throughput from seconds, for a table."""
    return f"{count / summary.median:,.0f} {unit}"
