"""Markdown as one HTML page that needs nothing else: styles and images are inside, and there are no scripts."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markdown_it.token import Token

from steerwell.studies.report.text import escaped

TEMPLATES = FileSystemLoader(Path(__file__).parent / "templates")
_KINDS = {".svg": "image/svg+xml", ".png": "image/png"}


def fill(template: str, **fields: Any) -> str:
    """A Markdown template filled in; whatever is not `Markdown` is escaped."""
    environment = Environment(  # noqa: S701 - `escaped` does what autoescape does, for Markdown
        loader=TEMPLATES, undefined=StrictUndefined, finalize=escaped, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(fields)


def page(markdown: str, title: str, images: Mapping[str, bytes]) -> str:
    """The page of a Markdown text.

    Args:
        markdown: trusted but for what `escaped` wrote; HTML in it is kept.
        title: of the window.
        images: contents by the address that the text gives; they go into the page.
    """
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    tokens = parser.parse(markdown)
    for token in tokens:
        _put_in(token, images)
    body = parser.renderer.render(tokens, parser.options, {})
    body = body.replace("<table>", '<div class="scroll" tabindex="0"><table>').replace("</table>", "</table></div>")
    frame = Environment(loader=TEMPLATES, undefined=StrictUndefined, autoescape=True)
    return frame.get_template("page.html.j2").render(title=title, body=_Trusted(body))


class _Trusted(str):
    """HTML that is not to be escaped again."""

    __slots__ = ()

    def __html__(self) -> str:
        return self


def _put_in(token: Token, images: Mapping[str, bytes]) -> None:
    """Exchange the addresses of images for the images."""
    for part in token.children or ():
        if part.type == "image":
            address = str(part.attrs["src"])
            kind = _KINDS[Path(address).suffix]
            part.attrs["src"] = f"data:{kind};base64,{base64.b64encode(images[address]).decode()}"
