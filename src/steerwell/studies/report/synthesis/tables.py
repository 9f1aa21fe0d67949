"""The tables of a synthesis report, as Markdown. Intervals are 95 % bootstrap ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from steerwell.scoring.intervals import Interval
from steerwell.studies.claims import Claim
from steerwell.studies.report.claims import mark
from steerwell.studies.report.synthesis.measures import DIGITS, MISSING, NAMES, Cell, Overview
from steerwell.studies.report.text import Markdown, escaped, number, spread, table
from steerwell.studies.synthesis.analysis import MEASURES, consistency, top
from steerwell.studies.synthesis.arms import BY_HM3, ORIGINAL, PROMPTED, STEERED, UNSTEERED
from steerwell.synthesis.examples import VIOLATING, Example

AXES = ("success", "coherence", "diversity", "hm3")
BEST = 5  # configurations listed by each rule


def overviews(cells: Sequence[Overview]) -> Markdown:
    """All cells, one per row; each leads to its section."""
    header = ("model, concept", "originals", "few originals", "unsteered", "broken", "best prompted", "best steered",
              "steered by HM3", "steered less prompted", "beat prompting", "probe")  # fmt: skip
    rows = []
    for at, cell in enumerate(cells, 1):
        name = f"[{escaped(cell.model)}, {escaped(cell.concept)}](#cell-{at})"
        if cell.unmeasurable:
            name += f"<br>{mark('unknown', 'not measurable')}"
        few = "<br>".join(f"{_count(arm)}: {number(found.estimate, DIGITS)}" for arm, found in cell.few.items())
        figures = [cell.unsteered, cell.broken, cell.prompted, cell.steered, cell.by_hm3, cell.difference]
        beating = f"{cell.beating} of {cell.configurations}" if cell.configurations else ""
        rows.append([Markdown(name), spread(cell.original, DIGITS), Markdown(few),
                     *(spread(found, DIGITS) for found in figures), beating, spread(cell.probe, DIGITS)])  # fmt: skip
    return table(header, rows)


def detectors(cell: Cell) -> Markdown:
    """Everything that is singled out: its texts' quality and what detectors trained on them are worth."""
    header = ["violating training texts", "texts", "S", "C", "D", "HM3", "AUROC, validation", "AUROC, test", "by seed",
              "AUPRC", "FPR at 95 % TPR", "F1", "ECE"]  # fmt: skip
    if cell.encoders:
        header.append("encoder: AUROC, test")
    rows = []
    for name, found in cell.detections.items():
        at = cell.roles.get(name)
        seeds = [number(edge(found.seeds["auroc"]), DIGITS) for edge in (min, max)]
        row = [_role(cell, name), *(_quality(cell, at) if at is not None else [""] * 6), spread(found.auroc, DIGITS),
               Markdown(" to ".join(seeds)) if len(found.seeds["auroc"]) > 1 else "",
               *(number(part.estimate, 2) for part in (found.auprc, found.fpr95, found.f1, found.ece))]  # fmt: skip
        if cell.encoders:
            row.append(spread(cell.encoders[name].auroc, DIGITS) if name in cell.encoders else "")
        rows.append(row)
    return table(header, rows)


def encoders(cells: Sequence[Cell]) -> Markdown:
    """AUROC of fine-tuned encoders, a row per cell that has them; "" where there are none."""
    run = [cell for cell in cells if cell.encoders]
    roles = list(dict.fromkeys(role for cell in run for role in cell.encoders))
    rows = []
    for cell in run:
        found = [cell.encoders[role].auroc if role in cell.encoders else MISSING for role in roles]
        compared = cell.encoder_difference
        difference = MISSING if compared is None else compared.difference
        rows.append([cell.title, *(spread(each, DIGITS) for each in [*found, difference])])
    return table(("model, concept", *roles, "best steered less best prompted"), rows)


