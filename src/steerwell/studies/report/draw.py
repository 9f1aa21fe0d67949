"""How figures look: small SVGs with real text, in colours that tell apart for everyone and on light and dark pages."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

INK = "#010203"  # stands for the page's own text colour
SIZE = (3.75, 3.1)  # inches; three beside each other on a desk, one on a phone
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "steerwell",
    "text.parse_math": False,
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), INK
    ),
}
_ADAPT = "svg{color:#1f2328}@media(prefers-color-scheme:dark){svg{color:#e6e8eb}}"


@dataclass(frozen=True, slots=True)
class Look:
    """How a condition is drawn, in every figure alike."""

    colour: str
    marker: str
    line: str = "-"

    @property
    def drawn(self) -> dict[str, Any]:
        """As keywords of `Axes.plot`."""
        return {"color": self.colour, "marker": self.marker, "linestyle": self.line}


_LOOKS = {  # after Okabe and Ito, darkened or lightened to stand out from both white and near-black
    "not attacked": Look(INK, "."),
    "unsteered": Look("#858c94", "x"),
    "swfc": Look("#d55e00", "o"),
    "sttp": Look("#2f83c5", "s"),
    "stmp": Look("#009e73", "^"),
    "transport": Look("#c46a9e", "D"),
    "clamp": Look("#b3831a", "v"),
    "conditional": Look("#7f6fc4", "P"),
    "directional_ablation": Look("#5f9ea0", "X"),
}


def look(name: str) -> Look:
    """Of a method or a condition; `method, matched` is the method's, dashed. Others are grey."""
    method, _, rest = name.partition(", ")
    found = _LOOKS.get(method, Look("#858c94", "*"))
    return Look(found.colour, found.marker, "--") if rest else found


def level(axes: Any, value: float, label: str) -> None:
    """A dotted line, named where it is."""
    axes.axhline(value, color=INK, linestyle=":", linewidth=1, alpha=0.6)
    axes.annotate(label, (1, value), (0, 2), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right",
                  fontsize=7.5, alpha=0.8)  # fmt: skip


def svg(draw: Callable[[Any], None], size: tuple[float, float] = SIZE) -> bytes:
    """A figure of one panel as SVG, the same bytes for the same drawing.

    Args:
        draw: draws on matplotlib axes; a legend goes below the panel, outside of it.
        size: width and height, inches.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        handles, labels = axes.get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower left", ncols=3, columnspacing=1.2, handlelength=1.8)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", file.getvalue(), flags=re.DOTALL)
    text = re.sub(r"<!DOCTYPE.*?>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", text)
    return text.replace(INK, "currentColor").replace('<style type="text/css">', f"<style>{_ADAPT}", 1).encode()
