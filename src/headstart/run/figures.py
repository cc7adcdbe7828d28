"""The report's pictures, as inline SVG."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, CHOSEN, OTHER, BASELINE = "#1f2933", "#cbd2d9", "#0b7285", "#829ab1", "#c92a2a"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: searchable, small, and in the reader's font
    "svg.hashsalt": "headstart",  # the same figures give the same bytes
    "text.parse_math": False,  # a class may be called $x$
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def svg_of(width: float, height: float, draw: Any) -> str:
    """Draw on one pair of axes and hand over the SVG element, without the XML prologue."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure: Figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.subplots())
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def ranking(rows: Sequence[Mapping[str, Any]], baselines: Mapping[str, float]) -> str:
    """Predicted accuracy of each source with its interval, best on top, and the baselines as lines."""
    known = [row for row in rows if row.get("predicted")]

    def draw(axes: Axes) -> None:
        for k, row in enumerate(reversed(known)):
            p, colour = row["predicted"], CHOSEN if row.get("chosen") else OTHER
            axes.plot([p["low"], p["high"]], [k, k], color=colour, lw=3, solid_capstyle="round", alpha=0.55)
            axes.plot(p["accuracy"], k, "o", color=colour, ms=8)
        axes.set_yticks(range(len(known)), [row["source"] for row in reversed(known)])
        axes.set_ylim(-0.6, len(known) - 0.4)
        _baseline_lines(axes, baselines)
        axes.set_xlabel("predicted accuracy, with interval")
        axes.grid(axis="x", color=FAINT, lw=0.6)

    return svg_of(7.2, 0.9 + 0.32 * max(len(known), 3), draw) if known else ""


def cost(candidates: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy in selection against seconds spent: what each route bought."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    known = [c for c in candidates if c.get("selection") and c.get("seconds")]

    def draw(axes: Axes) -> None:
        for c in known:
            s = c["selection"]
            colour = CHOSEN if c.get("chosen") else BASELINE if c.get("role") == "baseline" else OTHER
            axes.plot([c["seconds"]] * 2, [s["low"], s["high"]], color=colour, lw=2.5, alpha=0.5)
            axes.plot(c["seconds"], s["accuracy"], "s" if c.get("role") == "baseline" else "o", color=colour, ms=8)
            axes.annotate(c["name"], (c["seconds"], s["accuracy"]), xytext=(8, 5), textcoords="offset points")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(x=0.25, y=0.12)
        axes.set_xlabel("seconds (log scale)")
        axes.set_ylabel("accuracy in selection")
        axes.grid(color=FAINT, lw=0.6)

    return svg_of(7.2, 3.8, draw) if known else ""


def confusion(matrix: Sequence[Sequence[float]], classes: Sequence[str]) -> str:
    """Rows are the true classes; the shade is the share of the row."""
    counts = np.asarray(matrix, dtype=float)
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    n = len(counts)
    names = [name if len(name) <= 14 else name[:13] + "…" for name in classes]

    def draw(axes: Axes) -> None:
        axes.imshow(shares, cmap="GnBu", vmin=0, vmax=1)
        for (i, j), value in np.ndenumerate(counts):
            if value and n <= 20:
                axes.text(j, i, f"{value:.0f}", ha="center", va="center", color="white" if shares[i, j] > 0.55 else INK)
        if n <= 40:
            short = max(map(len, names)) < 4
            axes.set_xticks(range(n), names, rotation=0 if short else 50, ha="center" if short else "right")
            axes.set_yticks(range(n), names)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        axes.spines[:].set_visible(False)

    side = float(np.clip(1.6 + 0.42 * n, 3.2, 8.5))
    return svg_of(side, side, draw)


def calibration(bins: Sequence[Mapping[str, Any]]) -> str:
    """How often it is right when it says p; the diagonal is perfect. Dot area follows the number of examples."""
    known = [b for b in bins if b.get("n")]

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=FAINT, lw=1.5)
        sizes = [20 + 380 * b["n"] / max(b["n"] for b in known) for b in known]
        axes.scatter([b["confidence"] for b in known], [b["accuracy"] for b in known], s=sizes, color=CHOSEN, alpha=0.7)
        axes.set(xlim=(0, 1.02), ylim=(0, 1.05), xlabel="confidence it states", ylabel="share it gets right")
        axes.grid(color=FAINT, lw=0.6)

    return svg_of(4.6, 4.2, draw) if known else ""


