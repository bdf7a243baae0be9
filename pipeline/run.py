"""Running the stages in order, each skipped where its output is complete."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from cluster import storage
from cluster.errors import RunError, UserError
from cluster.progress import StageProgress, console, read_progress
from cluster.runner import ActorStage, Row, Runner, fit_pools, run_ray, run_serial
from cluster.session import ray_session
from cluster.shards import labels_of
from pipeline import rundir
from pipeline.config import Config
from pipeline.describe import cost, print_plan, results_table
from pipeline.plan import make_plan, save_plan, with_sources
from pipeline.preflight import Planned, Ready, check_space, preflight
from pipeline.summary import SUMMARY_FILE, write_summary
from stages.evaluate.baselines import random_real, random_real_uri
from stages.evaluate.diversity import diversity_stage
from stages.evaluate.jobs import HARD_LABEL, StudentJob, plan_jobs
from stages.evaluate.train import train_students
from stages.evaluate.validate import ValidateStage, read_results, validate_students
from stages.recover import stage as recovery
from stages.recover.unit import RecoverUnit
from stages.relabel import stage as relabelling
from stages.relabel.unit import LabelUnit, plan_units
from stages.squeeze.stage import squeeze_teachers
from stages.teachers.accuracy import guesses
from stages.teachers.card import TeacherCard, read_card
from stages.teachers.options import NetworkSpec, TeacherSpec
from stages.teachers.teacher import PRETRAINED

DISTILLED, RANDOM_REAL = "distilled", "random_real"
Spec = TypeVar("Spec", bound=NetworkSpec)


@dataclass(frozen=True)
class Run:
    """A checked run and the way its stages are driven."""

    config: Config
    ready: Ready
    runner: Runner
    serial: bool

    @property
    def out(self) -> str:
        """The run directory."""
        return self.config.out

    @cached_property
    def units(self) -> list[RecoverUnit]:
        """The plan."""
        return make_plan(self.config, self.ready.data.num_classes)

    @cached_property
    def sourced_units(self) -> list[RecoverUnit]:
        """The plan with the initial real images, where it starts from such."""
        if self.config.recover.init != "real":
            return self.units
        return with_sources(self.units, labels_of(self.ready.train), self.ready.data.num_classes)

    @cached_property
    def label_units(self) -> list[LabelUnit]:
        """Label shards of an image set."""
        return plan_units(self.config.recover.ipc * self.ready.data.num_classes, self.config.relabel)

    @cached_property
    def image_identity(self) -> str:
        """Hash of what images are made from: configuration, data, teachers' weights, torch threads.

        Known once the teachers are there; a shard of another identity is redone.
        """
        content = {
            "config": self.config.sha256(),
            "data": self.ready.train.fingerprint,
            "teachers": {name: self.card(name).sha256 for name in self.config.teachers},
            "threads": self.config.resources.recover.threads,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @cached_property
    def label_identity(self) -> str:
        """The same of labels."""
        content = {"images": self.image_identity, "threads": self.config.resources.relabel.threads}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def card(self, name: str) -> TeacherCard:
        """Card of a finished teacher.

        Raises:
            UserError: there is none.
        """
        found = read_card(storage.join(self.out, "teachers", name))
        if found is None:
            raise UserError(
                f"out: {self.out} lacks teacher {name}; run `prism squeeze` with the same configuration first"
            )
        return found

    @cached_property
    def teachers(self) -> dict[str, TeacherSpec]:
        """Specifications with the run's own copy of the weights."""
        return {
            name: spec.model_copy(
                update={
                    "weights": storage.join(self.out, "teachers", name, "model.safetensors"),
                    "key_map": type(spec.key_map)(),
                }
            )
            for name, spec in self.config.teachers.items()
        }

    def images_uri(self, name: str) -> str:
        """Folder of an image set: the distilled one or a baseline's."""
        return storage.join(self.out, "recovered") if name == DISTILLED else random_real_uri(self.out)

    def labels_uri(self, name: str) -> str:
        """Folder of an image set's label shards."""
        return storage.join(self.out, "labels", name)

    @cached_property
    def image_sets(self) -> list[str]:
        """Image sets that are labelled."""
        return [DISTILLED] + ([RANDOM_REAL] if RANDOM_REAL in self.config.evaluate.baselines else [])

    def drive(self, title: str, rows: list[Row], stages: list[ActorStage], unit: str, total: int) -> list[Row]:
        """Push rows through stages and show how far they are.

        Args:
            title: of the progress bar.
            rows: pending units.
            stages: of the pipeline.
            unit: what is counted.
            total: of all units; those not pending were done before.

        Raises:
            RunError: units failed; the rest was finished first.
        """
        results = []
        with StageProgress(title, total, unit) as progress:
            progress.resume(total - len(rows))
            for row in self.runner(rows, stages) if rows else ():
                results.append(row)
                progress.advance(f"failed: {row['id']}" if row["error"] else "")
        raise_failures(title, results, len(rows))
        return results


