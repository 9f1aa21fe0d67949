"""The command line. One file per subcommand; nothing heavy is imported before a command runs."""

from __future__ import annotations

import sys

import typer
from rich.console import Console

from steerwell.apps.cli import (
    concepts,
    demo,
    detect,
    fit,
    generate,
    inspect,
    keys,
    quality,
    report,
    select,
    serve,
    study,
    sweep,
    synthesize,
)
from steerwell.core.errors import SteerwellError

app = typer.Typer(
    name="steerwell",
    help="Steer language models by their activations, and measure honestly what that does.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.add_typer(concepts.app, name="concepts")
app.command("fit")(fit.fit)
app.command("inspect")(inspect.inspect)
app.command("sweep")(sweep.sweep)
app.command("generate")(generate.generate)
app.add_typer(study.app, name="study")
app.command("report")(report.report)
app.command("select")(select.select)
app.command("synthesize")(synthesize.synthesize)
app.command("quality")(quality.quality)
app.add_typer(detect.app, name="detect")
app.command("serve")(serve.serve)
app.add_typer(keys.app, name="keys")


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from steerwell import __version__

        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 an error of ours (told on stderr), 2 wrong usage, 130 interrupted."""
    try:
        app()
    except SteerwellError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {_escaped(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
