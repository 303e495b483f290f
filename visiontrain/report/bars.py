"""Horizontal bars made of parts, as HTML: they fit any width, and need no script."""

from __future__ import annotations

import re
from collections.abc import Sequence

from visiontrain.report.page import Html, tag

Part = tuple[float, str, str]  # share of the whole width, colour (c0 to c6, or rgb(...)), meaning
Line = tuple[str, str, Sequence[Part]]  # name, what stands below it, parts


def bars(lines: Sequence[Line]) -> Html:
    """Draw a bar of parts per line; pointing at a part tells what it is."""
    cells = []
    for name, below, parts in lines:
        cells.append(tag("div", [name, tag("small", below)], {"class": "label"}))
        meaning = "; ".join(text for _, _, text in parts)
        spans = [
            tag("span", None, _look(colour, f"width:{100 * share:.3f}%") | {"title": text})
            for share, colour, text in parts
        ]
        cells.append(tag("div", spans, {"class": "bar", "role": "img", "aria-label": meaning}))
    return tag("div", cells, {"class": "bars"})


def legend(colours: Sequence[tuple[str, str]]) -> Html:
    """Say what colours mean."""
    keys = [
        tag("span", [tag("i", None, _look(colour)), tag("b", text)]) for colour, text in colours
    ]
    return tag("div", keys, {"class": "legend"})


def _look(colour: str, style: str = "") -> dict[str, str]:
    """Return the attributes of a colour, which is a class of the page's style or stands for itself.

    Raises:
        ValueError: it is neither.
    """
    if re.fullmatch(r"c\d", colour):
        return {"class": colour, "style": style}
    if not re.fullmatch(r"rgb\(\d+, \d+, \d+\)", colour):
        raise ValueError(colour)
    return {"style": f"color:{colour};{style}"}
