"""A paper's claims in tables."""

from __future__ import annotations

from collections.abc import Sequence

from steerwell.studies.claims import Claim
from steerwell.studies.report.text import Markdown, table


def claims(found: Sequence[Claim]) -> Markdown:
    """Every claim, and in how many cells it holds."""
    rows = []
    for claim in found:
        holds, measured = claim.tally
        if not measured:
            told = mark("unknown", "not measured")
        else:
            told = mark("holds" if holds == measured else "partly" if holds else "fails", f"{holds} of {measured}")
        rows.append([told, Markdown(f"**{claim.name}**<br>{claim.statement}"), Markdown(claim.criterion)])
    return table(("holds in", "the paper's claim", "criterion here"), rows, left=3)


def findings(found: Sequence[Claim], at: int) -> Markdown:
    """What every claim rests on in one cell."""
    mine = [(claim.name, claim.findings[at]) for claim in found]
    verdicts = {True: ("holds", "holds"), False: ("fails", "fails"), None: ("unknown", "not measured")}
    rows = [[name, mark(*verdicts[item.holds]), item.detail] for name, item in mine]
    return table(("claim", "verdict", "figures"), rows, left=3)


def tallied(found: Sequence[Claim]) -> str:
    """How many claims hold wherever they were measured, in words."""
    measured = [claim.tally for claim in found if claim.tally[1]]
    whole = sum(holds == known for holds, known in measured)
    return f"{whole} of {len(measured)} claims of the paper hold wherever they were measured"


def mark(kind: str, text: str) -> Markdown:
    """A verdict that shows, in colour on the page: `holds`, `partly`, `fails` or `unknown`."""
    sign = {"holds": "✓", "unknown": "–"}.get(kind, "✗")
    return Markdown(f'<span class="{kind}">{sign} {text}</span>')
