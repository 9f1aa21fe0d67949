"""Reports read back: their tables as lists of words, a page's tags, and a text that would break a careless one."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser

HOSTILE = "a | b\n\n# <script>alert(1)</script>\n</td></table> `c` **d** ![e](http://evil.example/x.png) \\| <!-- $f$"


def seen(cell: str) -> str:
    """What a reader sees of a cell of a Markdown table."""
    bare = re.sub(r"\[(.*?)\]\(#.*?\)", r"\1", re.sub(r"<[^>]*>", " ", cell)).replace("**", "").replace("`", "")
    return re.sub(" +", " ", html.unescape(bare)).strip(" ")


def markdown_tables(text: str) -> list[list[list[str]]]:
    """Every table by splitting lines at their bars, without the rules below their heads."""
    found, last = [], ""
    for line in text.splitlines():
        if line.startswith("|"):
            if not last.startswith("|"):
                found.append([])
            if not re.fullmatch(r"[|: -]+", line):
                found[-1].append([seen(cell) for cell in line.strip()[1:-1].split("|")])
        last = line
    return found


class Tables(HTMLParser):
    """Every table of a page, and every tag."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.found: list[list[list[str]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside = False
        self.feed(source)

    def handle_starttag(self, tag: str, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.found.append([])
        elif tag == "tr":
            self.found[-1].append([])
        elif tag in ("td", "th"):
            self.found[-1][-1].append("")
            self.inside = True
        elif self.inside:
            self.found[-1][-1][-1] += " "

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.inside = False
        elif self.inside:
            self.found[-1][-1][-1] += " "

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.found[-1][-1][-1] += data
