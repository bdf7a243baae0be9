"""From a configuration to a finished run: checks, then the stages in order."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from cluster import storage
from cluster.errors import UserError
from cluster.lease import Lease
from cluster.progress import console
from cluster.runner import ActorStage, fit_pools, run_ray, run_serial
from cluster.session import ray_session
from pipeline import rundir
from pipeline.config import Config
from pipeline.context import DISTILLED, Run
from pipeline.describe import cost, print_plan, results_table
from pipeline.paths import absolute
from pipeline.preflight import Planned, check_space, preflight
from pipeline.steps import STAGES, recover_stages, relabel_stages
from pipeline.summary import SUMMARY_FILE
from stages.evaluate.validate import ValidateStage
from stages.recover.placement import teacher_resources
from stages.recover.stage import RecoverStage


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
        units = recover_stages(run, "", resources.recover)
        fit_pools(units, len(run.units))
        if resources.placement == "per_teacher":
            count = len({*run.config.recover.logit_teachers, *run.config.recover.bn_teachers})
            own = teacher_resources(resources.recover, count)
            # Together, for units' actors hold what they have while they wait for those of their teachers.
            helpers = ActorStage("recover, actors of teachers", RecoverStage, resources=own)
            fit_pools([*units, helpers], 10**6)
    if "relabel" in names:
        fit_pools(relabel_stages(run, DISTILLED, ""), len(run.label_units))
    if "evaluate" in names:
        settle(resources.evaluate, len(run.config.evaluate.students), "resources.evaluate")
        fit_pools([ActorStage("validate", ValidateStage, resources=resources.validate_)], run.ready.val.num_images)


def check(config: Config, *, serial: bool) -> Run:
    """Everything that can be checked before work starts; writes nothing."""
    ready = preflight(config)
    run = Run(config, ready, run_serial if serial else run_ray, serial)
    found = cost(config, run.units, ready.networks, ready.data.num_classes)
    sets, shards = run.image_sets, len(run.label_units)
    planned = [Planned(f"labels/{name}", shards, found.label_bytes // len(sets)) for name in sets]
    folders = ["recovered", "init"] if config.recover.init == "real" else ["recovered"]
    planned += [Planned(folder, len(run.units), found.image_bytes) for folder in folders]
    # A shard for every one of the real data that it has images of, in one go.
    planned += [Planned(f"baselines/{name}", 1, found.image_bytes) for name in sets if name != DISTILLED]
    check_space(config, planned, ready.students)
    return run


def dry_run(config: Config) -> None:
    """Check and show the plan; run nothing."""
    config = absolute(config)
    check(config, serial=True)
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
    run = check(config, serial=serial)
    names = list(stages or STAGES)
    _check_inputs(config, names)
    session = contextlib.nullcontext() if serial else ray_session(config.resources.session)
    with Lease(config.out, say=_say) as lease:
        rundir.claim(config, run.ready.fingerprints)
        # The guard ends before the session, whose end may take the process with it.
        with session, lease.guard():
            if not serial:
                check_fit(run, names)
            for name in names:
                lease.check()
                with rundir.timed(config.out, name):
                    STAGES[name](run)
    if "report" in names:
        console.print(results_table(storage.read_json(storage.join(config.out, SUMMARY_FILE))["results"]))
        console.print(f"report: {storage.join(config.out, 'report.html')}", soft_wrap=True)


def _say(text: str) -> None:
    console.print(text, soft_wrap=True)


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
