"""What one kind of study puts into its report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from steerwell.studies.report.text import Markdown, escaped

PICTURES = "figures"


class Line(Protocol):
    """One cell in a line: a frozen dataclass whose `str` tells its result."""

    @property
    def model(self) -> str:
        """The model's title."""

    @property
    def concept(self) -> str:
        """The concept's name."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure.

    Attributes:
        name: of the file, with its ending.
        alt: what it shows, for those who do not see it.
        data: the file.
    """

    name: str
    alt: str
    data: bytes


@dataclass(frozen=True)
class Album:
    """Figures that are told of together.

    Attributes:
        pictures: in the order in which they are shown.
        prefix: of their files' names.
    """

    pictures: Sequence[Picture]
    prefix: str = ""

    @property
    def images(self) -> dict[str, bytes]:
        """Contents by the address that the text gives."""
        return {self._address(item): item.data for item in self.pictures}

    def drawn(self, *names: str) -> Markdown:
        """The figures whose names begin so, beside each other; "" where there are none."""
        shown = [item for item in self.pictures if item.name.startswith(names)]
        listed = "\n".join(f"![{escaped(item.alt)}]({self._address(item)})" for item in shown)
        return Markdown(f'<div class="figures">\n\n{listed}\n\n</div>' if listed else "")

    def _address(self, picture: Picture) -> str:
        """Where a figure lies, beside the text."""
        return f"{PICTURES}/{re.sub('[^A-Za-z0-9.-]+', '-', self.prefix + picture.name)}"


@dataclass(frozen=True)
class Content:
    """A report before it is written.

    Attributes:
        title: of the kind of study.
        template: the Markdown template's file.
        fields: what it needs beside the study's name, settings, command and unfinished cells.
        albums: all figures.
        lines: every finished cell in a line.
    """

    title: str
    template: str
    fields: Mapping[str, Any]
    albums: Sequence[Album]
    lines: Sequence[Line]
