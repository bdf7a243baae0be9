"""The ``prism`` command."""

from __future__ import annotations

import io
import logging
import signal
import sys
import traceback
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.errors import INTERRUPTED, PrismError, UserError, redact
from cluster.progress import console

if TYPE_CHECKING:
    from pipeline.config import Config

# What Typer turns Ctrl-C into, without a word.
CTRL_C = 128 + signal.SIGINT

app = typer.Typer(
    name="prism",
    help="Distil a labelled image dataset into a few images per class, and measure what they are worth.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[CONFIG] [KEY=VALUE]...", help="A YAML file, and fields to override: recover.r_bn=0.05"),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Resolve, check and print; run nothing.")]
Serial = Annotated[bool, typer.Option("--serial", help="In this process, without Ray: for debugging.")]

Address = Annotated[
    str | None,
    typer.Option("--address", help="A running Ray cluster: auto or host:port. The same as resources.session.address."),
]


def _split(words: list[str] | None) -> tuple[str | None, list[str]]:
    words = words or []
    files = [w for w in words if "=" not in w]
    if len(files) > 1:
        raise UserError(f"{files[1]!r} is neither the configuration file ({files[0]}) nor key=value")
    return (files[0] if files else None), [w for w in words if "=" in w]


def _load(words: list[str] | None, address: str | None) -> Config:
    from pipeline.loading import load_config

    file, overrides = _split(words)
    return load_config(file, overrides + ([f"resources.session.address={address}"] if address else []))


def _load_for(words: list[str] | None, serial: bool, address: str | None) -> Config:
    if serial and address:
        raise UserError("--address: a cluster is of no use with --serial, which runs in this process; give one of them")
    return _load(words, address)


def _stages(
    words: list[str] | None, stages: list[str] | None, dry_run: bool, serial: bool, address: str | None
) -> None:
    from pipeline.run import dry_run as show
    from pipeline.run import execute

    config = _load_for(words, serial, address)
    if dry_run:
        show(config)
    else:
        execute(config, stages, serial=serial)


@app.command()
def run(words: Words = None, dry_run: DryRun = False, serial: Serial = False, address: Address = None) -> None:
    """Run every stage whose output is not complete; without CONFIG, the embedded demo."""
    _stages(words, None, dry_run, serial, address)


@app.command()
def squeeze(words: Words, dry_run: DryRun = False, serial: Serial = False, address: Address = None) -> None:
    """Train or adopt the teachers."""
    _stages(words, ["squeeze"], dry_run, serial, address)


@app.command()
def recover(words: Words, dry_run: DryRun = False, serial: Serial = False, address: Address = None) -> None:
    """Optimise the distilled images."""
    _stages(words, ["recover"], dry_run, serial, address)


@app.command()
def relabel(words: Words, dry_run: DryRun = False, serial: Serial = False, address: Address = None) -> None:
    """Label augmented views of the distilled images (and of the baseline's)."""
    _stages(words, ["relabel"], dry_run, serial, address)


@app.command()
def evaluate(words: Words, dry_run: DryRun = False, serial: Serial = False, address: Address = None) -> None:
    """Train students on the distilled data and test them on real data."""
    _stages(words, ["evaluate"], dry_run, serial, address)


@app.command()
def search(words: Words, dry_run: DryRun = False, serial: Serial = False, address: Address = None) -> None:
    """Search teacher pools, weights and other fields; writes the best configuration as a runnable file."""
    from pipeline.search.run import search as find

    find(_load_for(words, serial, address), dry_run=dry_run, serial=serial)


@app.command()
def plan(words: Words) -> None:
    """Show the work plan and its cost; needs no data and no GPU where data.num_classes is given."""
    from pipeline.describe import print_plan
    from pipeline.loading import load_config

    print_plan(load_config(*_split(words)))


@app.command()
def bench(
    words: Words,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each way; medians count.")] = 3,
    price: Annotated[float | None, typer.Option(min=0, help="Of an hour of this machine, for the cost.")] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Find out how many units at the same time this machine recovers fastest.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for programs.")] = False,
) -> None:
    """Measure this machine's speed at recovery, against the published way and the machine's limits."""
    from pipeline.bench import bench as measure
    from pipeline.loading import load_config

    measure(load_config(*_split(words)), rounds, price, probing=probe, as_json=as_json)