def raise_failures(title: str, rows: Sequence[Row], expected: int | None = None) -> None:
    """Raise what failed, as one error that says how to go on.

    Raises:
        RunError: some rows carry an error, or rows are missing.
    """
    failed = [row for row in rows if row["error"]]
    if failed:
        first = "\n".join(f"{row['id']}: {row['error']}" for row in failed[:5])
        more = f"\n… and {len(failed) - 5} more" if len(failed) > 5 else ""
        raise RunError(
            f"{title}: {len(failed)} of {len(rows)} failed, the others are kept; run the same command again to resume\n"
            f"{first}{more}"
        )
    if expected is not None and len(rows) != expected:
        raise RunError(f"{title}: {expected - len(rows)} of {expected} got lost; run the same command again to resume")


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


def recover_stages(run: Run, identity: str) -> list[ActorStage]:
    """The stages of recover; ``identity`` is the images'."""
    config = run.config
    return [
        recovery.recover_stage(
            run.out,
            run.ready.train.uri,
            run.teachers,
            run.ready.data,
            config.recover,
            identity,
            config.resources.recover,
        )
    ]


def recover(run: Run) -> None:
    """Optimise every unit that is not committed."""
    save_plan(run.out, run.units)
    units = run.sourced_units
    pending = [u for u in units if not recovery.is_committed(run.out, u, run.image_identity)]
    run.drive("recover", recovery.recover_rows(pending), recover_stages(run, run.image_identity), "units", len(units))


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
    )


def relabel(run: Run) -> None:
    """Label the views of the distilled images, and of the baseline's."""
    config, data = run.config, run.ready.data
    units = run.label_units
    if RANDOM_REAL in run.image_sets:
        rows = random_real(
            run.out,
            run.ready.train.uri,
            data,
            config.recover.ipc,
            config.seed,
            config.resources.relabel,
            run.runner,
        )
        raise_failures("random_real", rows)
    for name in run.image_sets:
        labels = run.labels_uri(name)
        pending = [u for u in units if not relabelling.is_committed(labels, u, run.label_identity)]
        title = "relabel" if name == DISTILLED else "  baseline"
        stages = relabel_stages(run, name, run.label_identity)
        run.drive(title, relabelling.relabel_rows(pending), stages, "shards", len(units))


