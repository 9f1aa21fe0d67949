"""`steerwell concepts`: list the packs, show one, check a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from steerwell.apps.cli.common import Json, out, print_json
from steerwell.concepts import check_concept, concept_names, load_concept

app = typer.Typer(help="List, show and check concepts.", no_args_is_help=True)
LANGUAGES = ("english", "testbed")
Language = Annotated[str, typer.Option(help="english (real models) or testbed (the bundled model's world).")]


@app.command("list")
def list_concepts(as_json: Json = False) -> None:
    """The concepts that come with Steerwell."""
    packs = [load_concept(name, language) for language in LANGUAGES for name in concept_names(language)]
    rows = [
        {
            "concept": pack.concept,
            "language": pack.language,
            "aligned": pack.poles.aligned,
            "violating": pack.poles.violating,
            "train": len(pack.train),
            "validation": len(pack.validation),
            "test": len(pack.test),
            "malicious": len(pack.malicious),
        }
        for pack in packs
    ]
    if as_json:
        print_json(rows)
        return
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    out.print(table)


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(help="A bundled concept, or a .yaml file.")],
    language: Language = "english",
    as_json: Json = False,
) -> None:
    """One concept: what it is, its contrastive pairs, its attacks and some scenarios."""
    concept = load_concept(name, language)
    if as_json:
        print_json(concept.model_dump(mode="json", by_alias=True) | {"hash": concept.hash})
        return
    out.print(f"[bold]{concept.title}[/] ({concept.language}, {concept.hash[:12]}): {concept.description.strip()}")
    for title, texts in (
        (f"aligned: {concept.poles.aligned}", [pair.aligned for pair in concept.pairs]),
        (f"violating: {concept.poles.violating}", [pair.violating for pair in concept.pairs]),
        ("malicious, held out from fitting", concept.malicious),
        ("training scenarios", [item.prompt for item in concept.train]),
    ):
        out.print(f"\n[bold]{title}[/] ({len(texts)})")
        for text in texts[:3]:
            out.print(f"  - {text.strip()}", markup=False)


@app.command("check")
def check(
    file: Annotated[Path, typer.Argument(help="A concept file (YAML).", dir_okay=False)], as_json: Json = False
) -> None:
    """Say what is wrong with a concept file: line, field and fix. Exit code 1 if it cannot be used."""
    faults = check_concept(file)
    usable = all(fault.severity == "warning" for fault in faults)
    if as_json:
        listed = [
            {"severity": f.severity, "line": f.line, "field": f.field, "problem": f.problem, "fix": f.fix}
            for f in faults
        ]
        print_json({"file": str(file), "usable": usable, "faults": listed})
    else:
        for fault in faults:
            out.print(f"{file}: {fault.severity}: {fault}", markup=False, soft_wrap=True)
        out.print(f"{file}: {'usable' if usable else 'not usable'}, {len(faults)} fault(s)", markup=False)
    if not usable:
        raise typer.Exit(1)