def comparisons(cell: Cell) -> Markdown:
    """Paired differences between what is singled out."""
    rows = [
        [f"{_short(one)} less {_short(other)}", spread(found.difference, DIGITS), number(found.p, 3)]
        for (one, other), found in cell.differences.items()
    ]
    if (found := cell.encoder_difference) is not None:
        told = f"{_short(STEERED)} less {_short(PROMPTED)}, fine-tuned encoders"
        rows.append([told, spread(found.difference, DIGITS), number(found.p, 3)])
    return table(("AUROC of detectors trained on", "difference", "p"), rows)


def correlations(found: Mapping[str, Mapping[str, Interval]], cells: Mapping[str, Sequence[Cell]]) -> Markdown:
    """Every measure's rank correlation with AUROC: a row per concept, and the lowest of them."""
    rows: list[list[object]] = [
        [
            concept,
            len(cells[concept]),
            max(item.n for item in each.values()),
            *(spread(each[name], 2) for name in MEASURES),
        ]
        for concept, each in found.items()
    ]
    if len(found) > 1:
        lowest = consistency(found)
        told = [f"{number(low, 2)}<br><small>{_sign(low, same)}</small>" for low, same in map(lowest.get, MEASURES)]  # type: ignore[misc]
        rows.append([Markdown("**lowest**"), "", "", *map(Markdown, told)])
    return table(("concept", "models", "configurations", *(NAMES[name] for name in MEASURES)), rows)


def cell_correlations(cell: Cell) -> Markdown:
    """The same of one cell."""
    found = cell.correlations
    row = [spread(found[name], 2) for name in MEASURES]
    return table(("Spearman with AUROC", *(NAMES[name] for name in MEASURES)), [["steered configurations", *row]])


def regrets(cells: Sequence[Cell]) -> Markdown:
    """AUROC that every rule gives away: a row per measurable cell, and their mean."""
    cells = [cell for cell in cells if cell.unmeasurable is None]
    found = [{item.rule: item.regret for item in cell.selections} for cell in cells]
    rules = list(dict.fromkeys(rule for each in found for rule in each))
    rows: list[list[object]] = [
        [cell.title, *(number(each.get(rule, math.nan), DIGITS) for rule in rules)]
        for cell, each in zip(cells, found, strict=True)
    ]
    if len(found) > 1:
        means = [float(np.mean([each.get(rule, math.nan) for each in found])) for rule in rules]
        rows.append([Markdown("**mean**"), *(number(mean, DIGITS) for mean in means)])
    return table(("model, concept", *(NAMES.get(rule, rule) for rule in rules)), rows)


def selections(cell: Cell) -> Markdown:
    """What every rule picks."""
    rows = []
    for item in cell.selections:
        picked = "mean of all" if item.picked is None else cell.result.arms[item.picked]["arm"]
        rows.append([NAMES.get(item.rule, item.rule), picked, number(item.auroc, DIGITS), number(item.regret, DIGITS)])
    return table(("picked by", "configuration", "AUROC, test", "regret"), rows, left=2)


def falsifiers(cells: Sequence[Cell], claims: Sequence[Claim]) -> Markdown:
    """Whether diverse data beat successful data, cell by cell."""
    verdicts = {True: ("holds", "diversity helps"), False: ("fails", "diversity may be an artifact here")}
    unknown = {True: "no pairs", False: "not measurable"}
    claim = next(claim for claim in claims if claim.name == "diversity matters")
    rows = []
    for cell, finding in zip(cells, claim.findings, strict=True):
        found = cell.falsifier
        sides = found.difference
        figures = (MISSING,) * 3 if sides is None else (sides.first, sides.second, sides.difference)
        verdict = ("unknown", unknown[cell.unmeasurable is None]) if finding.holds is None else verdicts[finding.holds]
        rows.append([cell.title, mark(*verdict), len(found.pairs), *(spread(part, DIGITS) for part in figures),
                     spread(found.partial, 2)])  # fmt: skip
    header = ("model, concept", "verdict", "pairs", "AUROC, weak and diverse", "AUROC, strong and successful",
              "difference", "D and AUROC, S and C held fixed")  # fmt: skip
    return table(header, rows, left=2)


