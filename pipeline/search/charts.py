"""Charts of a search, in the style of ``pipeline/charts.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from pipeline.charts import INK, MAX_BARS, as_svg, plain, styles

Point = tuple[float, float]
MARKERS = ["o", "s", "^", "D", "v"]
# Longer names leave no room for the bars; their ends tell them apart.
MAX_NAME = 40


def field_chart(
    field: str,
    rungs: Sequence[Sequence[Point]],
    default: Sequence[Point],
    bounds: Point | None,
    log: bool,
    label: str,
) -> str:
    """Top-1 against the values of a field.

    Args:
        field: path.
        rungs: of each rung, from the cheapest, (value, top-1) of every trial; one without any is left out.
        default: those of them that are the configuration's own, which are ringed.
        bounds: of the search, which are shaded.
        log: whether the values' axis is logarithmic; values that have no logarithm are left out.
        label: says in words what the chart shows.
    """
    figure, axes = _figure()
    if log:
        rungs = [[point for point in points if point[0] > 0] for points in rungs]
        default = [point for point in default if point[0] > 0]
    for index, (points, (colour, _)) in enumerate(zip(rungs, styles(len(rungs)), strict=True)):
        if points:
            last = index == len(rungs) - 1
            axes.plot(*_columns(points), MARKERS[index % len(MARKERS)], color=colour, alpha=1 if last else 0.65,
                      markersize=6 if last else 4.5, label=f"rung {index + 1}")  # fmt: skip
    _ring(axes, default)
    if bounds:
        axes.axvspan(*bounds, color=INK, alpha=0.05, linewidth=0)
    axes.set_xlabel(plain(field))
    axes.set_ylabel("top-1 on the search split, %")
    if log:
        _log_axis(axes, [*(value for points in rungs for value, _ in points), *(bounds or ())])
    return as_svg(figure, label)


def importance_chart(shares: Mapping[str, float], chance: Mapping[str, float], label: str) -> str:
    """A bar for each parameter, the greatest on top, and a mark where chance alone reaches.

    Bars that end before their mark are pale; a mark beyond 100 % is an arrow.
    """
    names = list(shares)[:MAX_BARS]
    figure, axes = _bars(names)
    colour = styles(1)[0][0]
    for row, name in enumerate(names):
        clear = shares[name] > chance[name]
        axes.barh(row, 100 * shares[name], 0.62, color=colour, alpha=1 if clear else 0.4, linewidth=0)
        if chance[name] <= 1:
            axes.plot([100 * chance[name]] * 2, [row - 0.4, row + 0.4], color=INK, linewidth=1.6)
        else:
            axes.plot(100, row, ">", color=INK, markersize=5, clip_on=False)
    axes.plot([], [], "|", color=INK, markersize=11, markeredgewidth=1.6, label="chance: passed in 1 case of 20")
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the importance of all, %")
    return as_svg(figure, label)


def effect_chart(effects: Sequence[tuple[str, float, float | None]], label: str) -> str:
    """Differences in top-1 as bars from zero.

    Args:
        effects: (name, difference, its standard error or None), from the top.
        label: says in words what the chart shows.
    """
    figure, axes = _bars([name for name, _, _ in effects])
    (good, _), (bad, _) = styles(2)
    for row, (_, difference, error) in enumerate(effects):
        axes.barh(row, difference, 0.62, color=good if difference >= 0 else bad, alpha=0.75, linewidth=0)
        if error is not None:
            axes.errorbar(difference, row, xerr=error, color=INK, linewidth=1.2, capsize=3)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xlabel("points of top-1: with it minus without it, ± standard error")
    return as_svg(figure, label)


def best_chart(xs: Sequence[float], values: Sequence[float], best: Sequence[float], xlabel: str, label: str) -> str:
    """Trials as points, and the best value until each as a line."""
    figure, axes = _figure()
    (line, _), (dots, _) = styles(2)
    axes.plot(xs, values, "o", color=dots, markersize=4.5, label="trial")
    axes.step(
        xs, best, where="post", color=line, linewidth=2, marker="o" if len(xs) == 1 else None, label="best so far"
    )
    axes.set_xlabel(xlabel)
    axes.set_ylabel("top-1 on the search split, %")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=xlabel == "trial"))
    return as_svg(figure, label)


def pareto_chart(
    points: Sequence[Point], front: Sequence[tuple[int, float, float]], default: Sequence[Point], label: str
) -> str:
    """Top-1 against planned GPU-seconds.

    Args:
        points: (GPU-seconds, top-1) of every trial.
        front: (number, GPU-seconds, top-1) of those that no other beats in both, from the cheapest.
        default: that of the configuration itself, which is ringed.
        label: says in words what the chart shows.
    """
    figure, axes = _figure()
    (line, _), (dots, _) = styles(2)
    axes.plot(*_columns(points), "o", color=dots, markersize=4.5, label="trial")
    axes.step(*_columns([(x, y) for _, x, y in front]), where="post", color=line, linewidth=2, marker="o", markersize=6,
              label="none is both better and cheaper")  # fmt: skip
    for number, x, y in front:
        axes.annotate(str(number), (x, y), xytext=(0, 7), textcoords="offset points", ha="center", color=INK)
    axes.margins(y=0.12)
    _ring(axes, default)
    axes.set_xlabel("planned GPU-seconds")
    axes.set_ylabel("top-1 on the search split, %")
    costs = [x for x, _ in points]
    if min(costs) > 0 and max(costs) > 10 * min(costs):
        _log_axis(axes, costs)
    return as_svg(figure, label)


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(axis="y", alpha=0.2, color=INK)
    axes.set_axisbelow(True)
    return figure, axes


def _bars(names: Sequence[str]) -> tuple[Figure, Axes]:
    """A row for each name, the first on top."""
    figure = Figure(figsize=(7.2, 1.1 + 0.3 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    short = [name if len(name) <= MAX_NAME else "…" + name[1 - MAX_NAME :] for name in names]
    axes.set_yticks(range(len(names)), [plain(name) for name in short])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.2, color=INK)
    axes.set_axisbelow(True)
    return figure, axes


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _ring(axes: Axes, points: Sequence[Point]) -> None:
    if points:
        axes.plot(*_columns(points), "o", markersize=12, markerfacecolor="none", color=INK, label="default")


def _log_axis(axes: Axes, values: Sequence[float]) -> None:
    axes.set_xscale("log")
    # Plain numbers, and enough of them where the values are close.
    close = not values or max(values) < 50 * min(values)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if close else (1.0,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
