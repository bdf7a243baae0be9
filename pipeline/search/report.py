"""``search/report.html``: one page that shows a search, made from its directory alone, readable without a network."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pydantic
from markupsafe import Markup

from cluster import storage
from cluster.errors import UserError
from pipeline.loading import parse_yaml
from pipeline.pages import render
from pipeline.search import findings
from pipeline.search.findings import Effect, Gain
from pipeline.search.importance import MIN_TRIALS, importances
from pipeline.search.options import Dimension, SearchOptions
from pipeline.search.table import TRIALS_FILE, read_trials
from pipeline.search.trial import Measured, State, Trial
from pipeline.status_text import duration

REPORT_FILE = "search/report.html"
SEARCH_FILE = "search/search.yaml"
FINAL_FILE = "search/final.json"
# Rows of the table of trials.
TOP = 10
STATES: list[State] = ["finished", "stopped", "failed", "running"]
# The weight of the BN loss is what a search is asked about first.
FOREMOST = "recover.r_bn"

Record = dict[str, Any]


def write_search_report(out: str, *, dry_run: bool = False) -> str:
    """Render ``OUT/search/report.html`` from ``trials.parquet``, ``search.yaml`` and ``final.json`` beside it.

    ``search.yaml`` is the resolved configuration with its ``search`` section. ``final.json`` has the full runs:
    ``default`` and ``winner``, each with ``out`` and ``top1`` (student → accuracy of each seed, percent), the winner
    also with its ``number``, 0 where it is the default. Where it or the table of trials is missing, the page says so.

    Args:
        out: directory of the search, local or ``s3://``.
        dry_run: render, write nothing.

    Returns:
        Path of the page.

    Raises:
        UserError: ``search.yaml`` is missing, or a file is damaged.
    """
    text, config, options = read_search(out)
    try:
        trials = read_trials(storage.join(out, TRIALS_FILE))
    except (FileNotFoundError, NotADirectoryError):
        trials = []
    rungs = findings.planned_rungs(options)
    best = findings.winner(trials, rungs)
    final = read_final(out)
    page = render(
        "search.html.j2",
        name=config.get("name", "search"),
        recipe=config.get("recipe", "prism"),
        seed=config.get("seed", 0),
        options=options,
        text=text,
        rungs=_rungs(options, rungs),
        trials=trials,
        time=duration(sum(rung.seconds for trial in trials for rung in trial.rungs)),
        final=final,
        gains=gains(final),
        best=best,
        best_top1=best and findings.top1(best),
        default_top1=next((findings.top1(t) for t in findings.completed(trials, rungs) if t.number == 0), None),
        table=_table(trials, rungs, list(options.space), best),
        fields=_field_charts(trials, rungs, options.space),
        importances=_importances(trials, rungs, options.space),
        min_trials=MIN_TRIALS,
        effects=_effects(trials),
        progress=_progress(trials, rungs),
        pareto=_pareto(trials, rungs) if len(options.objectives) > 1 else None,
        states=[(state, sum(trial.state == state for trial in trials)) for state in STATES],
        failures=_failures(trials),
        units=_units(trials),
    )
    report = storage.join(out, REPORT_FILE)
    if not dry_run:
        storage.write_bytes(report, page.encode())
    return report


# What is read


def read_search(out: str) -> tuple[str, Record, SearchOptions]:
    """``search.yaml``: its text, its values, and its ``search`` section.

    Raises:
        UserError: it is missing or damaged.
    """
    where = storage.join(out, SEARCH_FILE)
    try:
        text = storage.read_bytes(where).decode()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{out}: {SEARCH_FILE} is missing; `prism search` with the configuration makes it") from None
    config = parse_yaml(text, where)
    try:
        return text, config, SearchOptions.model_validate(config["search"])
    except (KeyError, TypeError, pydantic.ValidationError):
        raise UserError(f"{where} has no valid section `search`; run the search again") from None


def read_final(out: str) -> Record | None:
    """What the full runs found; None while they have not run.

    Raises:
        UserError: ``final.json`` is damaged.
    """
    where = storage.join(out, FINAL_FILE)
    try:
        found = storage.read_json(where)
        number = int(found["winner"]["number"])
        # The default that won has one run, not two.
        runs = {"default": found["default"], "winner": found["winner"] if number else found["default"]}
        return {"number": number, **{name: _full_run(run) for name, run in runs.items()}}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{where} does not say what the full runs found; delete it and run the search again") from None


def _full_run(found: Mapping[str, Any]) -> Record:
    top1 = {str(student): [float(value) for value in values] for student, values in found["top1"].items()}
    return {"out": str(found["out"]), "top1": {student: values for student, values in top1.items() if values}}


# The result


def gains(final: Record | None) -> dict[str, Gain]:
    """Of every student that both full runs have."""
    if final is None:
        return {}
    default, winner = final["default"]["top1"], final["winner"]["top1"]
    return {
        student: findings.gain(default[student], winner[student], final["number"])
        for student in default
        if student in winner
    }


def _rungs(options: SearchOptions, rungs: int) -> list[str]:
    """What each rung changes, in words."""
    return [
        ", ".join(f"{field} = {readable(value)}" for field, value in overrides.items()) or "the configuration as it is"
        for overrides in options.rungs[-rungs:]
    ]


def _table(trials: Sequence[Trial], rungs: int, space: Sequence[str], best: Trial | None) -> Record:
    """The best trials and the default."""
    order = findings.ranked(trials, rungs)
    shown = order[:TOP]
    shown += [trial for trial in order[TOP:] if trial.number == 0]
    # Fields that follow from searched ones stand behind them.
    fields = list(dict.fromkeys([*space, *(field for trial in trials for field in trial.point)]))
    return {
        "fields": fields,
        "rows": [
            {
                "trial": trial,
                "best": best is not None and trial.number == best.number,
                "values": [readable(trial.point[field]) if field in trial.point else "–" for field in fields],
                "rungs": [_cell(trial.rungs[i]) if i < len(trial.rungs) else None for i in range(rungs)],
            }
            for trial in shown
        ],
        "cut": len(order) - len(shown),
    }


def _cell(rung: Measured) -> Record:
    return {"mean": rung.top1, "sd": statistics.stdev(rung.top1_seeds) if len(rung.top1_seeds) > 1 else None}


def readable(value: Any) -> str:
    """A field's value as people write it."""
    if isinstance(value, list):
        return ", ".join(map(readable, value)) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# What made a difference


