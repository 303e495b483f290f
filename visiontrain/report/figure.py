"""What all plots share: colours, a figure that needs no screen, and how it becomes a file."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from matplotlib import font_manager
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Text

# Okabe and Ito's palette (jfly.uni-koeln.de/color), told apart by colour-blind eyes; its yellow
# is left out, being hard to see on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STRONG, FAINT, INK, GRID = "#0072B2", "#B8C4CC", "#1F2933", "#DDE3E8"
DASHES = ("-", "--", ":")  # a second sign beside the colour, once the palette is used up
DPI = 120
FAST = 1  # compression of PNG: half the time, a fifth larger
SCRIPTS = (  # beside DejaVu, which is shipped with matplotlib, if the machine has them
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "WenQuanYi Zen Hei",
    "Hiragino Sans",
    "PingFang SC",
    "Microsoft YaHei",
    "Malgun Gothic",
    "Arial Unicode MS",
)


def new_figure(width: float, height: float) -> Figure:
    """Make a figure of `width` x `height` inches that no other code of the process sees."""
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)  # inches around each plot
    figure = Figure((width, height), dpi=DPI, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def style(axes: Axes, title: str, x: str = "", y: str = "", pad: float = 6.0) -> Axes:
    """Give `axes` a title `pad` points above them, labels, a light grid, and no frame."""
    axes.set_facecolor("white")
    axes.set_title(title, fontsize=12, color=INK, loc="left", pad=pad)
    axes.set_xlabel(x, fontsize=10, color=INK)
    axes.set_ylabel(y, fontsize=10, color=INK)
    axes.tick_params(labelsize=9, colors=INK, length=0)
    axes.grid(visible=True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    return axes


def sign(number: int) -> tuple[str, str]:
    """Return the colour and the dashes of line `number`."""
    return PALETTE[number % len(PALETTE)], DASHES[number // len(PALETTE) % len(DASHES)]


def name_lines(
    axes: Axes, lines: Sequence[Artist], names: Sequence[str], title: str | None = None
) -> None:
    """Say which line is which: in a row above the plot, or to the right of it under `title`.

    Never on the plot, where it would cover some of the lines. Names are set after the legend is
    made: matplotlib leaves out those that start with `_`.
    """
    legend = axes.legend(
        lines,
        [str(number) for number in range(len(lines))],
        fontsize=9,
        title=title,
        title_fontsize=9,
        alignment="left",
        frameon=False,
        borderpad=0.0 if title is None else 0.4,
        borderaxespad=0.2 if title is None else 0.0,
        ncols=len(lines) if title is None else 1,
        columnspacing=1.2,
        handlelength=1.4 if title is None else 2.0,
        loc="lower left" if title is None else "upper left",
        bbox_to_anchor=(0.0, 1.0) if title is None else (1.01, 1.0),
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)


def short(name: str, length: int = 24) -> str:
    """Return `name` on one line, its middle left out where it is longer than `length`."""
    name = " ".join(name.split())
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[:half]}…{name[-half:]}"


def save(figure: Figure, path: Path) -> Path:
    """Write `figure` to `path` as PNG, whatever script the names in it are in."""
    known = font_manager.get_font_names()
    family = ["DejaVu Sans", *(font for font in SCRIPTS if font in known)]
    for text in figure.findobj(Text):
        if isinstance(text, Text):
            text.set_fontfamily(family)
            text.set_parse_math(False)  # a `$` in a class name is a dollar
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        # A letter that no font knows is drawn as a box; the plot is good without it.
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        figure.savefig(
            path, format="png", metadata={"Software": None}, pil_kwargs={"compress_level": FAST}
        )
    figure.clear()
    return path
