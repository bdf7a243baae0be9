"""``report.html``: one page that shows a run, made from its directory alone and readable without a network."""

from __future__ import annotations

import base64
import statistics
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from markupsafe import Markup

from cluster import shards, storage
from cluster.errors import UserError
from pipeline.describe import human
from pipeline.loading import parse_yaml
from pipeline.pages import render
from pipeline.rundir import RUN_FILE
from pipeline.summary import SUMMARY_FILE, read_records

REPORT_FILE = "report.html"
RANDOM_REAL = "random_real"
# Images shown: enough to judge by eye, few enough for a page that opens at once.
MAX_CLASSES = 10
MAX_PER_CLASS = 4
MAX_IMAGE_BYTES = 6_000_000
# Up to so many images per class, the losses are also shown for each of them.
MAX_LOSS_ROWS = 50

Record = dict[str, Any]


def write_report(out: str, *, dry_run: bool = False) -> str:
    """Render ``OUT/report.html`` from ``summary.json``, ``run.yaml``, ``eval/``, ``recovered/``, ``init/``, cards.

    Parts of a run that are not there (no students yet, noise as initial images) are left out of the page. With
    ``dry_run`` it is rendered and not written. Returns its path.

    Raises:
        UserError: ``out`` has no ``summary.json``.
    """
    where = storage.join(out, SUMMARY_FILE)
    try:
        summary = storage.read_json(where)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{out}: {SUMMARY_FILE} is missing; `prism run` with the run's configuration makes it"
        ) from None
    except ValueError:
        raise UserError(f"{where} is not valid JSON; delete it and run the configuration again") from None
    run_text = storage.read_bytes(storage.join(out, RUN_FILE)).decode()
    run = parse_yaml(run_text, RUN_FILE)
    students = list((run.get("evaluate") or {}).get("students") or {})
    # In the order of the configuration; read_records goes by file name.
    results = sorted(read_records(out), key=lambda r: students.index(r["student"]) if r["student"] in students else 0)
    units = _read_units(storage.join(out, "recovered"))
    class_names: list[str] = next((unit["class_names"] for unit in units), [])
    page = render(
        "report.html.j2",
        summary=summary,
        run=run,
        run_text=run_text,
        headline=_headline(results, summary["recipe"]),
        results=_result_rows(results, summary["recipe"]),
        curves=_curve_charts(results, summary["recipe"]),
        gallery=_gallery(out, units, class_names),
        diversity=_diversity(summary["diversity"], class_names),
        losses=_losses(units),
        teachers=_teachers(out, run),
        seconds=[(stage, _duration(value)) for stage, value in summary["seconds"].items()],
        total_seconds=_duration(sum(summary["seconds"].values())),
        sizes=[(name, human(size)) for name, size in summary["bytes"].items()],
    )
    report = storage.join(out, REPORT_FILE)
    if not dry_run:
        storage.write_bytes(report, page.encode())
    return report


# Accuracy


def _order(method: str, recipe: str) -> tuple[int, str]:
    """The method itself first, then its baselines."""
    return (0 if method == recipe else 1 if method == RANDOM_REAL else 2, method)


def _grouped(results: list[Record], recipe: str) -> dict[tuple[str, str], dict[str, list[Record]]]:
    """(student, protocol) → method → one record per seed."""
    # Students stay in the order they come in.
    groups: dict[tuple[str, str], dict[str, list[Record]]] = {(r["student"], r["protocol"]): {} for r in results}
    for record in sorted(results, key=lambda r: (r["protocol"], _order(r["method"], recipe), r["seed"])):
        groups[record["student"], record["protocol"]].setdefault(record["method"], []).append(record)
    return groups


def _spread(records: list[Record], field: str) -> dict[str, float | None]:
    values = [record[field] for record in records]
    return {
        "mean": statistics.mean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
    }