def _field_charts(trials: Sequence[Trial], rungs: int, space: Mapping[str, Dimension]) -> list[Record]:
    """A chart for each field of numbers that some measured trial has a value of."""
    # Plotting takes a second to import, which the command line should not pay at its start.
    from pipeline.search.charts import field_chart

    charts = []
    for field in sorted((f for f, d in space.items() if d.bounds), key=lambda f: f != FOREMOST):
        valued = [trial for trial in trials if isinstance(trial.point.get(field), int | float)]
        points = [[(t.point[field], t.rungs[i].top1) for t in valued if len(t.rungs) > i] for i in range(rungs)]
        default = [(t.point[field], rung.top1) for t in valued if t.number == 0 for rung in t.rungs]
        if any(points):
            dimension = space[field]
            label = f"Top-1 on the search split against {field}, by rung"
            chart = field_chart(field, points, default, dimension.bounds, dimension.log is not None, label)
            charts.append({"field": field, "svg": Markup(chart)})
    return charts


def _importances(trials: Sequence[Trial], rungs: int, space: Mapping[str, Dimension]) -> list[Record]:
    from pipeline.search.charts import importance_chart

    return [
        {
            "found": one,
            "svg": Markup(importance_chart(one.shares, one.chance, f"Importance of each parameter at rung {one.rung}")),
            "beyond": [name for name, share in one.shares.items() if share > one.chance[name]],
        }
        for one in importances(trials, rungs, space)
        if one.shares
    ]


def _effects(trials: Sequence[Trial]) -> list[Record]:
    """Per list of teachers: its chart, None where every teacher is always in, and its rows."""
    from pipeline.search.charts import effect_chart

    by_field: dict[str, list[Effect]] = defaultdict(list)
    for effect in findings.teacher_effects(trials):
        by_field[effect.field].append(effect)
    out = []
    for field, effects in by_field.items():
        known = [(e.teacher, e.difference, e.error) for e in effects if e.difference is not None]
        known.sort(key=lambda bar: -bar[1])
        label = f"Difference in top-1 of trials with and without each teacher in {field}"
        out.append({"field": field, "rows": effects, "svg": Markup(effect_chart(known, label)) if known else None})
    return out


# The course


def _progress(trials: Sequence[Trial], rungs: int) -> list[Record]:
    """Best so far, by number of the trial and by time."""
    from pipeline.search.charts import best_chart

    curve = findings.best_so_far(trials, rungs)
    if not curve:
        return []
    unit, size = next(u for u in (("h", 3600), ("min", 60), ("s", 1)) if curve[-1].seconds >= 2 * u[1] or u[1] == 1)
    values, best = [step.top1 for step in curve], [step.best for step in curve]
    numbers = best_chart([step.number for step in curve], values, best, "trial", "Best top-1 until each trial")
    times = best_chart([step.seconds / size for step in curve], values, best, f"time of the jobs added up, {unit}",
                       "Best top-1 against time spent")  # fmt: skip
    return [{"title": "By trial", "svg": Markup(numbers)}, {"title": "By time spent", "svg": Markup(times)}]


def _pareto(trials: Sequence[Trial], rungs: int) -> Record | None:
    from pipeline.search.charts import pareto_chart

    def place(trial: Trial) -> tuple[float, float]:
        return trial.rungs[-1].gpu_seconds, findings.top1(trial)

    done, front = findings.completed(trials, rungs), findings.pareto_front(trials, rungs)
    if not done:
        return None
    chart = pareto_chart([place(trial) for trial in done], [(trial.number, *place(trial)) for trial in front],
                         [place(trial) for trial in done if trial.number == 0],
                         "Top-1 against planned GPU-seconds, and the trials that no other beats in both")  # fmt: skip
    return {"svg": Markup(chart), "rows": [(trial.number, *place(trial)) for trial in front]}


def _failures(trials: Sequence[Trial]) -> list[Record]:
    """Reasons, the most frequent first, with the trials that failed by them."""
    failed = [trial for trial in trials if trial.state == "failed"]
    counts = Counter(trial.reason for trial in failed)
    return [
        {"reason": reason or "no reason given", "numbers": [t.number for t in failed if t.reason == reason]}
        for reason, _ in counts.most_common()
    ]


def _units(trials: Sequence[Trial]) -> Record:
    units = sum(rung.units for trial in trials for rung in trial.rungs)
    shared = sum(rung.units_shared for trial in trials for rung in trial.rungs)
    return {"all": units, "shared": shared, "rate": shared / units if units else None}
