"""Charts as inline SVG that takes text colour and background from the page, so it suits light and dark."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Middle tones that stand out from white and from near-black alike, told apart by dashes as well as by hue.
Dashes = str | tuple[int, tuple[int, int]]
STYLES: list[tuple[str, Dashes]] = [
    ("#3d7fd9", "-"),
    ("#d9722e", "--"),
    ("#2f9e74", "-."),
    ("#b45fb8", ":"),
    ("#8a8f2c", (0, (6, 1))),
]
# Stands for the page's text colour until the SVG is written.
INK = "#010203"
# More classes than this do not fit as named bars.
MAX_BARS = 30


@dataclass(frozen=True)
class Curve:
    """One method's accuracy over training.

    Attributes:
        name: of the method.
        epochs: where it was measured.
        seeds: top-1 in percent of each seed at these epochs.
    """

    name: str
    epochs: list[int]
    seeds: list[list[float]]

    @property
    def mean(self) -> list[float]:
        """Over seeds."""
        return [sum(values) / len(values) for values in zip(*self.seeds, strict=True)]


def accuracy_chart(curves: list[Curve], label: str) -> str:
    """Top-1 against epochs: the mean of the seeds, and each seed as a thin line behind it."""
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for curve, (colour, dashes) in zip(curves, styles(len(curves)), strict=True):
        marker = "o" if len(curve.epochs) < 3 else None
        for values in curve.seeds:
            axes.plot(curve.epochs, values, color=colour, linewidth=0.8, alpha=0.45, marker=marker, markersize=3)
        axes.plot(curve.epochs, curve.mean, color=colour, linestyle=dashes, linewidth=2, label=curve.name)
    axes.set_xlabel("epoch")
    axes.set_ylabel("top-1, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", alpha=0.2, color=INK)
    return as_svg(figure, label)


def cosine_chart(class_names: list[str], series: dict[str, list[float | None]], label: str) -> str:
    """Intra-class cosine similarity of each class: bars, or sorted curves where classes are many.

    Args:
        class_names: in label order.
        series: name → value of each class, None where a class has no pair.
        label: says in words what the chart shows.
    """
    count = len(class_names)
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / max(1, len(series))
    for index, ((name, values), (colour, dashes)) in enumerate(zip(series.items(), styles(len(series)), strict=True)):
        known = [(label, value) for label, value in enumerate(values) if value is not None]
        if count <= MAX_BARS:
            places = [label + (index - (len(series) - 1) / 2) * width for label, _ in known]
            hatch = "" if index == 0 else "////"
            axes.bar(places, [v for _, v in known], width, label=name, color=colour, edgecolor=INK, linewidth=0.4,
                     hatch=hatch)  # fmt: skip
        else:
            axes.plot(sorted(v for _, v in known), color=colour, linestyle=dashes, linewidth=2, label=name)
    if count <= MAX_BARS:
        long = max(map(len, class_names)) > 6 or count > 12
        names = [plain(name) for name in class_names]
        axes.set_xticks(range(count), names, rotation=40 if long else 0, ha="right" if long else "center")
    else:
        axes.set_xlabel("classes, sorted by similarity")
    axes.set_ylabel("cosine similarity")
    axes.grid(axis="y", alpha=0.2, color=INK)
    return as_svg(figure, label)


def styles(count: int) -> list[tuple[str, Dashes]]:
    """Colour and dashes of so many series; they come again after the fifth."""
    return [STYLES[i % len(STYLES)] for i in range(count)]


def plain(name: str) -> str:
    """A name as text of a chart, where dollars would begin a formula."""
    return name.replace("$", r"\$")


def as_svg(figure: Figure, label: str) -> str:
    """The figure as an element of a page; ``label`` says in words what it shows."""
    for axes in figure.axes:
        axes.set_facecolor("none")
        axes.tick_params(which="both", colors=INK, labelcolor=INK)
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
        for name, spine in axes.spines.items():
            spine.set_visible(name in ("left", "bottom"))
            spine.set_color(INK)
        # Above the chart, where it covers no data.
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, labelcolor=INK, loc="lower left", bbox_to_anchor=(0, 1), ncols=4)
    out = io.StringIO()
    # The salt keeps the ids of several charts on one page apart, and the same for the same chart.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _inline(out.getvalue(), label)


def _inline(svg: str, label: str) -> str:
    """From a document to an element of a page: no address of any other place, no ids that nothing refers to."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = svg.replace(INK, "currentColor")
    label = label.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