def configurations(cell: Cell) -> Markdown:
    """The best by validation AUROC and by HM3, steered and prompted."""
    rules = (("steered", "validation", "auroc_validation"), ("steered", "HM3", "hm3"),
             ("prompted", "validation", "auroc_validation"))  # fmt: skip
    rows = []
    for source, rule, measure in rules:
        for place, at in enumerate(top(cell.result, measure, BEST, source), 1):
            auroc = number(cell.result.auroc(at), DIGITS)
            rows.append([f"{source} by {rule}, {place}", cell.result.arms[at]["arm"], *_quality(cell, at), auroc])
    header = ("best", "configuration", "texts", "S", "C", "D", "HM3", "AUROC, validation", "AUROC, test")
    return table(header, rows, left=2)


def examples(cell: Cell, count: int) -> list[tuple[str, Markdown]]:
    """What the singled out writers answer to the first prompts: the prompt and the table of answers."""
    roles = {name: cell.roles[name] for name in (STEERED, BY_HM3, PROMPTED, UNSTEERED) if name in cell.roles}
    if roles.get(BY_HM3) == roles.get(STEERED):
        roles.pop(BY_HM3, None)
    said = {name: _by_prompt(cell.result.texts(str(cell.result.arms[at]["arm"]))) for name, at in roles.items()}
    prompts = list(dict.fromkeys(prompt for each in said.values() for prompt in each))[:count]
    shown = []
    for prompt in prompts:
        answers = {name: each[prompt] for name, each in said.items() if prompt in each}
        scores = [Markdown(f"S {number(item.success, 2)}, C {number(item.coherence, 2)}") for item in answers.values()]
        rows = [[_said(item.response) for item in answers.values()], scores]
        shown.append((prompt, table([_role(cell, name) for name in answers], rows, left=len(answers))))
    return shown


def violations(cell: Cell, count: int) -> Markdown:
    """The first real violations of the test set."""
    found = [example for example in cell.result.test if example.label == VIOLATING][:count]
    return table(("prompt", "response"), [[item.prompt, _said(item.response)] for item in found], left=2)


def _quality(cell: Cell, at: int) -> list[object]:
    """Texts, S, C, D, HM3 and validation AUROC of an arm."""
    axes = [number(cell.result.value(at, name), 2) for name in AXES]
    return [cell.result.arms[at]["texts"], *axes, number(cell.result.value(at, "auroc_validation"), DIGITS)]


def _role(cell: Cell, name: str) -> Markdown:
    """A role and, in small print, the configuration that has it."""
    at = cell.roles.get(name)
    arm = name if at is None else str(cell.result.arms[at]["arm"])
    if name == "probe":
        probe = cell.result.about["probe"]
        arm = f"{probe['reading']}, layer {probe['layer']}"
    small = f"<br><small>{escaped(arm)}</small>" if arm != name else ""
    return Markdown(f"**{escaped(name)}**{small}")


def _short(name: str) -> str:
    return {STEERED: "best steered", PROMPTED: "best prompted", ORIGINAL: "originals"}.get(name, name)


def _count(arm: str) -> str:
    """How many originals an arm of few has."""
    return escaped(arm.removeprefix(f"{ORIGINAL}, "))


def _sign(lowest: float, same: bool) -> str:
    if math.isnan(lowest):
        return ""
    return ("all above 0" if lowest > 0 else "none above 0") if same else "signs differ"


def _by_prompt(examples: Sequence[Example]) -> dict[str, Example]:
    """The first answer to every prompt."""
    found: dict[str, Example] = {}
    for example in examples:
        found.setdefault(example.prompt, example)
    return found


def _said(response: str) -> Markdown:
    return escaped(response) if response.strip() else Markdown("<i>an empty answer</i>")