def _headline(results: list[Record], recipe: str) -> list[Record]:
    """Per student: the method, the random real images, and the difference."""
    out = []
    for (student, protocol), methods in _grouped(results, recipe).items():
        if recipe not in methods:
            continue
        mine = methods[recipe]
        row: Record = {
            "student": student,
            "protocol": protocol,
            "method": recipe,
            "ipc": mine[0]["ipc"],
            "seeds": len(mine),
            "last": _spread(mine, "top1_last"),
            "best": _spread(mine, "top1_best"),
            "random": None,
        }
        if RANDOM_REAL in methods and recipe != RANDOM_REAL:
            row["random"] = _spread(methods[RANDOM_REAL], "top1_last")
            row["random_best"] = _spread(methods[RANDOM_REAL], "top1_best")
            row["margin"] = row["last"]["mean"] - row["random"]["mean"]
        out.append(row)
    return out


def _result_rows(results: list[Record], recipe: str) -> list[Record]:
    return [
        {
            "student": student,
            "protocol": protocol,
            "method": method,
            "ipc": records[0]["ipc"],
            "epochs": records[0]["epochs"],
            "seeds": len(records),
            **{field: _spread(records, field) for field in ("top1_last", "top1_best", "top5_last")},
        }
        for (student, protocol), methods in _grouped(results, recipe).items()
        for method, records in methods.items()
    ]


def _curve_charts(results: list[Record], recipe: str) -> list[Record]:
    # Plotting takes a second to import, which `prism run` should not pay at its start.
    from pipeline.charts import Curve, accuracy_chart

    charts = []
    for (student, protocol), methods in _grouped(results, recipe).items():
        curves = []
        for method, records in methods.items():
            # Seeds of one method share a configuration, but a changed val_every may have left older results.
            epochs = sorted(set.intersection(*({p["epoch"] for p in r["curve"]} for r in records)))
            points = [{p["epoch"]: p["top1"] for p in r["curve"]} for r in records]
            curves.append(Curve(method, epochs, [[values[e] for e in epochs] for values in points]))
        label = f"Top-1 accuracy of {student} ({protocol}) over training, by method"
        charts.append({"title": f"{student}, {protocol}", "svg": Markup(accuracy_chart(curves, label))})
    return charts


# Images and losses


def _read_units(folder: str) -> list[Record]:
    """What the shards of a folder say, without their images."""
    columns = ["image_id", "label", "ipc", "source_id", "loss_ce", "loss_bn", "bn_teachers", "iterations"]

    def read(name: str) -> Record | None:
        uri = storage.join(folder, name)
        metadata = shards.shard_metadata(uri)
        if metadata is None:
            return None
        rows = shards.read_shard(uri, columns).to_pylist()
        return {"uri": uri, "name": name, "class_names": metadata["class_names"], "rows": rows}

    with ThreadPoolExecutor(shards.READERS) as pool:
        return [unit for unit in pool.map(read, storage.list_files(folder, ".parquet")) if unit]


def _gallery(out: str, units: list[Record], class_names: list[str]) -> Record | None:
    """Real initial images beside what became of them; classes spread evenly where they are many."""
    if not units:
        return None
    count = len(class_names)
    shown = min(MAX_CLASSES, count)
    labels = [round(i * (count - 1) / max(1, shown - 1)) for i in range(shown)]
    indices = sorted({row["ipc"] for unit in units for row in unit["rows"]})[:MAX_PER_CLASS]
    pairs: dict[tuple[int, int], Record] = {}
    size = 0
    for ipc in indices:
        column: dict[tuple[int, int], Record] = {}
        for unit in units:
            wanted = {r["image_id"] for r in unit["rows"] if r["ipc"] == ipc and r["label"] in labels}
            if not wanted:
                continue
            distilled = _images(unit["uri"], wanted)
            real = _images(storage.join(out, "init", unit["name"]), wanted)
            for row in unit["rows"]:
                if row["image_id"] in wanted:
                    key = (row["label"], ipc)
                    column[key] = {
                        "distilled": distilled[row["image_id"]],
                        "real": real.get(row["image_id"]),
                        "source": row["source_id"],
                    }
        size += sum(len(p["distilled"]) + len(p["real"] or "") for p in column.values())
        if pairs and size > MAX_IMAGE_BYTES:
            break
        pairs |= column
    kept = sorted({ipc for _, ipc in pairs})
    return {
        "indices": kept,
        "has_real": any(pair["real"] for pair in pairs.values()),
        "rows": [{"name": class_names[y], "pairs": [pairs.get((y, ipc)) for ipc in kept]} for y in labels],
        "all_classes": count == shown,
    }


