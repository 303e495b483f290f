"""Predicted speeds on many devices, as text and on a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from visiontrain.report.page import Content, table, tag
from visiontrain.strategies.speeds import Speed

Line = tuple[str, Sequence[Speed | None]]  # a mode, and its speeds by number of devices


@dataclass(frozen=True, slots=True)
class Extrapolation:
    """Predictions. Nothing of them was measured but the step of one device."""

    images: int  # of each device in a step
    step_s: float  # of one device
    source: str  # of that
    per_node: int
    speeds: Sequence[Speed]  # by link, then mode, then devices

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def counts(self) -> list[int]:
        """Return the numbers of devices, ascending."""
        return sorted({each.devices for each in self.speeds})

    def by_link(self) -> Iterator[tuple[str, Sequence[Line]]]:
        """Yield each link with a line per mode, which has a speed or None per number of devices."""
        for link in dict.fromkeys(each.link for each in self.speeds):
            mine = [each for each in self.speeds if each.link == link]
            lines = []
            for mode in dict.fromkeys(each.mode for each in mine):
                of = {each.devices: each for each in mine if each.mode == mode}
                lines.append((mode, [of.get(count) for count in self.counts()]))
            yield link, lines

    def basis(self) -> str:
        """Say what the predictions are made from."""
        nodes = f", {self.per_node} devices on NVLink in a machine" if self.per_node > 1 else ""
        return (
            f"images/s and efficiency of so many devices with {self.images} images each, "
            f"from {self.step_s:.3g} s a step of one ({self.source}){nodes}"
        )

    def lines(self) -> list[str]:
        """Return tables for people."""
        room = 2 + max((len(each.mode) for each in self.speeds), default=0)
        head = "".join(f"{f'W={count}':>18}" for count in self.counts())
        found = [f"predicted, not measured: {self.basis()}"]
        for link, modes in self.by_link():
            found.append(f"{link:{room + 2}}{head}")
            found += (f"  {mode:{room}}{''.join(map(_cell, speeds))}" for mode, speeds in modes)
        return found

    def as_json(self) -> dict[str, Any]:
        """Return all of it: seconds, bytes per step, and the bounds of each prediction."""
        return {
            "prediction": True,
            "images": self.images,
            "step_s": self.step_s,
            "step_source": self.source,
            "per_node": self.per_node,
            "speeds": [asdict(each) for each in self.speeds],
        }


def _cell(known: Speed | None) -> str:
    if known is None:
        return f"{'-':>18}"
    return f"{_rate(known.images_per_s):>12}{known.efficiency:6.0%}"


def _rate(images_per_s: float) -> str:
    """Write three digits: a prediction has no more."""
    rounded = float(f"{images_per_s:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:g}"


def section(found: Extrapolation | None) -> Content:
    """Show predictions on a page, in words that nobody takes for a measurement."""
    if found is None:
        return None
    head = ["mode", *(f"{count} devices" for count in found.counts())]
    numbers = range(1, len(head))
    tables = [
        [
            tag("h3", link),
            table(head, [[mode, *map(_shown, speeds)] for mode, speeds in modes], numbers),
        ]
        for link, modes in found.by_link()
    ]
    return [
        tag("h2", "Predicted for more devices, not measured"),
        tag("p", f"Speeds in {found.basis()}, over links as they head the tables."),
        tag(
            "p",
            "In parentheses: if nothing that travels hides behind computing, and if all does that "
            "could.",
            {"class": "soft"},
        ),
        *tables,
    ]


def _shown(known: Speed | None) -> str:
    if known is None:
        return "\N{EN DASH}"
    slowest, fastest = (
        _rate(known.images_per_s * known.seconds / seconds)
        for seconds in (known.slowest, known.fastest)
    )
    between = "" if slowest == fastest else f" ({slowest} to {fastest})"
    return f"{_rate(known.images_per_s)}{between}, {known.efficiency:.0%}"
