"""`steerwell demo`: the main job on the bundled model - fit, attack, steer, compare."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.columns import Columns
from rich.panel import Panel
from rich.table import Table

from steerwell.apps.cli.common import Json, load_engine, out, print_json, progress
from steerwell.testbed.bundled import BUNDLED

if TYPE_CHECKING:
    from steerwell.concepts import Concept
    from steerwell.studies.defence import Configuration, Outcome

METHODS = ("swfc", "sttp", "stmp")
STRENGTHS = {"swfc": (0.5, 1, 2, 3), "sttp": (0, 3, 6, 12, 24), "stmp": (1, 1.5, 2, 3)}


def demo(
    concept: Annotated[str, typer.Option("--concept", "-c", help="One of the bundled concepts.")] = "dishonesty",
    scenarios: Annotated[int, typer.Option(min=8, help="Test scenarios per condition.")] = 40,
    as_json: Json = False,
) -> None:
    """Fit a direction on the bundled model, attack it with held-out system prompts, and defend it with three methods.

    Layer and strength of each method are chosen on validation scenarios and attacks; the table reports test ones.
    """
    from steerwell.concepts import load_concept
    from steerwell.core.records import Sampling
    from steerwell.scoring.judges.exact import ExactJudge
    from steerwell.studies.defence import attack_prompts, baseline_prompts, choose, grid, measure
    from steerwell.studies.fitting import contrast

    engine = load_engine(BUNDLED, "float32", None, None, 64, False)
    pack, judge, greedy = load_concept(concept, engine.info.language), ExactJudge(), Sampling(max_new_tokens=128)

    def say(text: str) -> None:
        if not as_json:
            out.print(text)

    say(f"[bold]1. Learn[/] {pack.concept!r} from the model's own answers to {len(pack.train)} scenarios")
    with progress("answers", 2 * len(pack.train)) as advance:
        direction = contrast(engine, pack, progress=advance).direction()

    configurations = grid(range(1, engine.info.n_layers - 1), STRENGTHS)
    say(
        f"[bold]2. Choose[/] layer and strength of each method: {len(configurations)} configurations on validation data"
    )
    edits = [None, *(configuration.edit(direction) for configuration in configurations)]
    asked = baseline_prompts(pack, "validation", 12), attack_prompts(pack, "validation", 12)
    with progress("answers", len(asked[0]) + len(edits) * len(asked[1])) as advance:
        (healthy,) = measure(engine, judge, pack, asked[0], [None], greedy, advance)
        _, *tried = measure(engine, judge, pack, asked[1], edits, greedy, advance)
    chosen: list[Configuration] = []
    for method in METHODS:
        mine = [index for index, item in enumerate(configurations) if item.method == method]
        best = choose([tried[index] for index in mine], healthy)
        if best is not None:
            chosen.append(configurations[mine[best]])

    say(f"[bold]3. Attack and defend[/] on {scenarios} test scenarios under system prompts that nothing above has seen")
    with progress("answers", scenarios * (len(chosen) + 2)) as advance:
        (aligned,) = measure(engine, judge, pack, baseline_prompts(pack, "test", scenarios), [None], greedy, advance)
        attack = attack_prompts(pack, "test", scenarios)
        attacked, *steered = measure(
            engine, judge, pack, attack, [None, *(item.edit(direction) for item in chosen)], greedy, advance
        )
    names = [
        "not attacked",
        "attacked",
        *(f"attacked + {c.method}, layer {c.layer}, strength {c.strength:g}" for c in chosen),
    ]
    outcomes = [aligned, attacked, *steered]
    if as_json:
        print_json({"concept": pack.concept, "conditions": [_row(n, o) for n, o in zip(names, outcomes, strict=True)]})
        return
    _show(pack, names, outcomes)


def _row(name: str, outcome: Outcome) -> dict[str, Any]:
    return {
        "condition": name,
        "trait": outcome.trait,
        "coherence": outcome.coherence,
        "tokens_edited": outcome.gate_rate,
        "displacement": outcome.perturbation,
        "n": len(outcome.responses),
    }


def _show(pack: Concept, names: list[str], outcomes: list[Outcome]) -> None:
    trait = f"{pack.poles.aligned} (0-100)"
    table = Table(
        "condition",
        trait,
        "coherence (0-100)",
        "tokens edited",
        "displacement",
        title=f"n = {len(outcomes[0].responses)}",
    )
    for name, item in zip(names, outcomes, strict=True):
        share, moved = f"{item.gate_rate:.0%}", f"{item.perturbation:.2f}"
        table.add_row(name, f"{item.trait:.1f}", f"{item.coherence:.1f}", share, moved)
    out.print(table)
    out.print("[bold]The same questions, answer by answer[/]")
    for index in range(3):
        prompt = outcomes[1].responses[index].prompt
        out.print(
            f"\n[dim]system (attack):[/] {prompt.messages[0].content}\n[dim]user:[/] {prompt.messages[-1].content}"
        )
        panels = [
            Panel(item.responses[index].text, title=f"{name}: {item.verdicts[index].trait:.0f}", width=38)
            for name, item in zip(("not attacked", "attacked", *METHODS), outcomes, strict=False)
        ]
        out.print(Columns(panels))
