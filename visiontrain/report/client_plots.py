"""Who trained in a federated run: what images each client has, and how well it is served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes

from visiontrain.report.figure import INK, name_lines, new_figure, save, short, sign, style

CLASSES = 12  # with a colour of their own; the others share one
HATCHES = {"-": "", "--": "///", ":": "..."}  # of the same colour, by its line's dashes
Clients = Mapping[str, Mapping[str, Any]]


def clients_plot(clients: Clients, names: Sequence[str], path: Path) -> Path:
    """Draw what metrics.json says of clients to `path`."""
    figure = new_figure(11, float(np.clip(1.8 + 0.3 * len(clients), 3.4, 14)))
    _images(figure.add_subplot(1, 2, 1), clients, names)
    _scores(figure.add_subplot(1, 2, 2), clients)
    return save(figure, path)


def _rows(axes: Axes, clients: Clients) -> None:
    labels = [f"client {number}" for number in clients]
    axes.set_yticks(range(len(labels)), labels, color=INK)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")


def _images(axes: Axes, clients: Clients, names: Sequence[str]) -> None:
    """Draw images by the class that each has most of, where that is known."""
    style(axes, "Training images", "images", pad=22)
    known = [clients[number].get("classes") for number in clients]
    if not all(known):
        axes.barh(range(len(clients)), [own["images"] for own in clients.values()], 0.7)
        _rows(axes, clients)
        return
    counts = np.array(known)
    order = np.argsort(-counts.sum(axis=0), kind="stable")
    order = order[counts.sum(axis=0)[order] > 0]
    groups = [[k] for k in order[:CLASSES].tolist()]
    groups += [order[CLASSES:].tolist()] if len(order) > CLASSES else []
    left, drawn, labels = np.zeros(len(counts)), list[Artist](), list[str]()
    for number, group in enumerate(groups):
        values = counts[:, group].sum(axis=1)
        colour, dashes = sign(number)
        look = {"color": colour, "hatch": HATCHES[dashes], "edgecolor": "white"}
        drawn.append(axes.barh(range(len(counts)), values, 0.7, left=left, **look)[0])
        left += values
        many = f"{len(group)} others"
        labels.append(many if len(group) > 1 else short([*names, "none"][group[0]], 12))
    _rows(axes, clients)
    name_lines(axes, drawn, labels, "most of")


def _scores(axes: Axes, clients: Clients) -> None:
    """Draw scores on each client's own images: of the common weights, of those it made last."""
    style(axes, "Scores on each client's own images", "score", pad=22)
    places, drawn = np.arange(len(clients)), []
    titles = {"common_score": "the server's weights", "own_score": "its own, before they met"}
    for number, key in enumerate(titles):
        values = [np.nan if own.get(key) is None else own[key] for own in clients.values()]
        marker = "o" if key == "common_score" else "D"
        drawn += axes.plot(values, places, marker, color=sign(number)[0], markersize=7)
    _rows(axes, clients)
    name_lines(axes, drawn, list(titles.values()))