@app.command("import")
def import_(
    src: Annotated[str, typer.Argument(help="Folder tree, CIFAR batches, IDX files or Parquet; local or s3://")],
    dst: Annotated[str, typer.Argument(help="Where DST/train and DST/val go")],
    format: Annotated[str, typer.Option(help="auto, imagefolder, cifar, idx or parquet")] = "auto",
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first corrupt image.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Turn labelled images into image shards."""
    from pipeline.importing import run_import

    run_import(src, dst, format=format, strict=strict, dry_run=dry_run)


@app.command()
def init(
    directory: Annotated[str, typer.Argument(help="Where prism.yaml is written")], dry_run: DryRun = False
) -> None:
    """Write a commented starter configuration."""
    from pipeline.starter import write_starter

    where = write_starter(directory, dry_run=dry_run)
    console.print(f"{'would write' if dry_run else 'wrote'} {where}", soft_wrap=True)


@app.command()
def status(
    out: Annotated[str, typer.Argument(help="A run directory, local or s3://")],
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON for programs, a line each for a run and a search.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Again and again while a driver works on it.")] = False,
) -> None:
    """Show what a run, or a search, has done and is doing, from its directory alone."""
    from cluster import storage
    from pipeline import status_text
    from pipeline.rundir import RUN_FILE
    from pipeline.search import status as of_search
    from pipeline.search.report import SEARCH_FILE
    from pipeline.status import read_status

    searched = storage.exists(storage.join(out, SEARCH_FILE))
    if searched:
        status_text.print_status(out, of_search.read_status, of_search.lines, as_json=as_json, watch=watch)
    # A directory may hold both.
    if not searched or storage.exists(storage.join(out, RUN_FILE)):
        status_text.print_status(out, read_status, status_text.lines, as_json=as_json, watch=watch)


@app.command()
def report(out: Annotated[str, typer.Argument(help="A run directory")], dry_run: DryRun = False) -> None:
    """Write report.html of a run, or of a search, again."""
    from cluster import storage
    from pipeline.report import write_report
    from pipeline.rundir import RUN_FILE, read_run
    from pipeline.search.report import SEARCH_FILE, write_search_report

    searched = storage.exists(storage.join(out, SEARCH_FILE))
    written = [write_search_report(out, dry_run=dry_run)] if searched else []
    # A directory may hold both.
    if not searched or storage.exists(storage.join(out, RUN_FILE)):
        read_run(out)
        written.append(write_report(out, dry_run=dry_run))
    for where in written:
        console.print(f"{'would write' if dry_run else 'wrote'} {where}", soft_wrap=True)


@app.command()
def doctor(words: Words = None, address: Address = None) -> None:
    """Find what would keep a run from working: this machine and the cluster; with CONFIG its data and weights too."""
    from cluster.resources import SessionOptions
    from pipeline.doctor import doctor as examine

    file, overrides = _split(words)
    if file is None and overrides:
        raise UserError(f"{overrides[0]}: overrides a field of a configuration; name its file before it")
    config = _load(words, address) if file else None
    if not examine(config, config.resources.session if config else SessionOptions(address=address)):
        raise typer.Exit(1)


def main() -> None:
    """Entry point: errors made for users become one sentence and an exit code."""
    # Ray's and Torch's own warnings are not the user's business; failures reach them as sentences.
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    try:
        code = app(standalone_mode=False) or 0
        if code == CTRL_C:
            raise KeyboardInterrupt
    except PrismError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        code = 1
    except typer.Abort:
        code = 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        reason = redact(f"{where}{error.strerror or error}")
        print(f"error: {reason}; run the same command again to resume", file=sys.stderr)
        code = 1
    except Exception as error:
        text, show = io.StringIO(), getattr(error, "show", None)
        if show:
            # Typer's own, on words it does not understand.
            show(text)
        else:
            traceback.print_exc(file=text)
        print(redact(text.getvalue()), file=sys.stderr, end="")
        code = getattr(error, "exit_code", 1)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
