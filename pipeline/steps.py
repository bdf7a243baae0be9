"""What each stage of a run does, each skipping what is complete."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from cluster import storage
from cluster.errors import UserError
from cluster.progress import console
from cluster.record import read_record
from cluster.resources import ActorResources
from cluster.runner import ActorStage, Row
from pipeline.context import DISTILLED, RANDOM_REAL, Run, baseline_title, methods, raise_failures
from pipeline.plan import save_plan
from pipeline.sharing import recover_resources
from pipeline.summary import write_summary
from pipeline.work import recover_work, relabel_work
from stages.evaluate.baselines import random_real, random_real_set, random_real_uri
from stages.evaluate.diversity import diversity_stage
from stages.evaluate.jobs import StudentJob, plan_jobs
from stages.evaluate.train import train_students
from stages.evaluate.validate import read_results, validate_students
from stages.recover import stage as recovery
from stages.relabel import stage as relabelling
from stages.squeeze.stage import squeeze_teachers
from stages.teachers.accuracy import guesses


def squeeze(run: Run) -> None:
    """Teachers that are given are checked and copied, the others trained; each ends with a card."""
    squeeze_teachers(
        run.out,
        run.config.teachers,
        run.ready.data,
        run.ready.train.uri,
        run.ready.val.uri,
        run.config.squeeze,
        run.config.resources.squeeze,
        run.config.seed,
        serial=run.serial,
    )
    warn_of_guessing(run)


def warn_of_guessing(run: Run) -> None:
    """Say which trained teachers are no better than chance; given ones were refused."""
    for name in run.config.teachers:
        card = run.card(name)
        if card.val_top1 is not None and guesses(card.val_top1, card.val_images, run.ready.data.num_classes):
            console.print(
                f"warning: teachers.{name}: top-1 on the validation data is {100 * card.val_top1:.1f} %, no better "
                "than guessing; more squeeze.epochs or another squeeze.lr may help",
                style="yellow",
            )


def recover_stages(run: Run, identity: str, resources: ActorResources) -> list[ActorStage]:
    """The stages of recover, of actors with these resources; ``identity`` is the images'."""
    config = run.config
    return [
        recovery.recover_stage(
            run.out,
            run.ready.train.uri,
            run.teachers,
            run.ready.data,
            config.recover,
            identity,
            resources,
            config.resources.placement,
        )
    ]


def recover(run: Run) -> None:
    """Optimise every unit that is not committed."""
    save_plan(run.out, run.units)
    work = recover_work(run)
    rows = recovery.recover_rows(work.pending())
    stages = recover_stages(run, run.image_identity, recover_resources(run, rows))
    with work.ledger:
        run.drive("recover", rows, stages, "units", len(work.units), work.keep)


def relabel_stages(run: Run, name: str, identity: str) -> list[ActorStage]:
    """The stages that label an image set; ``identity`` is the labels'."""
    config = run.config
    return relabelling.relabel_stages(
        run.labels_uri(name),
        run.images_uri(name),
        run.teachers,
        run.ready.data,
        config.relabel,
        config.seed,
        identity,
        config.resources.relabel,
        storage.join(run.out, "progress", "relabel", name),
    )


def relabel(run: Run) -> None:
    """Label the views of the distilled images, and of the baseline's."""
    config, data = run.config, run.ready.data
    for draw in config.evaluate.real_draws:
        rows = random_real(
            run.out,
            run.ready.train.uri,
            data,
            config.recover.ipc,
            config.seed,
            config.resources.relabel,
            run.runner,
            draw,
        )
        raise_failures(random_real_set(draw), rows)
    titles = ["relabel"] + [f"  {baseline_title(draw)}" for draw in config.evaluate.real_draws]
    for name, title in zip(run.image_sets, titles, strict=True):
        work = relabel_work(run, name)
        rows = relabelling.relabel_rows(work.pending())
        stages = relabel_stages(run, name, run.label_identity)
        with work.ledger:
            run.drive(title, rows, stages, "shards", len(work.units), work.keep)


def jobs_of(run: Run) -> list[StudentJob]:
    """All students of the run: the method's, then the baselines'."""
    config, evaluate = run.config, run.config.evaluate
    jobs = []
    for method in methods(config):
        draws = evaluate.real_draws if method == RANDOM_REAL else {0: evaluate.seeds}
        for draw, seeds in draws.items():
            images = random_real_set(draw) if method == RANDOM_REAL else DISTILLED
            jobs += plan_jobs(
                evaluate.model_copy(update={"seeds": seeds}),
                method,
                recipe=config.recipe,
                images_uri=run.images_uri(images),
                labels_uri=run.labels_uri(images),
                epochs=config.relabel.epochs,
                ipc=config.recover.ipc,
                inputs_sha=f"{run.label_identity}-{run.ready.val.fingerprint}",
                workers=config.resources.evaluate.workers,
                draw=draw,
            )
    return jobs


def evaluate(run: Run) -> None:
    """Train every student that has no result and test it on all validation images."""
    resources = run.config.resources
    _check_complete(run)
    jobs = jobs_of(run)
    failed = train_students(run.out, jobs, run.ready.data, resources.evaluate, serial=run.serial)
    rows = validate_students(run.out, jobs, run.ready.data, run.ready.val.uri, resources.validate_, run.runner)
    raise_failures("evaluate", [*failed, *rows])


def _check_complete(run: Run) -> None:
    """Images and labels are there as a whole, before a student trains on a part of them for hours.

    Raises:
        UserError: says what is missing.
    """
    missing = len(recover_work(run).pending())
    if missing:
        raise UserError(
            f"out: {run.out} lacks {missing} of {len(run.units)} recovered units; run `prism recover` first"
        )
    for name in run.image_sets:
        missing = len(relabel_work(run, name).pending())
        if missing:
            raise UserError(
                f"out: {run.labels_uri(name)} lacks {missing} of {len(run.label_units)} label shards; "
                "run `prism relabel` first"
            )


def report(run: Run) -> dict[str, Any]:
    """Diversity, ``summary.json`` and ``report.html``."""
    # Here, because matplotlib takes a second to import and only this stage plots.
    from pipeline.report import write_report

    config = run.config
    feature_model = config.recover.logit_teachers[0]
    init = storage.join(run.out, "init")
    real = init if config.recover.init == "real" else random_real_uri(run.out)
    sets = {"distilled": run.images_uri(DISTILLED), "real": real}
    rows: list[Row] = [
        {"id": key, "error": "", "uri": uri} for key, uri in sets.items() if storage.list_files(uri, ".parquet")
    ]
    stage = diversity_stage(feature_model, run.teachers[feature_model], run.ready.data, config.resources.validate_)
    found = run.drive("diversity", rows, [stage], "sets", len(rows))
    record = read_record(storage.join(run.out, "progress", "recover"))
    done = len(run.units) - len(recover_work(run).pending())
    summary = write_summary(
        config,
        read_results(run.out, jobs_of(run)),
        units={"planned": len(run.units), "done": done, "retried": record.retried if record else 0},
        diversity={"feature_model": feature_model, **{row["id"]: json.loads(row["result"]) for row in found}},
    )
    write_report(run.out)
    return summary


STAGES: dict[str, Callable[[Run], object]] = {
    "squeeze": squeeze,
    "recover": recover,
    "relabel": relabel,
    "evaluate": evaluate,
    "report": report,
}