def bars(rows: Sequence[tuple[str, float, Sequence[float] | None]], xlabel: str) -> str:
    """A horizontal bar for each (name, value, interval or None); the first is the one that matters."""

    def draw(axes: Axes) -> None:
        for k, (name, value, interval) in enumerate(reversed(rows)):
            first = k == len(rows) - 1
            axes.barh(k, value, color=CHOSEN if first else OTHER, height=0.62)
            if interval:
                axes.plot(interval, [k, k], color=INK, lw=2)
            text, end = f"{name}   {100 * value:.1f} %", max(value, *(interval or [0.0]))
            wide = 0.0125 * len(text)  # about what it takes of the axis
            beside = value < wide < 1 - end
            axes.text(end + 0.012 if beside else 0.012, k, text, va="center", color="white" if value > wide else INK)
        axes.set_yticks([])
        axes.set_xlim(0, 1)
        axes.set_xlabel(xlabel)

    return svg_of(7.2, 0.8 + 0.48 * len(rows), draw) if rows else ""


def heat(
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    below: Sequence[Sequence[str]] = (),
    framed: Sequence[tuple[int, int]] = (),
    good: bool = False,
) -> str:
    """Shares as cells with their percentage in them; None is unknown.

    Args:
        values: rows of shares.
        rows: their names.
        columns: names of the columns, above them.
        below: a smaller second line of each cell; left out where cells are narrow.
        framed: (row, column) of cells to frame.
        good: whether a high share is good, and so blue, not red.
    """
    shares = np.array([[np.nan if v is None else v for v in row] for row in values], dtype=float)
    n, m = shares.shape
    flat = m * max(len(line) for name in columns for line in name.split("\n")) <= 50

    def draw(axes: Axes) -> None:
        axes.imshow(shares, cmap="GnBu" if good else "OrRd", vmin=0, vmax=1, aspect="auto")
        for (i, j), value in np.ndenumerate(shares):
            ink = "white" if value > (0.7 if good else 0.6) else INK
            two = bool(below) and m <= 6
            text = "?" if np.isnan(value) else f"{100 * value:.0f} %" if m <= 8 else f"{100 * value:.0f}"
            axes.text(j, i - 0.13 * two, text, ha="center", va="center", color=ink, fontsize=12 if two else 11)
            if two:
                axes.text(j, i + 0.25, below[i][j], ha="center", va="center", color=ink, fontsize=9)
        for i, j in framed:
            axes.add_patch(_frame(i, j))
        axes.set_xticks(range(m), columns, rotation=0 if flat else 40, ha="center" if flat else "left")
        axes.set_yticks(range(n), rows)
        axes.tick_params(length=0, labeltop=True, labelbottom=False)
        axes.set_xticks(np.arange(m - 1) + 0.5, minor=True)
        axes.set_yticks(np.arange(n - 1) + 0.5, minor=True)
        axes.grid(which="minor", color="white", lw=2)
        axes.tick_params(which="minor", length=0)
        axes.spines[:].set_visible(False)

    return svg_of(6.4, (0.7 if flat else 1.5) + (0.58 if below else 0.34) * n, draw)


def _frame(row: int, column: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.46, row - 0.45), 0.92, 0.9, fill=False, edgecolor=INK, lw=1.5)


def _baseline_lines(axes: Axes, baselines: Mapping[str, float]) -> None:
    for k, (name, value) in enumerate(sorted(baselines.items(), key=lambda item: item[1])):
        axes.axvline(value, color=BASELINE, lw=1.2, ls="--")
        axes.annotate(
            name, (value, 1.0), xycoords=("data", "axes fraction"), ha="right", xytext=(-3, 2 + 12 * (k % 3)),
            textcoords="offset points", color=BASELINE, fontsize=9,
        )  # fmt: skip


def png(pixels: np.ndarray) -> str:
    """A uint8 picture (h, w, 3) as a data URI."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