def jobs_of(run: Run) -> list[StudentJob]:
    """All students of the run: the method's, then the baselines'."""
    config = run.config
    methods = {config.recipe: DISTILLED}
    if RANDOM_REAL in config.evaluate.baselines:
        methods[RANDOM_REAL] = RANDOM_REAL
    if HARD_LABEL in config.evaluate.baselines:
        methods[HARD_LABEL] = DISTILLED
    return [
        job
        for method, images in methods.items()
        for job in plan_jobs(
            config.evaluate,
            method,
            recipe=config.recipe,
            images_uri=run.images_uri(images),
            labels_uri=run.labels_uri(images),
            epochs=config.relabel.epochs,
            ipc=config.recover.ipc,
            inputs_sha=f"{run.label_identity}-{run.ready.val.fingerprint}",
        )
    ]


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
    missing = sum(not recovery.is_committed(run.out, u, run.image_identity) for u in run.sourced_units)
    if missing:
        raise UserError(
            f"out: {run.out} lacks {missing} of {len(run.units)} recovered units; run `prism recover` first"
        )
    for name in run.image_sets:
        units = run.label_units
        missing = sum(not relabelling.is_committed(run.labels_uri(name), u, run.label_identity) for u in units)
        if missing:
            raise UserError(
                f"out: {run.labels_uri(name)} lacks {missing} of {len(units)} label shards; run `prism relabel` first"
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
    attempts = [
        record.get("attempt", 1) for record in read_progress(storage.join(run.out, "progress", "recover")).values()
    ]
    done = sum(recovery.is_committed(run.out, u, run.image_identity) for u in run.sourced_units)
    summary = write_summary(
        config,
        read_results(run.out, jobs_of(run)),
        units={"planned": len(run.units), "done": done, "retried": sum(attempts) - len(attempts)},
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


def check_fit(run: Run, names: Sequence[str]) -> None:
    """Every stage fits the running cluster; said before the first of them works for hours.

    Args:
        run: whose resources are looked at.
        names: of the stages that will run.

    Raises:
        UserError: names the resources.
    """
    from cluster.training import settle

    resources = run.config.resources
    if "squeeze" in names:
        settle(resources.squeeze, len(run.config.teachers), "resources.squeeze")
    if "recover" in names:
        fit_pools(recover_stages(run, ""), len(run.units))
    if "relabel" in names:
        fit_pools(relabel_stages(run, DISTILLED, ""), len(run.label_units))
    if "evaluate" in names:
        settle(resources.evaluate, len(run.config.evaluate.students), "resources.evaluate")
        fit_pools([ActorStage("validate", ValidateStage, resources=resources.validate_)], run.ready.val.num_images)


def absolute(config: Config) -> Config:
    """Paths that mean the same in every worker, whatever its working directory."""

    def full(uri: str | None) -> str | None:
        return storage.resolve(uri)[1] if uri is not None and storage.is_local(uri) else uri

    def network(spec: Spec) -> Spec:
        if not spec.arch.startswith("user:") or ".py:" not in spec.arch:
            return spec
        path, _, factory = spec.arch.removeprefix("user:").rpartition(":")
        return spec.model_copy(update={"arch": f"user:{full(path)}:{factory}"})

    def teacher(spec: TeacherSpec) -> TeacherSpec:
        weights = spec.weights if spec.weights == PRETRAINED else full(spec.weights)
        return network(spec).model_copy(update={"weights": weights})

    data = config.data.model_copy(update={"train": full(config.data.train), "val": full(config.data.val)})
    students = {name: network(spec) for name, spec in config.evaluate.students.items()}
    return config.model_copy(
        update={
            "out": full(config.out),
            "data": data,
            "teachers": {name: teacher(spec) for name, spec in config.teachers.items()},
            "squeeze": config.squeeze.model_copy(update={"cache": full(config.squeeze.cache)}),
            "evaluate": config.evaluate.model_copy(update={"students": students}),
        }
    )


def check(config: Config) -> Ready:
    """Everything that can be checked before work starts; writes nothing."""
    ready = preflight(config)
    run = Run(config, ready, run_serial, serial=True)
    found = cost(config, run.units, ready.networks, ready.data.num_classes)
    sets, shards = run.image_sets, len(run.label_units)
    labels = [Planned(f"labels/{name}", shards, found.label_bytes // len(sets)) for name in sets]
    check_space(config, [Planned("recovered", len(run.units), found.image_bytes), *labels], ready.students)
    return ready


def dry_run(config: Config) -> None:
    """Check and show the plan; run nothing."""
    config = absolute(config)
    check(config)
    print_plan(config)


def execute(config: Config, stages: Sequence[str] | None = None, *, serial: bool = False) -> None:
    """Run the stages in order.

    Args:
        config: of the run.
        stages: names of ``STAGES``; None = all.
        serial: in this process, without Ray.

    Raises:
        UserError: bad input, before any work.
        RunError: something failed on the way.
    """
    config = absolute(config)
    ready = check(config)
    names = list(stages or STAGES)
    _check_inputs(config, names)
    rundir.claim(config, ready.fingerprints)
    run = Run(config, ready, run_serial if serial else run_ray, serial)
    with contextlib.nullcontext() if serial else ray_session(config.resources.session):
        if not serial:
            check_fit(run, names)
        for name in names:
            with rundir.timed(config.out, name):
                STAGES[name](run)
    if "report" in names:
        console.print(results_table(storage.read_json(storage.join(config.out, SUMMARY_FILE))["results"]))
        console.print(f"report: {storage.join(config.out, 'report.html')}", soft_wrap=True)


def _check_inputs(config: Config, names: Sequence[str]) -> None:
    """A single stage needs what the ones before it make."""
    needs = {
        "recover": ("squeeze", [f"teachers/{name}/card.json" for name in config.teachers]),
        "relabel": ("recover", ["plan.parquet", *(f"teachers/{name}/card.json" for name in config.teachers)]),
        "evaluate": ("relabel", ["plan.parquet", *(f"teachers/{name}/card.json" for name in config.teachers)]),
    }
    if len(names) == 1 and names[0] in needs:
        before, files = needs[names[0]]
        for file in files:
            if not storage.exists(storage.join(config.out, file)):
                raise UserError(
                    f"out: {config.out} lacks {file}; run `prism {before}` with the same configuration first"
                )
