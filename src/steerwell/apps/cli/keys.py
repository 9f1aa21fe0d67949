"""`steerwell keys`: API keys of a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steerwell.apps.cli.common import Json, err, print_json

app = typer.Typer(help="API keys of a server.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """API keys of a server."""


@app.command("new")
def new(
    name: Annotated[str, typer.Argument(help="Who will hold it; logs tell this name, never the key.")],
    file: Annotated[Path, typer.Option("--file", "-f", help="Keys file that gets the key's hash.")] = Path("keys.txt"),
    as_json: Json = False,
) -> None:
    """Make a key, print it once, and append its SHA-256 hash to a keys file."""
    from steerwell.serving.keys import add_key

    key = add_key(name, file)
    if as_json:
        print_json({"name": name, "key": key, "file": str(file)})
        return
    typer.echo(key)
    err.print(f"Its hash is in {file}; the key itself is kept nowhere: store it now.", markup=False, soft_wrap=True)
