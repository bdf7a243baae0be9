"""The search as an experiment of Ray Tune."""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Callable
from typing import Any

from cluster import storage
from cluster.errors import RunError, redact
from pipeline.search.bench import Bench
from pipeline.search.ladder import Ladder
from pipeline.search.measure import measure, reason_of
from pipeline.search.trial import Trial

log = logging.getLogger("prism")
EXPERIMENT = "tune"
# A job whose process died is run again so often.
RESTARTS = 2


def make_job(root: str, bench: Bench) -> Callable[[dict[str, Any]], None]:
    """The function that Tune runs: one rung of one trial.

    Args:
        root: folder of the search.
        bench: of its jobs.
    """

    def job(config: dict[str, Any]) -> None:
        from ray import tune

        name = f"{config['trial']:05d}-{config['rung']}"
        try:
            found = measure(root, bench.config(config["point"], config["rung"]), name)
            tune.report(found.model_dump(mode="json"))
        except Exception as error:
            # A point that fails is a result like another; the search goes on.
            log.error("job %s: %s", name, redact(traceback.format_exc()))
            tune.report(reason_of(error))

    return job


def run_tune(root: str, bench: Bench, ladder: Ladder, gpus: float) -> list[Trial]:
    """Run all jobs of a search in the running session.

    Tune's own records, with TensorBoard's, are under ``root/tune``.

    Args:
        root: folder of the search.
        bench: of its jobs.
        ladder: decides on jobs and keeps the trials.
        gpus: of a job.

    Raises:
        RunError: Tune gave up.
    """
    # Ctrl-C is the command's own; Tune's handler would wait for jobs that run for hours.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    from ray import tune
    from ray.tune.execution.placement_groups import PlacementGroupFactory

    # Of an earlier start of this search; what its jobs made is elsewhere and is found.
    storage.remove(storage.join(root, EXPERIMENT))
    where, files = _storage(root)
    share = PlacementGroupFactory([{"CPU": bench.options.cpus} | ({"GPU": gpus} if gpus else {})])
    tuner = tune.Tuner(
        tune.with_resources(make_job(root, bench), share),
        tune_config=tune.TuneConfig(search_alg=ladder, num_samples=ladder.most_jobs, trial_name_creator=_name),
        run_config=tune.RunConfig(
            name=EXPERIMENT,
            storage_path=where,
            storage_filesystem=files,
            failure_config=tune.FailureConfig(max_failures=RESTARTS),
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    except Exception as error:
        raise RunError(
            f"search: Ray Tune gave up ({redact(str(error).strip().splitlines()[-1] if str(error) else repr(error))}); "
            "what was measured is kept, run the same command again to go on"
        ) from error
    return ladder.trials


def _name(trial: Any) -> str:
    return f"trial-{trial.config['trial']:05d}-rung-{trial.config['rung']}"


def _storage(root: str) -> tuple[str, Any]:
    """Path and file system for Tune, which speaks pyarrow's."""
    if storage.is_local(root):
        return storage.absolute(root), None
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    fs, path = storage.resolve(root)
    return path, PyFileSystem(FSSpecHandler(fs))
