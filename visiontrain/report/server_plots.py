"""What parameter servers did in a run: how old gradients were, what workers' time went into."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from visiontrain.report.figure import INK, STRONG, name_lines, new_figure, save, sign, style

OLDEST = 20  # updates: what is older shares the last bar
TIMES = ("computing", "reading and pushing", "waiting for others")


def servers_plot(metrics: Mapping[str, Any], path: Path) -> Path:
    """Draw what metrics.json says of updates and workers to `path`."""
    names = list(metrics["gradients"])
    figure = new_figure(11, float(np.clip(1.8 + 0.3 * len(names), 3.4, 14)))
    counts = np.zeros(OLDEST + 1)
    for age, updates in metrics["stalenesses"].items():
        counts[min(int(age), OLDEST)] += updates
    oldest = max(int(counts.nonzero()[0].max(initial=0)), 1)
    title = "Updates between reading and applying"
    axes = style(figure.add_subplot(1, 2, 1), title, "updates", "% of all updates", pad=22)
    axes.bar(range(oldest + 1), 100 * counts[: oldest + 1] / max(1, counts.sum()), color=STRONG)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if oldest == OLDEST:
        axes.set_xticks([0, 5, 10, 15, OLDEST], ["0", "5", "10", "15", f"{OLDEST} or more"])

    axes = style(figure.add_subplot(1, 2, 2), "Time of the workers", "seconds", pad=22)
    waited, worked, exchanged = (
        np.array([metrics[key][name] for name in names])
        for key in ("waited_s", "worked_s", "exchanged_s")
    )
    left, lines = np.zeros(len(names)), []
    for number, seconds in enumerate((worked - exchanged, exchanged, waited)):
        colour = sign(number)[0]
        axes.barh(range(len(names)), seconds, 0.7, left=left, color=colour)
        left += seconds
        lines.append(axes.plot([], [], color=colour, linewidth=5)[0])
    labels = [f"{name}: {metrics['gradients'][name]:,} gradients" for name in names]
    axes.set_yticks(range(len(names)), labels, color=INK)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    name_lines(axes, lines, TIMES)
    return save(figure, path)