def _images(uri: str, wanted: set[int]) -> dict[int, str]:
    """Image id → data URI, for those of a shard; none where there is no such shard."""
    if not storage.exists(uri):
        return {}
    table = shards.read_shard(uri, ["image", "image_id"])
    return {
        image_id: "data:image/png;base64," + base64.b64encode(image["bytes"]).decode()
        for image_id, image in zip(table["image_id"].to_pylist(), table["image"].to_pylist(), strict=True)
        if image_id in wanted
    }


def _losses(units: list[Record]) -> Record | None:
    """BN loss of every teacher: over all images, and for each IPC index, whose subset of teachers it shows."""
    by_teacher: dict[str, list[float]] = defaultdict(list)
    by_index: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    details: dict[int, Record] = {}
    for unit in units:
        for row in unit["rows"]:
            for teacher, loss in zip(row["bn_teachers"] or [], row["loss_bn"] or [], strict=True):
                by_teacher[teacher].append(loss)
                by_index[row["ipc"]][teacher].append(loss)
            entry = details.setdefault(row["ipc"], {"ce": [], "iterations": row["iterations"]})
            entry["ce"].append(row["loss_ce"])
    if not by_teacher:
        return None
    names = sorted(by_teacher)
    rows = [
        {
            "ipc": ipc,
            "iterations": details[ipc]["iterations"],
            "ce": _mean(details[ipc]["ce"]),
            "bn": [_mean(by_index[ipc].get(name, [])) for name in names],
        }
        for ipc in sorted(details)
    ]
    return {
        "teachers": [
            {
                "name": name,
                "images": len(by_teacher[name]),
                "mean": _mean(by_teacher[name]),
                "low": min(by_teacher[name]),
                "high": max(by_teacher[name]),
            }
            for name in names
        ],
        "names": names,
        "rows": rows if len(rows) <= MAX_LOSS_ROWS else [],
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


# The rest


def _diversity(found: Record, class_names: list[str]) -> Record | None:
    from pipeline.charts import cosine_chart

    sets = {name: found[name] for name in ("real", "distilled") if found.get(name)}
    if not any(value is not None for entry in sets.values() for value in entry["per_class"]):
        return None
    names = class_names or [str(i) for i in range(max(len(entry["per_class"]) for entry in sets.values()))]
    label = "Intra-class cosine similarity of each class, " + " and ".join(sets)
    chart = cosine_chart(names, {name: entry["per_class"] for name, entry in sets.items()}, label)
    return {"model": found["feature_model"], "sets": sets, "svg": Markup(chart), "names": names}


def _teachers(out: str, run: Record) -> list[Record]:
    recover, relabel = run.get("recover", {}), run.get("relabel", {})
    roles = {
        "cross-entropy": recover.get("logit_teachers", []),
        "BN statistics": recover.get("bn_teachers", []),
        "labels": relabel.get("teachers", []),
    }
    rows = []
    for name in run.get("teachers", {}):
        where = storage.join(out, "teachers", name, "card.json")
        if storage.exists(where):
            used = [role for role, names in roles.items() if name in names]
            rows.append({"name": name, "roles": ", ".join(used) or "not used", **storage.read_json(where)})
    return rows


def _duration(seconds: float) -> str:
    """Seconds as people say them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
