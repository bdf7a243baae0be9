"""``summary.json``: the run in numbers, from the run directory alone."""

from __future__ import annotations

from typing import Any

from cluster import storage
from pipeline.config import Config
from pipeline.rundir import read_seconds

SUMMARY_FILE = "summary.json"
RESULT_FIELDS = [
    "method", "recipe", "student", "protocol", "seed", "ipc", "epochs", "top1_last", "top1_best", "top5_last",
]  # fmt: skip


def _size(uri: str) -> int:
    return sum(storage.list_files(uri, ".parquet").values())


def read_records(out: str) -> list[dict[str, Any]]:
    """Students that ``summary.json`` names, one record each, curves included.

    Files of students that were taken out of the configuration may still be there; they are not read.
    """
    folder = storage.join(out, "eval")
    wanted = [_key(result) for result in storage.read_json(storage.join(out, SUMMARY_FILE))["results"]]
    files = [storage.read_json(storage.join(folder, name)) for name in storage.list_files(folder, ".json")]
    return [record for record in files if _key(record) in wanted]


def _key(record: dict[str, Any]) -> list[Any]:
    return [record[name] for name in ("method", "student", "protocol", "seed")]


def write_summary(
    config: Config, results: list[dict[str, Any]], *, units: dict[str, int], diversity: dict[str, Any]
) -> dict[str, Any]:
    """Collect and write the summary.

    Args:
        config: of the run.
        results: records of the students.
        units: planned, done, retried.
        diversity: intra-class cosine similarities.
    """
    out = config.out
    summary = {
        "name": config.name,
        "recipe": config.recipe,
        "config_sha256": config.sha256(),
        "seed": config.seed,
        "results": [{key: record[key] for key in RESULT_FIELDS} for record in results],
        "diversity": diversity,
        "bytes": {
            "images": _size(storage.join(out, "recovered")),
            "labels": _size(storage.join(out, "labels", "distilled")),
        },
        "seconds": read_seconds(out),
        "units": units,
    }
    storage.write_json(storage.join(out, SUMMARY_FILE), summary)
    return summary
