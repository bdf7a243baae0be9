"""``prism import``: the command around ``stages.importing``."""

from __future__ import annotations

from cluster import storage
from cluster.progress import StageProgress, console
from cluster.resources import SessionOptions
from cluster.session import ray_session
from stages.importing.detect import open_source
from stages.importing.run import ImportReport, import_dataset


def run_import(src: str, dst: str, *, format: str, strict: bool, dry_run: bool) -> None:
    """Import and say what became of every image."""
    source = open_source(src, format)
    total = sum(len(split.keys) for split in source.splits)
    counts = ", ".join(f"{split.name} {len(split.keys):,}" for split in source.splits)
    console.print(f"{src}: {source.format}, {len(source.class_names)} classes, {counts} images", soft_wrap=True)
    shown = ", ".join(source.class_names[:10]) + (", …" if len(source.class_names) > 10 else "")
    console.print(f"classes: {shown}", soft_wrap=True)
    if source.ignored:
        console.print(f"{source.ignored:,} other files there are no part of the data", soft_wrap=True)
    if len(source.splits) == 1:
        console.print(
            f"warning: no validation split, which a run needs: move some images of every class to {src}/val and the "
            f"others to {src}/train, or import others and give their folder as data.val",
            style="yellow",
            soft_wrap=True,
        )
    if dry_run:
        storage.check_writable(dst, "DST")
        return
    with ray_session(SessionOptions()), StageProgress("import", total, "images") as progress:
        report = import_dataset(source, dst, strict=strict, on_progress=lambda done, _: progress.set(done))
        if report.already_done:
            progress.set(total, "already done")
    _print(report)


def _print(report: ImportReport) -> None:
    for split in report.splits:
        lost = f", {len(split.corrupt)} corrupt left out" if split.corrupt else ""
        console.print(f"{split.uri}: {split.images:,} images{lost}", soft_wrap=True)
    for name, reason in report.corrupt[:20]:
        console.print(f"  corrupt: {name} ({reason})", soft_wrap=True, style="yellow")
    if len(report.corrupt) > 20:
        console.print(f"  … all of them in {report.dst}/*/corrupt.json", soft_wrap=True)
    console.print(f"{report.seconds:.0f} s")
