"""What will be done and what came out, for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from cluster.errors import UserError
from cluster.progress import console
from pipeline.config import Config
from pipeline.plan import Estimate, estimate, make_plan
from pipeline.preflight import check_networks
from stages.recover.unit import RecoverUnit
from stages.relabel.unit import label_bytes
from stages.teachers.describe import NetworkFacts


def class_count(config: Config) -> int:
    """Classes, from the configuration or else from the data.

    Raises:
        UserError: neither knows.
    """
    from cluster.shards import load_dataset

    data = config.data
    if data.num_classes is not None or data.class_names is not None:
        return data.num_classes or len(data.class_names or [])
    if data.train is None:
        raise UserError("data.num_classes: is needed to plan without data.train")
    return len(load_dataset(data.train, "data.train").class_names)


def cost(config: Config, units: Sequence[RecoverUnit], networks: dict[str, NetworkFacts], num_classes: int) -> Estimate:
    """Estimate of a plan."""
    labels = label_bytes(config.recover.ipc * num_classes, num_classes, config.relabel.epochs)
    sets = 1 + len(config.evaluate.real_draws)
    return estimate(config, units, {name: facts.flops for name, facts in networks.items()}, labels * sets)


def print_plan(config: Config) -> None:
    """The whole plan: one line per IPC index, and what it costs."""
    num_classes = class_count(config)
    networks = check_networks(config, num_classes)
    units = make_plan(config, num_classes)
    table = Table(title=f"{config.name}: recipe {config.recipe}, seed {config.seed}", title_justify="left")
    for column, justify in (
        ("ipc", "right"),
        ("units", "right"),
        ("steps", "right"),
        ("logit", "left"),
        ("BN teachers", "left"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    by_index: dict[int, list[RecoverUnit]] = {}
    for unit in units:
        by_index.setdefault(unit.ipc, []).append(unit)
    for ipc, same in by_index.items():
        first = same[0]
        names = ", ".join(n if networks[n].bn_channels else f"{n} (no BN)" for n in first.bn_teachers)
        if config.recover.selection in ("per_step", "round_robin"):
            names = f"{config.recover.selection} from: {names}"
        table.add_row(str(ipc), str(len(same)), f"{first.iterations:,}", ", ".join(first.logit_teachers), names)
    console.print(table)
    chunks = len(by_index[0])
    found = cost(config, units, networks, num_classes)
    console.print(
        f"{found.units:,} units of {min(config.recover.chunk, num_classes)} images; {found.steps:,} steps in all, "
        f"{found.steps // chunks:,} a chunk of classes",
        soft_wrap=True,
    )
    console.print(
        f"{found.images:,} images of {config.data.image_size} px, about {human(found.image_bytes)}",
        soft_wrap=True,
    )
    console.print(
        f"labels: {config.relabel.epochs} epochs from {', '.join(config.relabel.teachers)}, "
        f"about {human(found.label_bytes)}",
        soft_wrap=True,
    )
    console.print(
        f"recover about {found.recover_hours:.3g} GPU-hours, relabel about {found.relabel_hours:.3g} (RTX 4090, fp32, "
        "scaled by arithmetic work from the published 52 ms a step; small networks wait for other things)",
        soft_wrap=True,
    )
    epochs = [spec.epochs or config.squeeze.epochs for spec in config.teachers.values() if spec.weights is None]
    evaluate = config.evaluate
    students = len(evaluate.students) * len(evaluate.seeds) * (1 + len(evaluate.baselines))
    console.print(
        f"besides: {len(epochs)} teachers to train ({sum(epochs)} epochs of the real images in all) and {students} "
        f"students ({config.relabel.epochs} epochs of {found.images:,} images each)",
        soft_wrap=True,
    )


def results_table(results: list[dict]) -> Table:
    """Mean and standard deviation over seeds, one row per student and method."""
    import statistics

    table = Table(title="top-1 on the real validation data, %", title_justify="left")
    for column in ("student", "method", "seeds"):
        table.add_column(column)
    for column in ("last", "best epoch (chosen on the test data)", "top-5 last"):
        table.add_column(column, justify="right")
    groups: dict[tuple[str, str], list[dict]] = {}
    for record in results:
        groups.setdefault((record["student"], record["method"]), []).append(record)
    for (student, method), records in sorted(groups.items()):
        cells = []
        for key in ("top1_last", "top1_best", "top5_last"):
            values = [r[key] for r in records]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        table.add_row(student, method, str(len(records)), *cells)
    return table


def human(size: float) -> str:
    """Bytes with a unit."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
